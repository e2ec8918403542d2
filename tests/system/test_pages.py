"""The examples of the documentation and of `examples/` are run, and their output is compared."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from support.openvino import openvino_environment
from support.pages import (
    FAMILIES,
    LIMIT_S,
    ROOT,
    Block,
    blocks,
    expected,
    printed_as,
    run_alone,
    run_page,
    says,
)
from support.servers import QUIET, bare_environment, copy_examples, copy_tree, fresh_environment, standing
from yarl import URL

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
    "docs/how-to/run-behind-an-identity-provider.md": 4,
    "docs/how-to/sign-and-approve-models.md": 8,
    "docs/how-to/swap-without-downtime.md": 6,
    "docs/how-to/use-tritons-client.md": 1,
}
"""Pages that start their own servers, and how many answers are compared."""
PACKAGES = {
    "docs/how-to/get-a-model-into-onnx.md": ("lightgbm", "onnxmltools", "skl2onnx", "xgboost"),
    "docs/how-to/use-tritons-client.md": ("tritonclient",),
    EXAMPLES: ("skl2onnx", "sklearn"),
    "the notebook": ("ipykernel", "nbclient", "PIL", "sklearn"),
}
"""Packages that pages import besides ours and its requirements."""
STANDING: dict[str, tuple[str, dict[str, int]]] = {
    "events": ("", {"docs/events.md": 5, "docs/time-travel.md": 5, "docs/verify-it-yourself.md": 7}),
    "client": ("", {"docs/client.md": 9, "docs/models.md": 11}),
    "devices": ("", {"docs/devices.md": 6}),
    "memory": (
        "--max-loaded 1 --evict idle --min-residency-s 0 --on-demand on",
        {"docs/memory.md": 5},
    ),
}
"""Options of a server, and the pages that need it, one after the other: how many answers are compared."""
MIGRATIONS = [page for page in GUIDES if "come-from" in page]
"""Guides whose tables have another server's words in the first column and ours beside them."""
ELSEWHERE = {
    "docs/clients/curl.md": "tests/clients/test_docs.py",
    "docs/clients/kserve.md": "tests/clients/test_docs.py",
    "docs/clients/perf_analyzer.md": "tests/clients/test_docs.py",
    "docs/clients/tritonclient.md": "tests/clients/test_docs.py",
}
"""Pages whose commands other tests run."""
OF_OTHERS = {f"docs/{name}.md" for name in ("cli", "configuration", "console", "deployment")} | {
    f"docs/{name}.md" for name in ("logs", "metrics")
}
"""Reference pages, and pages for root, containers or a cluster; other tests hold them to the code."""
NOT_RUN = re.compile(r"^(.*)\n\n~~~(?:sh|python)\n", re.MULTILINE)
"""The line before a block that is not run."""
COMMANDS = re.compile(r"^```(sh|python)$", re.MULTILINE)
PROGRAMS = ("curl", "openssl", "model_signing")
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


@pytest.mark.parametrize(("options", "pages"), STANDING.values(), ids=STANDING)
def test_examples_print_what_the_page_says(tmp_path: Path, options: str, pages: dict[str, int]) -> None:
    for page in pages:
        skip_without_needs(page)
    copy_examples(tmp_path)
    plugin = openvino_environment(tmp_path) if "docs/devices.md" in pages else None
    with standing(tmp_path / "examples", *options.split(), environment=plugin) as server:
        for page, comparisons in pages.items():
            assert not options or f"`{options}`" in (ROOT / page).read_text()
            port = str(URL(server.url).port)
            ran = run_page(page, tmp_path, port, fresh_environment(tmp_path / "home"))
            answers = [(block, printed) for block, printed in ran if block.answer is not None]
            for block, printed in answers:
                assert printed_as(block, printed) == expected(block), f"{page}: {block.text}"
            assert len(answers) == comparisons, page


def compared(ran: Iterable[tuple[Block, str]]) -> int:
    """Compare what blocks printed with what the page says; return how many answers there were."""
    answers = [(block, printed) for block, printed in ran if block.answer is not None]
    for block, printed in answers:
        assert says(block, printed), f"{block.text}\nprinted\n{printed}"
    return len(answers)


@pytest.mark.parametrize("page", GUIDES)
def test_guide_prints_what_it_says(tmp_path: Path, page: str) -> None:
    skip_without_needs(page)
    environment = fresh_environment(tmp_path / "home") | QUIET
    environment["PATH"] = os.pathsep.join([environment["PATH"], search_path()])
    assert compared(run_alone(page, tmp_path, environment)) == GUIDES[page]


def test_guides_name_their_starting_point() -> None:
    for page in GUIDES:
        before, _, _ = (ROOT / page).read_text(encoding="utf-8").partition("```sh")
        assert "in the environment of the [quick start](../quick-start.md)" in before.replace("\n", " "), page


def test_quick_start_works_in_a_copy_of_the_tree(tmp_path: Path) -> None:
    skip_without_needs(QUICK_START)
    assert compared(run_alone(QUICK_START, tmp_path, bare_environment(tmp_path), copy_tree)) == 8


def test_readme_of_the_examples_prints_what_it_says(tmp_path: Path) -> None:
    skip_without_needs(EXAMPLES)

    def copy(here: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "examples", here / "examples", ignore=ignored)

    assert compared(run_alone(EXAMPLES, tmp_path, fresh_environment(tmp_path / "home") | QUIET, copy)) == 4


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
    on_servers = {page for _, pages in STANDING.values() for page in pages}
    run = {QUICK_START, *GUIDES, *on_servers, *ELSEWHERE}
    have = {
        page.relative_to(ROOT).as_posix()
        for page in (ROOT / "docs").rglob("*.md")
        if COMMANDS.search(page.read_text(encoding="utf-8"))
    }
    assert have - OF_OTHERS == run - OF_OTHERS
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / test).read_text(encoding="utf-8")


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
