"""The fetch process's only way to the web: HTTPS GET to allowed hosts, at addresses that are checked.

Each URL, of a source or a redirect, is checked against `AllowedHosts`, and each address to which its host
resolves, before a connection. Proxies of the environment are not used, cookies not kept, bodies not
decompressed. A download that breaks off goes on where it was (RFC 9110, sections 13.1.5 and 14).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_address
from typing import NamedTuple, Self
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from runtime.fetch.messages import PIECE_BYTES
from runtime.fetch.origin import (
    Download,
    SourceChanged,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceProblem,
    SourceTimeout,
    SourceUnreachable,
)
from runtime.fetch.sources import AllowedHosts, SourceNotAllowed, join_host

MAX_ANSWER_BYTES = 16 * 2**20
"""Of an answer that is kept in memory: a page of a listing has 1 MiB."""
MAX_REDIRECTS = 10
"""A content delivery network takes two."""
TIMEOUT_S, MIN_PROGRESS_BYTES = 60.0, 1000
"""For connecting and the answer's head, and then for each so many bytes of its body."""
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Back-off before each further attempt: a server that is restarted comes back in that time."""
SHOWN_CHARACTERS = 200
"""Of a URL in a message."""
OK, PARTIAL, NOT_SATISFIABLE, TOO_MANY, SERVER_ERROR = 200, 206, 416, 429, 500
REDIRECTS = {301, 302, 303, 307, 308}
NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}
UNICAST, SIX_TO_FOUR = IPv6Network("2000::/3"), IPv6Network("2002::/16")
"""The public part of IPv6, and the part of that which leads to any IPv4 address."""
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """An answer that was read as a whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Request(NamedTuple):
    """One GET request; `headers` go to the URL's own origin only."""

    url: str
    headers: Mapping[str, str]
    is_pinned: bool = False


class _Part(NamedTuple):
    """An answer whose body is not read yet, and what its head says of the file."""

    response: aiohttp.ClientResponse
    offset: int
    bytes: int | None
    etag: str | None


class Web:
    """An HTTPS client for one fetch; its methods raise `SourceProblem` and `SourceNotAllowed`.

    Args:
        hosts: to which it may connect.
        ca_file: certificates that are trusted in place of the system's; `SSL_CERT_FILE` of an order.
        credential: what an error of 401 or 403 says of the credential that was or was not sent.

    Raises:
        SourceUnreachable: `source_unreachable`, the certificates cannot be read.
    """

    def __init__(
        self,
        hosts: AllowedHosts,
        ca_file: str | None = None,
        *,
        credential: str = "no credential was sent",
        timeout_s: float = TIMEOUT_S,
        delays_s: Sequence[float] = DELAYS_S,
    ) -> None:
        self._hosts = hosts
        self._credential = credential
        self._timeout_s = timeout_s
        self._delays_s = delays_s
        try:
            self._tls = ssl.create_default_context(cafile=ca_file or None)
        except OSError as error:
            reason = ascii(error.strerror or str(error))
            raise SourceUnreachable(f"the certificates of SSL_CERT_FILE cannot be read: {reason}") from None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=self._tls, resolver=_CheckedResolver(self._hosts), use_dns_cache=False
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity", "User-Agent": "loadledger"},
            auto_decompress=False,
            trust_env=False,
            read_bufsize=PIECE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        authorization: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        statuses: Collection[int] = (OK,),
    ) -> WebAnswer:
        """Return an answer with one of these statuses; headers go to the URL's own origin only."""
        own = {"Authorization": authorization} if authorization else {}
        request = _Request(url, {**headers, **own})
        async with await self._send(request, statuses) as response:
            body = bytearray()
            async for piece in self._read(response):
                body += piece
                if len(body) > max_bytes:
                    raise SourceInvalid(f"{_show(url)} answers with more than {max_bytes} bytes")
            return WebAnswer(response.status, response.headers, bytes(body))

    @asynccontextmanager
    async def download(
        self,
        url: str,
        *,
        authorization: str | None = None,
        offset: int = 0,
        is_pinned: bool = False,
    ) -> AsyncIterator[Download]:
        """Open a file; where the connection is lost, its pieces continue with another request.

        Args:
            url: of https.
            authorization: the header's value, sent to the URL's own origin only.
            offset: where to begin, if the file is pinned and the server has ranges; else at 0.
            is_pinned: whether the whole file's SHA-256 is known, so that pieces of another one are found.
        """
        headers = {"Authorization": authorization} if authorization else {}
        request = _Request(url, headers, is_pinned)
        part = await self._open(request, offset)
        async with part.response, aclosing(self._continue(request, part)) as pieces:
            yield Download(part.offset, part.bytes, pieces)

    async def _open(self, request: _Request, offset: int, etag: str | None = None) -> _Part:
        """Open a file at an offset, or at its beginning if the server does not have that part of it."""
        ranges = {}
        if offset and (etag or request.is_pinned):
            ranges["Range"] = f"bytes={offset}-"
        if ranges and etag and not request.is_pinned:
            ranges["If-Range"] = etag
        accepted = (OK, PARTIAL, NOT_SATISFIABLE) if ranges else (OK,)
        response = await self._send(request, accepted, ranges)
        tag = response.headers.get("ETag", "")
        strong = tag if _STRONG_TAG.fullmatch(tag) else None
        if response.status == OK:
            return _Part(response, 0, response.content_length, strong)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        begin, last, size = map(int, found.groups()) if found else (0, 0, 0)
        if response.status == PARTIAL and begin == offset and last + 1 == size:
            return _Part(response, offset, size, strong)
        response.close()
        if response.status == NOT_SATISFIABLE:
            return await self._open(request, 0)
        raise SourceInvalid(f"{_show(request.url)} answers with another range than bytes {offset}-")

    async def _continue(self, request: _Request, first: _Part) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of a file over as many requests as it takes."""
        part, position, delays_s, shown = first, first.offset, iter(self._delays_s), _show(request.url)
        while True:
            start = position
            try:
                async with part.response:
                    async for piece in self._read(part.response):
                        position += len(piece)
                        yield piece
                if first.bytes in (None, position):
                    return
                raise SourceUnreachable(f"{shown} sent {position} of {first.bytes} bytes", is_transient=True)
            except SourceProblem as problem:
                if position and not (first.etag or request.is_pinned):
                    raise type(problem)(
                        f"{problem}; it broke off after {position} bytes, and without an entity tag it cannot"
                        " be continued: add it again, or give its SHA-256"
                    ) from None
                if position - start >= MIN_PROGRESS_BYTES:
                    delays_s = iter(self._delays_s)
                delay_s = next(delays_s, None)
                if delay_s is None or not problem.is_transient:
                    raise
            await asyncio.sleep(delay_s)
            part = await self._open(request, position, first.etag)
            is_same = request.is_pinned or (part.bytes, part.etag) == (first.bytes, first.etag)
            if part.offset != position or not is_same:
                part.response.close()
                raise SourceChanged(
                    f"{shown} is not the file any more of which {position} bytes were read, or cannot be"
                    " continued: add it again"
                )

    async def _send(
        self, request: _Request, statuses: Collection[int], ranges: Mapping[str, str] = _NO_HEADERS
    ) -> aiohttp.ClientResponse:
        """Return an answer with one of these statuses, before its body is read; try again with back-off."""
        for delay_s in self._delays_s:
            try:
                return await self._send_once(request, statuses, ranges)
            except SourceProblem as problem:
                if not problem.is_transient:
                    raise
            await asyncio.sleep(delay_s)
        return await self._send_once(request, statuses, ranges)

    async def _send_once(
        self, request: _Request, statuses: Collection[int], ranges: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Return the answer after redirects."""
        target, headers, own = request.url, request.headers, None
        for _ in range(MAX_REDIRECTS + 1):
            try:
                checked = self._check(target)
                own = own or checked.origin()
                if checked.origin() != own:
                    headers = _NO_HEADERS
                async with asyncio.timeout(self._timeout_s):
                    response = await self._session.get(
                        checked, headers={**headers, **ranges}, allow_redirects=False
                    )
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    break
                response.close()
                target = urljoin(target, response.headers["Location"])
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _explain(error, target) from None
        else:
            raise SourceInvalid(f"{_show(request.url)} leads through more than {MAX_REDIRECTS} redirects")
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if response.status in statuses and coding in ("", "identity"):
            return response
        response.close()
        shown = _show(target)
        match response.status:
            case status if status in statuses:
                raise SourceInvalid(f"{shown} answers in a coding that was not asked for, as gzip")
            case 401 | 403 as status:
                raise SourceDenied(f"{shown} refuses with HTTP {status}: {self._credential}")
            case 404 | 410 as status:
                raise SourceNotFound(f"{shown} is not there (HTTP {status}): check the name")
            case status if status == TOO_MANY or status >= SERVER_ERROR:
                message = f"{shown} fails with HTTP {status}: try again later"
                raise SourceUnreachable(message, is_transient=True)
        raise SourceInvalid(f"{shown} answers HTTP {response.status}, which is no file: check the name")

    def _check(self, url: str) -> URL:
        """Return a URL as the client takes it; refuse it if it is not of https, or its host not allowed."""
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(url)
        target = URL(url, encoded=True)
        host, port = target.raw_host, target.port
        if target.scheme != "https" or not host or not port or target.raw_user is not None:
            raise SourceInvalid(f"the source leads to {_show(url)}, which is no URL of https to follow")
        self._hosts.check(host, port)
        with suppress(ValueError):  # an address, for which the client asks no resolver
            _choose_addresses(self._hosts, host, port, {str(ip_address(host))})
        return target

    async def _read(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield a body's pieces; time in which nobody asks for the next one does not count."""
        left_s, missing = self._timeout_s, MIN_PROGRESS_BYTES
        while True:
            begin = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    piece = await response.content.read(PIECE_BYTES)
            except (aiohttp.ClientError, OSError) as error:
                raise _explain(error, str(response.url)) from None
            if not piece:
                return
            left_s, missing = left_s - (time.monotonic() - begin), missing - len(piece)
            if missing <= 0:
                left_s, missing = self._timeout_s, MIN_PROGRESS_BYTES
            yield piece


class _CheckedResolver(aiohttp.ThreadedResolver):
    """Resolves to allowed addresses only, so that the address that was checked is the one connected to."""

    def __init__(self, hosts: AllowedHosts) -> None:
        super().__init__()
        self._hosts = hosts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        allowed = _choose_addresses(self._hosts, host, port, {each["host"] for each in found})
        return [each for each in found if each["host"] in allowed]


def is_public(text: str) -> bool:
    """Whether an IP address is one of the internet: of no own network, no machine, no group, no tunnel."""
    address = ip_address(text)
    if address.version == 6:  # noqa: PLR2004
        return address.is_global and address in UNICAST and address not in SIX_TO_FOUR
    return address.is_global and not address.is_multicast


def _choose_addresses(hosts: AllowedHosts, host: str, port: int, addresses: set[str]) -> set[str]:
    """Return those of a host's addresses to which a fetch may connect; there is one, or it is refused."""
    if hosts.may_be_private(host, port):
        return addresses
    public = {each for each in addresses if is_public(each)}
    if not public:
        where = join_host(host, port)
        raise SourceNotAllowed(
            f"the source leads to {where}, which has no public address: if that is right, the operator adds"
            f" https://{where} to --sources"
        )
    return public


def _explain(error: Exception, url: str) -> SourceProblem:
    """Return the problem that an error of the client stands for, without texts of the server."""
    shown = _show(url)
    match error:
        case TimeoutError():
            return SourceTimeout(f"{shown} does not answer, or too slowly: try again", is_transient=True)
        case aiohttp.ClientConnectorCertificateError():
            reason = ascii(getattr(error.certificate_error, "verify_message", "invalid"))
            return SourceUnreachable(
                f"the certificate of {shown} is not trusted ({reason}): name its authority with SSL_CERT_FILE"
            )
        case aiohttp.ClientConnectorDNSError() if error.os_error.errno in NO_SUCH_NAME:
            return SourceUnreachable(f"{shown} cannot be reached: its host has no address; check the name")
        case aiohttp.ClientResponseError() | aiohttp.InvalidURL() | ValueError():
            return SourceInvalid(f"{shown} does not answer in valid HTTP, or is no valid URL")
    reason = ascii(getattr(error, "strerror", None) or type(error).__name__)
    return SourceUnreachable(f"the connection to {shown} fails ({reason}): try again", is_transient=True)


def _show(url: str) -> str:
    """Return a URL for a message: no user, no query, since a password or signature may stand there."""
    bare = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    return ascii(re.sub(r"//[^/]*@", "//", bare)[:SHOWN_CHARACTERS])[1:-1]
