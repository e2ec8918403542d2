"""Files at URLs of https, and the HTTPS client of the standard library.

Proxies come from `HTTPS_PROXY`, other certificates from `SSL_CERT_FILE`. Redirects lead to https only, and
credentials to no other origin.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Collection, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import cast
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request

from loadledger.errors import SourceProblem, printable
from loadledger.sources.downloads import Download, Downloads, OpenAt, OpenFile, retry
from loadledger.sources.names import SourceName
from loadledger.sources.origin import RemoteFile, Resolved
from loadledger.uploads import CHUNK_BYTES
from runtime.onnxfile import MODEL_FILE

MAX_ANSWER_BYTES = 16 * 2**20
"""Of an answer that is kept in memory, as a listing or a manifest."""
MAX_REDIRECTS = 10
"""A content delivery network takes two."""
TIMEOUT_S = 60.0
"""For connecting, and for each wait for bytes."""
SHOWN_CHARACTERS = 200
"""Of a URL in a message."""
OK, PARTIAL, NOT_SATISFIABLE, TOO_MANY, SERVER_ERROR = 200, 206, 416, 429, 500
REDIRECTS = {301, 302, 303, 307, 308}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """An answer that was read as a whole; `challenges` are its WWW-Authenticate fields."""

    status: int
    challenges: list[str]
    body: bytes


class Web:
    """An HTTPS client; its methods raise `SourceProblem`.

    Args:
        credential: what an error of 401 or 403 says of the credential that was or was not sent.
    """

    def __init__(self, credential: str) -> None:
        self._credential = credential
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

        def ask() -> tuple[HTTPResponse, bytes]:
            response = self._send(url, {**headers, **own}, statuses)
            return response, b"".join(_read(response, url, MAX_ANSWER_BYTES + 1))

        response, body = retry(ask)
        if len(body) > MAX_ANSWER_BYTES:
            raise SourceProblem(
                "source_invalid", f"{_show(url)} answers with more than {MAX_ANSWER_BYTES} bytes"
            )
        return WebAnswer(response.status, response.headers.get_all("WWW-Authenticate", []), body)

    def file_opener(self, url: str, *, authorization: str | None = None) -> OpenAt:
        """Return what opens a file, at an offset if the server has ranges of it."""
        headers = {"Authorization": authorization} if authorization else {}

        def open_at(offset: int) -> OpenFile:
            ranges = {"Range": f"bytes={offset}-"} if offset else {}
            accepted = (OK, PARTIAL, NOT_SATISFIABLE) if ranges else (OK,)
            response = self._send(url, headers, accepted, ranges)
            if response.status == NOT_SATISFIABLE:
                response.close()
                return open_at(0)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status == PARTIAL and (found is None or int(found[1]) != offset):
                response.close()
                raise SourceProblem(
                    "source_invalid", f"{_show(url)} answers with another range than bytes {offset}-"
                )
            begin = offset if response.status == PARTIAL else 0
            length = None if response.length is None else begin + response.length
            return OpenFile(begin, length, _read(response, url))

        return open_at

    def _send(
        self,
        url: str,
        headers: Mapping[str, str],
        statuses: Collection[int],
        ranges: Mapping[str, str] = _NOTHING,
    ) -> HTTPResponse:
        """Return an answer with one of these statuses, after redirects and before its body is read."""
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            own = headers if _origin_of(target) == _origin_of(url) else _NOTHING
            response = self._open_url(target, {**own, **ranges, "User-Agent": "loadledger"})
            if response.status not in REDIRECTS or "Location" not in response.headers:
                break
            response.close()
            target = _join(target, response.headers["Location"])
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
            return _transient(f"{shown} fails with HTTP {status}: try again later")
        return SourceProblem(
            "source_invalid", f"{shown} answers HTTP {status}, which is no file: check the name"
        )

    def _open_url(self, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        try:
            answer = self._opener.open(Request(url, headers=dict(headers)), timeout=TIMEOUT_S)  # noqa: S310
        except (OSError, HTTPException, ValueError) as error:
            raise _explain(error, url) from None
        return cast(HTTPResponse, answer)


class Https:
    """One file at a URL, which says nothing of its bytes beforehand; see `origin.Origin`."""

    def __init__(self, source: SourceName, digest: str | None) -> None:
        self._url, self._digest = source.name, digest
        self._web = Web("https sources are read without credentials; use one that has them, as oci or s3")

    def resolve(self) -> Resolved:
        name = f"{self._url}#sha256={self._digest}" if self._digest else None
        return Resolved(name, (RemoteFile(MODEL_FILE, sha256=self._digest),))

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        identity = file.sha256 and f"sha256:{file.sha256}"
        return downloads.receive(identity, self._web.file_opener(self._url), sha256=file.sha256)


def _transient(message: str) -> SourceProblem:
    return SourceProblem("source_unreachable", message, is_transient=True)


def _origin_of(url: str) -> tuple[str, int]:
    """Return host and port of a URL, which has to be of https, without a user."""
    with suppress(ValueError):
        parts = urlsplit(url)
        is_text = url.isascii() and url.isprintable() and " " not in url
        if is_text and parts.scheme == "https" and parts.hostname and parts.username is None:
            return parts.hostname, parts.port or 443
    raise SourceProblem(
        "source_invalid", f"the source leads to {_show(url)}, which is no URL of https to follow"
    )


def _join(base: str, location: str) -> str:
    with suppress(ValueError):
        return urljoin(base, location)
    return location


def _read(response: HTTPResponse, url: str, most: int | None = None) -> Generator[bytes, None, None]:
    """Yield a body's pieces; at most so many bytes, and one piece, of it."""
    count, length = 0, response.length
    with closing(response):
        while most is None or count < most:
            try:
                piece = response.read(CHUNK_BYTES)
            except (OSError, HTTPException, ValueError) as error:
                raise _explain(error, url) from None
            if not piece:
                break
            count += len(piece)
            yield piece
    if length is not None and count < (length if most is None else min(length, most)):
        raise _transient(f"{_show(url)} sent {count} of {length} bytes")


def _explain(error: Exception, url: str) -> SourceProblem:
    """Return the problem that an error of the client stands for, without texts of the server."""
    shown = _show(url)
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return _transient(f"{shown} does not answer: try again")
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
    return _transient(f"the connection to {shown} fails ({printable(reason, SHOWN_CHARACTERS)}): try again")


def _show(url: str) -> str:
    """Return a URL for a message: no user, no query, since a password or signature may stand there."""
    bare = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    return ascii(re.sub(r"//[^/]*@", "//", bare)[:SHOWN_CHARACTERS])[1:-1]
