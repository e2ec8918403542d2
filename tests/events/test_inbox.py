"""What waits for one coroutine: taken in order, all at once, and never overslept."""

import asyncio

import pytest

from events.log import Inbox

LIMIT_S = 60
"""For what cannot take long: only against hanging."""


async def test_what_was_put_in_is_taken_in_order_and_up_to_the_limit() -> None:
    inbox = Inbox[int]()
    for number in range(5):
        inbox.put(number)
    assert len(inbox) == 5
    assert inbox.take(2) == [0, 1]
    async with asyncio.timeout(LIMIT_S):
        await inbox.wait()  # for there is more
    assert inbox.take(7) == [2, 3, 4]
    assert inbox.take() == []


async def test_a_reader_sleeps_until_something_is_there() -> None:
    inbox = Inbox[str]()
    reader = asyncio.create_task(inbox.wait())
    await asyncio.sleep(0)
    assert not reader.done()
    inbox.put("a")
    inbox.put("b")
    async with asyncio.timeout(LIMIT_S):
        await reader
    assert inbox.take() == ["a", "b"]


async def test_a_reader_that_took_everything_sleeps_again() -> None:
    inbox = Inbox[str]()
    inbox.put("a")
    inbox.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await inbox.wait()


async def test_a_call_wakes_the_reader_though_nothing_is_there() -> None:
    inbox = Inbox[str]()
    reader = asyncio.create_task(inbox.wait())
    await asyncio.sleep(0)
    inbox.call()
    async with asyncio.timeout(LIMIT_S):
        await reader
    assert inbox.take() == []
