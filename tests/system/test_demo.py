"""`loadledger demo`: its failures, and the memory figure that it checks."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.servers import LIMIT_S, MODULE, clean_environment
from support.workers import freeze, until

from loadledger.cli import demo
from runtime.memory import PROC, list_descendants, parse_field

MB = 2**20


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@contextmanager
def other_process() -> Iterator[None]:
    """A process with the libraries of the server and its fork server."""
    code = "import onnxruntime, server.app; print('ready', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield
    process.communicate("\n", timeout=LIMIT_S)


async def test_demo_whose_server_dies_exits_with_1() -> None:
    process = await asyncio.create_subprocess_exec(
        *(*MODULE, "demo"),
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await until(lambda: bool(list_descendants(process.pid)))
    os.kill(list_descendants(process.pid)[0], signal.SIGKILL)
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode == 1
    assert b"failed: " in out
    assert b"Traceback" not in err


async def test_server_that_does_not_stop_is_killed(repository: Path, tmp_path: Path) -> None:
    context = demo._serve(repository, tmp_path / "data")
    server = context.__enter__()
    await freeze(server.process.pid)
    with pytest.raises(demo.DemoFailed, match=r"stops within 0\.1 s"):
        demo._stop(server.process, limit_s=0.1)
    with pytest.raises(demo.DemoFailed, match="ended with -9"):
        context.__exit__(None, None, None)


async def test_memory_figure_ignores_other_processes_with_same_libraries(
    repository: Path, tmp_path: Path
) -> None:
    with demo._serve(repository, tmp_path / "data") as server:
        alone = server.memory_bytes()
        with other_process():
            assert abs(server.memory_bytes() - alone) < MB
        assert abs(server.memory_bytes() - alone) < MB
        rollups = [
            (PROC / str(pid) / "smaps_rollup").read_text()
            for pid in (server.process.pid, *list_descendants(server.process.pid))
        ]
        assert alone < sum(parse_field(rollup, "Pss") for rollup in rollups)  # which has the libraries
