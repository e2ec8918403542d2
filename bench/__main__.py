"""`python -m bench`: measure one part after the other, each at its own server, and print one table."""

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import (
    baselines,
    cluster,
    compute,
    driver,
    firstloads,
    generator,
    inference,
    ledger,
    loads,
    memory,
    peers,
    records,
    release,
    streams,
    swaps,
)
from bench.models import LARGE, NETWORKS, Network
from bench.table import Row, table

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WIDTH = 300
"""Of a table in a file: its longest row does not wrap, however long the figures are."""
PARTS = (
    "loads",
    "memory",
    "release",
    "policies",
    "inference",
    "compute",
    "records",
    "tails",
    "ledger",
    "cluster",
)
AT_LEAST_ONE = click.IntRange(min=1)
PEERS = ".venv/peers"
"""The environment that `make bench-peers` creates."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of the command."""

    repeats: int
    cycles: int
    swaps: int
    rounds: int
    seconds: float
    tails: int
    facts: int
    tail_seconds: float
    network: tuple[str, ...]
    only: tuple[str, ...]
    peers: Path | None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts to run, in their order."""
        return tuple(part for part in PARTS if part in (self.only or PARTS))

    def chosen(self, *networks: Network) -> list[Network]:
        """Return the networks of these that are asked for."""
        return [network for network in networks if not self.network or network.name in self.network]


@click.command()
@click.option(
    "--repeats",
    default=15,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Loads, swaps, forced unloads and cold inferences for each median.",
)
@click.option(
    "--cycles",
    default=100,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Loads and unloads between the two memory figures; the goal is for 1000.",
)
@click.option(
    "--swaps",
    default=1000,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Version swaps without pause, under load.",
)
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Rounds of inferences, appends, kills and ends of nodes, and ten loads at once for each median.",
)
@click.option("--seconds", default=2.0, show_default=True, help="Duration of each measurement of inference.")
@click.option("--tails", default=1000, show_default=True, type=AT_LEAST_ONE, help="Streams at once.")
@click.option("--tail-seconds", default=30.0, show_default=True, help="Duration of the streams.")
@click.option(
    "--facts",
    default=1_000_000,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Events of the ledger for verification, time travel and catching up.",
)
@click.option(
    "--network",
    multiple=True,
    type=click.Choice([network.name for network in (*NETWORKS, LARGE)]),
    help="Load only this one of all networks; can be repeated.",
)
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Only this part; can be repeated.")
@click.option(
    "--peers",
    is_flag=False,
    flag_value=PEERS,
    type=click.Path(path_type=Path),
    help=f"Measure Triton, too, from this environment [{PEERS}].",
)
def main(**options: Any) -> None:
    """Measure the installed server and print the ratios beside their goals."""
    choice = Choice(**options)
    busy = os.getloadavg()[0]
    if choice.peers is not None:
        peers.find(choice.peers)  # before the first of many minutes
    measures = {
        "loads": _loads,
        "memory": _memory,
        "release": _release,
        "policies": _policies,
        "inference": _inference,
        "compute": _compute,
        "records": _records,
        "tails": _tails,
        "ledger": _ledger,
        "cluster": _cluster,
    }
    rows = [row for part in choice.parts for row in _measured(measures[part], choice)]
    console = Console()
    if not console.is_terminal:  # in a file or a log there is no edge to wrap at
        console.width = WIDTH
    console.print(
        table(rows, title="loadledger, measured through its HTTP API", caption=_conditions(choice, busy))
    )


def _measured(measure: Callable[[Path, Choice], list[Row]], choice: Choice) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), choice)


def _loads(folder: Path, choice: Choice) -> list[Row]:
    with driver.running(folder, *driver.UNLIMITED) as server:
        return firstloads.measure(server, choice.chosen(*NETWORKS, LARGE), repeats=choice.repeats)


def _memory(folder: Path, choice: Choice) -> list[Row]:
    with driver.running(folder, *driver.UNLIMITED) as server:
        return memory.measure(server, cycles=choice.cycles)


def _release(folder: Path, _: Choice) -> list[Row]:
    with driver.running(folder, *driver.UNLIMITED) as server:
        return release.measure(server)


def _policies(folder: Path, choice: Choice) -> list[Row]:
    options = driver.UNLIMITED
    rows: list[Row] = []
    with driver.running(folder / "gaps", *options) as server:
        rows += swaps.measure_gaps(server, folder, repeats=choice.repeats)
    with driver.running(folder / "swaps", *options) as server:
        rows += swaps.measure_under_load(server, folder, swaps=choice.swaps)
    with driver.running(folder / "forced", *options) as server:
        rows += loads.measure_forced_unloads(server, repeats=choice.repeats)
    with driver.running(folder / "queue", *options) as server:
        rows += loads.measure_loads_at_once(server, rounds=choice.rounds)
    return rows + loads.measure_evictions(folder / "eviction", repeats=choice.repeats)


def _inference(folder: Path, choice: Choice) -> list[Row]:
    return inference.measure(folder, rounds=choice.rounds, seconds=choice.seconds, peers_at=choice.peers)


def _compute(folder: Path, choice: Choice) -> list[Row]:
    rounds, seconds = choice.rounds, choice.seconds
    return [
        *compute.measure(folder / "beside", rounds=rounds, seconds=seconds, peers_at=choice.peers),
        *compute.measure_many(folder / "many", rounds=rounds, seconds=seconds),
    ]


def _records(folder: Path, choice: Choice) -> list[Row]:
    return records.measure(folder, rounds=choice.rounds, seconds=choice.seconds)


def _tails(folder: Path, choice: Choice) -> list[Row]:
    with driver.running(folder, *driver.UNLIMITED) as server:
        return streams.measure(server, tails=choice.tails, seconds=choice.tail_seconds)


def _ledger(folder: Path, choice: Choice) -> list[Row]:
    return ledger.measure_ledger(folder, facts=choice.facts, rounds=choice.rounds)


def _cluster(folder: Path, choice: Choice) -> list[Row]:
    return cluster.measure(
        folder,
        repeats=choice.repeats,
        rounds=choice.rounds,
        seconds=choice.seconds,
        facts=choice.facts,
    )


def _conditions(choice: Choice, busy: float) -> str:
    pages = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "unknown"
    machine = f"{os.cpu_count()} cores (load average before: {busy:.1f}), transparent huge pages {pages}."
    told = [f"Python {platform.python_version()}, ONNX Runtime {version('onnxruntime')}, {machine}"]
    if "loads" in choice.parts:
        told.append(
            f"Loads: request to ready, median of {choice.repeats}, of the largest of "
            f"{min(choice.repeats, firstloads.LARGE_REPEATS)}, alternated with bare sessions in the workers' "
            "environment; warm page cache, the same threads and warm-up inference on zeros in both. The goal "
            f"of a first load: {firstloads.RATIO_GOAL:.2f} of a bare session, or that + "
            f"{firstloads.ABOVE_GOAL_MS:.0f} ms, or sha256sum of its files if that takes longer; and cp of "
            "them. HTTP is what the client waits for beyond the load that the ledger records; one commit is "
            "the mean of those of a load and its unload."
        )
    if "release" in choice.parts:
        told.append(
            "Release: anonymous memory of the process tree, the server included, beside that of one process "
            "with the defaults of ONNX Runtime and malloc, which runs the inferences in a pool of threads."
        )
    if "policies" in choice.parts:
        told.append(
            f"Policies: gaps, forced unloads and cold inferences are medians of {choice.repeats}, ten loads "
            f"of {choice.rounds} rounds; a gap is of the client that waited longest; a refused client asks "
            f"again after {generator.PAUSE_S * 1000:.0f} ms; bare sessions run the same warm-up inference; "
            "202 to ready is by the ledger's clock."
        )
    if "inference" in choice.parts:
        told.append(
            f"Inferences: binary unless it says JSON, in and out; one load generator beside it on these "
            f"cores; median of {choice.rounds} times {choice.seconds:g} s, alternated; token, rate limit and "
            "deadline on."
        )
    if "compute" in choice.parts:
        others = "bare sessions" if choice.peers is None else "bare sessions and Triton"
        told.append(
            f"Models that compute: {baselines.THREADS} threads in {others}, which spin as by default; one "
            f"load generator beside them on these cores; medians of {choice.rounds} ratios of "
            f"{choice.seconds:g} s each, alternated; outputs equal to the bare session's, bit for bit."
        )
    if "tails" in choice.parts:
        told.append("Tails: from recorded to received, one process listens to all of them on these cores.")
    if "cluster" in choice.parts:
        told.append(
            "Cluster: PostgreSQL on these cores and this disk, with its own defaults (fsync, "
            f"synchronous_commit); loads and unloads are medians of {choice.repeats}, in turn at a node and "
            f"at a server alone, from one repository; appends medians of {choice.rounds} ratios, in turn; "
            f"kills medians of {choice.rounds}; forwarding: binary, medians of {choice.rounds} median "
            f"latencies of {choice.seconds:g} s each, in turn at both nodes."
        )
    return " ".join(told)


if __name__ == "__main__":
    main()
