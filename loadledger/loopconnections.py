"""The transport for event loops: connections to one server, over aiohttp."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from loadledger.effects import Answer, Request
from loadledger.options import CHUNK_BYTES, SILENCE_S, Options
from loadledger.problems import BadAnswer, ClientProblem, ServerUnreachable
from loadledger.reasons import reason

CLOSED = "this client is closed"


class Transport:
    """Connections to one server, in one event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._tls = options.tls() if options.address.is_secure else None
        self._session: aiohttp.ClientSession | None = None
        self._waits: set[asyncio.Timeout] = set()
        self._closed = False

    async def close(self) -> None:
        """Close all connections; who waits for something that was to come over one is told so."""
        self._closed = True
        for wait in self._waits:  # the library would have them wait for ever
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, request: Request) -> Answer:
        """Return the whole answer."""
        limit_s = request.patience_s + (request.timeout_s or self._options.timeout_s)
        async with self._within(limit_s):
            response = await self.open(request, limit_s)
            try:
                return await self.answer(response)
            finally:
                response.release()  # closes a connection with something left to read

    async def open(self, request: Request, silence_s: float = SILENCE_S) -> aiohttp.ClientResponse:
        """Return a response whose body was not read yet; a redirect is one, too."""
        connect_s = min(self._options.connect_s, silence_s)
        async with self._within(connect_s + silence_s):
            return await self._opened().request(
                request.method,
                URL(f"{self._options.address.url}{request.target}", encoded=True),
                data=None if request.body is None else io.BytesIO(request.body),
                headers=request.headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silence_s),
            )

    async def read(self, response: aiohttp.ClientResponse) -> bytes:
        """Return what has come of a body, and wait if that is nothing; no bytes are its end."""
        async with self._within(None):
            return await response.content.read(CHUNK_BYTES)

    async def answer(self, response: aiohttp.ClientResponse) -> Answer:
        """Return a response with the rest of its body."""
        found = bytearray()
        while chunk := await self.read(response):
            found += chunk
            self._options.check(len(found))
        return answer_of(response, bytes(found))

    async def refused(self, response: aiohttp.ClientResponse) -> Answer:
        """Return the answer that came in place of a stream."""
        async with self._within(self._options.timeout_s):
            return await self.answer(response)

    @asynccontextmanager
    async def _within(self, limit_s: float | None) -> AsyncGenerator[None, None]:
        """Wait no longer than this, nor for what cannot come any more, and say what went wrong."""
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
            raise self._problem(error) from _told(error)
        finally:
            self._waits.discard(wait)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=True if self._tls is None else self._tls, limit=0, keepalive_timeout=15
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self._options.address.headers(),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _problem(self, error: Exception) -> ClientProblem:
        url = self._options.address.url
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return ServerUnreachable(url, reason(error.certificate_error))
        if isinstance(error, aiohttp.ClientConnectorError):
            return ServerUnreachable(url, reason(error.os_error))
        if isinstance(error, TimeoutError):
            sent = not isinstance(error, aiohttp.ConnectionTimeoutError)
            return ServerUnreachable(url, "it took too long", sent=sent)
        if isinstance(error, aiohttp.ClientResponseError):
            return BadAnswer(f"{url} does not speak HTTP as this client does: is this its URL?")
        return ServerUnreachable(url, f"the connection was lost: {reason(error)}", sent=True)


def _told(error: Exception) -> Exception | None:
    """Return what may stand in a trace: the library's own errors repeat what was sent, the token perhaps."""
    return None if isinstance(error, aiohttp.ClientResponseError) else error


def answer_of(response: aiohttp.ClientResponse, body: bytes) -> Answer:
    """Return a response as a value."""
    return Answer(response.status, {name.lower(): text for name, text in response.headers.items()}, body)
