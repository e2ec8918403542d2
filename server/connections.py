"""Connections that nobody can hold for nothing: bounds on heads, on time, and on how many there are.

aiohttp parses, keeps alive and answers; what stands here is what it leaves open. Its protocol class is
public. What is used of it that is not documented (`_waiter`, `_request_count`, `_loop`, `handle_error`, and
`_messages` with `_buffer_paused` and `_pause_reading_for_buffer`) is held by tests with raw sockets.

What is bounded where: bodies that come slowly in `server.validation`, and their memory in `server.bodies`;
answers that are not read here, and streams of events in `server.stream`.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass, field
from typing import cast

from aiohttp import hdrs, http_exceptions, web

from server.config import Config
from server.direct import SERVER, UNREAD_S
from server.errors import ServerProblem, problem_of, problem_response
from server.validation import MIN_PROGRESS_BYTES

MAX_LINE_BYTES = 8190
"""Of a request line, or a header field: a token with many roles has some thousand."""

MAX_FIELDS = 100
MAX_HEAD_BYTES = 64 * 2**10
"""Of a head that is not whole: what one connection can have us keep before anybody knows who it is."""

SWEEP_S = 1.0
CLOSING_S = 10.0
"""How long a client may take to read the last of its answers once the connection is to be closed."""
SPARE_DESCRIPTORS = 4
"""Of so many descriptors one is left to the ledger, the models and the logs."""


class HeadTooLarge(ServerProblem):
    """The request's header fields are too many or too long."""

    code = "head_too_large"


class TargetTooLong(ServerProblem):
    """The request line is too long."""

    code = "target_too_long"


class MalformedRequest(ServerProblem):
    """The request is no HTTP."""

    code = "invalid_request"


class HeadTimeout(ServerProblem):
    """The request's head did not arrive in time."""

    code = "head_timeout"


class TooManyConnections(ServerProblem):
    """The server has as many connections open as it may; try again."""

    code = "too_many_connections"


@dataclass(slots=True)
class Limits:
    """What connections may take, and which there are.

    Attributes:
        head_s: for the head of a request to arrive.
        idle_s: between two requests.
        unread_s: in so long a client has to read some of a long answer.
        most: how many connections there may be.
        open: those that there are.
        handshakes: of TLS, that are to become connections.
    """

    head_s: float
    idle_s: float
    most: int
    unread_s: float = UNREAD_S
    closing_s: float = CLOSING_S
    open: set[Connection] = field(default_factory=set)
    handshakes: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def full(self) -> bool:
        """Whether there is no room for one more."""
        return len(self.open) + len(self.handshakes) >= self.most

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Return those of a configuration and of this process."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            most = config.max_connections
        else:
            most = min(config.max_connections, max(1, descriptors - descriptors // SPARE_DESCRIPTORS))
        return cls(config.head_timeout_s, config.idle_timeout_s, most)

    async def sweep(self) -> None:
        """Look at all connections again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SWEEP_S, self.unread_s / 4, self.closing_s / 4))
            now_s = loop.time()
            for connection in tuple(self.open):
                connection.look(now_s)


class Connection(web.RequestHandler):
    """One connection, as aiohttp has it, within limits."""

    __slots__ = ("_closing_until", "_head_bytes", "_late", "_limits", "_requests_before", "_unread", "_wire")

    def __init__(self, limits: Limits, server: web.Server) -> None:
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
        self._wire: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None
        self._requests_before = 0
        self._head_bytes = 0
        self._closing_until: float | None = None
        self._unread: tuple[float, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        self._wire = cast("asyncio.Transport", transport)
        self._limits.open.add(self)
        if len(self._limits.open) > self._limits.most:
            self._refuse(TooManyConnections())
        else:
            self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        self._limits.open.discard(self)
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come; the head that it begins, and does not end, has to end in time."""
        super().data_received(data)
        if self._late is None:
            waiter = self._waiter
            if waiter is None:
                self._wait_for_turn()
            elif not waiter.done():
                self._head_grows(len(data))
        elif self._request_count > self._requests_before:
            self._expect_nothing()
        else:
            self._head_grows(len(data))

    def look(self, now_s: float) -> None:
        """End the connection if its client does not read what it was sent; called every now and then."""
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
        response = problem_response(problem_of(_problem(exc)), request.path)
        response.headers[hdrs.SERVER] = SERVER
        response.force_close()
        return response

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

    def _expect_head(self) -> None:
        self._requests_before = self._request_count
        self._late = self._loop.call_later(self._limits.head_s, self._head_is_late)

    def _expect_nothing(self) -> None:
        self._head_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _head_grows(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the head of a request must end within {MAX_HEAD_BYTES} bytes"))
        elif self._late is None and count:
            self._expect_head()

    def _head_is_late(self) -> None:
        self._late = None
        if self._head_bytes:
            seconds = self._limits.head_s
            self._refuse(HeadTimeout(f"the head of the request did not arrive within {seconds:g} s"))
        else:  # it has asked for nothing, so nothing is answered
            self.force_close()

    def _refuse(self, problem: ServerProblem) -> None:
        """Answer before there is a request, and close."""
        self._expect_nothing()
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(_raw(problem))
        self.force_close()


def _problem(defect: BaseException | None) -> ServerProblem:
    """Say what is wrong with what the parser refused."""
    if isinstance(defect, http_exceptions.LineTooLong):
        if MAX_LINE_BYTES in defect.args:
            return TargetTooLong(f"the request line must not have more than {MAX_LINE_BYTES} bytes")
        return HeadTooLarge(f"a header field must not have more than {MAX_LINE_BYTES} bytes")
    if "Too many headers" in str(defect):
        return HeadTooLarge(f"a request must not have more than {MAX_FIELDS} header fields")
    told = defect.message if isinstance(defect, http_exceptions.HttpProcessingError) else str(defect)
    first = told.strip().partition("\n")[0].rstrip(":")  # then come the bytes that were sent
    return MalformedRequest(f"the request is no HTTP: {first or 'malformed'}")


def _raw(error: ServerProblem) -> bytes:
    """Return a whole answer, as it goes over the wire."""
    problem = problem_of(error)
    response = problem_response(problem, "/")
    assert isinstance(response.body, bytes)
    retry = "".join(f"{name}: {value}\r\n" for name, value in problem.headers.items())
    return (
        f"HTTP/1.1 {problem.status} {response.reason}\r\nContent-Type: application/problem+json\r\n"
        f"Content-Length: {len(response.body)}\r\nServer: {SERVER}\r\nConnection: close\r\n{retry}\r\n"
    ).encode() + response.body
