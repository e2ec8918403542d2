"""What the policies cost: swaps under load, forced unloads, a queue of loads, and eviction."""

from pathlib import Path

from bench import driver, eviction, forced, queued, swaps
from bench.table import Row

# Else the models that are loaded are prepared in the background of what is measured.
OPTIONS = (*driver.UNLIMITED, "--prepare=off")


def measure(folder: Path, *, repeats: int, rounds: int, swapped: int) -> list[Row]:
    """Measure them one after the other, each with a server of its own.

    Args:
        folder: An empty directory.
        repeats: Swaps, forced unloads and cold inferences to take the median of.
        rounds: Queues of loads to take the median of.
        swapped: Version swaps without pause.
    """
    rows: list[Row] = []
    with driver.running(folder / "gaps", *OPTIONS) as server:
        rows += swaps.gaps(server, folder, repeats=repeats)
    with driver.running(folder / "swaps", *OPTIONS) as server:
        rows += swaps.under_load(server, folder, swaps=swapped)
    with driver.running(folder / "forced", *OPTIONS) as server:
        rows += forced.measure(server, repeats=repeats)
    with driver.running(folder / "queue", *OPTIONS) as server:
        rows += queued.measure(server, rounds=rounds)
    return rows + eviction.measure(folder / "eviction", repeats=repeats)
