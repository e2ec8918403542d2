"""HTTP/1.1 without I/O: requests to bytes, bytes to heads and bodies (RFC 9112).

The standard library's `http.client` parses an answer's fields as those of an e-mail, which takes longer than
a small inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from loadledger.requests import parse_length

HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES = 2**16
"""Longest head of an answer, and trailer of a body; a real server's are shorter than a kilobyte."""
MAX_SIZE_LINE_BYTES = 256
"""Longest line with the size of a chunk: its extensions are ignored."""

_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_UNSENDABLE = re.compile(r"[\x00-\x1f\x7f]")
_BODILESS = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


class MalformedResponse(Exception):
    """The bytes are no HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and fields of an answer.

    Attributes:
        headers: by name in lower case; repeated ones are joined by commas.
        is_1_1: HTTP/1.1 rather than 1.0, so that the connection persists unless a side says `close`.
    """

    status: int
    headers: Mapping[str, str]
    is_1_1: bool

    @property
    def is_interim(self) -> bool:
        """Whether another head follows, as after 100 Continue."""
        return self.status < HTTPStatus.OK

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks.

        Raises:
            MalformedResponse: the body has another encoding.
        """
        coding = self.headers.get("transfer-encoding", "").lower()
        if coding not in ("", "chunked"):
            raise MalformedResponse
        return coding == "chunked"

    @property
    def body_length(self) -> int | None:
        """The length of a body that is not chunked; None if the end of the connection ends it.

        Raises:
            MalformedResponse: the length is no number, or too large.
        """
        if self.status in _BODILESS:
            return 0
        text = self.headers.get("content-length")
        length = None if text is None else parse_length(text)
        if text is not None and length is None:
            raise MalformedResponse
        return length

    @property
    def persists(self) -> bool:
        """Whether the connection may be used again after the body."""
        options = self.headers.get("connection", "").lower()
        return "close" not in options if self.is_1_1 else "keep-alive" in options


def parse_head(text: bytes) -> ResponseHead:
    """Parse status line and fields, without the empty line that ends them.

    Raises:
        MalformedResponse: the bytes are no HTTP/1.1.
    """
    first, *lines = text.decode("latin-1").split("\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise MalformedResponse
    headers: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise MalformedResponse
        name = field[1].lower()
        headers[name] = f"{headers[name]}, {field[2]}" if name in headers else field[2]
    return ResponseHead(int(status[2]), headers, status[1] == "1")


def format_fields(fields: Iterable[tuple[str, str]]) -> str:
    """Return header fields as lines.

    Raises:
        ValueError: a field has control characters.
    """
    lines = [f"{name}: {value}\r\n" for name, value in fields]
    if any(_UNSENDABLE.search(line, 0, len(line) - 2) for line in lines):
        raise ValueError("a header field has control characters")
    return "".join(lines)


class ChunkedDecoder:
    """Decodes a chunked body.

    Attributes:
        has_ended: whether the last chunk and the trailer were read.
        rest: bytes after the end.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.rest = bytearray()
        self._left = 0
        self._is_in_chunk = False
        self._is_trailer = False
        self._trailer_bytes = 0

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the part of the body that the bytes complete; incomplete sizes and trailers wait.

        Raises:
            MalformedResponse: the bytes are no chunks.
        """
        self.rest += data
        found = bytearray()
        while not self.has_ended and self._step(found):
            pass
        return bytes(found)

    def _step(self, found: bytearray) -> bool:
        """Decode one element; return whether it was complete."""
        if self._left:
            part = self.rest[: self._left]
            found += part
            del self.rest[: len(part)]
            self._left -= len(part)
            return bool(part)
        line = self._line()
        if line is None:
            return False
        if self._is_in_chunk:  # the line's end after the chunk's data
            self._is_in_chunk = False
            if line:
                raise MalformedResponse
        elif self._is_trailer:
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise MalformedResponse
            self.has_ended = not line
        else:
            self._left = _chunk_size(line)
            self._is_in_chunk = self._left > 0
            self._is_trailer = not self._is_in_chunk
        return True

    def _line(self) -> bytes | None:
        most = MAX_HEAD_BYTES if self._is_trailer else MAX_SIZE_LINE_BYTES
        end = self.rest.find(b"\r\n", 0, most)
        if end < 0:
            if len(self.rest) >= most:
                raise MalformedResponse
            return None
        line = bytes(self.rest[:end])
        del self.rest[: end + 2]
        return line


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
        raise MalformedResponse
    return int(digits, 16)
