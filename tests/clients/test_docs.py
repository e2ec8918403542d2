"""The pages about clients say only what was run: their examples are executed, what they print is compared."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import ROOT, blocks, expected, printed_as, run_page
from support.servers import Server, clean_environment, copy_examples, standing
from yarl import URL

PAGES = ("curl", "tritonclient", "kserve")
PERF_ANALYZER = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer")
NUMBER = re.compile(r"\d+(\.\d+)?")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    copy_examples(tmp_path)
    with standing(tmp_path / "examples") as server:
        yield server


def environment(*folders: Path) -> dict[str, str]:
    """Return one in which the installed commands are found, and these folders' before them."""
    path = [*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]]
    return clean_environment() | {"PATH": os.pathsep.join(path)}


@pytest.mark.parametrize("page", PAGES)
def test_every_example_of_a_page_does_what_the_page_says(page: str, server: Server, tmp_path: Path) -> None:
    wanted = re.findall(r"\b(curl|jq)\b", (ROOT / f"docs/clients/{page}.md").read_text(encoding="utf-8"))
    if missing := sorted({name for name in wanted if shutil.which(name) is None}):
        pytest.skip(f"the page uses {' and '.join(missing)}, not installed here")
    if page == "kserve":
        pytest.importorskip("kserve", reason="KServe's client is not made for this Python")
    port = str(URL(server.url).port)
    compared = 0
    for block, printed in run_page(f"docs/clients/{page}.md", tmp_path, port, environment()):
        if block.answer is not None:
            assert printed_as(block, printed.replace(f":{port}", ":8080")) == expected(block), block.text
            compared += 1
    assert compared >= 4


@pytest.mark.skipif(
    PERF_ANALYZER is None, reason="perf_analyzer is neither named by PERF_ANALYZER nor on PATH"
)
def test_perf_analyzer_prints_what_its_page_shows_but_for_the_numbers(server: Server, tmp_path: Path) -> None:
    assert PERF_ANALYZER is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "perf_analyzer").symlink_to(Path(PERF_ANALYZER).absolute())
    port = str(URL(server.url).port)
    ran = list(run_page("docs/clients/perf_analyzer.md", tmp_path, port, environment(folder)))
    block, printed = ran[-1]
    assert block.answer is not None
    assert NUMBER.sub("N", printed).split() == NUMBER.sub("N", block.answer).split()


def test_every_page_is_in_the_index_and_is_run() -> None:
    pages = {path.stem for path in (ROOT / "docs/clients").glob("*.md")} - {"README"}
    assert pages == {*PAGES, "perf_analyzer"}
    index = (ROOT / "docs/clients/README.md").read_text(encoding="utf-8")
    assert all(f"({page}.md)" in index for page in pages)
    assert blocks("docs/clients/README.md") == []
