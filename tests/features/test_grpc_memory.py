"""Calls that wait for room for their messages: who goes on, who is refused, and what is left."""

import asyncio

import pytest

from features.grpc import memory
from features.grpc.errors import CallRefused
from features.grpc.memory import CallMemory, MessageRoom

LARGEST = 2**40
"""More than this process takes meanwhile, so that only what is counted decides."""


def new_room(messages: int = 2) -> MessageRoom:
    return MessageRoom(messages * LARGEST, LARGEST)


def of(room: MessageRoom, connection: str) -> CallMemory:
    return CallMemory(room, connection.partition(":")[0], connection)


async def started(
    room: MessageRoom, calls: list[CallMemory], *, is_probe: bool = False
) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(room.admit(call, is_probe=is_probe)) for call in calls]
    await asyncio.sleep(0)
    return tasks


async def test_connections_take_turns_and_newest_calls_go_first() -> None:
    room, order = new_room(1), list[str]()
    busy = of(room, "z")
    await room.admit(busy)

    async def read(connection: str, name: str) -> None:
        call = of(room, connection)
        await room.admit(call)
        order.append(name)
        room.has_arrived(call)

    tasks = list[asyncio.Task[None]]()
    for connection, name in (("a:1", "a1"), ("a:1", "a2"), ("a:1", "a3"), ("b:1", "b1")):
        tasks.append(asyncio.create_task(read(connection, name)))
        await asyncio.sleep(0)
    room.has_arrived(busy)
    await asyncio.gather(*tasks)
    assert order == ["a3", "b1", "a2", "a1"]


async def test_probe_goes_on_where_others_wait() -> None:
    room = new_room(2)
    held = [of(room, "a") for _ in range(2)]
    for call in held:
        await room.admit(call)
    [waiting] = await started(room, [of(room, "b")])
    first, second = of(room, "c"), of(room, "d")
    await room.admit(first, is_probe=True)
    [probe] = await started(room, [second], is_probe=True)
    room.has_arrived(held[0])
    await probe
    assert not waiting.done()
    for call in (held[1], first, second):
        room.has_arrived(call)
    await waiting


async def test_call_waits_no_longer_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WAIT_S", 0.05)
    room = new_room(1)
    await room.admit(of(room, "a"))
    with pytest.raises(CallRefused, match="try again"):
        await room.admit(of(room, "b"))
    assert not room._waiting


async def test_cancelled_call_passes_its_turn_on() -> None:
    room = new_room(1)
    busy = of(room, "a")
    await room.admit(busy)
    first, second = await started(room, [of(room, "b"), of(room, "b")])
    room.has_arrived(busy)  # wakes the second one, which is the newest
    second.cancel()
    await first
    assert second.cancelled()


async def test_slow_messages_are_refused_when_others_wait() -> None:
    room, refused = new_room(1), asyncio.Event()
    slow = of(room, "a")
    await room.admit(slow)
    room.slow_down(slow, refused.set)
    slow.take(LARGEST)  # as if so much had arrived
    [waiting] = await started(room, [of(room, "b")])
    async with asyncio.timeout(30):
        await refused.wait()
    slow.give_back()
    room.has_arrived(slow)
    await waiting


async def test_slow_messages_go_on_while_there_is_room() -> None:
    room, refused = new_room(2), list[str]()
    slow = of(room, "a")
    await room.admit(slow)
    room.slow_down(slow, lambda: refused.append("slow"))
    for _ in range(3):
        call = of(room, "b")
        await room.admit(call)
        room.has_arrived(call)
        room._check()
    assert not refused
    room.has_arrived(slow)


async def test_slow_message_without_memory_is_not_refused_for_fresh_ones() -> None:
    room, refused = new_room(2), list[str]()
    slow, *fresh = (of(room, "a") for _ in range(3))
    await room.admit(slow)
    room.slow_down(slow, lambda: refused.append("slow"))
    for call in fresh:
        await room.admit(call)
    [waiting] = await started(room, [of(room, "b")])
    room._check()
    assert not waiting.done()
    assert not refused
    for call in (slow, *fresh):
        room.has_arrived(call)
    await waiting


async def test_calls_beyond_the_queue_refuse_those_of_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_WAITING", 3)
    room = new_room(1)
    busy = of(room, "z")
    await room.admit(busy)
    tasks = await started(room, [of(room, "a:1"), of(room, "b:1"), of(room, "b:1"), of(room, "b:1")])
    with pytest.raises(CallRefused):
        await tasks[1]
    assert not tasks[0].done()
    for task in (tasks[0], *tasks[2:]):
        task.cancel()
    await asyncio.wait(tasks)
    assert not room._waiting
