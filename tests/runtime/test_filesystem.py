"""Calls of the file system: in their order by model, bounded in all, and nobody waits for one that hangs."""

import asyncio
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from support.workers import LIMIT_S, until

from runtime.repository import FileSystemPool, RepositoryBusy

SHORT_S = 0.05


class Hanging:
    """Calls that hang until they are let go."""

    def __init__(self) -> None:
        self.began = 0
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.began += 1
        self.may_end.wait()
        return "late"


async def test_call_returns_or_raises_what_it_finds() -> None:
    pool = FileSystemPool()
    assert await pool.run("m", lambda: 3, LIMIT_S) == 3
    with pytest.raises(ZeroDivisionError):
        await pool.run("m", lambda: 1 // 0, LIMIT_S)
    calls = (pool.run("m", partial(abs, number), LIMIT_S) for number in range(99))
    assert await asyncio.gather(*calls) == [*range(99)]


async def test_calls_of_one_model_run_one_after_the_other() -> None:
    pool, hanging = FileSystemPool(), Hanging()
    first = asyncio.ensure_future(pool.run("m", hanging, LIMIT_S))
    second = asyncio.ensure_future(pool.run("m", hanging, LIMIT_S))
    await until(lambda: hanging.began > 0)
    assert await pool.run("other", lambda: 3, LIMIT_S) == 3
    assert hanging.began == 1
    hanging.may_end.set()
    assert [await first, await second] == ["late", "late"]
    assert hanging.began == 2


async def test_calls_that_hang_refuse_others_at_the_bound_only() -> None:
    pool, hanging = FileSystemPool(max_threads=2), Hanging()
    for key in ("a", "b"):
        with pytest.raises(RepositoryBusy, match=f"'{key}' did not answer within 0.05 s"):
            await pool.run(key, hanging, SHORT_S)
        if key == "a":
            assert await pool.run("c", lambda: 3, LIMIT_S) == 3
    with pytest.raises(RepositoryBusy, match="'c' did not answer"):
        await pool.run("c", lambda: 3, SHORT_S)
    with pytest.raises(RepositoryBusy, match="'a' has not answered an earlier call yet"):
        await pool.run("a", lambda: 3, LIMIT_S)
    assert hanging.began == 2
    hanging.may_end.set()
    await until(lambda: not pool._late)
    assert [await pool.run(key, lambda: 3, LIMIT_S) for key in ("a", "b", "c")] == [3, 3, 3]


async def test_calls_wait_for_as_many_as_come_before_them() -> None:
    pool = FileSystemPool(max_threads=1)
    calls = [pool.run(f"m{number}", partial(time.sleep, 0.01), LIMIT_S) for number in range(20)]
    waiting = asyncio.ensure_future(pool.run("m0", lambda: 3, LIMIT_S))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await asyncio.gather(*calls) == [None] * 20
    assert waiting.cancelled()
    assert await pool.run("m0", lambda: 3, LIMIT_S) == 3


def test_process_ends_though_a_call_hangs() -> None:
    script = """
import asyncio, threading
from runtime.repository import FileSystemPool
async def main():
    asyncio.create_task(FileSystemPool().run("m", threading.Event().wait, 99))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LIMIT_S)
