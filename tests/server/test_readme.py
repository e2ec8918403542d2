"""README.md says only what was run: its session is executed, and its answers and tables are compared."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.config import configuration_table
from server.errors import error_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SESSION = README.partition("## A first session")[2].partition("## Errors")[0]
BLOCK = re.compile(r"^```(sh|json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PORT = "8080"
END = "-- end of the block --"
VOLATILE = {"id", "position", "created_at", "started_at", "finished_at", "load_job_id"}
"""What differs from run to run; that it is there, and whether it is null, is compared all the same."""


class Shell:
    """A bash that keeps its variables and background jobs from block to block."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, block: str) -> str:
        """Run a block and return what it printed; its last command must not have failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{block}\nprintf '\\n%s %d\\n' '{END}' $?\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(END):
                assert line.split()[-1] == "0", "".join(lines)
                break
            lines.append(line)
        return "".join(lines)


@contextmanager
def shell(folder: Path) -> Iterator[Shell]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "--noprofile", "--norc"],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield Shell(process)
        finally:
            process.communicate("kill $(jobs -p); wait\n", timeout=60)


def test_every_example_of_the_session_does_what_the_readme_says(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the session is written with curl, which is not installed here")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    port, said, compared = str(free_port()), "", 0
    with shell(tmp_path) as bash:
        for kind, text in BLOCK.findall(SESSION):
            if kind == "sh":
                said = bash.send(text.replace(PORT, port))
            else:
                assert comparable(kind, said) == comparable(kind, text)
                compared += 1
    assert compared >= 8


def test_the_tables_are_what_the_code_has() -> None:
    assert configuration_table() in README
    assert error_table() in README


def comparable(kind: str, text: str) -> Any:
    """Return what has to be the same in each run."""
    if kind == "json":
        return _settled(json.loads(text))
    # The end of a swapped-out version runs beside what is asked next, so positions may differ.
    return sorted(line.split()[1:] for line in text.splitlines() if line)


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = {key for key in VOLATILE if value.get(key) is not None}
        return {key: "…" if key in hidden else _settled(item) for key, item in value.items()}
    return [_settled(item) for item in value] if isinstance(value, list) else value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
