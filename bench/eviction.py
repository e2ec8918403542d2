"""Two models that do not fit together: an inference for the one that is not there has the other evicted."""

import http.client
import json
import math
import time
from pathlib import Path
from statistics import median

from bench import bare, driver, models
from bench.driver import Server
from bench.requests import LENGTH
from bench.table import Row

IMAGE = (1, 3, 224, 224)
IMAGE_BYTES = 4 * math.prod(IMAGE)
# The first of each: what its files take is an estimate then, and their hash is not known.
THROWN_AWAY = 2
# A worker holds 1.3 times the network's file and takes 3 times while it loads: room for one, not for both.
BUDGET_FILES = 3.5
OPTIONS = ("--prepare", "off", "--evict", "idle", "--on-demand", "on", "--min-residency-s", "0")


def measure(folder: Path, *, repeats: int) -> list[Row]:
    """Ask two networks in turn, each of which is cold then, alternated with bare sessions of the same files.

    Args:
        folder: An empty directory.
        repeats: Inferences to take the median of.
    """
    network = models.convnet()
    budget = ("--memory-budget", str(int(BUDGET_FILES * len(network))))
    with driver.running(folder, *driver.UNLIMITED, *OPTIONS, *budget) as server:
        paths = {name: models.write(server.repository, name, models.renamed(network, name)) for name in "ab"}
        order = [("a", "b"), ("b", "a")]
        rounds = [_round(server, paths, *order[index % 2]) for index in range(repeats + THROWN_AWAY)]
    ours, beside = (median(figures) for figures in zip(*rounds[THROWN_AWAY:], strict=True))
    name = f"cold inference, {len(network) / 1e6:.0f} MB network, evicting another ÷ bare first session"
    return [Row(name, f"{ours:.0f} ms", f"{beside:.0f} ms", ours / beside)]


def _round(server: Server, paths: dict[str, Path], cold: str, other: str) -> tuple[float, float]:
    """Return the milliseconds of an inference that is answered with eviction and load, and of a bare one."""
    ours = _asked(server, cold)
    state = server.ask("GET", f"/api/v1/models/{other}").json()["state"]
    if state != "unloaded":
        raise SystemExit(f"model {other!r} is {state}: the budget has room for both")
    return ours, bare.run(paths[cold], inferences=2)  # its warm-up, and what is asked for


def _asked(server: Server, model_id: str) -> float:
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
