"""Effect of a swap on clients: gaps between responses, and failed requests."""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

from bench import generator, models
from bench.driver import Server
from bench.generator import Answers
from bench.requests import Target, add_one_request
from bench.table import Row

BESIDE, IN_PLACE = "beside", "in_place"
REQUEST = add_one_request(16, binary=True)
MANY_CLIENTS = 8
SETTLE_S = 0.1
"""After a swap the worker of the old version ends, which belongs to the swap."""
QUIET_S = 1.0
"""Time without a swap, for a rate to compare with."""
NO_FAILURE = "0"
Window = tuple[float, float]


def measure_gaps(server: Server, folder: Path, *, repeats: int) -> list[Row]:
    """Measure the longest time without an answer at each of `repeats` swaps, by strategy and clients.

    The model has 54 MB and answers in microseconds, so that a gap comes from the swap. It is compared with
    the longest gap in as long a time right after the swap.
    """
    versions = _write(server, models.add_one_from_table())
    rows: list[Row] = []
    for strategy in (BESIDE, IN_PLACE):
        failures: list[Answers] = []
        for clients in (1, MANY_CLIENTS):
            with generator.recording(server.port, _request(server, folder), clients=clients) as stop:
                windows = [_swapped(server, next(versions), strategy) for _ in range(repeats)]
                failures.append(stop())
            rows.append(_gap_row(strategy, clients, failures[-1], windows))
        rows.append(_failures_row(f"{2 * repeats:,} swaps {strategy}", failures, is_goal=strategy == BESIDE))
    return rows


def measure_under_load(server: Server, folder: Path, *, swaps: int) -> list[Row]:
    """Swap the version of a small model without pause, under 8 clients."""
    versions = _write(server, models.add_one())
    with generator.recording(server.port, _request(server, folder), clients=MANY_CLIENTS) as stop:
        quiet = _quiet(QUIET_S)
        begin = time.monotonic()
        for _ in range(swaps):
            server.load(models.ADD_ONE, version=next(versions), strategy=BESIDE)
        swapping = begin, time.monotonic()
        told = stop()
    name = f"{swaps:,} version swaps, {MANY_CLIENTS} clients"
    ours, beside = (told.within(*window) / (window[1] - window[0]) for window in (swapping, quiet))
    rates = f"{ours:,.0f}/s", f"{beside:,.0f}/s"
    return [
        _failures_row(name, [told], is_goal=True),
        Row(f"answers during {name} ÷ without swaps", *rates, ours / beside),
    ]


def _write(server: Server, model: bytes) -> Iterator[int]:
    """Write two versions of a model and load the first; return the versions to swap in, in order."""
    for version in (1, 2):
        named = models.renamed(model, f"version {version}")
        models.write(server.repository, models.ADD_ONE, named, version=version)
    server.load(models.ADD_ONE, version=1)
    return cycle((2, 1))


def _request(server: Server, folder: Path) -> Path:
    target = Target("ours", server.port, server.token)
    REQUEST.check(target)
    return REQUEST.write(target, folder)


def _swapped(server: Server, version: int, strategy: str) -> tuple[Window, Window]:
    """Swap, and wait as long again; return both times."""
    begin = time.monotonic()
    server.load(models.ADD_ONE, version=version, strategy=strategy)
    time.sleep(SETTLE_S)
    swap = begin, time.monotonic()
    return swap, _quiet(swap[1] - swap[0])


def _quiet(seconds: float) -> Window:
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


def _gap_row(strategy: str, clients: int, told: Answers, windows: Sequence[tuple[Window, Window]]) -> Row:
    swapped, quiet = ([told.longest_gap_s(*window) for window in part] for part in zip(*windows, strict=True))
    name = f"swap {strategy}, {_clients(clients)}: longest gap between answers ÷ without a swap"
    return Row(name, _gap(swapped), _gap(quiet), median(swapped) / median(quiet))


def _failures_row(during: str, told: Sequence[Answers], *, is_goal: bool) -> Row:
    """Return how many requests failed; print the first reason where none should fail."""
    failed, total = (sum(numbers) for numbers in zip(*((one.failed, one.total) for one in told), strict=True))
    name, ours = f"requests failed during {during}", f"{failed:,} of {total:,}"
    if not is_goal:
        return Row(name, ours, "", None)
    for reason in filter(None, (one.reason for one in told)):
        print(f"{name}, the first: {reason}", file=sys.stderr)
    return Row(name, ours, "", None, NO_FAILURE, failed == 0)


def _gap(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1000:.1f} ms, worst {max(seconds) * 1000:.1f} ms"


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"
