"""Inferences per second of our client, beside Triton's client on the same server.

Both block, keep one connection, and send and receive numpy arrays in binary. They take turns call by call,
and the median call counts, so that what else runs on these cores slows both alike.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from tritonclient import http as triton

from bench import driver, models
from bench.inference import LARGE, OPTIONS, SMALL
from bench.requests import add_one_inputs
from bench.table import Row, rate_row
from loadledger import Client

CASES = (("16 floats", SMALL), ("600 KB", LARGE))
GOAL = 1.0
WARM_UP = 50
"""Calls of each client that are not counted."""

Floats = NDArray[np.float32]
Call = Callable[[Floats], Floats]


def measure(folder: Path, *, rounds: int, seconds: float) -> list[Row]:
    """Measure each case for `seconds` of each client in each round; median ratios.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each client in a round.
    """
    rows: list[Row] = []
    with driver.running(folder, *OPTIONS) as server:
        models.write(server.repository, models.ADD_ONE, models.add_one())
        server.load(models.ADD_ONE)
        url = f"127.0.0.1:{server.port}"
        with Client(f"http://{url}", token=server.token) as client, triton.InferenceServerClient(url) as peer:
            headers = {"Authorization": f"Bearer {server.token}"}
            calls = _our_call(client), _triton_call(peer, headers)
            for what, elements in CASES:
                [value] = add_one_inputs(elements).values()
                rates = [_rates(calls, value, seconds) for _ in range(rounds)]
                title = f"our client, {what} ÷ Triton's client on the same server"
                rows.append(rate_row(title, [ours for ours, _ in rates], [other for _, other in rates], GOAL))
    return rows


def _our_call(client: Client) -> Call:
    def call(value: Floats) -> Floats:
        answer: Floats = client.infer(models.ADD_ONE, {"x": value})["y"]
        return answer

    return call


def _triton_call(client: triton.InferenceServerClient, headers: dict[str, str]) -> Call:
    def call(value: Floats) -> Floats:
        tensor = triton.InferInput("x", list(value.shape), "FP32")
        tensor.set_data_from_numpy(value)
        result = client.infer(models.ADD_ONE, [tensor], headers=dict(headers))  # it writes into them
        answer: Floats = result.as_numpy("y")
        return answer

    return call


def _rates(calls: tuple[Call, Call], value: Floats, seconds: float) -> tuple[float, float]:
    """Return the calls per second of both, by their median call; the client that begins changes."""
    for call in calls:
        answers = [call(value) for _ in range(WARM_UP)]
        if not all(np.array_equal(answer, value + 1) for answer in answers):
            raise SystemExit("a client's answer is wrong")
    took = {call: list[float]() for call in calls}
    until = time.perf_counter() + 2 * seconds
    while time.perf_counter() < until:
        for call in calls if len(took[calls[0]]) % 2 else reversed(calls):
            begin = time.perf_counter()
            call(value)
            took[call].append(time.perf_counter() - begin)
    ours, theirs = (1 / median(took[call]) for call in calls)
    return ours, theirs
