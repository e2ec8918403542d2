"""The examples of the documentation and of `examples/` are run, and their output is compared."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from support.openvino import openvino_environment
from support.pages import (
    ANYTHING,
    FAMILIES,
    LIMIT_S,
    ROOT,
    Block,
    blocks,
    expected,
    printed_as,
    run_pages,
    says,
)
from support.servers import QUIET, bare_environment, copy_tree, fresh_environment

QUICK_START = "docs/quick-start.md"
EXAMPLES = "examples/README.md"
NOTEBOOK = ROOT / "examples/pictures.ipynb"
GUIDES = {
    "docs/how-to/add-a-model-by-name.md": 5,
    "docs/how-to/add-an-optimised-file.md": 2,
    "docs/how-to/answer-an-auditor.md": 5,
    "docs/how-to/back-up-and-restore.md": 5,
    "docs/how-to/come-from-torchserve.md": 7,
    "docs/how-to/come-from-triton.md": 5,
    "docs/how-to/find-out-what-is-wrong.md": 6,
    "docs/how-to/fit-many-models-in-little-memory.md": 5,
    "docs/how-to/get-a-model-into-onnx.md": 5,
    "docs/how-to/keep-a-ledger-for-years.md": 4,
    "docs/how-to/receive-events.md": 4,
    "docs/how-to/record-inferences.md": 4,
    "docs/how-to/run-behind-an-identity-provider.md": 4,
    "docs/how-to/sign-and-approve-models.md": 8,
    "docs/how-to/swap-without-downtime.md": 6,
    "docs/how-to/use-grpc.md": 3,
    "docs/how-to/use-tritons-client.md": 1,
}
"""Pages that start their own servers, and how many answers are compared."""
PACKAGES = {
    "docs/how-to/get-a-model-into-onnx.md": ("lightgbm", "onnxmltools", "skl2onnx", "xgboost"),
    "docs/how-to/record-inferences.md": ("duckdb", "pandas"),
    "docs/how-to/use-grpc.md": ("grpc", "tritonclient"),
    "docs/how-to/use-tritons-client.md": ("tritonclient",),
    "docs/clients/tritonclient.md": ("tritonclient",),
    "docs/clients/kserve.md": ("kserve",),
    EXAMPLES: ("skl2onnx", "sklearn"),
    "the notebook": ("ipykernel", "nbclient", "PIL", "sklearn"),
}
"""Packages that pages import besides ours and its requirements."""
REFERENCES = {
    "docs/client.md": 9,
    "docs/devices.md": 6,
    "docs/events.md": 5,
    "docs/memory.md": 6,
    "docs/models.md": 12,
    "docs/time-travel.md": 5,
}
"""Pages that start their own servers, and how many answers are compared to the letter."""
CLIENTS = "docs/clients"
PERF_ANALYZER_PAGE = f"{CLIENTS}/perf_analyzer.md"
NUMBER = re.compile(r"\d+(\.\d+)?")
CHAINS = {
    "quick start": {
        QUICK_START: 8,
        f"{CLIENTS}/curl.md": 11,
        f"{CLIENTS}/tritonclient.md": 6,
        "docs/verify-it-yourself.md": 7,
    },
    "kserve": {QUICK_START: 8, f"{CLIENTS}/kserve.md": 4},
    "perf_analyzer": {QUICK_START: 8, PERF_ANALYZER_PAGE: 1},
}
"""The quick start, the pages that go on from it in the order of its links, and how many answers each has."""
MIGRATIONS = [page for page in GUIDES if "come-from" in page]
"""Guides whose tables have another server's words in the first column and ours beside them."""
OF_OTHERS = {f"docs/{name}.md" for name in ("cli", "configuration", "console", "deployment")} | {
    f"docs/{name}.md" for name in ("logs", "metrics")
}
"""Reference pages, and pages for root, containers or a cluster; other tests hold them to the code."""
NOT_RUN = re.compile(r"^(.*)\n\n~~~(?:sh|python)\n", re.MULTILINE)
"""The line before a block that is not run."""
COMMANDS = re.compile(r"^```(sh|python)$", re.MULTILINE)
PROGRAMS = ("curl", "jq", "openssl", "model_signing")
PERF_ANALYZER = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer")
GOES_ON = "This page goes on from the [quick start](quick-start.md): with its server, folder and environment"
SIGNING = os.environ.get("MODEL_SIGNING")
"""The published tool, if it is not on the path: `.ci/model_signing` makes an environment with it."""


def search_path() -> str:
    return os.pathsep.join([os.environ["PATH"], *([str(Path(SIGNING).parent)] if SIGNING else [])])


def skip_without_needs(page: str, text: str | None = None) -> None:
    """Skip the test if there is not what a page uses."""
    text = text or (ROOT / page).read_text(encoding="utf-8")
    found = [name for name in PROGRAMS if re.search(rf"\b{name}\b", text)]
    missing = [name for name in found if shutil.which(name, path=search_path()) is None]
    missing += [name for name in PACKAGES.get(page, ()) if find_spec(name) is None]
    if missing:
        pytest.skip(f"the page uses {' and '.join(missing)}, not installed here")


def compared(ran: Iterable[tuple[Block, str]], *, to_the_letter: Collection[str] = ()) -> dict[str, int]:
    """Compare what blocks printed with what the page says; return how many answers each page has.

    In pages to the letter only what has an ellipsis may differ.
    """
    answers = [(block, printed) for block, printed in ran if block.answer is not None]
    for block, printed in answers:
        is_exact = block.page in to_the_letter and ANYTHING not in (block.answer or "")
        if block.page == PERF_ANALYZER_PAGE:
            fits = NUMBER.sub("N", printed).split() == NUMBER.sub("N", block.answer or "").split()
        else:
            fits = printed_as(block, printed) == expected(block) if is_exact else says(block, printed)
        assert fits, f"{block.page}: {block.text}\nprinted\n{printed}"
    return dict(Counter(block.page for block, _ in answers))


@pytest.mark.parametrize("page", REFERENCES)
def test_examples_print_what_the_page_says(tmp_path: Path, page: str) -> None:
    skip_without_needs(page)
    environment = fresh_environment(tmp_path / "home") | QUIET
    if page == "docs/devices.md":
        environment |= openvino_environment(tmp_path)
    ran = run_pages([page], tmp_path, environment)
    assert compared(ran, to_the_letter=[page]) == {page: REFERENCES[page]}


@pytest.mark.parametrize("pages", CHAINS.values(), ids=CHAINS)
def test_pages_work_as_printed_from_an_empty_home(tmp_path: Path, pages: dict[str, int]) -> None:
    for page in pages:
        skip_without_needs(page)
    environment = bare_environment(tmp_path)
    if PERF_ANALYZER_PAGE in pages:
        if PERF_ANALYZER is None:
            pytest.skip("perf_analyzer is neither named by PERF_ANALYZER nor on PATH")
        (tmp_path / "programs" / "perf_analyzer").symlink_to(Path(PERF_ANALYZER).absolute())
    exact = pages.keys() - {QUICK_START, PERF_ANALYZER_PAGE}
    assert compared(run_pages(pages, tmp_path, environment, copy_tree), to_the_letter=exact) == pages


def test_pages_after_the_quick_start_say_so_and_are_in_a_chain() -> None:
    """Such a page has no folder of its own: the quick start says where the server keeps its data."""
    run = {page for pages in CHAINS.values() for page in pages} - {QUICK_START}
    clients = {path.relative_to(ROOT).as_posix() for path in (ROOT / CLIENTS).glob("*.md")}
    index = f"{CLIENTS}/README.md"
    assert clients - {index} <= run
    assert blocks(index) == []
    assert all(f"({Path(page).name})" in (ROOT / index).read_text("utf-8") for page in clients - {index})
    for page in run:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert GOES_ON in text.replace("\n", " ").replace("../", ""), page
        assert " --data " not in "".join(block.text for block in blocks(page)), page


@pytest.mark.parametrize("page", GUIDES)
def test_guide_prints_what_it_says(tmp_path: Path, page: str) -> None:
    skip_without_needs(page)
    environment = fresh_environment(tmp_path / "home") | QUIET
    environment["PATH"] = os.pathsep.join([environment["PATH"], search_path()])
    assert compared(run_pages([page], tmp_path, environment)) == {page: GUIDES[page]}


def test_guides_name_their_starting_point() -> None:
    for page in (*GUIDES, *REFERENCES):
        before, _, _ = (ROOT / page).read_text(encoding="utf-8").partition("```sh")
        before = before.replace("\n", " ").replace("../", "")
        assert "in the environment of the [quick start](quick-start.md)" in before, page


def test_readme_of_the_examples_prints_what_it_says(tmp_path: Path) -> None:
    skip_without_needs(EXAMPLES)

    def copy(here: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "examples", here / "examples", ignore=ignored)

    environment = fresh_environment(tmp_path / "home") | QUIET
    assert compared(run_pages([EXAMPLES], tmp_path, environment, copy)) == {EXAMPLES: 4}


def cell_outputs(notebook: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each cell that printed something, and what it printed."""
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        streams = [
            "".join(each["text"]) for each in cell.get("outputs", ()) if each["output_type"] == "stream"
        ]
        if streams:
            yield number, "".join(streams).replace("\r\n", "\n")


def test_notebook_in_jupyter_prints_what_it_shows(tmp_path: Path) -> None:
    """`jupyter execute` runs all cells in a kernel of its own, and fails at the first error."""
    skip_without_needs("the notebook", "python")
    ran = tmp_path / "ran.ipynb"
    jupyter = Path(sys.executable).with_name("jupyter-execute")
    finished = subprocess.run(
        [jupyter, f"--timeout={LIMIT_S:.0f}", f"--output={ran}", NOTEBOOK],
        cwd=tmp_path,
        env=fresh_environment(tmp_path / "home") | QUIET,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    shown = list(cell_outputs(NOTEBOOK))
    assert len(shown) == 8
    assert list(cell_outputs(ran)) == shown


def test_every_page_with_commands_is_run() -> None:
    run = {*REFERENCES, *GUIDES, *(page for pages in CHAINS.values() for page in pages)}
    have = {
        page.relative_to(ROOT).as_posix()
        for page in (ROOT / "docs").rglob("*.md")
        if COMMANDS.search(page.read_text(encoding="utf-8"))
    }
    assert have - OF_OTHERS == run - OF_OTHERS


def test_block_without_a_test_says_so_and_names_versions() -> None:
    before = [
        line
        for page in (ROOT / "docs").rglob("*.md")
        for line in NOT_RUN.findall(page.read_text(encoding="utf-8"))
    ]
    assert len(before) == 4
    for line in before:
        assert "ot run by a test" in line, line
        assert re.search(r"\d+\.\d+\.\d+|the same versions", line), line


@cache
def operations() -> set[tuple[str, str]]:
    """Return the methods and paths of the API, with a star for each parameter."""
    text = (ROOT / "openapi.yaml").read_text(encoding="utf-8")
    paths = yaml.load(text, yaml.CSafeLoader)["paths"]
    return {
        (method.upper(), re.sub(r"\{\w+\}", "*", path)) for path, item in paths.items() for method in item
    }


@pytest.mark.parametrize("page", MIGRATIONS)
def test_tables_beside_another_server_name_what_exists(page: str) -> None:
    ours = "\n".join(
        line.split("|", 2)[2]
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    )
    reference = "".join((ROOT / f"docs/{name}.md").read_text("utf-8") for name in ("cli", "configuration"))
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    assert options
    assert {name for name in options if f"`{name}" not in reference} == set()
    series = {name for family in FAMILIES for name in (family.name, *family.series)}
    assert set(re.findall(r"loadledger_\w+", ours)) <= series
    named = re.findall(r"`([A-Z]+) (/[\w/]+)`", ours)
    assert {(method, re.sub(r"/(m|\d+)(?=/|$)", "/*", path)) for method, path in named} <= operations()


def test_readme_and_quick_start_install_alike() -> None:
    first = blocks(QUICK_START)[0].text.splitlines()[0]
    assert first in (ROOT / "README.md").read_text(encoding="utf-8")
