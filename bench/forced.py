"""A forced unload of a worker that does nothing any more, beside one of a worker that is well."""

import os
import signal
from collections.abc import Sequence
from statistics import median

from bench.driver import TINY, Server
from bench.table import Row
from runtime.memory import descendants

LIMIT_MS = 1000.0


def measure(server: Server, *, repeats: int) -> list[Row]:
    """Unload a model by force, `repeats` times with its worker stopped by SIGSTOP and as often without."""
    pairs = [
        (_unloaded(server, is_stopped=True), _unloaded(server, is_stopped=False)) for _ in range(repeats)
    ]
    stopped, well = zip(*pairs, strict=True)
    ratio, reached = median(stopped) / median(well), max(stopped) <= LIMIT_MS
    name = "forced unload of a worker stopped by SIGSTOP ÷ of a running one"
    return [Row(name, _told(stopped), _told(well), ratio, "≤ 1 s", reached)]


def _unloaded(server: Server, *, is_stopped: bool) -> float:
    """Return the milliseconds from the request to the answer that the job is completed."""
    before = set(descendants(server.pid))
    server.load(TINY)
    (worker,) = set(descendants(server.pid)) - before
    if is_stopped:
        os.kill(worker, signal.SIGSTOP)
    return server.unload(TINY, force=True)


def _told(took_ms: Sequence[float]) -> str:
    return f"{median(took_ms):.1f} ms, worst {max(took_ms):.1f} ms"
