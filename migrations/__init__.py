"""The log's SQL schemas: numbered files, each applied once, in one transaction, by `events`.

The files here are for `events.sqlite.schema`, those in `postgres` for `nodes.postgres.schema`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_NAME = re.compile(r"^(\d{4})_\w+\.sql$")


@cache
def read_migrations(folder: str = "") -> tuple[tuple[int, str], ...]:
    """Return the migrations of a folder in order, with their numbers; a gap in those is a mistake here."""
    found = sorted(
        (int(match[1]), file.read_text(encoding="utf-8"))
        for file in (resources.files("migrations") / folder).iterdir()
        if (match := _NAME.match(file.name))
    )
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return tuple(found)
