"""The first load of a model through the API, beside a bare first session of the same file."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench import models
from bench.driver import Server
from bench.table import Row
from runtime.forkserver import ADDED

MALLOC = "GLIBC_TUNABLES"
# The workers' own, so that the figures differ by the server's own work alone.
WORKER_ENVIRONMENT = ADDED
# What a process has whose memory nobody tuned; telemetry and numpy's threads would disturb the measurement.
PLAIN_ENVIRONMENT = {name: value for name, value in ADDED.items() if name != MALLOC}
RATIO_GOAL = 1.10
# Where a session is so quick that a tenth of it says nothing.
ABOVE_GOAL_MS = 15.0
# Memory that a virtual machine has never touched costs its host a fault a page: 60 ms became 200 to 400. All
# files are written first, and some rounds thrown away, so that what is measured runs in touched memory.
THROWN_AWAY = 3


def measure(server: Server, *, repeats: int) -> list[Row]:
    """Load `repeats` networks, each new to the server, alternated with bare sessions of the same files."""
    network = models.convnet()
    ids = [f"convnet-{index:02}" for index in range(repeats + THROWN_AWAY)]
    paths = [models.write(server.repository, model_id, models.renamed(network, model_id)) for model_id in ids]
    rounds = [
        _round(server, model_id, path, ours_first=index % 2 == 0)
        for index, (model_id, path) in enumerate(zip(ids, paths, strict=True))
    ]
    ours, same, plain = (median(figures) for figures in zip(*rounds[THROWN_AWAY:], strict=True))
    reached = ours <= max(same * RATIO_GOAL, same + ABOVE_GOAL_MS)
    name = f"first load, {len(network) / 1e6:.0f} MB network ÷ bare first session"
    goal = f"≤ {RATIO_GOAL:.2f} or + {ABOVE_GOAL_MS:.0f} ms"
    return [
        Row(name, _ms(ours), _ms(same), ours / same, goal, reached),
        Row(f"{name} without huge pages", _ms(ours), _ms(plain), ours / plain),
    ]


def _round(server: Server, model_id: str, path: Path, *, ours_first: bool) -> tuple[float, float, float]:
    """Return the milliseconds of our load and of both bare sessions; nothing stays loaded beside them."""
    before = _ours_ms(server, model_id) if ours_first else None
    same = _bare_session_ms(path, WORKER_ENVIRONMENT)
    plain = _bare_session_ms(path, PLAIN_ENVIRONMENT)
    return before or _ours_ms(server, model_id), same, plain


def _ours_ms(server: Server, model_id: str) -> float:
    took_ms = server.load(model_id)
    server.unload(model_id)
    return took_ms


def _bare_session_ms(model: Path, environment: dict[str, str]) -> float:
    """Return how long the first session of a fresh process takes that has imported ONNX Runtime before."""
    inherited = {name: value for name, value in os.environ.items() if name != MALLOC}
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.bare", str(model)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    return float(done.stdout)


def _ms(value: float) -> str:
    return f"{value:.0f} ms"
