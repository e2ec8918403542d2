"""`loadledger demo`: its failures, and the memory figure that it checks."""

import asyncio
import os
import signal

from support.servers import LIMIT_S, MODULE, clean_environment
from support.workers import until

from runtime.memory import list_descendants


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
