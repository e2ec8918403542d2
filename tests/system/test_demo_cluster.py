"""`loadledger demo --cluster`: real nodes, a real PostgreSQL server, and what is left of them: nothing."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.postgres import require_programs
from support.servers import CTRL_C, LIMIT_S, MODULE, at_terminal, clean_environment
from support.workers import until

from loadledger.cli import postgres
from loadledger.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = "loadledger demo --cluster"


@pytest.fixture
def surroundings() -> dict[str, str]:
    """An environment with PostgreSQL's programs on PATH."""
    environment = clean_environment()
    return environment | {"PATH": os.pathsep.join([str(require_programs()), environment["PATH"]])}


def find_folder(shown: str) -> Path:
    """Return the folder that a demo names."""
    found = re.search(r"^PostgreSQL \S+ has the ledger, in (\S+),", shown, re.MULTILINE)
    assert found, shown
    return Path(found[1])


def list_processes(folder: Path) -> list[bytes]:
    """Return the command lines of all processes that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found.append(entry.read_bytes())
    return [line for line in found if os.fsencode(folder) in line]


def test_readmes_cluster_demo_answers_through_kill_and_leaves_nothing(surroundings: dict[str, str]) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Several machines\n")[2]
    [line] = re.findall(r"^```sh\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert line == f".venv/bin/pip install '.[postgres]' && .venv/bin/{COMMAND}\n"
    done = subprocess.run(
        [*MODULE, *COMMAND.split()[1:]],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"^kill -9 of (n\d), which has (digits-\w.*)$", done.stdout, re.MULTILINE)
    moved = re.search(r"^after [\d.]+ s .* they are loaded: (.*)$", done.stdout, re.MULTILINE)
    assert killed
    assert moved
    assert re.findall(r"digits-\w", moved[1]) == killed[2].split(", ")
    assert killed[1] not in moved[1]
    assert re.search(r"digits-a at n\d and n\d", moved[1])
    assert re.search(r"^digits-a meanwhile: [1-9]\d* answers, 0 failed, ", done.stdout, re.MULTILINE)
    assert re.search(rf"NodeLost .* {killed[1]} epoch 1", done.stdout)
    assert len(re.findall(r"^asked at n\d, each model reads 599 .* digits$", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^(?:database|replica of n\d) verified: ", done.stdout, re.MULTILINE)) == 4
    folder = find_folder(done.stdout)
    assert not folder.exists()
    assert not list_processes(folder)


async def test_cluster_demo_after_ctrl_c_leaves_nothing(surroundings: dict[str, str]) -> None:
    with at_terminal(*COMMAND.split()[1:], environment=surroundings) as terminal:
        await terminal.until("kill -9 of n")
        folder = find_folder(terminal.plain)
        running = list_processes(folder)
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
    assert len(running) >= 3  # PostgreSQL, and nodes
    assert "Traceback" not in terminal.plain
    assert not folder.exists()
    assert not list_processes(folder)


async def test_killed_cluster_demo_leaves_no_process(surroundings: dict[str, str]) -> None:
    with at_terminal(*COMMAND.split()[1:], environment=surroundings) as terminal:
        await terminal.until("and loaded after")  # soon after "asked at", a node is killed
        folder = find_folder(terminal.plain)
        running = list_processes(folder)
        os.kill(terminal.pid, signal.SIGKILL)
        assert await terminal.end() == -signal.SIGKILL
    assert len(running) >= 4  # PostgreSQL, and nodes
    await until(lambda: not list_processes(folder))
    shutil.rmtree(folder)


def test_cluster_demo_without_postgresql_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path)
    done = CliRunner().invoke(main, COMMAND.split()[1:])
    assert done.exit_code == 2
    assert not done.stdout
    [line] = done.stderr.splitlines()
    assert "apt install postgresql" in line


def test_programs_of_newest_postgresql_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version in ("9.6", "15", "16"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin" / "initdb").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path)
    assert postgres.find_programs() == tmp_path / "16" / "bin"
