"""A result beside its goal, and the table of all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Args:
        what: What was measured, and beside what.
        ours: Our figure, with its unit.
        beside: The figure that ours is divided by, with its unit.
        ratio: Ours ÷ beside; null where there is nothing to divide by.
        goal: The goal in words, empty when the row is there for comparison only.
        reached: Whether the goal is met; null where there is none.
    """

    what: str
    ours: str
    beside: str
    ratio: float | None
    goal: str = ""
    reached: bool | None = None


def median_ratio(ours: Sequence[float], beside: Sequence[float]) -> float:
    """Return the median of the ratios, each of two measurements that followed each other."""
    return median(one / other for one, other in zip(ours, beside, strict=True))


def rate_row(what: str, ours: Sequence[float], beside: Sequence[float], goal: float | None) -> Row:
    """Return a line for two rates a second, with the least ratio as its goal; None is no goal."""
    ratio = median_ratio(ours, beside)
    rates = f"{median(ours):,.1f}/s", f"{median(beside):,.1f}/s"
    if goal is None:
        return Row(what, *rates, ratio)
    return Row(what, *rates, ratio, f"≥ {goal:.2f}", ratio >= goal)


def table(rows: Iterable[Row], *, title: str, caption: str) -> Table:
    """Return the rows as a table to print; the caption says under which conditions they were measured."""
    shown = Table(title=title, caption=Text(caption), caption_justify="left")
    shown.add_column("what")
    for name in ("ours", "beside", "ratio", "goal"):
        shown.add_column(name, justify="right")
    shown.add_column("reached")
    marks = {True: "[green]yes", False: "[red]no", None: ""}
    for row in rows:
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        shown.add_row(row.what, row.ours, row.beside, ratio, row.goal, marks[row.reached])
    return shown


def format_ms(value: float, *, decimals: int = 0) -> str:
    """Return a time as the table has it."""
    return f"{value:.{decimals}f} ms"


def format_mb(value: int) -> str:
    """Return a size in bytes as the table has it."""
    return f"{value / 1e6:.1f} MB"
