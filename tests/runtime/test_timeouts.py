"""Timeouts of waiting for an answer; that stalls do not count is in process/test_stalls.py."""

import asyncio
import errno

import pytest
from support.workers import LIMIT_S

from runtime.timeouts import Timeout, TimeoutExpired, timeout

SHORT_S = 0.2


async def test_timeout_without_progress_expires() -> None:
    with pytest.raises(TimeoutExpired):
        async with timeout(SHORT_S, lambda: 0):
            await asyncio.Event().wait()


async def test_timeout_begins_anew_with_progress() -> None:
    checks, ended = 0, asyncio.Event()

    def progress() -> int:
        nonlocal checks
        checks += 1
        if checks == 5:  # each after a tenth of a second
            ended.set()
        return checks

    async with timeout(SHORT_S, progress):
        await ended.wait()


async def test_timeout_error_of_the_work_is_raised_as_it_is() -> None:
    with pytest.raises(TimeoutError, match="of the file system") as raised:
        async with timeout(LIMIT_S):
            raise TimeoutError(errno.ETIMEDOUT, "of the file system")
    assert not isinstance(raised.value, TimeoutExpired)


async def test_cancelled_timeout_does_not_call_back() -> None:
    passed, later = asyncio.Event(), asyncio.Event()
    cancelled = Timeout(0, passed.set)
    Timeout(SHORT_S, later.set)
    cancelled.cancel()
    await later.wait()
    assert not passed.is_set()
