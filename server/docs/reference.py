"""The pages of `docs/reference` that are generated; `python -m server.docs.reference FOLDER` writes them."""

import sys
from collections.abc import Mapping
from pathlib import Path

from server.docs.errorreference import error_page
from server.docs.eventreference import event_page


def reference_pages() -> Mapping[str, str]:
    """Return the pages by the names of their files; the same code gives the same text."""
    return {
        "events.md": event_page(),
        "errors.md": error_page(),
    }


def write_pages(folder: Path) -> None:
    """Write the pages into a folder that is there."""
    for name, page in reference_pages().items():
        (folder / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
