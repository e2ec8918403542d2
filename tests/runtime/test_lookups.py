"""Looks at the repository: in their order by model, bounded in all, and nobody waits for one that hangs."""

import asyncio
import errno
import gc
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from support import models
from support.mounts import hanging_mounts
from support.running import running
from support.workers import LIMIT_S, until

from events.commands import RequestLoad
from events.jobs import JobStatus
from events.types import LoadParameters
from runtime import lookups as lookups_module
from runtime.limits import PROGRESS_TICKS
from runtime.lookups import Lookups, RepositoryBusy, make_call, wait_with_progress
from runtime.process.pool import WorkerPool
from runtime.scheduler.view import Policy

SHORT_S = 0.05


class Hanging:
    """Looks that hang until they are let go."""

    def __init__(self) -> None:
        self.began = 0
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.began += 1
        self.may_end.wait()
        return "late"


@pytest.fixture
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups_module, "HANG_S", SHORT_S)
    monkeypatch.setattr(lookups_module, "CHECK_S", SHORT_S)


async def test_look_returns_or_raises_what_it_finds() -> None:
    lookups = Lookups()
    assert await lookups.run("m", lambda: 3, LIMIT_S) == 3
    with pytest.raises(ZeroDivisionError):
        await lookups.run("m", lambda: 1 // 0, LIMIT_S)
    looks = (lookups.run("m", partial(abs, number), LIMIT_S) for number in range(99))
    assert await asyncio.gather(*looks) == [*range(99)]
    assert not lookups._lanes


async def test_looks_of_one_model_run_one_after_the_other() -> None:
    lookups, hanging = Lookups(), Hanging()
    first = asyncio.ensure_future(lookups.run("m", hanging, LIMIT_S))
    second = asyncio.ensure_future(lookups.run("m", hanging, LIMIT_S))
    await until(lambda: hanging.began > 0)
    assert await lookups.run("other", lambda: 3, LIMIT_S) == 3
    assert hanging.began == 1
    hanging.may_end.set()
    assert [await first, await second] == ["late", "late"]
    assert hanging.began == 2


@pytest.mark.usefixtures("_short_limits")
async def test_looks_that_hang_refuse_others_at_the_bound_only() -> None:
    lookups, hanging = Lookups(max_threads=2), Hanging()
    late = []
    for key in ("a", "b"):
        with pytest.raises(RepositoryBusy, match=f"'{key}' did not answer within 0.05 s"):
            await lookups.run(key, hanging, SHORT_S)
        late.append(asyncio.ensure_future(lookups.run(key, hanging, LIMIT_S)))
        if key == "a":
            assert await lookups.run("c", lambda: 3, LIMIT_S) == 3
    for refused in (*late, lookups.run("c", lambda: 3, LIMIT_S)):
        with pytest.raises(RepositoryBusy):
            await refused
    with pytest.raises(RepositoryBusy, match="has not answered"):
        await lookups.run("a", lambda: 3, LIMIT_S)
    assert hanging.began == 2
    hanging.may_end.set()
    await until(lambda: not lookups._lanes)
    assert await lookups.run("a", lambda: 3, LIMIT_S) == 3


async def test_looks_wait_for_as_many_as_come_before_them() -> None:
    lookups = Lookups(max_threads=1)
    looks = [lookups.run(f"m{number}", partial(time.sleep, 0.01), LIMIT_S) for number in range(100)]
    waiting = asyncio.ensure_future(lookups.run("m0", lambda: 3, LIMIT_S))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await asyncio.gather(*looks) == [None] * 100
    assert waiting.cancelled()
    assert not lookups._lanes
    assert not lookups._free.locked()


async def test_work_may_take_long_as_long_as_it_goes_on() -> None:
    hanging, pieces = Hanging(), 0

    def progress() -> int:
        nonlocal pieces
        pieces += 1
        if pieces == 3 * PROGRESS_TICKS:  # three limits
            hanging.may_end.set()
        return pieces

    work, call = make_call(hanging, lambda: None)
    threading.Thread(target=call).start()
    assert await wait_with_progress("m", work, progress, SHORT_S) == "late"
    assert pieces >= 3 * PROGRESS_TICKS


async def test_work_without_progress_is_left_alone() -> None:
    hanging = Hanging()
    ended = asyncio.Event()
    work, call = make_call(hanging, ended.set)
    thread = threading.Thread(target=call)
    thread.start()
    with pytest.raises(RepositoryBusy, match="has given nothing to copy"):
        await wait_with_progress("m", work, lambda: 0, SHORT_S)
    assert not work.done()
    hanging.may_end.set()
    await ended.wait()
    assert await work == "late"


async def test_time_out_of_the_work_itself_is_raised() -> None:
    def work() -> None:
        raise TimeoutError(errno.ETIMEDOUT, "of the file system")

    answer, call = make_call(work, lambda: None)
    threading.Thread(target=call).start()
    with pytest.raises(TimeoutError, match="of the file system"):
        await wait_with_progress("m", answer, lambda: 0, LIMIT_S)


async def test_threads_are_reused_and_end_with_their_owner() -> None:
    lookups = Lookups()
    before = set(threading.enumerate())
    for _ in range(3):
        await lookups.run("m", lambda: None, LIMIT_S)
    [thread] = set(threading.enumerate()) - before
    del lookups
    gc.collect()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_process_ends_though_a_look_hangs() -> None:
    script = """
import asyncio, threading
from runtime.lookups import Lookups
async def main():
    asyncio.create_task(Lookups().run("m", threading.Event().wait, 99))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LIMIT_S)


async def test_hanging_models_do_not_delay_the_load_of_another(
    tmp_path: Path, shared_pool: WorkerPool
) -> None:
    root = tmp_path / "models"
    hanging = [root / f"h{number}" for number in range(6)]
    for folder in hanging:
        folder.mkdir(parents=True)
    models.save(models.add(1), root, "well")
    policy = Policy(loads_at_once=1, budget_bytes=10**9)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        with hanging_mounts(*hanging):
            for folder in hanging:
                await engine.log.submit(RequestLoad(folder.name, 1, (), "alice", LoadParameters()))
            assert (await engine.load("well")).status is JobStatus.COMPLETED
            assert len(engine.log.state.unended()) == len(hanging)
