"""`python -m bench`: every bench against one server after the other, and one table of what came out."""

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

from bench import driver, inference, loads, memory, triton
from bench.table import Row, table

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WIDTH = 160
PARTS = ("loads", "memory", "inference")
PEERS = ".venv/peers"
"""Where `make bench-peers` installs them: a part of what is ours alone, and out of everybody's way."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to measure, and how often; the fields are the options of the command."""

    repeats: int
    cycles: int
    rounds: int
    seconds: float
    only: tuple[str, ...]
    peers: Path | None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts to run, in their order."""
        return tuple(part for part in PARTS if part in (self.only or PARTS))


@click.command()
@click.option("--repeats", default=15, show_default=True, help="First loads to take the median of.")
@click.option(
    "--cycles", default=100, show_default=True, help="Loads and unloads between the memory figures."
)
@click.option("--rounds", default=5, show_default=True, help="Rounds of inference to take the median of.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each measurement of inference.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Only this part; can be repeated.")
@click.option(
    "--peers",
    is_flag=False,
    flag_value=PEERS,
    type=click.Path(path_type=Path),
    help=f"Measure Triton too, from this environment [{PEERS}].",
)
def main(**options: Any) -> None:
    """Measure the installed server and print the ratios beside their goals."""
    choice = Choice(**options)
    busy = os.getloadavg()[0]
    if choice.peers is not None:
        triton.find(choice.peers)  # before the first of many minutes
    measures = {"loads": _loads, "memory": _memory, "inference": _inference}
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
    with driver.running(folder) as server:
        return loads.measure(server, repeats=choice.repeats)


def _memory(folder: Path, choice: Choice) -> list[Row]:
    with driver.running(folder) as server:
        return memory.measure(server, cycles=choice.cycles)


def _inference(folder: Path, choice: Choice) -> list[Row]:
    return inference.measure(folder, rounds=choice.rounds, seconds=choice.seconds, peers=choice.peers)


def _conditions(choice: Choice, busy: float) -> str:
    pages = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "unknown"
    machine = f"{os.cpu_count()} cores (load average before: {busy:.1f}), transparent huge pages {pages}."
    told = [f"Python {platform.python_version()}, ONNX Runtime {version('onnxruntime')}, {machine}"]
    if "loads" in choice.parts:
        told.append(
            f"Loads: request to ready, median of {choice.repeats}, alternated with bare sessions in the "
            "workers' environment; warm page cache, 1 thread a session, no warm-up inference."
        )
    if "inference" in choice.parts:
        told.append(
            f"Inferences: binary unless it says JSON, in and out; one load generator beside it on these "
            f"cores; median of {choice.rounds} times {choice.seconds:g} s, alternated; token, rate limit and "
            "deadline on."
        )
    return " ".join(told)


if __name__ == "__main__":
    main()
