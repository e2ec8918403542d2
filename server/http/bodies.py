"""Bodies of requests: the body budget, and the one reader, with limits of time and length.

The budget is memory for the bodies of all requests and responses, and turns to decode them: one subject gets
half of the memory, and one turn at a time. Tensors for a worker's shared memory have a reader of their own,
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from aiohttp import StreamReader, web

from runtime.memory import return_free_memory
from runtime.memoryplan import MemoryPlan
from runtime.timeouts import stall_detector, timeout
from runtime.wire import PayloadRoom
from server.errors import ServerProblem

IDLE_S = 30.0
"""Also the only timeout after a malformed chunk: aiohttp's reader would wait forever."""

MIN_PROGRESS_BYTES = 256 * 2**10
"""Bytes of a longer body in IDLE_S: 70 kbit/s. Single bytes would hold memory for days."""

COUNTED_FROM_BYTES = 4096
"""Least body that is counted if it came with its head, as up to 128 KiB of one may. Less, in each of 10,000
connections, is 40 MB."""

READ_BYTES = 2**20
"""Buffered bytes of a body that is being read; more means fewer iterations for long bodies."""

BURST_BYTES = 16 * 2**20
"""Bytes of bodies at once. Beyond them, malloc keeps an unbounded part of the memory of the pieces."""

TRIM_S = 2.0
"""How long a burst's memory is kept: new pages take longer than filling them."""

_FULL = "too many large requests or answers are in memory at once; try again"


class BodyTooLarge(ServerProblem):
    """The body is larger than this route allows."""

    code = "body_too_large"

    def __init__(self, max_bytes: int, memory: BodyMemory | None = None) -> None:
        advice = "" if memory is None else "; the server's --max-request-size sets this limit"
        super().__init__(f"the body must not be larger than {max_bytes} bytes{advice}")


class BodyTimeout(ServerProblem):
    """The rest of the body did not arrive in time."""

    code = "body_timeout"


class Bodies:
    """The body budget of all subjects: counts the bytes of bodies in memory; one subject has half of it.

    Args:
        plan: has the budget, and the limit of a request in it.

    Attributes:
        answer_room: the room for long answers that arrive from workers, of which bodies leave less.
        inflating: held while a long body is decompressed, whose length is not known before.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.max_request_bytes = plan.max_request_bytes
        self._max_bytes = plan.bodies_bytes
        self._by_subject = Counter[str]()
        self._turns = WeakValueDictionary[str, asyncio.Lock]()
        self._trimming: asyncio.TimerHandle | None = None
        self._had_burst = False
        self.taken_bytes = 0
        self.answer_room = PayloadRoom(self._has_room_beside, self.max_subject_bytes)
        self.inflating = asyncio.Lock()

    def _has_room_beside(self, count: int) -> bool:
        return self.taken_bytes + count <= self._max_bytes

    def has_room_for_answers(self, count: int) -> bool:
        return self._has_room_beside(self.answer_room.taken_bytes + count)

    def memory_of(self, subject: str) -> BodyMemory:
        return BodyMemory(self, subject)

    @property
    def max_subject_bytes(self) -> int:
        return self._max_bytes // 2

    def has_room(self, subject: str, count: int) -> bool:
        of_subject = self._by_subject[subject] + count
        return self.has_room_for_answers(count) and of_subject <= self.max_subject_bytes

    def add(self, subject: str, count: int) -> None:
        self.taken_bytes += count
        if self.taken_bytes >= BURST_BYTES:
            self._had_burst = True
            self._trimming = self._trimming or asyncio.get_running_loop().call_later(TRIM_S, self._trim)
        self._by_subject[subject] += count
        if not self._by_subject[subject]:
            del self._by_subject[subject]

    def _trim(self) -> None:
        """Return freed memory to the kernel, in a thread, unless there was a burst since the last time."""
        loop = asyncio.get_running_loop()
        self._trimming = loop.call_later(TRIM_S, self._trim) if self._had_burst else None
        self._had_burst = self.taken_bytes >= BURST_BYTES
        if self._trimming is None:
            loop.run_in_executor(None, return_free_memory)

    @asynccontextmanager
    async def turn(self, subject: str) -> AsyncIterator[None]:
        """Wait for the subject's turn to block the event loop; a pause as long as the turn follows.

        So many long bodies of one subject leave half of the time to others, with at most one of them between
        two requests of others.
        """
        turn = self._turns.setdefault(subject, asyncio.Lock())
        await turn.acquire()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            yield
        finally:
            loop.call_later(loop.time() - began_s, turn.release)


class BodyMemory:
    """The bytes of one request, then those of its response, until the client has received it."""

    __slots__ = ("_bodies", "_count", "_subject")

    def __init__(self, bodies: Bodies, subject: str) -> None:
        self._bodies = bodies
        self._subject = subject
        self._count = 0

    @property
    def max_request_bytes(self) -> int:
        return self._bodies.max_request_bytes

    @property
    def inflating(self) -> asyncio.Lock:
        return self._bodies.inflating

    def take(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            ServerProblem: `bodies_full`, or `body_too_large` for a request that takes more than one subject
                can have; these bytes are not counted.
        """
        most = self._bodies.max_subject_bytes
        if self._count + count > most:
            raise ServerProblem(
                f"the request takes {self._count + count} bytes of the server's memory, and one subject may"
                f" have {most} for requests: send a shorter one, or tensors as binary data; more memory for"
                " the server's container, or a larger --max-request-size, raises this limit",
                code="body_too_large",
            )
        if not self._bodies.has_room(self._subject, count):
            raise ServerProblem(_FULL, code="bodies_full")
        self._add(count)

    def take_answer(self, count: int) -> None:
        """Count bytes of an answer that arrives from another server.

        Raises:
            ServerProblem: `bodies_full`; these bytes are not counted.
        """
        if not self._bodies.has_room_for_answers(count):
            raise ServerProblem(_FULL, code="bodies_full")
        self._add(count)

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Count bytes within the context; for errors see `take`."""
        self.take(count)
        try:
            yield
        finally:
            self._add(-count)

    def add_answer(self, count: int) -> None:
        """Count the bytes of an answer, which exists already, beside the request's."""
        self._add(count)

    def replace(self, count: int) -> None:
        """Give back the request's bytes, and count those of the response, which exists already."""
        self.give_back()
        self._add(count)

    def give_back(self) -> None:
        if self._count:
            self._add(-self._count)

    def _add(self, count: int) -> None:
        self._bodies.add(self._subject, count)
        self._count += count


async def iterate_body(content: StreamReader, idle_s: float = IDLE_S) -> AsyncIterator[bytes]:
    """Yield a body of any length as it arrives; the caller's own time does not count as idle.

    Raises:
        BodyTimeout: `body_timeout`, less than MIN_PROGRESS_BYTES arrived in `idle_s` of waiting.
    """
    content.set_read_chunk_size(READ_BYTES)
    clock, left_s, got_bytes = stall_detector().active_s, idle_s, 0
    while not content.at_eof():
        began_s = clock()
        try:
            async with timeout(left_s):
                piece = await content.readany()
        except TimeoutError:
            raise BodyTimeout from None
        left_s -= clock() - began_s
        got_bytes += len(piece)
        if got_bytes >= MIN_PROGRESS_BYTES:
            left_s, got_bytes = idle_s, 0
        if piece:
            yield piece


async def read_body(
    request: web.BaseRequest, max_bytes: int, memory: BodyMemory | None = None, idle_s: float = IDLE_S
) -> bytes | bytearray:
    """Read a whole body unchanged, within a route's limit: the application's is the largest of all routes.

    Pieces are appended as they arrive: to join them in the end would take the body's memory twice. The memory
    counts the bytes as they arrive, but not a short body that came with its head.

    Raises:
        BodyTooLarge: the declared length or the body is too long (`body_too_large`).
        BodyTimeout: `body_timeout`.
        ServerProblem: `bodies_full`.
    """
    content = request.content
    if content.is_eof():  # most bodies arrive with their head
        short = content.read_nowait()
        if len(short) > max_bytes:
            raise BodyTooLarge(max_bytes, memory)
        if memory is not None and len(short) >= COUNTED_FROM_BYTES:
            memory.take(len(short))
        return short
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(max_bytes, memory)
    body = bytearray()
    async for piece in iterate_body(content, idle_s):
        if len(body) + len(piece) > max_bytes:
            raise BodyTooLarge(max_bytes, memory)
        if memory is not None:
            memory.take(len(piece))
        body += piece
    return body
