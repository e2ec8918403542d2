"""What `loadledger demo` says when it is not so, and the figure of memory that it checks."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.process import LIMIT_S, MODULE, clean_environment
from support.workers import freeze, until

from bench.memory import tree_bytes
from loadledger.cli import demo
from loadledger.problems import NotFound, ServerUnreachable
from runtime.memory import descendants

MB = 2**20


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository without any model."""
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.fixture
def killed(repository: Path, tmp_path: Path) -> Iterator[demo._Server]:
    """A server that the test kills, in one way or another, which is told at the end."""
    told = "ended with -9"
    with pytest.raises(demo._Failed, match=told), demo._serving(repository, tmp_path / "data") as server:
        yield server


@contextmanager
def somebody_else() -> Iterator[None]:
    """A process that maps the libraries that the server and its fork server have mapped."""
    code = "import onnxruntime, server.app; print('ready', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield
    process.communicate("\n", timeout=LIMIT_S)


async def test_a_demo_whose_server_dies_says_what_is_not_so_and_ends_with_1() -> None:
    process = await asyncio.create_subprocess_exec(
        *(*MODULE, "demo"),
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await until(lambda: bool(descendants(process.pid)))
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode == 1
    assert b"not so: " in out
    assert b"Traceback" not in err


def test_an_error_of_the_server_is_told_with_its_detail(repository: Path, tmp_path: Path) -> None:
    with (
        demo._serving(repository, tmp_path / "data") as server,
        pytest.raises(NotFound, match=r"404: .*'digits'"),
    ):
        server.load(1)


def test_a_server_that_does_not_answer_is_told(killed: demo._Server) -> None:
    killed.process.kill()
    killed.process.wait()
    with pytest.raises(ServerUnreachable, match="refused"):
        killed.unload()


async def test_a_server_that_does_not_stop_is_told_and_killed(killed: demo._Server) -> None:
    await freeze(killed.process.pid)
    with pytest.raises(demo._Failed, match=r"stops within 0\.1 s"):
        demo._stop(killed.process, limit_s=0.1)


def test_its_figure_of_memory_is_not_moved_by_others_who_map_the_same_libraries(
    repository: Path, tmp_path: Path
) -> None:
    with demo._serving(repository, tmp_path / "data") as server:
        alone = server.memory_bytes()
        with somebody_else():
            assert abs(server.memory_bytes() - alone) < MB
        assert abs(server.memory_bytes() - alone) < MB
        assert alone < tree_bytes(server.process.pid)
