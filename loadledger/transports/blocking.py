"""The blocking transport: keep-alive connections to one server, over sockets.

Its coroutines block and never suspend, so `run` and `iterate` complete the client's coroutines without an
event loop.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import closing, suppress
from dataclasses import replace
from http import HTTPStatus
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

from loadledger.address import (
    CHUNK_BYTES,
    CONTROL_KEY,
    CONTROL_SOCKET,
    MAX_IDLE,
    SILENCE_S,
    ConnectionOptions,
)
from loadledger.errors import ClientProblem, ServerUnreachable, failure_reason
from loadledger.requests import MAX_JOINED_BYTES, Answer, Buffer, Request, T, body_buffer
from loadledger.transports.http1 import (
    HEAD_END,
    MAX_HEAD_BYTES,
    ChunkedDecoder,
    MalformedResponse,
    ResponseHead,
    format_fields,
    parse_head,
)

FIRST_READ_BYTES = 2**14
"""Bytes read with the head: a small answer arrives whole, and little of a large one has to be copied."""
_MORE = getattr(socket, "MSG_MORE", 0)
"""Linux: the head of a large request is sent together with its body."""


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


class Connection:
    """A connected socket; every wait ends at a deadline of the monotonic clock."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._flags = 0 if isinstance(sock, ssl.SSLSocket) else _MORE

    @property
    def is_reusable(self) -> bool:
        """Whether the idle connection is neither closed nor readable."""
        if self.sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def send(self, head: bytes, request: Request, limit_s: float) -> None:
        """Send a request; large tensors are not copied."""
        self.sock.settimeout(limit_s)
        if request.upload is not None:
            self.sock.sendall(head)
            for chunk in request.upload.chunks():
                self.sock.sendall(chunk)
            return
        if len(head) + request.length <= MAX_JOINED_BYTES:
            self.sock.sendall(b"".join((head, *request.parts)))
            return
        self.sock.sendall(head, self._flags)
        for number, part in enumerate(request.parts, 1):
            self.sock.sendall(part, self._flags if number < len(request.parts) else 0)

    def receive(self, most: int, until: float) -> bytes:
        self._wait_until(until)
        return self.sock.recv(most)

    def receive_into(self, room: memoryview, until: float) -> int:
        """Receive the next bytes into a buffer and return their number, 0 at the end of the connection."""
        self._wait_until(until)
        return self.sock.recv_into(room)

    def receive_head(self, until: float) -> tuple[ResponseHead, bytes]:
        """Return the final head and the bytes after it.

        Raises:
            ConnectionResetError: the connection ended within the head.
            MalformedResponse: the head is no HTTP/1.1.
        """
        found, searched = bytearray(), 0
        while True:
            end = found.find(HEAD_END, max(0, searched - len(HEAD_END)))
            if end >= 0:
                head = parse_head(bytes(found[:end]))
                del found[: end + len(HEAD_END)]
                if not head.is_interim:
                    return head, bytes(found)
                searched = 0
                continue
            if len(found) > MAX_HEAD_BYTES or (found and not b"HTTP/1".startswith(bytes(found[:6]))):
                raise MalformedResponse
            searched = len(found)
            data = self.receive(FIRST_READ_BYTES, until)
            if not data:
                raise ConnectionResetError
            found += data

    def close(self) -> None:
        self.sock.close()

    def _wait_until(self, until: float) -> None:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.sock.settimeout(left_s)


class BlockingStream:
    """A response that is being read.

    Args:
        connection: with a request sent; the transport gets it back after the response.
        silence_s: limit of the wait for the next byte.
    """

    def __init__(self, transport: BlockingTransport, connection: Connection, silence_s: float) -> None:
        self._transport = transport
        self._connection = connection
        self._silence_s = silence_s
        self._until = inf
        self._head, self._rest = connection.receive_head(time.monotonic() + silence_s)
        self.answer = Answer(self._head.status, self._head.headers, b"")
        self._chunks = ChunkedDecoder() if self._head.is_chunked else None
        self._length = None if self._chunks else self._head.body_length
        self._left = self._length
        self._is_read = False

    async def read(self) -> bytes:
        try:
            return self._read_chunk() if self._chunks else self._read_plain()
        except (MalformedResponse, OSError) as error:
            raise self._transport.problem(error, self._silence_s) from _safe_cause(error)

    async def read_all(self, until: float) -> Answer:
        """Return the answer with its whole body, read before a deadline."""
        self._until = until
        if self._length is not None:
            return replace(self.answer, body=self._read_length(self._length))
        found = bytearray()
        while chunk := await self.read():
            found += chunk
            self._transport.options.check(len(found))
        return replace(self.answer, body=found)

    def close(self) -> None:
        """Keep the connection for the next request if the body was read to its end, else close it."""
        if self._is_read and not self._rest and self._head.persists:
            self._transport.keep(self._connection)
        else:
            self._connection.close()

    def _deadline(self) -> float:
        return min(self._until, time.monotonic() + self._silence_s)

    def _read_length(self, length: int) -> Buffer:
        """Return a body of a known length, in one buffer."""
        self._transport.options.check(length)
        body = body_buffer(self._head.headers, length)
        position = min(len(self._rest), length)
        body[:position], self._rest = self._rest[:position], self._rest[position:]
        try:
            while position < length:
                received = self._connection.receive_into(body[position:], self._deadline())
                if not received:
                    raise ConnectionResetError
                position += received
        except OSError as error:
            raise self._transport.problem(error, self._silence_s) from error
        self._is_read = True
        return body

    def _read_plain(self) -> bytes:
        if self._left == 0:
            self._is_read = True
            return b""
        most = CHUNK_BYTES if self._left is None else min(CHUNK_BYTES, self._left)
        if self._rest:
            data, self._rest = self._rest[:most], self._rest[most:]
        else:
            data = self._connection.receive(most, self._deadline())
        if self._left is not None:
            if not data:
                raise ConnectionResetError
            self._left -= len(data)
        return data

    def _read_chunk(self) -> bytes:
        decoder = self._chunks
        while decoder is not None and not decoder.has_ended:
            data, self._rest = self._rest or self._connection.receive(CHUNK_BYTES, self._deadline()), b""
            if not data:
                raise ConnectionResetError
            if body := decoder.feed(data):
                return body
        self._is_read = decoder is not None and not decoder.rest
        return b""


class BlockingTransport:
    """Keep-alive connections to one server, shared by threads."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        parts = urlsplit(options.address.url)
        self._tls = options.tls() if options.address.is_secure else None
        self._place = parts.hostname or "", parts.port or (80 if self._tls is None else 443)
        self._path = parts.path
        self._headers = {"Host": parts.netloc, **options.address.headers()}
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Close the idle connections, and keep no further ones."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def keep(self, connection: Connection) -> None:
        """Keep an idle connection, up to `MAX_IDLE`."""
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    async def send(self, request: Request) -> Answer:
        limit_s = request.limit_s(self.options.timeout_s)
        until = time.monotonic() + limit_s
        with closing(self._respond(request, limit_s)) as response:
            if request.upload is not None:  # sending a file has no limit
                until = time.monotonic() + limit_s
            return await response.read_all(until)

    async def open(self, request: Request) -> BlockingStream:
        response = self._respond(request, SILENCE_S)
        try:
            if response.answer.status != HTTPStatus.OK:
                response.answer = await response.read_all(time.monotonic() + self.options.timeout_s)
        except BaseException:
            response.close()
            raise
        return response

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - it is to block

    async def call(self, work: Callable[[], T]) -> T:
        return work()

    def _respond(self, request: Request, silence_s: float) -> BlockingStream:
        """Send a request and return the response with its body unread."""
        head = self._request_head(request)
        connection = self._connection()
        try:
            # A server that refuses a body early does not read the rest: its answer may have arrived.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send(head, request, silence_s)
            return BlockingStream(self, connection, silence_s)
        except (MalformedResponse, OSError) as error:
            connection.close()
            raise self.problem(error, silence_s) from _safe_cause(error)
        except BaseException:
            connection.close()
            raise

    def _request_head(self, request: Request) -> bytes:
        fields = format_fields({**self._headers, **request.headers}.items())
        if request.upload is None and (request.body is not None or request.method != "GET"):
            fields += f"Content-Length: {request.length}\r\n"
        line = f"{request.method} {self._path}{request.target} HTTP/1.1\r\n"
        return f"{line}{fields}\r\n".encode("latin-1")

    def problem(self, error: Exception, limit_s: float) -> ClientProblem:
        if not isinstance(error, OSError):
            return self.options.no_http()
        return self.options.unreachable(error, limit_s=limit_s)

    def _connection(self) -> Connection:
        """Return an idle connection that the server has not closed, or a new one."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connected()
            if connection.is_reusable:
                return connection
            connection.close()

    def _connected(self) -> Connection:
        if self.options.data is not None:
            return Connection(_connect_control(self.options.data, self.options.connect_s))
        try:
            sock = socket.create_connection(self._place, self.options.connect_s)
        except OSError as error:
            raise self.options.unreachable(error, sent=False) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Connection(
                sock if self._tls is None else self._tls.wrap_socket(sock, server_hostname=self._place[0])
            )
        except OSError as error:
            sock.close()
            raise self.options.unreachable(error, sent=False) from error
        except BaseException:
            sock.close()
            raise


def _connect_control(data: Path, limit_s: float) -> socket.socket:
    """Connect to the control socket of the server that runs on a data directory.

    The path leads through the directory's descriptor, since an address has at most 108 bytes.

    Raises:
        ServerUnreachable: no server runs there, or it is another user's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(limit_s)
    try:
        folder = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{CONTROL_SOCKET}")
        finally:
            os.close(folder)
    except OSError as error:
        sock.close()
        raise _explain_control(data, error) from error
    return sock


def read_control_key(data: Path) -> str:
    """Return the token for the control socket of the server that runs on a data directory.

    Raises:
        ServerUnreachable: no server runs there, or it is another user's.
    """
    try:
        return (data / CONTROL_KEY).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise _explain_control(data, error) from error


def _explain_control(data: Path, error: OSError) -> ServerUnreachable:
    reason, advice = failure_reason(error), "manage tokens over the server's URL"
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        reason, advice = "no server runs there", f"start it with `loadledger serve --data {data}`"
    elif isinstance(error, PermissionError):
        reason, advice = "it is for the server's user", "run this as that user"
    return ServerUnreachable(str(data / CONTROL_SOCKET), reason, advice)


def _safe_cause(error: Exception) -> Exception | None:
    """Return the cause to chain, without malformed answers, which may repeat the token."""
    return None if isinstance(error, MalformedResponse) else error
