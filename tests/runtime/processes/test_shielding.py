"""What has to come to its end does, whatever becomes of the task that waits for it."""

import asyncio
import threading

import pytest

from runtime.processes.shielding import whole


async def test_a_task_that_is_cancelled_waits_for_what_has_to_end() -> None:
    may_end, ended = threading.Event(), list[str]()

    def work() -> None:
        may_end.wait()
        ended.append("well")

    task = asyncio.create_task(whole(asyncio.to_thread(work)))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["well"]


async def test_what_it_came_to_is_returned_or_raised() -> None:
    assert await whole(asyncio.to_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        await whole(asyncio.to_thread(lambda: 1 // 0))
