"""Connections that nobody can hold for nothing: bounds on heads, on time, and on how many there are.

aiohttp parses, keeps alive and answers; what stands here is what it leaves open. Its protocol class is
public. What is used of it that is not documented (`_waiter`, `_request_count`, `_request_handler`, `_loop`,
`_upgraded`, and `_messages` with `_buffer_paused` and `_pause_reading_for_buffer`) is held by tests with raw
sockets.

What is bounded where: how many there are in `server.connections.places`; bodies that come slowly in
`server.validation`, and their memory in `server.connections.bodies`; answers that are not read here, and
streams of events in `server.ledger.stream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from aiohttp import EMPTY_PAYLOAD, StreamReader, web

from server.config import Config
from server.connections.direct import UNREAD_S
from server.connections.places import Place, Places
from server.connections.refusals import (
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_LINE_BYTES,
    HeadTimeout,
    HeadTooLarge,
    TooManyConnections,
    problem_of_parser,
    raw_refusal,
    refusal,
)
from server.errors import ServerProblem
from server.health import is_probe
from server.validation import MIN_PROGRESS_BYTES

SWEEP_S = 1.0
CLOSING_S = 10.0
"""How long a client may take to read the last of its answers once the connection is to be closed."""
SPARE_HEAD_S = 2.0
"""For the head of a probe, at most: they send it as soon as they are connected."""
_END = b"\r\n\r\n"
"""Of a head."""

RequestHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Limits:
    """What connections may take, and which there are.

    Attributes:
        head_s: for the head of a request to arrive.
        idle_s: between two requests.
        places: how many there may be.
        unread_s: in so long a client has to read some of a long answer.
        spare_head_s: as head_s, of the reserve.
        open: those that there are.
        handshakes: of TLS, that are to become connections.
    """

    head_s: float
    idle_s: float
    places: Places
    unread_s: float = UNREAD_S
    closing_s: float = CLOSING_S
    spare_head_s: float = SPARE_HEAD_S
    open: set[Connection] = field(default_factory=set)
    handshakes: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Return those of a configuration and of this process."""
        return cls(config.head_timeout_s, config.idle_timeout_s, Places.of(config))

    def head_s_of(self, place: Place | None) -> float:
        """Return how long a head may take that comes in a place."""
        return min(self.head_s, self.spare_head_s) if place is not None and place.is_spare else self.head_s

    async def sweep(self) -> None:
        """Look at all connections again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SWEEP_S, self.unread_s / 4, self.closing_s / 4))
            now_s = loop.time()
            for connection in tuple(self.open):
                connection.look(now_s)


class Connection(web.RequestHandler):
    """One connection, as aiohttp has it, within limits.

    Args:
        limits: of all of them.
        server: that has the handler.
        place: one that was taken for it; without one it takes one when it begins.
    """

    __slots__ = ("_body", "_closing_until", "_head_bytes", "_late", "_limits", "_place", "_unread", "_wire")

    def __init__(self, limits: Limits, server: web.Server, place: Place | None = None) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.idle_s,
            access_log=None,  # type: ignore[arg-type]  # as its own runner passes it
            auto_decompress=False,  # it is done before authentication, and a small body may become a huge one
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES + 1,  # so that the one can be told from the other
            max_headers=MAX_FIELDS,
        )
        self._limits = limits
        self._place = place
        self._wire: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None
        self._body: StreamReader | None = EMPTY_PAYLOAD  # of the last request; None if that is not known
        self._head_bytes = 0
        self._closing_until: float | None = None
        self._unread: tuple[float, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        self._wire = cast("asyncio.Transport", transport)
        self._limits.open.add(self)
        self._place = self._place or self._limits.places.take(_address(transport))
        if self._place is None:
            self._refuse(TooManyConnections())
            return
        self._place.give_way, self._place.abort = self._give_way, self._wire.abort
        if self._place.is_spare and self._request_handler is not None:
            self._request_handler = partial(self._answer_probe, self._place, self._request_handler)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        self._limits.open.discard(self)
        if self._place is not None:
            self._limits.places.leave(self._place)
            self._place = None
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come; the head that it begins, and does not end, has to end in time."""
        body, before = self._body, self._request_count
        is_head = self._is_awaited() if body is None else body.is_eof()
        super().data_received(data)
        if self._request_count > before:
            self._head_ended(data)
        elif is_head:
            self._head_grows(data)

    def force_close(self) -> None:
        """Close, once: a transport of TLS that is closed twice cannot be aborted any more."""
        if self.transport is not None and self.transport.is_closing():
            self.transport = None
        super().force_close()

    def look(self, now_s: float) -> None:
        """End the connection if its client does not go on; called every now and then."""
        wire = self._wire
        if wire is None:
            return
        if wire.is_closing():
            self._closing_until = self._closing_until or now_s + self._limits.closing_s
            if now_s > self._closing_until:
                wire.abort()
        elif self.writing_paused:
            self._look_at_unread(wire, now_s)
        else:
            self._unread = None
            if self._head_bytes and self._late is None and self._is_awaited():
                self._expect_head()  # of a head that was begun while the request before it was under way

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, in the one shape that errors have."""
        if status != 400 or request.writer.output_size > 0:  # noqa: PLR2004 - what is ours is answered elsewhere
            return super().handle_error(request, status, exc, message)
        return refusal(request, problem_of_parser(exc))

    async def _answer_probe(
        self, place: Place, handler: RequestHandler, request: web.BaseRequest
    ) -> web.StreamResponse:
        """Answer one request of who has a place of the reserve."""
        if not is_probe(request):
            place.give_way = self.force_close
            return refusal(request, TooManyConnections())
        place.give_way = None
        try:
            response = await handler(request)
        finally:
            place.give_way = self.force_close  # which lets go what is written
        response.force_close()
        return response

    def _give_way(self) -> None:
        self._refuse(TooManyConnections())

    def _look_at_unread(self, wire: asyncio.Transport, now_s: float) -> None:
        left = wire.get_write_buffer_size()
        until_s, before = self._unread or (0.0, -1)
        if left > before or left <= before - MIN_PROGRESS_BYTES:  # there is something new, or much was read
            self._unread = (now_s + self._limits.unread_s, left)
        elif now_s > until_s:
            wire.abort()

    def _wait_for_turn(self) -> None:
        """Read no more while a request waits for the one before it: the framework would keep 32 of them.

        It reads on itself when it takes up the next one.
        """
        if self._messages and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def _is_awaited(self) -> bool:
        """Whether no request is under way."""
        return self._waiter is not None and not self._waiter.done()

    def _expect_head(self) -> None:
        seconds = self._limits.head_s_of(self._place)
        self._late = self._loop.call_later(seconds, self._head_is_late)

    def _expect_nothing(self) -> None:
        self._head_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _head_ended(self, data: bytes) -> None:
        if self._head_bytes or self._late is not None:
            self._expect_nothing()
        # What follows a wish for another protocol is taken up past us, when that is declined.
        self._body = self._messages[-1][1] if self._messages and not self._upgraded else None
        if self._waiter is None:
            self._wait_for_turn()
        # After a body nobody knows where it ended and the next head begins.
        if self._body is EMPTY_PAYLOAD and not data.endswith(_END):
            self._head_bytes = max(0, len(data) - data.rfind(_END) - len(_END))

    def _head_grows(self, data: bytes) -> None:
        if not self._head_bytes and not data.strip(b"\r\n"):
            return  # RFC 9112 section 2.2: empty lines before a request are none of it
        self._head_bytes += len(data)
        is_awaited = self._late is not None or self._is_awaited()
        if self._head_bytes <= MAX_HEAD_BYTES:
            if self._late is None and is_awaited:
                self._expect_head()
        elif is_awaited:
            self._refuse(HeadTooLarge(f"the head of a request must end within {MAX_HEAD_BYTES} bytes"))
        else:
            self.close()  # after the answer that is under way, into which nothing can be said

    def _head_is_late(self) -> None:
        self._late = None
        if self._place is not None and self._place.is_spare:
            self._refuse(TooManyConnections())
        elif self._head_bytes:
            seconds = self._limits.head_s
            self._refuse(HeadTimeout(f"the head of the request did not arrive within {seconds:g} s"))
        else:  # it has asked for nothing, so nothing is answered
            self.force_close()

    def _refuse(self, problem: ServerProblem) -> None:
        """Answer before there is a request, and close."""
        self._expect_nothing()
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(raw_refusal(problem))
        self.force_close()


def _address(transport: asyncio.BaseTransport) -> str | None:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else None
