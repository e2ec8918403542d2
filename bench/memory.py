"""The memory of the server's process tree before and after many loads and unloads."""

from collections.abc import Iterator
from pathlib import Path

from bench import models
from bench.driver import Server
from bench.table import Row

MODEL = "memory"
RATIO_GOAL = 1.02
KIB = 1024


def measure(server: Server, *, cycles: int) -> list[Row]:
    """Load and unload a network `cycles` times, after one throw-away cycle."""
    models.write(server.repository, MODEL, models.convnet())
    _cycle(server)
    before = tree_bytes(server.pid)
    for _ in range(cycles):
        _cycle(server)
    after = tree_bytes(server.pid)
    ratio = after / before
    name = f"memory of the process tree, after {cycles:,} loads and unloads ÷ before"
    return [Row(name, _mb(after), _mb(before), ratio, f"≤ {RATIO_GOAL:.2f}", ratio <= RATIO_GOAL)]


def _cycle(server: Server) -> None:
    server.load(MODEL)
    server.unload(MODEL)


def tree_bytes(pid: int) -> int:
    """Return the memory of a process and all its descendants; pages that they share count once (PSS)."""
    return sum(_pss_bytes(member) for member in _tree(pid))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def _pss_bytes(pid: int) -> int:
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return int(fields["Pss"].split()[0]) * KIB


def _mb(value: int) -> str:
    return f"{value / 1e6:.1f} MB"
