"""The table of settings in the docs; `python -m server.docs.configpage FILE` writes it into a page again."""

import sys
from pathlib import Path

from server.config import configuration_table

BEGIN = "<!-- settings: written by `python -m server.docs.configpage` -->\n"
END = "<!-- end of settings -->\n"


def with_table(page: str) -> str:
    """Return a page with the present table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{configuration_table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
