"""Slow-client protection: header, idle and write timeouts, a connection limit, and a reserve for probes.

A `GuardedConnection` is the protocol of a connection. It passes all data to aiohttp's protocol, which parses
and answers, and disconnects slow clients. It uses only documented names of aiohttp and asyncio: a wrapped
request handler reports the start of a request, and an access logger the end of its response.
Other protection is a reverse proxy's, see `docs/deployment.md`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractAccessLogger

from runtime.timeouts import stall_detector, timeout
from server.api.health import is_probe
from server.config import Config
from server.errors import ServerProblem
from server.http import responses
from server.http.bodies import IDLE_S, MIN_PROGRESS_BYTES, READ_BYTES, BodyTimeout, iterate_body
from server.routing import RequestHandler, wrap_handler

_log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted, so that bursts are not refused."""

RESERVE = 64
"""Connections beyond the limit, each for one probe; more than probe at the same moment."""

RESERVE_HEAD_S = 2.0
"""Time for the head of a probe: probes send it as soon as they are connected."""

UNREAD_S = 30.0
"""Time in which a client must read MIN_PROGRESS_BYTES of a long response, which is held in memory."""

CLOSING_S = 10.0
"""Time for the end of a TLS connection; asyncio's default is 30 s."""

CHUNK_BYTES = 64 * 2**10
"""Bytes of one read, which of a longer body arrive with its head; `receive_rest` reads the rest in place."""
_chunk = memoryview(bytearray(CHUNK_BYTES))
"""Shared by all connections: received data is passed on at once."""

CHECK_S = 1.0
"""Longest time between two checks of an active connection."""

HALF_CLOSED_S = 0.05
"""Time from the end of a client's data to the first question whether the client has left; the pauses double
up to CHECK_S. Most requests are answered before the first question."""
_PEER = struct.Struct("3i")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""The question: clients skip it, and the host of a client that has left resets the connection."""

ARRIVED_NS: web.RequestKey[int] = web.RequestKey("arrived_ns", int)
"""CLOCK_MONOTONIC when the first byte of a request was read."""


@dataclass(slots=True)
class ConnectionLimits:
    """The limits of connections, and the open connections.

    Attributes:
        head_s: time for a request's head, from the start of a new connection; also for a TLS handshake.
        idle_s: time between two requests.
        most: open connections; beyond them only probes are answered.
        reserve: open connections beyond `most`.
        unread_s: time in which a client must read some of a long response.
        reserve_head_s: as `head_s`, for connections in the reserve.
        closing_s: time for the end of a TLS connection and the data still to be sent.
        check_s: time between two checks of a connection.
        half_closed_s: as HALF_CLOSED_S.
        open: the open connections.
        is_stopping: whether no more are accepted; open connections close after an answer.
        is_admitted: whether a connection on a UNIX socket is, by the process at its other end.
    """

    head_s: float
    idle_s: float
    most: int
    reserve: int = RESERVE
    unread_s: float = UNREAD_S
    reserve_head_s: float = RESERVE_HEAD_S
    closing_s: float = CLOSING_S
    check_s: float = CHECK_S
    half_closed_s: float = HALF_CLOSED_S
    open: set[GuardedConnection] = field(default_factory=set)
    is_stopping: bool = False
    is_admitted: Callable[[int], bool] | None = None

    @classmethod
    def of(cls, config: Config) -> ConnectionLimits:
        """Return a configuration's limits, which leave file descriptors for ledger, models and logs."""
        most, reserve = config.max_connections, RESERVE
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors != resource.RLIM_INFINITY:
            most = min(most, max(1, descriptors * 3 // 4))
            reserve = min(reserve, max(1, descriptors // 32))
        return cls(config.head_timeout_s, config.idle_timeout_s, most, reserve)

    def interval_s(self) -> float:
        """Return the time between two checks: often enough for the shortest limit."""
        return min(self.check_s, self.head_s / 4, self.unread_s / 4)


@dataclass(slots=True)
class _Rest:
    """The rest of a body that is read in place.

    Attributes:
        content: the body, as far as the parser has passed it on.
        buffer: the memory for the rest.
        ended: set when the rest is complete, or the client has left.
        filled: the number of received bytes.
    """

    content: StreamReader
    buffer: memoryview
    ended: asyncio.Future[None]
    filled: int = 0


class GuardedConnection(asyncio.BufferedProtocol):
    """The protocol of one connection: aiohttp's, within limits.

    A timer checks the timeouts while the connection is active. Time in which the event loop was stalled does
    not count against the client.
    """

    def __init__(self, server: web.Server, limits: ConnectionLimits) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._http = _HttpProtocol(
            server,
            loop=self._loop,
            keepalive_timeout=limits.idle_s,
            access_log_class=_EndOfResponse,
            access_log=_log,
            auto_decompress=False,  # it would come before authentication, without a limit
            max_line_size=responses.MAX_LINE_BYTES,
            max_field_size=responses.MAX_LINE_BYTES + 1,  # so that the parser's errors differ
            max_headers=responses.MAX_FIELDS,
            read_bufsize=CHUNK_BYTES // 4,  # a body longer than twice this pauses until its handler reads it
        )
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._is_handling = False
        self._request: web.BaseRequest | None = None
        self._rest: _Rest | None = None
        self._is_head_expected = True
        self._head_bytes = self._checked_head_bytes = 0
        self._stalls = stall_detector()
        self._head_since_s: float | None = self._stalls.active_s()
        self._arrived_ns = 0
        self.is_writing_paused = False
        self._unread_bytes = 0
        self._unread_since_s: float | None = None
        self.is_reserve = False

    @property
    def closes_after_answer(self) -> bool:
        return self.is_reserve or self._limits.is_stopping

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the connection, and refuse it if there are too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._limits.open.add(self)
        self._http.connection_made(transport)
        is_admitted = self._limits.is_admitted
        if is_admitted is not None and not is_admitted(peer_of(transport).process):
            self._http.force_close()
            return
        self._schedule_check()
        beyond = len(self._limits.open) - self._limits.most
        self.is_reserve = beyond > 0
        if beyond > self._limits.reserve:
            self.refuse(responses.TooManyConnections())

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._http.connection_lost(exc)
        if self._rest is not None:
            self._end_rest(self._rest)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - a body knows better
        rest = self._rest
        return _chunk if rest is None else rest.buffer[rest.filled : rest.filled + READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        """Pass received data to the parser, unless it was received in place."""
        rest = self._rest
        if rest is None:
            self._parse(bytes(_chunk[:nbytes]))
            return
        rest.filled += nbytes
        if rest.filled == len(rest.buffer):
            self._end_rest(rest)

    async def receive_rest(self, content: StreamReader, buffer: memoryview, idle_s: float) -> None:
        """Read the rest of a body into a buffer of its length, past aiohttp's parser.

        Raises:
            BodyTimeout: `body_timeout`, too few bytes arrived in `idle_s`.
            ConnectionResetError: the client has left.
        """
        rest = self._rest = _Rest(content, buffer, self._loop.create_future())
        try:
            async with timeout(idle_s, lambda: rest.filled // MIN_PROGRESS_BYTES):
                await rest.ended
        except TimeoutError:
            raise BodyTimeout from None
        finally:
            if self._rest is not None:
                self._end_rest(rest)
        if rest.filled < len(buffer):
            raise ConnectionResetError("the client has left")

    def _end_rest(self, rest: _Rest) -> None:
        """Let the parser go on after the rest: it gets as many other bytes, which are dropped."""
        self._rest = None
        for start in range(0, rest.filled if self._http.connected else 0, READ_BYTES):
            self._http.data_received(_filler(min(rest.filled - start, READ_BYTES)))
            rest.content.read_nowait()
        if not rest.ended.done():
            rest.ended.set_result(None)

    def _parse(self, data: bytes) -> None:
        """Pass data to the parser; between two requests, data begins a head, which has a time limit.

        After an early response, data is still the body of that request. Empty lines before a request are no
        part of it (RFC 9112 section 2.2).
        """
        if not self._is_handling and (self._request is None or self._request.content.is_eof()):
            if self._head_bytes or not data.isspace():
                if not self._head_bytes:
                    self._arrived_ns = time.monotonic_ns()
                self._is_head_expected = True
                self._head_bytes += len(data)
            if self._timer is None:
                self._schedule_check()
        try:
            self._http.data_received(data)
        except ValueError as error:  # aiohttp 3.14.1 passes on yarl's error about a target
            if self._is_handling:  # the client would take the answer for that of the earlier request
                self._http.force_close()
            else:
                self.refuse(responses.problem_of_parser(error))

    def eof_received(self) -> bool:
        """Keep the connection of a client that ended its sending before an answer begins.

        Such a client may still want the answer (RFC 9112 section 6.3). But a client that has left looks the
        same, so `_check_half_closed` asks. TLS has no such state in asyncio.
        """
        self._http.eof_received()
        is_waiting = not self._has_begun_answer() if self._is_handling else self._head_bytes > 0
        is_tls = self._transport.get_extra_info("sslcontext") is not None
        if not is_waiting or self._rest is not None or is_tls:
            return False
        self._loop.call_later(self._limits.half_closed_s, self._check_half_closed, self._limits.half_closed_s)
        return True

    def _has_begun_answer(self) -> bool:
        is_written = self._request is not None and self._request.writer.output_size > 0
        return is_written or self._transport.get_write_buffer_size() > 0

    def _check_half_closed(self, waited_s: float) -> None:
        """Close a half-closed connection without a complete request; else ask whether the client is there.

        The second write to a client that has left fails, which cancels its request. HTTP/1.0 has no such
        question, and there the end of either side ends a request (RFC 1945 section 1.3): soon, not at once.
        """
        if self._transport.is_closing():
            return
        request = self._request if self._is_handling else None
        is_waiting = request is not None and not self._has_begun_answer()
        is_old = request is not None and request.version < HttpVersion11
        is_over = is_waiting and is_old and waited_s >= self._limits.check_s
        if request is None or not request.content.is_eof() or is_over:
            self._http.force_close()
            return
        if is_waiting and not is_old:
            self._transport.write(_CONTINUE)
        waited_s = min(2 * waited_s, self._limits.check_s)
        self._loop.call_later(waited_s, self._check_half_closed, waited_s)

    def pause_writing(self) -> None:
        """Begin to check that the client reads."""
        self.is_writing_paused = True
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Stop checking that the client reads: most of the data is sent."""
        self.is_writing_paused = False
        self._unread_bytes, self._unread_since_s = 0, None
        self._http.resume_writing()

    def request_began(self, request: web.BaseRequest) -> None:
        """Note that a head is complete and its request is being handled.

        A request that arrived during another one begins after the answer to that one.
        """
        request[ARRIVED_NS] = self._arrived_ns or time.monotonic_ns()
        self._arrived_ns = 0
        self._is_handling = True
        self._request = request
        self._is_head_expected = False
        self._head_bytes = self._checked_head_bytes = 0
        self._head_since_s = None

    def response_ended(self) -> None:
        self._is_handling = False

    def _schedule_check(self) -> None:
        self._timer = self._loop.call_later(self._limits.interval_s(), self._check)

    def _check(self) -> None:
        unread_bytes = self._transport.get_write_buffer_size()
        if self.is_writing_paused or self._transport.is_closing():
            self._check_reading(unread_bytes)
        elif self._is_head_expected:
            self._check_head()
        elif not self._is_handling and not unread_bytes:
            self._timer = None  # the connection is idle: aiohttp closes it after `idle_s`
            return
        self._schedule_check()

    def _check_reading(self, unread_bytes: int) -> None:
        enough, now_s = self._unread_bytes - MIN_PROGRESS_BYTES, self._stalls.active_s()
        has_written_or_read = unread_bytes > self._unread_bytes or unread_bytes <= enough
        if has_written_or_read or self._unread_since_s is None:
            self._unread_bytes, self._unread_since_s = unread_bytes, now_s
        elif now_s - self._unread_since_s >= self._limits.unread_s:
            self._transport.abort()

    def _check_head(self) -> None:
        """Refuse a head that is late, or was too long at the previous check already, so not just unparsed."""
        now_s = self._stalls.active_s()
        if self._head_since_s is None:
            self._head_since_s = now_s
        limit_s = self._limits.head_s
        if self.is_reserve:
            limit_s = min(limit_s, self._limits.reserve_head_s)
        if now_s - self._head_since_s > limit_s:
            if self.is_reserve:
                self.refuse(responses.TooManyConnections())
            elif self._head_bytes:
                late = f"the head of the request did not arrive within {limit_s:g} s"
                self.refuse(ServerProblem(late, code="head_timeout"))
            else:  # the client has sent nothing, so there is nothing to answer
                self._http.force_close()
        elif self._checked_head_bytes > responses.MAX_HEAD_BYTES:
            too_large = f"the head of a request must end within {responses.MAX_HEAD_BYTES} bytes"
            self.refuse(ServerProblem(too_large, code="head_too_large"))
        self._checked_head_bytes = self._head_bytes

    def refuse(self, problem: ServerProblem) -> None:
        """Answer with an error outside of a request, and close."""
        self._transport.write(responses.raw_refusal(problem))
        self._http.force_close()


class _HttpProtocol(web.RequestHandler):
    """aiohttp's protocol, with the one error body for malformed HTTP."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a refusal of the parser; other errors are aiohttp's."""
        if status != HTTPStatus.BAD_REQUEST:
            response = super().handle_error(request, status, exc, message)
            responses.add_standard_fields(response)
            return response
        return responses.refusal(request, responses.problem_of_parser(exc))


class _EndOfResponse(AbstractAccessLogger):
    """Notifies a connection that a response is written: aiohttp logs it at that moment."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:  # noqa: ARG002
        connection = _connection(request)
        if connection is not None:
            connection.response_ended()


def _connection(request: web.BaseRequest) -> GuardedConnection | None:
    transport = request.transport
    return None if transport is None else cast("GuardedConnection", transport.get_protocol())


def _guard(handler: RequestHandler) -> RequestHandler:
    """Return a handler that notifies connections of requests and checks these; the reserve answers probes.

    The answer announces the end of the connection, if it closes: later requests on it would be lost.
    """

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = _connection(request)
        if connection is None:  # refused, or the client has left: do not run the request
            return responses.refusal(request, responses.TooManyConnections())
        connection.request_began(request)
        if request.version not in (HttpVersion10, HttpVersion11):  # the parser takes 0.9 and 2.0, too
            connection.refuse(responses.UnknownHttpVersion())  # aiohttp's answer would have the same version
            return responses.refusal(request, responses.UnknownHttpVersion())
        try:
            responses.check_framing(request)
        except ServerProblem as problem:
            return responses.refusal(request, problem)
        if connection.is_reserve and not is_probe(request):
            return responses.refusal(request, responses.TooManyConnections())
        response = await handler(request)
        if connection.closes_after_answer:
            response.force_close()
        return response

    return handle


def protect(server: web.Server) -> None:
    """Have a server's handler obey the limits of its connections."""
    wrap_handler(server, _guard)


@contextmanager
def bind_address(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind a socket to each address of a host, for port 0 to a free one; clients are still refused.

    Raises:
        OSError: the port is in use, or the host is not this machine.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as opened:
        bound: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                bound.append(opened.enter_context(socket.socket(family, kind, protocol)))
            except OSError:  # "localhost" has an address of IPv6, and this machine's kernel has none
                continue
            bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                bound[-1].bind(address)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    reason = os.strerror(error.errno or 0).lower()
                    raise OSError(error.errno, reason, f"{host}:{port}") from None
                bound.pop()  # "localhost" has an address of IPv6, and IPv6 is off
        if not bound:
            raise OSError(errno.EADDRNOTAVAIL, "this machine does not have this address", f"{host}:{port}")
        yield bound


@asynccontextmanager
async def listening(
    server: web.Server, bound: list[socket.socket], limits: ConnectionLimits, tls: ssl.SSLContext | None
) -> AsyncIterator[int]:
    """Listen on bound sockets and yield the port; on leaving, stop accepting connections.

    The runner of the server closes the open ones.

    Raises:
        OSError: another process has begun to listen there.
    """
    protect(server)
    listeners: list[asyncio.Server] = []
    try:
        for each in bound:
            listener = await asyncio.get_running_loop().create_server(
                lambda: GuardedConnection(server, limits),
                sock=each,
                backlog=BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else limits.head_s,
                ssl_shutdown_timeout=None if tls is None else limits.closing_s,
            )
            listeners.append(listener)
        yield bound[0].getsockname()[1]
    finally:
        limits.is_stopping = True
        for listener in listeners:
            listener.close()


@contextmanager
def bound_socket(folder: Path, name: str) -> Iterator[socket.socket]:
    """Bind a UNIX socket of mode 0600, in place of the one of a killed server, and remove it on exit.

    The path goes through the directory's descriptor, because a socket's address has at most 108 bytes.

    Raises:
        OSError: the file system has no sockets.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as bound:
            os.fchmod(bound.fileno(), 0o600)  # the mode of the file to be created
            _remove(opened, name)
            bound.bind(f"/proc/self/fd/{opened}/{name}")
            try:
                yield bound
            finally:
                _remove(opened, name)
    finally:
        os.close(opened)


def _remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


class Peer(NamedTuple):
    """Process, user and group at the other end of a UNIX socket (unix(7), SO_PEERCRED)."""

    process: int
    user: int
    group: int


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    connection = transport.get_extra_info("socket")
    return Peer(*_PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)))


@asynccontextmanager
async def listening_on(
    server: web.Server, bound: socket.socket, limits: ConnectionLimits
) -> AsyncIterator[None]:
    """Listen on a bound UNIX socket; a server that does not listen on an address, too, needs `protect`."""
    listener = await asyncio.get_running_loop().create_unix_server(
        lambda: GuardedConnection(server, limits), sock=bound, backlog=limits.most
    )
    try:
        yield
    finally:
        limits.is_stopping = True
        listener.close()


async def read_body_into(
    request: web.BaseRequest, text_bytes: int, buffer: memoryview, idle_s: float = IDLE_S
) -> bytearray:
    """Read a body: return its first `text_bytes`, and put the rest into a buffer that is as long.

    Bytes that arrived with the head are copied; later ones are read in place.

    Raises:
        BodyTimeout: `body_timeout`.
        ConnectionResetError: the client has left.
    """
    content, connection = request.content, _connection(request)
    in_place = isinstance(connection, GuardedConnection)  # aiohttp's own in tests, None once closed
    content.set_read_chunk_size(READ_BYTES)  # no further pauses
    beginning = bytearray(content.read_nowait())
    least_bytes = text_bytes if in_place else text_bytes + len(buffer)
    if len(beginning) < least_bytes:
        async for piece in iterate_body(content, idle_s):
            beginning += piece
            if len(beginning) >= least_bytes:
                break
    came = len(beginning) - text_bytes
    with memoryview(beginning) as whole, whole[text_bytes:] as rest:
        buffer[:came] = rest
    if connection is not None and came < len(buffer):
        await connection.receive_rest(content, buffer[came:], idle_s)
    del beginning[text_bytes:]
    return beginning


@lru_cache(maxsize=4)
def _filler(count: int) -> bytes:
    """Return `count` zero bytes, cached, as requests of one model are often of one size."""
    return bytes(count)
