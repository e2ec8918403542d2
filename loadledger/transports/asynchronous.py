"""The transport for event loops: connections to one server, over aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from http import HTTPStatus

import aiohttp
from yarl import URL

from loadledger.address import CHUNK_BYTES, SILENCE_S, ConnectionOptions
from loadledger.errors import ClientProblem
from loadledger.requests import MAX_JOINED_BYTES, Answer, Buffer, Request, T, body_buffer
from loadledger.uploads import FileBody

CLOSED = "this client is closed"


class AioStream:
    """A response that is being read."""

    def __init__(self, transport: AioTransport, response: aiohttp.ClientResponse) -> None:
        self._transport = transport
        self._response = response
        headers = {name.lower(): text for name, text in response.headers.items()}
        self.answer = Answer(response.status, headers, b"")

    async def read(self) -> bytes:
        async with self._transport.limit_wait(None):
            return await self._response.content.read(CHUNK_BYTES)

    async def read_all(self) -> Answer:
        length = self._response.content_length
        if length is not None:
            return replace(self.answer, body=await self._read_length(length))
        found = bytearray()
        while chunk := await self.read():
            found += chunk
            self._transport.options.check(len(found))
        return replace(self.answer, body=found)

    async def _read_length(self, length: int) -> Buffer:
        """Return a body of a known length, in one buffer."""
        self._transport.options.check(length)
        body, position = body_buffer(self.answer.headers, length), 0
        async with self._transport.limit_wait(None):
            while chunk := await self._response.content.readany():
                body[position : position + len(chunk)] = chunk
                position += len(chunk)
        return body[:position]

    def release(self) -> None:
        """Keep the connection for the next request if the body was read to its end, else close it."""
        self._response.release()

    def close(self) -> None:
        self._response.close()


class AioTransport:
    """Connections to one server, in one event loop."""

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self._tls = options.tls() if options.address.is_secure else None
        self._session: aiohttp.ClientSession | None = None
        self._waits: set[asyncio.Timeout] = set()
        self._closed = False

    async def close(self) -> None:
        """Close all connections; pending calls raise RuntimeError."""
        self._closed = True
        for wait in self._waits:  # the library would leave them pending forever
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, request: Request) -> Answer:
        limit_s = request.limit_s(self.options.timeout_s)
        async with self.limit_wait(limit_s if request.upload is None else None):  # sending has no limit
            stream = await self._respond(request, limit_s)
            try:
                return await stream.read_all()
            finally:
                stream.release()

    async def open(self, request: Request) -> AioStream:
        stream = await self._respond(request, SILENCE_S)
        if stream.answer.status != HTTPStatus.OK:
            with closing(stream):
                async with self.limit_wait(self.options.timeout_s):
                    stream.answer = await stream.read_all()
        return stream

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def call(self, work: Callable[[], T]) -> T:
        """Return a function's result, called in a thread."""
        return await asyncio.to_thread(work)

    async def _respond(self, request: Request, silence_s: float) -> AioStream:
        """Send a request and return the response with its body unread."""
        connect_s = min(self.options.connect_s, silence_s)
        # Without its length, a body would be sent in chunks.
        length = {} if request.body is None else {"Content-Length": str(request.length)}
        async with self.limit_wait(connect_s + silence_s if request.upload is None else None):
            response = await self._open_session().request(
                request.method,
                URL(f"{self.options.address.url}{request.target}", encoded=True),
                data=_payload(request),
                headers={**request.headers, **length},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silence_s),
            )
        return AioStream(self, response)

    @asynccontextmanager
    async def limit_wait(self, limit_s: float | None) -> AsyncGenerator[None, None]:
        """Limit a wait, end it when the client is closed, and translate the library's errors."""
        if self._closed:
            raise RuntimeError(CLOSED)
        wait = asyncio.timeout(limit_s)
        try:
            async with wait:
                self._waits.add(wait)
                yield
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._closed:
                raise RuntimeError(CLOSED) from None
            raise self._problem(error, limit_s) from _safe_cause(error)
        finally:
            self._waits.discard(wait)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=True if self._tls is None else self._tls, limit=0, keepalive_timeout=15
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self.options.address.headers(),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _problem(self, error: Exception, limit_s: float | None) -> ClientProblem:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return self.options.unreachable(error.certificate_error, sent=False)
        if isinstance(error, aiohttp.ClientConnectorError):
            return self.options.unreachable(error.os_error, sent=False)
        if isinstance(error, aiohttp.ClientResponseError):
            return self.options.no_http()
        is_sent = not isinstance(error, aiohttp.ConnectionTimeoutError)
        return self.options.unreachable(error, limit_s=limit_s, sent=is_sent)


async def _read_in_thread(body: FileBody) -> AsyncGenerator[bytes, None]:
    chunks = body.chunks()
    while chunk := await asyncio.to_thread(_next_chunk, chunks):
        yield chunk


def _next_chunk(chunks: Iterator[bytes]) -> bytes:
    """Return the next part that is not empty, or b"" at the end."""
    return next(filter(None, chunks), b"")


def _safe_cause(error: Exception) -> Exception | None:
    """Return the cause to chain, without the library's errors, which may repeat the token."""
    return None if isinstance(error, aiohttp.ClientResponseError) else error


def _payload(request: Request) -> bytes | AsyncIterator[Buffer] | None:
    """Return a body for the library; a long body in parts, which are not copied."""
    if request.upload is not None:
        return _read_in_thread(request.upload)
    if request.body is None:
        return None
    return b"".join(request.parts) if request.length <= MAX_JOINED_BYTES else _parts(request.parts)


async def _parts(parts: Iterable[Buffer]) -> AsyncGenerator[Buffer, None]:
    for part in parts:
        yield part
