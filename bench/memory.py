"""Does memory grow? That of the process tree before and after many loads and unloads."""

from bench import models
from bench.driver import Server
from bench.table import Row, format_mb
from runtime.memory import tree_bytes

MODEL = "memory"
RATIO_GOAL = 1.02


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
    return [Row(name, format_mb(after), format_mb(before), ratio, f"≤ {RATIO_GOAL:.2f}", ratio <= RATIO_GOAL)]


def _cycle(server: Server) -> None:
    server.load(MODEL)
    server.unload(MODEL)
