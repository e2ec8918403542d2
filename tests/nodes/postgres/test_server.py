"""The PostgreSQL servers of tests end with the process that began them, and fail where they are missing."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from support.postgres import require_programs
from support.workers import until, wait_gone

TESTS = Path(__file__).parents[2]
OWNER = """
import asyncio
from support.postgres import postgres_server

async def main():
    async with postgres_server() as server:
        print(server.home, server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""A process that starts a server and does not end it."""


async def test_server_and_its_folder_end_with_their_killed_owner() -> None:
    require_programs()
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = (sys.executable, "-c", OWNER)
    owner = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        assert owner.stdout is not None
        home, pid = (await owner.stdout.readline()).decode().split()
        server = os.pidfd_open(int(pid))
    finally:
        owner.kill()
        await owner.wait()
    assert await asyncio.to_thread(wait_gone, [server])
    await until(lambda: not Path(home).exists())


def test_missing_programs_fail_where_ci_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSTGRES", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="no initdb"):
        require_programs()
