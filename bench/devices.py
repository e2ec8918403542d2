"""Loads and inferences on a device, beside the same on the CPU, at one server."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from bench import generator, models
from bench.driver import Server
from bench.models import Network
from bench.requests import Request, Target
from bench.table import Row, format_mb, format_ms, median_ratio, rate_row
from features.devices.names import CPU
from loadledger import Client

OURS = "ours"


class DeviceRound(NamedTuple):
    """A round of a network on one device: milliseconds from the request to ready, answers a second, bytes."""

    load_ms: float
    per_s: float
    memory_bytes: int


def measure(
    server: Server, folder: Path, device: str, networks: Sequence[Network], *, repeats: int, seconds: float
) -> list[Row]:
    """Load each network on the device and on the CPU in turn, and infer with one client, in binary.

    Args:
        server: its loads may run on the device.
        folder: for the requests.
        device: its name; a server without it gives a row that says so.
        networks: to load.
        repeats: rounds, beside one that is thrown away.
        seconds: of each measurement of inferences.
    """
    present = {each["device"] for each in server.ask("GET", "/api/v1/resources").json()["devices"]}
    if device not in present:
        return [Row(f"{device}: not measured, this server has {', '.join(sorted(present))}", "", "", None)]
    rows: list[Row] = []
    for network in networks:
        models.write(server.repository, network.name, network.build())
        rounds = defaultdict[str, list[DeviceRound]](list)
        for number in range(repeats + 1):
            for each in (device, CPU) if number % 2 else (CPU, device):
                measured = _round(server, folder, network, each, seconds)
                if number:
                    rounds[each].append(measured)
        rows += _rows(network, device, rounds, _largest_difference(server, network, device))
    return rows


def _round(server: Server, folder: Path, network: Network, device: str, seconds: float) -> DeviceRound:
    load_ms = server.load(network.name, devices=[device], fallback=CPU)
    (loaded,) = server.newest_events(f"type=ModelLoaded&model={network.name}", 1)
    target = Target(OURS, server.port, server.token)
    path = Request(network.name, network.values(), (), binary=True).write(target, folder)
    per_s = generator.measure_rate(target.port, path, clients=1, seconds=seconds).per_s
    server.unload(network.name)
    return DeviceRound(load_ms, per_s, loaded["memory_bytes"])


def _largest_difference(server: Server, network: Network, device: str) -> float:
    """Return how much an output on the device differs at most from that on the CPU, relative if above 1."""
    answers = []
    for each in (CPU, device):
        server.load(network.name, devices=[each], fallback=CPU)
        with Client(f"http://127.0.0.1:{server.port}", token=server.token) as client:
            answers.append(client.infer(network.name, network.values()))
        server.unload(network.name)
    on_cpu, on_device = answers
    return max(
        float(np.max(np.abs(on_device[name] - value) / np.maximum(1, np.abs(value))))
        for name, value in on_cpu.items()
    )


def _rows(
    network: Network, device: str, rounds: Mapping[str, Sequence[DeviceRound]], difference: float
) -> Iterator[Row]:
    ours, beside = rounds[device], rounds[CPU]
    what = f"{network.what} on {device} ÷ on the CPU"
    loads = [each.load_ms for each in ours], [each.load_ms for each in beside]
    took, took_beside = (format_ms(median(each), decimals=1) for each in loads)
    yield Row(f"{what}: load", took, took_beside, median_ratio(*loads))
    yield rate_row(
        f"{what}: inferences", [each.per_s for each in ours], [each.per_s for each in beside], None
    )
    taken, taken_beside = (int(median(each.memory_bytes for each in found)) for found in (ours, beside))
    yield Row(
        f"{what}: memory of the worker", format_mb(taken), format_mb(taken_beside), taken / taken_beside
    )
    yield Row(f"{what}: largest difference of an output", f"{difference:.1e}", "", None)
