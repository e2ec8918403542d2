"""Duration of loads beside bare sessions: ten at once, with eviction; forced unloads."""

import http.client
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from bench import baselines, driver, models
from bench.driver import TINY, Server
from bench.requests import LENGTH
from bench.table import Row, format_ms
from runtime.memory import list_descendants

FORCED_LIMIT_MS = 1000.0
LOADS_AT_ONCE = 10
UNMEASURED = 2
"""Cold inferences before the median: the first of each model has an estimate of its memory, and no hash."""
BUDGET_FILES = 3.5
"""A worker takes 3 times the network's file while it loads, then 1.3 times: room for one, not for both."""
EVICTION_OPTIONS = (
    "--evict",
    "idle",
    "--on-demand",
    "on",
    "--min-residency-s",
    "0",
)
IMAGE = (1, 3, 224, 224)
IMAGE_BYTES = 4 * math.prod(IMAGE)


def measure_loads_at_once(server: Server, *, rounds: int) -> list[Row]:
    """Load ten networks at once, each new to the server, in each round; take the medians.

    A load counts from its acceptance (202) to its `ModelLoaded`, on the ledger's clock.
    """
    network = models.convnet()
    ours, bares = zip(*(_loads_at_once_round(server, network, index) for index in range(rounds)), strict=True)
    first, half, last = (median(figures) for figures in zip(*map(_ranks, ours), strict=True))
    one, all_of_them = median(map(median, bares)), median(map(sum, bares))
    name = f"{LOADS_AT_ONCE} loads of {len(network) / 1e6:.0f} MB at once, 202 to ready"
    return [
        Row(f"{name}: first ÷ one bare session", format_ms(first), format_ms(one), first / one),
        Row(f"{name}: median ÷ one bare session", format_ms(half), format_ms(one), half / one),
        Row(
            f"{name}: last ÷ {LOADS_AT_ONCE} bare in turn",
            format_ms(last),
            format_ms(all_of_them),
            last / all_of_them,
        ),
    ]


def _loads_at_once_round(server: Server, network: bytes, index: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of our loads, and of bare sessions of the same files."""
    ids = [f"queued-{index:02}-{number}" for number in range(LOADS_AT_ONCE)]
    paths = [models.write(server.repository, model_id, models.renamed(network, model_id)) for model_id in ids]
    before = _load_at_once(server, ids) if index % 2 == 0 else None
    bares = [baselines.measure_session(path) for path in paths]
    ours = before or _load_at_once(server, ids)
    for path in paths:  # to save disk: the next round writes as many again
        path.unlink()
    return ours, bares


def _load_at_once(server: Server, ids: list[str]) -> list[float]:
    paths = [f"/api/v1/models/{model_id}/load" for model_id in ids]
    connections = [server.connect() for _ in paths]
    for connection, path in zip(connections, paths, strict=True):
        server.send(connection, "POST", path, headers=driver.WAIT)
    took_ms = []
    for connection, path in zip(connections, paths, strict=True):
        job = driver.completed_job(driver.read(connection), path)
        took = datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["created_at"])
        took_ms.append(took.total_seconds() * 1000)
        connection.close()
    for model_id in ids:
        server.unload(model_id)
    return took_ms


def _ranks(took_ms: list[float]) -> tuple[float, float, float]:
    return min(took_ms), median(took_ms), max(took_ms)


def measure_evictions(folder: Path, *, repeats: int) -> list[Row]:
    """Infer with two networks in turn, each cold by then, alternated with bare sessions of the same files.

    Args:
        folder: An empty directory.
        repeats: Inferences to take the median of.
    """
    network = models.convnet()
    budget = ("--memory-budget", str(int(BUDGET_FILES * len(network))))
    with driver.running(folder, *driver.UNLIMITED, *EVICTION_OPTIONS, *budget) as server:
        paths = {name: models.write(server.repository, name, models.renamed(network, name)) for name in "ab"}
        order = [("a", "b"), ("b", "a")]
        rounds = [_eviction_round(server, paths, *order[index % 2]) for index in range(repeats + UNMEASURED)]
    ours, beside = (median(figures) for figures in zip(*rounds[UNMEASURED:], strict=True))
    name = f"cold inference, {len(network) / 1e6:.0f} MB network, evicting another ÷ bare first session"
    return [Row(name, f"{ours:.0f} ms", f"{beside:.0f} ms", ours / beside)]


def _eviction_round(server: Server, paths: dict[str, Path], cold: str, other: str) -> tuple[float, float]:
    """Return the milliseconds of an inference that evicts and loads, and of a bare one."""
    ours = _infer_ms(server, cold)
    state = server.ask("GET", f"/api/v1/models/{other}").json()["state"]
    if state != "unloaded":
        raise SystemExit(f"model {other!r} is {state}: the budget has room for both")
    return ours, baselines.measure_session(paths[cold], inferences=2)  # its warm-up, and the inference


def _infer_ms(server: Server, model_id: str) -> float:
    tensor = {
        "name": "image",
        "shape": IMAGE,
        "datatype": "FP32",
        "parameters": {"binary_data_size": IMAGE_BYTES},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    path, body = f"/v2/models/{model_id}/infer", head + bytes(IMAGE_BYTES)
    start = time.perf_counter()
    answer = server.ask("POST", path, body, headers)
    took_ms = (time.perf_counter() - start) * 1000
    if answer.status != http.HTTPStatus.OK:
        raise SystemExit(f"POST {path}: {answer}")
    return took_ms


def measure_forced_unloads(server: Server, *, repeats: int) -> list[Row]:
    """Unload a model by force, `repeats` times with its worker stopped by SIGSTOP, and as often running."""
    pairs = [
        (_force_unload_ms(server, is_stopped=True), _force_unload_ms(server, is_stopped=False))
        for _ in range(repeats)
    ]
    stopped, well = zip(*pairs, strict=True)
    ratio, reached = median(stopped) / median(well), max(stopped) <= FORCED_LIMIT_MS
    name = "forced unload of a worker stopped by SIGSTOP ÷ of a running one"
    return [Row(name, _median_and_worst(stopped), _median_and_worst(well), ratio, "≤ 1 s", reached)]


def _force_unload_ms(server: Server, *, is_stopped: bool) -> float:
    """Return the milliseconds from the request to the response with the completed job."""
    server.load(TINY)
    (_, worker) = list_descendants(server.pid)
    if is_stopped:
        os.kill(worker, signal.SIGSTOP)
    return server.unload(TINY, force=True)


def _median_and_worst(took_ms: Sequence[float]) -> str:
    return f"{median(took_ms):.1f} ms, worst {max(took_ms):.1f} ms"
