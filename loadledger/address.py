"""A server's address: its URL, the token for it, time limits and TLS."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from loadledger.errors import (
    CHECK_LOG,
    CHECK_NETWORK,
    CHECK_URL,
    CHOOSE_URL,
    WAIT_LONGER,
    BadAnswer,
    ServerUnreachable,
    failure_reason,
)

_VISIBLE = re.compile(r"[!-~]+")
_NEXT_URL = re.compile(r",\s*(?=https?://)")
"""The separator before a further URL; another comma is part of a URL."""
USER_AGENT = "loadledger-client"
CONTROL_SOCKET = "control.sock"
"""The file in a data directory over which its server can be managed on this machine."""
CONTROL_KEY = "control.key"
"""The file beside it with its token, new at each start of the server."""
CONNECT_S = 10.0
SILENCE_S = 45.0
"""A stream without a byte for so long is dead: the server sends a heartbeat every 15 s."""
CHUNK_BYTES = 2**16
MAX_ANSWER_BYTES = 64 * 2**20
"""Longest answer held in memory: a page of a list has a few megabytes at most."""
MAX_IDLE = 8
"""Idle connections that are kept, enough for as many threads."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL and the token for it alone.

    Attributes:
        url: without a trailing slash; it may have a prefix, as behind a proxy.
        token: never part of a message or a repr.
    """

    url: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, token: str | None = None) -> Address:
        """Parse a URL.

        Raises:
            ValueError: the text is no server's URL, or the token cannot be sent; the message hides it.
        """
        if token is not None and not _VISIBLE.fullmatch(token):
            raise ValueError(
                "the token has characters that a token cannot have: give it without spaces and line ends"
            )
        return cls(_base(url), token)

    @classmethod
    def each_of(cls, urls: str, token: str | None = None) -> tuple[Address, ...]:
        """Parse the URLs of several servers, separated by commas; they all get the token.

        Raises:
            ValueError: as `of`.
        """
        return tuple(cls.of(url.strip(), token) for url in _NEXT_URL.split(urls))

    @property
    def is_secure(self) -> bool:
        return self.url.startswith("https:")

    def headers(self) -> dict[str, str]:
        """Return the headers of every request, without compression, so that length limits hold."""
        sent = {"User-Agent": USER_AGENT, "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        return sent

    def hide(self, text: str) -> str:
        """Replace the token in a text of the server, which may repeat it."""
        return text.replace(self.token, "[token]") if self.token else text


def path(*segments: str) -> str:
    """Return a path below the server's URL, percent-encoded.

    Raises:
        ValueError: a segment is empty, `.` or `..`.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise ValueError(f"{segment!r} is no id of a model or a job")
    return "".join(f"/{quote(segment, safe='')}" for segment in segments)


def query(pairs: list[tuple[str, str]]) -> str:
    """Return a query with its question mark, or an empty text without parameters."""
    return f"?{urlencode(pairs, quote_via=quote, safe='')}" if pairs else ""


def _base(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{_shorten(url)} does not begin with http:// or https://")
    if not _VISIBLE.fullmatch(url) or "\\" in url:
        raise ValueError(f"{_shorten(url)} has characters that a URL cannot have: percent-encode them")
    parts = urlsplit(url)
    if "@" in parts.netloc:  # not quoted: it may have a password
        raise ValueError("the URL names a user: remove it, and give a token")
    if "," in parts.netloc:
        raise ValueError(f"{_shorten(url)}: after each comma there has to be a whole URL, with http://")
    try:
        named = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        named = False
    if not named or parts.query or parts.fragment:
        raise ValueError(f"{_shorten(url)} is no URL of a server, such as http://127.0.0.1:8080")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _shorten(url: str) -> str:
    return repr(url if len(url) <= 100 else f"{url[:99]}…")  # noqa: PLR2004 - enough to recognise it


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Options of a client.

    Attributes:
        timeout_s: limit of an answer, unless the request asks the server to hold it back.
        ca_file: certificates of authorities, in PEM, instead of the system's.
        max_answer_bytes: longest accepted answer.
        max_connect_s: limit of the time to connect.
        data: the server's data directory, whose control socket replaces the address.
    """

    address: Address
    timeout_s: float
    ca_file: Path | str | None = None
    max_answer_bytes: int = MAX_ANSWER_BYTES
    max_connect_s: float = CONNECT_S
    data: Path | None = None

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s has to be more than 0, not {self.timeout_s}")

    @property
    def connect_s(self) -> float:
        return min(self.max_connect_s, self.timeout_s)

    def tls(self) -> ssl.SSLContext:
        """Return the TLS context.

        Raises:
            ValueError: the file has no certificates.
        """
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ValueError(f"ca_file {self.ca_file} has no certificates in PEM: {error}") from error

    def unreachable(
        self, error: Exception, *, limit_s: float | None = None, sent: bool = True
    ) -> ServerUnreachable:
        """Return the exception for a connection that failed.

        Args:
            error: the failure.
            limit_s: limit of the wait for an answer.
            sent: whether the request may have arrived.
        """
        url, is_late = self.address.url, isinstance(error, TimeoutError)
        if not sent:
            late = f"no connection within {self.connect_s:g} s", CHECK_NETWORK
            return ServerUnreachable(url, *(late if is_late else (failure_reason(error), CHECK_URL)))
        if is_late:
            within = f" within {limit_s:g} s" if limit_s is not None else ""
            reason = f"the request was sent, and no answer came{within}"
            return ServerUnreachable(url, reason, WAIT_LONGER, sent=True)
        reason = f"the connection was lost: {failure_reason(error)}"
        return ServerUnreachable(url, reason, CHECK_LOG, sent=True, lost=True)

    def no_http(self) -> BadAnswer:
        """Return the exception for bytes that are no HTTP/1.1."""
        hint = "" if self.address.is_secure else ", or HTTPS, whose URL begins with https://"
        what = f"what answers at {self.address.url} is not loadledger"
        return BadAnswer(f"{what} (it speaks no HTTP/1.1{hint}): {CHOOSE_URL}")

    def check(self, length: int) -> None:
        """Check the length of an answer.

        Raises:
            BadAnswer: the answer is too long.
        """
        if length > self.max_answer_bytes:
            raise BadAnswer(
                f"{self.address.url} answers more than {self.max_answer_bytes} bytes;"
                " raise max_answer_bytes to accept it"
            )
