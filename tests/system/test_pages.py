"""The pages about the server itself: their examples are run, and what they print is compared."""

import os
import re
import select
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from support import pages
from support.pages import ROOT, blocks, expected, printed_as, run_alone, run_page, says
from support.servers import QUIET, bare_environment, copy_examples, copy_tree, fresh_environment, standing
from yarl import URL

QUICK_START = "docs/quick-start.md"
GUIDES = {
    "docs/how-to/answer-an-auditor.md": 5,
    "docs/how-to/back-up-and-restore.md": 4,
    "docs/how-to/find-out-what-is-wrong.md": 6,
    "docs/how-to/fit-many-models-in-little-memory.md": 5,
    "docs/how-to/run-behind-an-identity-provider.md": 4,
    "docs/how-to/swap-without-downtime.md": 6,
    "docs/how-to/use-tritons-client.md": 1,
}
"""And how many of their answers are compared."""
STANDING = {
    "docs/models.md": ("", 4),
    "docs/events.md": ("", 5),
    "docs/memory.md": ("--max-loaded 1 --evict idle --min-residency-s 0 --on-demand on", 5),
    "docs/time-travel.md": ("", 5),
    "docs/prepared.md": ("--prepare on", 2),
    "docs/client.md": ("", 6),
}
"""Pages that go on where the quick start has started a server, with these options, and how many answers."""
ELSEWHERE = {
    "docs/verify-it-yourself.md": "tests/system/test_verify_it_yourself.py",
    "docs/clients/curl.md": "tests/clients/test_docs.py",
    "docs/clients/kserve.md": "tests/clients/test_docs.py",
    "docs/clients/perf_analyzer.md": "tests/clients/test_docs.py",
    "docs/clients/tritonclient.md": "tests/clients/test_docs.py",
}
"""Pages whose commands other tests run."""
OF_OTHERS = {f"docs/{name}.md" for name in ("cli", "configuration", "console", "deployment")} | {
    f"docs/{name}.md" for name in ("logs", "metrics")
}
"""Reference pages, and what takes root, containers or a cluster: held to the code by tests of their own."""
COMMANDS = re.compile(r"^```(sh|python)$", re.MULTILINE)
PROGRAMS = ("curl", "openssl")


def skip_without_programs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [name for name in PROGRAMS if re.search(rf"\b{name}\b", text) and shutil.which(name) is None]
    if missing:
        pytest.skip(f"the page uses {' and '.join(missing)}, not installed here")


@pytest.mark.parametrize(
    ("page", "options", "comparisons"), [(page, *rest) for page, rest in STANDING.items()]
)
def test_the_examples_of_a_page_do_what_it_says(
    tmp_path: Path, page: str, options: str, comparisons: int
) -> None:
    assert not options or f"`{options}`" in (ROOT / page).read_text()
    skip_without_programs(page)
    copy_examples(tmp_path)
    with standing(tmp_path / "examples", *options.split()) as server:
        port = str(URL(server.url).port)
        compared = 0
        for block, printed in run_page(page, tmp_path, port, fresh_environment(tmp_path / "home")):
            if block.answer is not None:
                assert printed_as(block, printed) == expected(block), block.text
                compared += 1
    assert compared == comparisons


@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_guide_do_what_it_says_from_nothing(tmp_path: Path, page: str) -> None:
    skip_without_programs(page)
    if "triton" in page:
        pytest.importorskip("tritonclient.http", reason="the page uses tritonclient, not installed here")
    compared = 0
    for block, printed in run_alone(page, tmp_path, fresh_environment(tmp_path / "home") | QUIET):
        if block.answer is not None:
            assert says(block, printed), f"{block.text}\nprinted\n{printed}"
            compared += 1
    assert compared == GUIDES[page]


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_says_where_its_commands_start(page: str) -> None:
    before, _, _ = (ROOT / page).read_text(encoding="utf-8").partition("```sh")
    assert "in the environment of the [quick start](../quick-start.md)" in before.replace("\n", " ")


def test_the_quick_start_leads_from_a_copy_of_the_tree_to_its_end(tmp_path: Path) -> None:
    skip_without_programs(QUICK_START)
    compared = 0
    for block, printed in run_alone(QUICK_START, tmp_path, bare_environment(tmp_path), copy_tree):
        if block.answer is not None:
            assert says(block, printed), f"{block.text}\nprinted\n{printed}"
            compared += 1
    assert compared == 8


def test_whatever_has_commands_is_run_by_a_test() -> None:
    run = {QUICK_START, *GUIDES, *STANDING, *ELSEWHERE}
    have = {
        page.relative_to(ROOT).as_posix()
        for page in (ROOT / "docs").rglob("*.md")
        if COMMANDS.search(page.read_text(encoding="utf-8"))
    }
    assert have - OF_OTHERS == run - OF_OTHERS
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / test).read_text(encoding="utf-8")


def test_the_readme_and_the_quick_start_install_alike() -> None:
    first = blocks(QUICK_START)[0].text.splitlines()[0]
    assert first in (ROOT / "README.md").read_text(encoding="utf-8")


# How pages are run.


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """A page of one block of commands in a tree of its own."""
    monkeypatch.setattr(pages, "ROOT", folder)
    (folder / "examples").mkdir(parents=True)
    (folder / "page.md").write_text(f"```sh\n{text}\n```\n", encoding="utf-8")
    return "page.md"


def test_a_page_whose_port_is_taken_is_run_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        serve = "loadledger serve --repository examples --data data"
        port = f"808{taken % 10}"
        text = f"test {port} != {taken} || {serve} --port {port} > server.log 2>&1\necho {port}"
        page = made(tmp_path / "tree", monkeypatch, text)
        monkeypatch.setattr(pages, "some_ports", lambda: [taken // 10, pages.PORTS[0]])
        [(_, printed)] = run_alone(page, tmp_path / "run", fresh_environment(tmp_path))
    assert printed == f"{port}\n"
    assert pages.IN_USE in (tmp_path / "run" / str(taken // 10) / pages.LOG).read_text()


def test_what_a_page_left_running_is_ended_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = made(tmp_path / "tree", monkeypatch, "sleep 1000 > /dev/null 2>&1 &\necho $!")
    [(_, printed)] = run_alone(page, tmp_path / "run", fresh_environment(tmp_path))
    with suppress(ProcessLookupError):  # there is nothing left of it, or what nobody has asked the end of
        pidfd = os.pidfd_open(int(printed))
        ended, _, _ = select.select([pidfd], [], [], pages.LIMIT_S)
        os.close(pidfd)
        assert ended


def test_a_page_that_does_not_end_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = made(tmp_path / "tree", monkeypatch, "sleep 1000")
    monkeypatch.setattr(pages, "LIMIT_S", 0.1)
    with pytest.raises(AssertionError, match="has not ended in time"):
        list(run_alone(page, tmp_path / "run", fresh_environment(tmp_path)))
