"""What generated pages of documentation have in common: the cells of a table, and the anchors of headings."""

import re
from collections import Counter
from collections.abc import Iterable

_NOT_IN_A_SLUG = re.compile(r"[^\w\- ]")


def cell(text: str) -> str:
    """Return text as it may stand in a cell of a table, in one line."""
    return " ".join(text.split()).replace("|", "\\|")


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return _NOT_IN_A_SLUG.sub("", heading.strip().lower()).replace(" ", "-")


def slugs(headings: Iterable[str]) -> list[str]:
    """Return the anchors of a page's headings in their order: those that are there already are counted."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for heading in headings:
        name = slug(heading)
        found.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found
