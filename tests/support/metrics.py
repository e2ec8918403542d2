"""The metrics that docs/metrics.md lists."""

import re
from pathlib import Path
from typing import NamedTuple

_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(loadledger_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", re.MULTILINE)


class Family(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    labels: frozenset[str]
    text: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a query finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))


FAMILIES = [
    Family(name, kind, frozenset(re.findall(r"\w+", labels)), text)
    for name, kind, labels, text in _ROW.findall(_PAGE.read_text(encoding="utf-8"))
]
