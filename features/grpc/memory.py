"""The memory for the messages of calls, and the calls that wait for it.

Messages and answers are counted. The length of a message is known only at its end: while some arrive slowly,
the memory of the process is measured.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from features.grpc.errors import too_many
from runtime.memory import return_free_memory

FRESH_S = 0.05
"""A short message has arrived completely when a call reads it."""
WAIT_S = 5.0
"""Time that a call waits for room for its message."""
CHECK_S = 0.05
"""Time between two measurements: at 10 Gbit/s 60 MB arrive, for which the copies of messages leave room."""
PROBES = ""
"""The connection of all health checks that wait."""
MAX_WAITING = 1024
"""Calls that wait for room, and as many whose messages arrive slowly; beyond them the oldest is refused. Each
takes some 20 KB, and the beginning of its message."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Queue:
    """Calls that wait for room: connections take turns, and each has its newest call go first."""

    def __init__(self) -> None:
        self._turns = dict[str, list[asyncio.Future[None]]]()
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, connection: str) -> asyncio.Future[None]:
        """Add a call; if there are too many, refuse the oldest of the connection with most."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.setdefault(connection, []).append(turn)
        self._count += 1
        if self._count > MAX_WAITING:
            longest = max(self._turns, key=lambda each: len(self._turns[each]))
            self._take(longest, 0).set_exception(too_many())
        return turn

    def discard(self, connection: str, turn: asyncio.Future[None]) -> None:
        """Remove a call that waits no more."""
        turns = self._turns.get(connection, [])
        if turn in turns:
            self._take(connection, turns.index(turn))

    def wake(self) -> None:
        """Let one call go on, a probe before others."""
        if self._turns:
            connection = PROBES if PROBES in self._turns else next(iter(self._turns))
            turn = self._take(connection, -1)
            if turn.done():
                self.wake()
            else:
                turn.set_result(None)

    def _take(self, connection: str, index: int) -> asyncio.Future[None]:
        turns = self._turns.pop(connection)
        turn = turns.pop(index)
        self._count -= 1
        if turns:
            self._turns[connection] = turns  # behind the others
        return turn


class MessageRoom:
    """The memory for the messages of all calls; the calls from one address have half of it.

    A call's message is first fresh, and counts as the largest; so only some calls read at once. If it has not
    arrived completely after a moment it is slow: from then on the memory of the process is measured, and if
    it is full, slow messages are refused. When it has arrived it counts with its length, as its answer does.

    Args:
        limit_bytes: for all messages.
        largest_bytes: of one message.
    """

    def __init__(self, limit_bytes: int, largest_bytes: int) -> None:
        self._limit_bytes, self._largest_bytes = limit_bytes, largest_bytes
        self._other_bytes = measure_memory()
        self._by_address = Counter[str]()
        self._fresh = set[CallMemory]()
        self._slow = dict[CallMemory, Callable[[], None]]()
        self._waiting = _Queue()
        self._timer: asyncio.TimerHandle | None = None
        self.taken_bytes = 0

    def take(self, address: str, count: int) -> None:
        """Count bytes of a message that has arrived, or of an answer.

        Raises:
            CallRefused: RESOURCE_EXHAUSTED; these bytes are not counted.
        """
        of_address = self._by_address[address] + count
        most = max(self._limit_bytes // 2, self._largest_bytes)
        if self.taken_bytes + count > self._limit_bytes or of_address > most:
            raise too_many()
        self.taken_bytes += count
        self._by_address[address] = of_address

    def give_back(self, address: str, count: int) -> None:
        self.taken_bytes -= count
        self._by_address[address] -= count
        if not self._by_address[address]:
            del self._by_address[address]
        self._waiting.wake()

    async def admit(self, call: CallMemory, *, is_probe: bool = False) -> None:
        """Wait until a call may read its message; connections take turns. Probes have some memory more.

        Raises:
            CallRefused: RESOURCE_EXHAUSTED.
        """
        if not self._fresh and not self._slow:
            self._other_bytes = measure_memory() - self.taken_bytes
        if not self._has_room(is_probe=is_probe):
            await self._wait(PROBES if is_probe else call.connection, is_probe=is_probe)
        self._fresh.add(call)

    async def _wait(self, connection: str, *, is_probe: bool) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not self._has_room(is_probe=is_probe):
                    turn = self._waiting.add(connection)
                    try:
                        await turn
                    finally:
                        self._waiting.discard(connection, turn)
        except TimeoutError:
            raise too_many() from None
        finally:
            asyncio.get_running_loop().call_soon(self._waiting.wake)  # there may be room for more

    def _has_room(self, *, is_probe: bool = False) -> bool:
        """Whether another message has room that begins to arrive."""
        most = self._limit_bytes + (self._largest_bytes if is_probe else 0)
        return self._used_bytes() + (len(self._fresh) + 1) * self._largest_bytes <= most

    def slow_down(self, call: CallMemory, refuse: Callable[[], None]) -> None:
        """Measure a call's message from now on; it may be refused until it `has_arrived`."""
        self._fresh.discard(call)
        self._slow[call] = refuse
        if len(self._slow) > MAX_WAITING:
            self._slow.pop(next(iter(self._slow)))()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        self._waiting.wake()

    def has_arrived(self, call: CallMemory) -> None:
        self._fresh.discard(call)
        self._slow.pop(call, None)
        self._waiting.wake()

    def _used_bytes(self) -> int:
        measured = measure_memory() - self._other_bytes if self._slow else 0
        return max(self.taken_bytes, measured)

    def _check(self) -> None:
        """Refuse some slow messages if memory is full."""
        self._timer = None
        if not self._slow:
            return
        self._timer = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        if self._is_full():
            return_free_memory()
            if self._is_full():
                self._refuse_some()
        self._waiting.wake()

    def _is_full(self) -> bool:
        """Whether slow messages have to be refused: there is no memory, or none for a call that waits.

        Below half of the limit, it waits for fresh messages, each of which arrives or is slow in a moment.
        """
        used_bytes = self._used_bytes()
        if used_bytes <= self._limit_bytes // 2:
            return False
        return used_bytes > self._limit_bytes or (bool(self._waiting) and not self._has_room())

    def _refuse_some(self) -> None:
        """Refuse the older half of the slow messages from the address with most of them."""
        [(address, count)] = Counter(call.address for call in self._slow).most_common(1)
        found = [call for call in self._slow if call.address == address]
        for call in found[: (count + 1) // 2]:
            self._slow.pop(call)()


class CallMemory:
    """The memory of one call.

    Attributes:
        address: of its client.
        connection: gRPC's name of the client and its port.
        has_begun: whether its message has arrived.
    """

    def __init__(self, room: MessageRoom, address: str, connection: str) -> None:
        self._room = room
        self.address, self.connection = address, connection
        self.has_begun = False
        self._count = 0

    def take(self, count: int) -> None:
        """Count bytes; for errors see `MessageRoom.take`."""
        self._room.take(self.address, count)
        self._count += count

    def give_back(self) -> None:
        self._room.give_back(self.address, self._count)
        self._count = 0


def measure_memory() -> int:
    """Return the bytes of this process that are no file's (proc_pid_statm(5)).

    The kernel has them as a number; for `runtime.memory.private_bytes` it walks all pages.
    """
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split())
    return (resident - shared) * _PAGE_BYTES
