"""README.md says only what was run: its session is executed, and its answers and tables are compared."""

import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
BLOCK_LIMIT_S = 120.0
"""Nothing here takes this long; it is there so that a loop without end fails and does not hang."""
PORTS = range(10_000, 30_000)
"""Below those that the kernel gives to who asks for any, so that nobody is given ours between tries."""
MAX_TRIES = 5
STARTED = "until test -s server.log || ! kill -0 $!; do sleep 0.05; done"
"""In the session's shell: until the server has said that it is ready, or has ended."""
VOLATILE = {"id", "position", "created_at", "started_at", "finished_at", "load_job_id"}
"""What differs from run to run; that it is there, and whether it is null, is compared all the same."""


class Shell:
    """A bash that keeps its variables and background jobs from block to block."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send(self, block: str, *, limit_s: float = BLOCK_LIMIT_S) -> str:
        """Run a block and return what it printed; it must end in time, and not fail."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{block}\nprintf '\\n%s %d\\n' '{END}' $?\n".encode())
        self._process.stdin.flush()
        deadline, said = time.monotonic() + limit_s, ""
        while not (end := re.search(rf"^{END} (\d+)\n", said, re.MULTILINE)):
            said += self._read(deadline, block, said)
        assert end[1] == "0", said
        return said[: end.start()]

    def _read(self, deadline: float, block: str, said: str) -> str:
        assert self._process.stdout is not None
        in_time = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert in_time, f"has not ended in time:\n{block}\n{said}"
        data = os.read(self._process.stdout.fileno(), 65536)
        assert data, f"the shell has ended:\n{block}\n{said}"
        return data.decode()


@contextmanager
def shell(folder: Path) -> Iterator[Shell]:
    """Start a bash; in the end it and all that it has started are killed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "--noprofile", "--norc"],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with process:
        try:
            yield Shell(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_every_example_of_the_session_does_what_the_readme_says(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the session is written with curl, which is not installed here")
    (_, start), *blocks = BLOCK.findall(SESSION)
    said, compared = "", 0
    with started(tmp_path, start, some_ports()) as (bash, port):
        for kind, text in blocks:
            if kind == "sh":
                said = bash.send(text.replace(PORT, port))
            else:
                assert comparable(kind, said) == comparable(kind, text)
                compared += 1
    assert compared >= 8


def test_a_session_whose_port_is_taken_goes_on_with_another(tmp_path: Path) -> None:
    (_, start), *_ = BLOCK.findall(SESSION)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with started(tmp_path, start, [taken, *some_ports()]) as (_, port):
            assert port != str(taken)


def test_a_block_without_end_is_ended_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    with shell(tmp_path) as bash:
        child = int(bash.send("sleep 1000 & echo $!").split()[-1])
        pidfd = os.pidfd_open(child)
        with pytest.raises(AssertionError, match="has not ended in time"):
            bash.send("while true; do :; done", limit_s=0.1)
    assert select.select([pidfd], [], [], BLOCK_LIMIT_S)[0]
    os.close(pidfd)


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


@contextmanager
def started(folder: Path, block: str, ports: list[int]) -> Iterator[tuple[Shell, str]]:
    """Run the block whose first line starts the server, on the first port that nobody has; give both."""
    begin, _, rest = block.partition("\n")
    for port in map(str, ports):
        here = folder / port
        shutil.copytree(ROOT / "examples", here / "examples")
        with shell(here) as bash:
            if listens(bash, begin.replace(PORT, port), here):
                bash.send(rest.replace(PORT, port))
                yield bash, port
                return
    pytest.fail(f"all of {ports} are taken")


def some_ports() -> list[int]:
    return random.sample(PORTS, MAX_TRIES)


def listens(bash: Shell, begin: str, folder: Path) -> bool:
    """Start the server; False if somebody else has its port."""
    assert begin.endswith("> server.log &")
    said = bash.send(f"{begin}\n{STARTED}")
    if (folder / "server.log").stat().st_size:
        return True
    assert "address already in use" in said, said
    return False
