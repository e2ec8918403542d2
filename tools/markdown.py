"""Markdown of generated pages: tables, cells, anchors of headings."""

import re
from collections.abc import Iterable, Sequence

_NOT_IN_A_SLUG = re.compile(r"[^\w\- ]")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells must be valid Markdown, see `cell`."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """Return text as one line that is valid in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return _NOT_IN_A_SLUG.sub("", heading.strip().lower()).replace(" ", "-")
