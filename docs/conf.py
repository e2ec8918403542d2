"""Settings of the documentation's site, for Sphinx: `make docs`. Why: decisions/0052-documentation-site.md.

The sources are the Markdown files of the repository as they are, so that they read alike on a forge. What a
site needs beside them is added here: navigation from `docs/index.md`, and pages for links to folders.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

project = "loadledger"
html_title = project
html_favicon = "../server/static/console.svg"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # the anchors that a forge gives headings
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/README.md"]
exclude_patterns = [".*", "build", "site"]
templates_path = ["templates"]
html_additional_pages = {"index": "start.html"}
smartquotes = False  # it would make a dash of the beginning of an option
html_theme = "furo"  # its files are local; a page asks no other server for anything
html_copy_source = False
html_use_index = False

INDEX = ROOT / "docs/index.md"
DECISIONS = "docs/decisions/README"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PAGE = re.compile(r"\[([^\]]+)\]\(([\w./-]+)\.md\)")
FOLDER = re.compile(r"\]\(([\w./-]+/)\)")
BY_ROLE = "By role"
"""The index's section that leads to pages of its other sections."""


def setup(app: Sphinx) -> None:
    """Have each source completed when it is read."""
    app.connect("source-read", complete_source)


def complete_source(_app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to a folder to its README, and add what navigation needs."""
    source[0] = FOLDER.sub(r"](\1README.md)", source[0])
    if page == root_doc:
        source[0] += "".join(_navigation())
    elif page == DECISIONS:
        source[0] += "\n```{toctree}\n:glob:\n:maxdepth: 1\n\n0*\n```\n"


def _navigation() -> Iterator[str]:
    """Yield a tree of pages for each section of the index."""
    seen = set[str]()
    for title, text in SECTION.findall(FOLDER.sub(r"](\1README.md)", INDEX.read_text(encoding="utf-8"))):
        if title == BY_ROLE:
            continue
        pages = {_from_root(page): label for label, page in PAGE.findall(text)}
        entries = [_entry(page, label) for page, label in pages.items() if page not in seen]
        seen.update(pages)
        yield "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *entries, "```", ""])
    yield "\n```{toctree}\n:hidden:\n\nAll pages </docs/index>\n```\n"


def _entry(page: str, label: str) -> str:
    """Return a line of a tree, with the link's words if they stand alone, else with the page's title."""
    return f"{label} <{page}>" if label[0].isupper() else page


def _from_root(page: str) -> str:
    """Return the path from the root of a page that the index links to."""
    path = PurePosixPath("/docs", page)
    return f"/{page.removeprefix('../')}" if page.startswith("../") else str(path)
