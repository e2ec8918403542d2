"""An HTTPS client: answers, and files that go on where a connection broke off.

Of the standard library, with its proxies (`HTTPS_PROXY`) and certificates (`SSL_CERT_FILE`). Redirects lead
to https only, and credentials to no other origin. A download that breaks off goes on where it was (RFC 9110,
sections 13.1.5 and 14).
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple, cast
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request

from loadledger.errors import SourceProblem, printable
from loadledger.sources.downloads import OpenAt
from loadledger.uploads import CHUNK_BYTES

MAX_ANSWER_BYTES = 16 * 2**20
"""Of an answer that is kept in memory, as a listing or a manifest."""
MAX_REDIRECTS = 10
"""A content delivery network takes two."""
TIMEOUT_S = 60.0
"""For connecting, and for each wait for bytes."""
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Back-off before each further attempt: a server that is restarted comes back in that time."""
SHOWN_CHARACTERS = 200
"""Of a URL in a message."""
OK, PARTIAL, NOT_SATISFIABLE, TOO_MANY, SERVER_ERROR = 200, 206, 416, 429, 500
REDIRECTS = {301, 302, 303, 307, 308}
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_NOTHING: Mapping[str, str] = {}


class _Transient(SourceProblem):
    """The same request may succeed soon."""

    def __init__(self, message: str) -> None:
        super().__init__("source_unreachable", message)


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """An answer that was read as a whole; `challenges` are its WWW-Authenticate fields."""

    status: int
    challenges: list[str]
    body: bytes


class _Part(NamedTuple):
    """An answer whose body is not read yet, and what its head says of the whole file."""

    response: HTTPResponse
    offset: int
    bytes: int | None
    etag: str | None


class Web:
    """An HTTPS client; its methods raise `SourceProblem`.

    Args:
        credential: what an error of 401 or 403 says of the credential that was or was not sent.
    """

    def __init__(self, credential: str, *, delays_s: Sequence[float] = DELAYS_S) -> None:
        self._credential, self._delays_s = credential, delays_s
        self._opener = OpenerDirector()  # the usual one follows redirects to http, with credentials
        self._opener.add_handler(ProxyHandler())
        self._opener.add_handler(HTTPSHandler(context=ssl.create_default_context()))

    def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] = _NOTHING,
        authorization: str | None = None,
        statuses: Collection[int] = (OK,),
    ) -> WebAnswer:
        """Return an answer with one of these statuses; headers go to the URL's own origin only."""
        own = {"Authorization": authorization} if authorization else {}
        with closing(self._send(url, {**headers, **own}, statuses)) as response:
            body = b"".join(_read(response, url, MAX_ANSWER_BYTES + 1))
        if len(body) > MAX_ANSWER_BYTES:
            raise SourceProblem(
                "source_invalid", f"{_show(url)} answers with more than {MAX_ANSWER_BYTES} bytes"
            )
        return WebAnswer(response.status, response.headers.get_all("WWW-Authenticate", []), body)

    def opening(self, url: str, *, authorization: str | None = None, is_pinned: bool) -> OpenAt:
        """Return what opens a file.

        Args:
            url: of https.
            authorization: the header's value.
            is_pinned: whether the whole file's SHA-256 is known, so that pieces of another one are found.
        """
        headers = {"Authorization": authorization} if authorization else {}

        def open_at(offset: int) -> tuple[int, Iterator[bytes]]:
            part = self._open(url, headers, offset, is_pinned=is_pinned)
            return part.offset, self._continue(url, headers, part, is_pinned=is_pinned)

        return open_at

    def _open(
        self, url: str, headers: Mapping[str, str], offset: int, etag: str | None = None, *, is_pinned: bool
    ) -> _Part:
        """Open a file at an offset, or at its beginning if the server does not have that part of it."""
        ranges = {}
        if offset and (etag or is_pinned):
            ranges["Range"] = f"bytes={offset}-"
        if ranges and etag and not is_pinned:
            ranges["If-Range"] = etag
        accepted = (OK, PARTIAL, NOT_SATISFIABLE) if ranges else (OK,)
        response = self._send(url, headers, accepted, ranges)
        tag = response.headers.get("ETag", "")
        strong = tag if _STRONG_TAG.fullmatch(tag) else None
        if response.status == OK:
            return _Part(response, 0, response.length, strong)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        begin, last, size = map(int, found.groups()) if found else (0, 0, 0)
        if response.status == PARTIAL and begin == offset and last + 1 == size:
            return _Part(response, offset, size, strong)
        response.close()
        if response.status == NOT_SATISFIABLE:
            return self._open(url, headers, 0, is_pinned=is_pinned)
        raise SourceProblem("source_invalid", f"{_show(url)} answers with another range than bytes {offset}-")

    def _continue(
        self, url: str, headers: Mapping[str, str], first: _Part, *, is_pinned: bool
    ) -> Iterator[bytes]:
        """Yield the pieces of a file over as many requests as it takes."""
        part, position, delays_s = first, first.offset, iter(self._delays_s)
        while True:
            start = position
            try:
                with closing(part.response):
                    for piece in _read(part.response, url):
                        position += len(piece)
                        yield piece
                if first.bytes in (None, position):
                    return
                broke_off = _Transient(f"{_show(url)} sent {position} of {first.bytes} bytes")
            except _Transient as problem:
                broke_off = problem
            if position and not (first.etag or is_pinned):
                raise SourceProblem(
                    "source_unreachable",
                    f"{_show(url)} broke off after {position} bytes, and without an entity tag it cannot"
                    " be continued: add it again, or give its SHA-256 with --digest",
                )
            if position > start:
                delays_s = iter(self._delays_s)
            delay_s = next(delays_s, None)
            if delay_s is None:
                raise broke_off
            time.sleep(delay_s)
            part = self._open(url, headers, position, first.etag, is_pinned=is_pinned)
            is_same = is_pinned or (part.bytes, part.etag) == (first.bytes, first.etag)
            if part.offset != position or not is_same:
                part.response.close()
                raise SourceProblem(
                    "source_changed",
                    f"{_show(url)} is not the file any more of which {position} bytes were read, or cannot be"
                    " continued: add it again",
                )

    def _send(
        self,
        url: str,
        headers: Mapping[str, str],
        statuses: Collection[int],
        ranges: Mapping[str, str] = _NOTHING,
    ) -> HTTPResponse:
        """Return an answer with one of these statuses, before its body is read; try again with back-off."""
        for delay_s in self._delays_s:
            try:
                return self._send_once(url, headers, statuses, ranges)
            except _Transient:
                time.sleep(delay_s)
        return self._send_once(url, headers, statuses, ranges)

    def _send_once(
        self, url: str, headers: Mapping[str, str], statuses: Collection[int], ranges: Mapping[str, str]
    ) -> HTTPResponse:
        """Return the answer after redirects."""
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            own = headers if _origin_of(target) == _origin_of(url) else _NOTHING
            response = self._open_url(target, {**own, **ranges, "User-Agent": "loadledger"})
            if response.status not in REDIRECTS or "Location" not in response.headers:
                break
            response.close()
            target = urljoin(target, response.headers["Location"])
        else:
            raise SourceProblem(
                "source_invalid", f"{_show(url)} leads through more than {MAX_REDIRECTS} redirects"
            )
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if response.status in statuses and coding in ("", "identity"):
            return response
        response.close()
        raise self._refuse(_show(target), response.status, is_coded=response.status in statuses)

    def _refuse(self, shown: str, status: int, *, is_coded: bool) -> SourceProblem:
        if is_coded:
            return SourceProblem("source_invalid", f"{shown} answers in a coding that was not asked for")
        if status in (401, 403):
            return SourceProblem("source_denied", f"{shown} refuses with HTTP {status}: {self._credential}")
        if status in (404, 410):
            return SourceProblem("source_not_found", f"{shown} is not there (HTTP {status}): check the name")
        if status == TOO_MANY or status >= SERVER_ERROR:
            return _Transient(f"{shown} fails with HTTP {status}: try again later")
        return SourceProblem(
            "source_invalid", f"{shown} answers HTTP {status}, which is no file: check the name"
        )

    def _open_url(self, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        parts = urlsplit(url) if url.isascii() and url.isprintable() and " " not in url else None
        if parts is None or parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise SourceProblem(
                "source_invalid", f"the source leads to {_show(url)}, which is no URL of https to follow"
            )
        try:
            answer = self._opener.open(Request(url, headers=dict(headers)), timeout=TIMEOUT_S)  # noqa: S310
        except (OSError, HTTPException, ValueError) as error:
            raise _explain(error, url) from None
        return cast(HTTPResponse, answer)


def _origin_of(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or 443


def _read(response: HTTPResponse, url: str, most: int | None = None) -> Iterator[bytes]:
    """Yield a body's pieces; at most so many bytes, and one piece, of it."""
    count = 0
    while most is None or count < most:
        try:
            piece = response.read(CHUNK_BYTES)
        except (OSError, HTTPException, ValueError) as error:
            raise _explain(error, url) from None
        if not piece:
            return
        count += len(piece)
        yield piece


def _explain(error: Exception, url: str) -> SourceProblem:
    """Return the problem that an error of the client stands for, without texts of the server."""
    shown = _show(url)
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return _Transient(f"{shown} does not answer: try again")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return SourceProblem(
            "source_unreachable",
            f"the certificate of {shown} is not trusted"
            f" ({printable(cause.verify_message, SHOWN_CHARACTERS)}): name its authority with SSL_CERT_FILE",
        )
    if isinstance(cause, socket.gaierror):
        return SourceProblem(
            "source_unreachable", f"{shown} cannot be reached: its host has no address; check the name"
        )
    if isinstance(cause, (HTTPException, ValueError)) and not isinstance(cause, OSError):
        return SourceProblem("source_invalid", f"{shown} does not answer in valid HTTP, or is no valid URL")
    reason = getattr(cause, "strerror", None) or type(cause).__name__
    return _Transient(f"the connection to {shown} fails ({printable(reason, SHOWN_CHARACTERS)}): try again")


def _show(url: str) -> str:
    """Return a URL for a message: no user, no query, since a password or signature may stand there."""
    bare = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    return ascii(re.sub(r"//[^/]*@", "//", bare)[:SHOWN_CHARACTERS])[1:-1]
