"""The blocking transport: keep-alive connections to one server, over the standard library.

Its coroutines block and never suspend, so `run` and `iterate` complete the client's coroutines without an
event loop.
"""

from __future__ import annotations

import http.client
import select
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import closing, suppress
from dataclasses import replace
from http import HTTPStatus
from math import inf
from urllib.parse import urlsplit

from loadledger.address import CHUNK_BYTES, MAX_IDLE, SILENCE_S, ConnectionOptions
from loadledger.problems import BadAnswer, ClientProblem, ServerUnreachable, failure_reason
from loadledger.requests import Answer, Request, T

MAX_LENGTH_DIGITS = 18
"""Digits of a Content-Length: no body is longer, and Python refuses to convert 4,300."""

HTTP_1_1 = 11
"""`HTTPResponse.version` of HTTP/1.1, whose connections are kept unless a side says `close`."""
_LOST = (http.client.RemoteDisconnected, http.client.IncompleteRead, OSError)


def run(work: Awaitable[T]) -> T:
    """Run a coroutine over this transport and return its result."""
    try:
        next(work.__await__())
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("the coroutine suspended: it needs an event loop")


def iterate(values: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Iterate over an asynchronous generator, and close it at the end."""
    try:
        while True:
            yield run(anext(values))
    except StopAsyncIteration:
        return
    finally:
        run(values.aclose())


class BlockingStream:
    """A response that is being read.

    Args:
        connection: with a request sent; the transport gets it back after the response.
        sock: the connection's socket, which the library may release earlier.
        silence_s: limit of the wait for the next byte.
    """

    def __init__(
        self,
        transport: BlockingTransport,
        connection: http.client.HTTPConnection,
        sock: socket.socket,
        silence_s: float,
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._sock = sock
        self._silence_s = silence_s
        self._until = inf
        self._response = connection.getresponse()
        headers = {name.lower(): text for name, text in self._response.getheaders()}
        self.answer = Answer(self._response.status, headers, b"")
        is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = None if is_chunked else _body_length(self.answer)
        # The library takes the end of a connection for the end of the headers: then there is neither a
        # body nor its length.
        self._is_cut = self._left is None and not is_chunked
        option = headers.get("connection", "").lower()
        persists = "keep-alive" in option if self._response.version < HTTP_1_1 else "close" not in option
        self._is_kept = persists and not self._is_cut
        self._is_read = False

    async def read(self) -> bytes:
        """Return the next bytes of the body; b"" is its end."""
        left_s = min(self._silence_s, self._until - time.monotonic())
        try:
            if left_s <= 0:
                raise TimeoutError
            if self._sock.fileno() >= 0:  # else it was closed, and only what the library holds is left
                self._sock.settimeout(left_s)
            chunk = self._response.read1(CHUNK_BYTES)
        except (http.client.HTTPException, OSError) as error:
            raise self._transport.problem(error) from _safe_cause(error)
        if self._left is not None:
            self._left -= len(chunk)
        if not chunk and (self._left or self._is_cut):
            raise self._transport.problem(ConnectionResetError())
        self._is_cut = False
        return chunk

    async def read_all(self, until: float) -> Answer:
        """Return the answer with its whole body, read before a deadline."""
        self._until = until
        found = bytearray()
        while chunk := await self.read():
            found += chunk
            self._transport.options.check(len(found))
        self._is_read = True
        return replace(self.answer, body=bytes(found))

    def close(self) -> None:
        """Keep the connection for the next request if the body was read to its end, else close it."""
        self._response.close()
        if self._is_read and self._is_kept:
            self._transport.keep(self._connection)
        else:
            self._connection.close()


class BlockingTransport:
    """Keep-alive connections to one server, shared by threads."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self._parts = urlsplit(options.address.url)
        self._headers = options.address.headers()
        self._tls = options.tls() if options.address.is_secure else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close the idle connections, and keep none from now on."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Keep an idle connection, up to `MAX_IDLE`."""
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    async def send(self, request: Request) -> Answer:
        """Return the whole answer."""
        limit_s = request.patience_s + (request.timeout_s or self.options.timeout_s)
        until = time.monotonic() + limit_s
        with closing(self._respond(request, limit_s)) as response:
            if request.upload is not None:  # to send it takes as long as it takes
                until = time.monotonic() + limit_s
            return await response.read_all(until)

    async def open(self, request: Request) -> BlockingStream:
        """Return the answer as a stream; one without success is read whole."""
        response = self._respond(request, SILENCE_S)
        try:
            if response.answer.status != HTTPStatus.OK:
                response.answer = await response.read_all(time.monotonic() + self.options.timeout_s)
        except BaseException:
            response.close()
            raise
        return response

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)  # noqa: ASYNC251 - it is to block

    async def call(self, work: Callable[[], T]) -> T:
        """Return what a function returns."""
        return work()

    def _respond(self, request: Request, silence_s: float) -> BlockingStream:
        """Send a request and return the response with its body unread."""
        connection = self._connection()
        headers = {**self._headers, **request.headers}
        try:
            sock = connection.sock  # the library documents no other way to limit one response's time
            sock.settimeout(silence_s)
            # A server that refuses a body early does not read the rest: its answer may have arrived.
            with suppress(BrokenPipeError, ConnectionResetError):
                body = request.body if request.upload is None else request.upload.chunks()
                connection.request(request.method, self._parts.path + request.target, body, headers)
            return BlockingStream(self, connection, sock, silence_s)
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            raise self.problem(error) from _safe_cause(error)
        except BaseException:
            connection.close()
            raise

    def problem(self, error: Exception, *, sent: bool = True) -> ClientProblem:
        """Return the `ClientProblem` for an error of the library."""
        url = self.options.address.url
        if isinstance(error, TimeoutError):
            return ServerUnreachable(url, "it took too long", sent=sent)
        if isinstance(error, _LOST):
            lost = "the connection was lost: " if sent else ""
            return ServerUnreachable(url, f"{lost}{failure_reason(error)}", sent=sent)
        return BadAnswer(f"{url} does not speak HTTP as this client does: is this its URL?")

    def _connection(self) -> http.client.HTTPConnection:
        """Return an idle connection that the server has not closed, or a new one."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connected()
            if _is_reusable(connection.sock):
                return connection
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        host, limit_s = self._parts.hostname or "", self.options.connect_s
        port = self._parts.port or (http.client.HTTP_PORT if self._tls is None else http.client.HTTPS_PORT)
        connection = (
            http.client.HTTPConnection(host, port, timeout=limit_s)
            if self._tls is None
            else http.client.HTTPSConnection(host, port, timeout=limit_s, context=self._tls)
        )
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise self.problem(error, sent=False) from error
        except BaseException:
            connection.close()
            raise
        return connection


def _body_length(answer: Answer) -> int | None:
    """Return the length of a body that is not chunked; None if only the end of the connection ends it."""
    if answer.status < HTTPStatus.OK or answer.status in {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}:
        return 0
    length = answer.headers.get("content-length", "")
    is_number = length.isascii() and length.isdecimal() and len(length) <= MAX_LENGTH_DIGITS
    return int(length) if is_number else None


def _safe_cause(error: Exception) -> Exception | None:
    """Return the cause to chain; errors of the library may repeat the token, so they are left out."""
    return None if isinstance(error, http.client.HTTPException) else error


def _is_reusable(sock: socket.socket | None) -> bool:
    """Whether an idle connection is reusable: neither closed nor readable."""
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)
