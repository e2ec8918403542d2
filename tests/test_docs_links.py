"""Links between pages and their anchors exist, and every page is linked from the index."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.markdown import slug

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs/index.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
MARKUP = re.compile(r"\[([^\]]*)\]\([^)]*\)|[`*]")
ELSEWHERE = ("http://", "https://", "mailto:")


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def text_of(page: Path) -> str:
    """Return the page without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Return the files and anchors of the tree that the page links to."""
    for found in LINK.finditer(CODE.sub("", text_of(page).replace("[`", "[").replace("`]", "]"))):
        target = found[1] or found[2]
        if not target.startswith(ELSEWHERE):
            path, _, anchor = target.partition("#")
            yield ((page.parent / path).resolve() if path else page), anchor


def anchors(page: Path) -> list[str]:
    """Return the anchors of the page's headings; repeated ones are numbered."""
    found, seen = [], Counter[str]()
    for heading in HEADING.findall(text_of(page)):
        name = slug(MARKUP.sub(r"\1", heading))
        found.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken(page: Path) -> Iterator[str]:
    for target, anchor in links(page):
        if not target.is_relative_to(ROOT) or not target.exists():
            yield f"{target} is not there"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            yield f"{target} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_of_a_page_exist(page: Path) -> None:
    assert list(broken(page)) == []


def test_every_page_is_linked_from_the_index() -> None:
    found, todo = set[Path](), {INDEX}
    while todo:
        page = todo.pop()
        found.add(page)
        for target, _ in links(page):
            inside = target.rglob("*.md") if target.is_dir() else [target]
            todo |= {each for each in inside if each.suffix == ".md" and each.is_file()} - found
    assert {page for page in PAGES if page not in found} == set()


def test_figures_of_the_readme_match_their_page() -> None:
    told = rows(ROOT / "README.md", "Measured")
    have = rows(ROOT / "docs/explanation/what-is-measured.md", "What is measured, and what is not")
    assert told
    for what, *figures in told:
        assert any(row[0].startswith(what) and set(figures) <= {*row, ""} for row in have), what


def rows(page: Path, section: str) -> list[list[str]]:
    """Return the cells of the rows of a section's tables, without their heads."""
    text = page.read_text(encoding="utf-8").partition(f"# {section}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [row for row in cells if row[0] != "what" and set(row[0]) != {"-"}]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[a](b.md)", 1),
        ("[a](#b)", 1),
        ("[a](#a-heading)", 0),
        ("[`a b`](#a-heading)", 0),
        ("[a](#a-heading-1)", 0),
        ("[a](#a-heading-2)", 1),
        ("`[a](b.md)`", 0),
        ("```sh\n[a](b.md)\n# c\n```\n[d](#c)", 1),
        ('<img alt="a" src="b.png">', 1),
        ("[a](https://example.org/#b)", 0),
    ],
)
def test_broken_links_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# A heading\n\n## `A` heading\n\n{text}\n", encoding="utf-8")
    assert len(list(broken(page))) == count
