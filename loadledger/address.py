"""Where a server is: its URL, perhaps with a prefix behind a proxy, and what may be sent there.

How a client speaks to its server: limits that both transports keep.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from loadledger.problems import BadAnswer

_VISIBLE = re.compile(r"[!-~]+")
USER_AGENT = "loadledger-client"


@dataclass(frozen=True, slots=True)
class Address:
    """A server, and the token that is shown to it and to nobody else.

    Attributes:
        url: without a slash at its end.
        token: never part of a text.
    """

    url: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, token: str | None = None) -> Address:
        """Return the address that a person wrote.

        Raises:
            ValueError: it is no URL of a server, or the token cannot be sent; the token is not repeated.
        """
        if token is not None and not _VISIBLE.fullmatch(token):
            raise ValueError(
                "the token has characters that no token has: give it without spaces and line ends"
            )
        return cls(_base(url), token)

    @property
    def is_secure(self) -> bool:
        """Whether it is spoken to over TLS."""
        return self.url.startswith("https:")

    def headers(self) -> dict[str, str]:
        """Return what goes with every request; no compression, so that no answer is larger than it looks."""
        sent = {"User-Agent": USER_AGENT, "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        return sent

    def hide(self, text: str) -> str:
        """Return a text of the server's without the token, which it may have repeated."""
        return text.replace(self.token, "[token]") if self.token else text


def path(*segments: str) -> str:
    """Return a path below the server's URL, with everything encoded that is not plain.

    Raises:
        ValueError: a segment is none: empty, or one that means a folder.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise ValueError(f"{segment!r} is no id of a model or a job")
    return "".join(f"/{quote(segment, safe='')}" for segment in segments)


def query(pairs: list[tuple[str, str]]) -> str:
    """Return the query of a URL, with its question mark where there is one."""
    return f"?{urlencode(pairs, quote_via=quote, safe='')}" if pairs else ""


def _base(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{_short(url)} does not begin with http:// or https://")
    if not _VISIBLE.fullmatch(url) or "\\" in url:
        raise ValueError(f"{_short(url)} has characters that no URL has")
    parts = urlsplit(url)
    if "@" in parts.netloc:  # not repeated: it may be a password
        raise ValueError("the URL names a user: leave that out, and give a token")
    try:
        named = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        named = False
    if not named or parts.query or parts.fragment:
        raise ValueError(f"{_short(url)} is no URL of a server, such as http://127.0.0.1:8080")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _short(url: str) -> str:
    return repr(url if len(url) <= 100 else f"{url[:99]}…")  # noqa: PLR2004 - enough to recognise it


CONNECT_S = 10.0
SILENCE_S = 45.0
"""After so long without a sign of life, of which a stream has one every 15 s, it is taken for dead."""
CHUNK_BYTES = 2**16
MAX_ANSWER_BYTES = 64 * 2**20
"""Of one answer, which is held in memory: a page of a list has some megabytes at most."""
MAX_IDLE = 8
"""Connections that are kept for the next request: as many threads need no new one."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a client was made with.

    Attributes:
        timeout_s: for an answer that is not asked to wait.
        ca_file: certificates to trust, in PEM, instead of the system's.
        max_answer_bytes: what is longer is not taken.
    """

    address: Address
    timeout_s: float
    ca_file: Path | str | None = None
    max_answer_bytes: int = MAX_ANSWER_BYTES

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError("timeout_s is more than 0")

    @property
    def connect_s(self) -> float:
        """For a connection to be made."""
        return min(CONNECT_S, self.timeout_s)

    def tls(self) -> ssl.SSLContext:
        """Return what says whom to trust.

        Raises:
            ValueError: the file has no certificates.
        """
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ValueError(f"ca_file {self.ca_file} has no certificates in PEM: {error}") from error

    def check(self, length: int) -> None:
        """Refuse an answer that is too long.

        Raises:
            BadAnswer: it is.
        """
        if length > self.max_answer_bytes:
            raise BadAnswer(
                f"{self.address.url} answers more than {self.max_answer_bytes} bytes;"
                " a larger max_answer_bytes would take it"
            )
