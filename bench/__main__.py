"""`python -m bench`: every bench against one server after the other, and one table of what came out."""

import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console

from bench import driver, loads, memory
from bench.table import Row, table

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WIDTH = 120


@click.command()
@click.option("--repeats", default=15, show_default=True, help="First loads to take the median of.")
@click.option(
    "--cycles", default=100, show_default=True, help="Loads and unloads between the memory figures."
)
def main(repeats: int, cycles: int) -> None:
    """Measure the installed server and print the ratios beside their goals."""
    rows = [*_loads(repeats), *_memory(cycles)]
    console = Console()
    if not console.is_terminal:  # in a file or a log there is no edge to wrap at
        console.width = WIDTH
    console.print(
        table(rows, title="loadledger, measured through its HTTP API", caption=_conditions(repeats))
    )


def _loads(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, driver.running(Path(folder)) as server:
        return loads.measure(server, repeats=repeats)


def _memory(cycles: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, driver.running(Path(folder)) as server:
        return memory.measure(server, cycles=cycles)


def _conditions(repeats: int) -> str:
    pages = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "unknown"
    return (
        f"Python {platform.python_version()}, ONNX Runtime {version('onnxruntime')}, {os.cpu_count()} cores, "
        f"transparent huge pages {pages}. Loads: request to ready, median of {repeats}, alternated with bare "
        "sessions in the workers' environment; warm page cache, 1 thread a session, no warm-up inference."
    )


if __name__ == "__main__":
    main()
