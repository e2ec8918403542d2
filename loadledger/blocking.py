"""The transport that blocks: connections to one server, with nothing but the standard library.

Its coroutines block and never wait, so `run` and `iterate` need no event loop for what is written over it.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from math import inf
from typing import Any, TypeVar
from urllib.parse import urlsplit

from loadledger.exchange import Answer, Request
from loadledger.options import CHUNK_BYTES, MAX_IDLE, SILENCE_S, Options
from loadledger.problems import BadAnswer, ClientProblem, ServerUnreachable, reason

T = TypeVar("T")

_LOST = (http.client.RemoteDisconnected, http.client.IncompleteRead, OSError)


def run(work: Awaitable[T]) -> T:
    """Return what this comes to; all that it waits for is a transport that blocks."""
    try:
        next(work.__await__())
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("this waits for an event loop")


def iterate(values: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what this yields, and close it in the end."""
    try:
        while True:
            yield run(anext(values))
    except StopAsyncIteration:
        return
    finally:
        run(values.aclose())


@dataclass(slots=True)
class Deadline:
    """When what is read has to be there: each byte after no more silence than this, and all by a moment."""

    silence_s: float
    until: float

    @property
    def left_s(self) -> float:
        """How long the next byte may take.

        Raises:
            TimeoutError: time is up.
        """
        left_s = min(self.silence_s, self.until - time.monotonic())
        if left_s <= 0:
            raise TimeoutError
        return left_s


class _Timed(io.RawIOBase):
    """What comes over a connection, in time: the library's own limit begins anew with every byte."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: Deadline) -> None:
        self._sock = sock
        self._raw = raw
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._sock.fileno() >= 0:  # else the library has closed it, and only what it held is left
            self._sock.settimeout(self._deadline.left_s)
        found: int | None = self._raw.readinto(buffer)
        return found

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """The library's answer; its head, too, has to come in time, and so has what follows its body."""

    def __init__(self, deadline: Deadline, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        raw: Any = self.fp.detach()
        self.fp = io.BufferedReader(_Timed(sock, raw, deadline))


class Response:
    """An answer that is still being read, and the connection it comes from.

    Attributes:
        deadline: for what is still to be read.
        answer: as of a `Stream`.
    """

    def __init__(
        self, transport: Transport, connection: http.client.HTTPConnection, deadline: Deadline
    ) -> None:
        self._transport = transport
        self._connection = connection
        self.deadline = deadline
        self._response = connection.getresponse()
        headers = {name.lower(): text for name, text in self._response.getheaders()}
        self.answer = Answer(self._response.status, headers, b"")
        # The library takes the end of a connection for the end of the headers: there is no body then, nor
        # anything that says how long it is.
        self._is_cut = self._response.length is None and not self._response.chunked
        self._is_read = False

    async def read(self) -> bytes:
        """Return what has come of the body, and wait if that is nothing; no bytes are its end."""
        try:
            chunk = self._response.read1(CHUNK_BYTES)
        except (http.client.HTTPException, OSError) as error:
            raise self._transport.problem(error) from _told(error)
        if not chunk and (self._response.length or self._is_cut):
            raise self._transport.problem(ConnectionResetError())
        self._is_cut = False
        return chunk

    async def read_all(self, until: float) -> Answer:
        """Return the answer with the rest of its body, which has to be there in time."""
        self.deadline.until = until
        found = bytearray()
        while chunk := await self.read():
            found += chunk
            self._transport.options.check(len(found))
        self._is_read = True
        return replace(self.answer, body=bytes(found))

    def close(self) -> None:
        """Keep the connection for the next request, if all of the body was read; else close it."""
        self._response.close()
        if self._is_read and not self._response.will_close:
            self._transport.keep(self._connection)
        else:
            self._connection.close()


class Transport:
    """Connections to one server, which threads may share."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._parts = urlsplit(options.address.url)
        self._headers = options.address.headers()
        self._tls = options.tls() if options.address.is_secure else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close all connections that nobody uses, and keep none from now on."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection for the next request, if there are not enough of them."""
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
            return await response.read_all(until)

    async def open(self, request: Request) -> Response:
        """Return a stream; a redirect is none."""
        response = self._respond(request, SILENCE_S)
        try:
            if response.answer.status != HTTPStatus.OK:
                response.answer = await response.read_all(time.monotonic() + self.options.timeout_s)
        except BaseException:
            response.close()
            raise
        return response

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        time.sleep(seconds)  # noqa: ASYNC251 - it is to block

    def _respond(self, request: Request, silence_s: float) -> Response:
        """Return a response whose body was not read yet; a redirect is one, too.

        Args:
            request: what is asked.
            silence_s: until its head is there, and then between two parts of its body.
        """
        connection = self._connection()
        headers = {**self._headers, **request.headers}
        deadline = Deadline(silence_s, time.monotonic() + silence_s)
        response_class: Any = partial(_TimedResponse, deadline)
        connection.response_class = response_class
        try:
            assert connection.sock is not None
            connection.sock.settimeout(silence_s)
            # A server that refuses a body early does not read the rest of it: its answer may be there.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(request.method, self._parts.path + request.target, request.body, headers)
            response = Response(self, connection, deadline)
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            raise self.problem(error) from _told(error)
        except BaseException:
            connection.close()
            raise
        deadline.until = inf  # a stream has no end
        return response

    def problem(self, error: Exception, *, sent: bool = True) -> ClientProblem:
        """Return what an error of the library means."""
        url = self.options.address.url
        if isinstance(error, TimeoutError):
            return ServerUnreachable(url, "it took too long", sent=sent)
        if isinstance(error, _LOST):
            lost = "the connection was lost: " if sent else ""
            return ServerUnreachable(url, f"{lost}{reason(error)}", sent=sent)
        return BadAnswer(f"{url} does not speak HTTP as this client does: is this its URL?")

    def _connection(self) -> http.client.HTTPConnection:
        """Return a connection: one that was kept, if the server has kept it, too."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connected()
            if _is_quiet(connection.sock):
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


def _told(error: Exception) -> Exception | None:
    """Return what may stand in a trace: the library's own errors repeat what was sent, the token perhaps."""
    return None if isinstance(error, http.client.HTTPException) else error


def _is_quiet(sock: socket.socket | None) -> bool:
    """Whether a connection can be used again: its end has not come, nor what nobody asked for."""
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)
