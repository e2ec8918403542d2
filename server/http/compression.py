"""Compression of bodies: gzip and deflate (RFC 9110 section 8.4.1).

`deflate` is the zlib format, as in the RFC and in Triton's clients, and no raw deflate stream.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import lru_cache

from runtime.process.pool import start_task
from runtime.wire import Buffer
from server.errors import ServerProblem
from server.http.bodies import BodyTooLarge
from server.http.validation import UnsupportedMediaType

Body = bytes | bytearray

CODINGS = ("gzip", "deflate")
"""Supported in both directions, the preferred one first."""

LEVEL = 1
"""Higher levels hardly shrink tensors or numbers in JSON, and take up to seven times as long (measured)."""

COMPRESSED_FROM_BYTES = 1024
"""A smaller response fits into one packet anyway."""

INLINE_BYTES = 64 * 1024
"""Length that takes two milliseconds at most, so that a thread does not pay."""

MAX_MEMBERS = 2**16
"""Members of a gzip body (RFC 1952 section 2.2); bgzip makes one of 64 KiB. Tiny members take time."""

PIECE_BYTES = 2**16
"""Bytes decompressed at once after the first member: the data after a member is copied at its end."""

_GZIP_MARK = b"\x1f\x8b"

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_ALIASES = {"x-gzip": "gzip"}  # RFC 9110 section 8.4.1.3
_WEIGHT = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.ASCII | re.IGNORECASE)


class MalformedCoding(ServerProblem):
    """The body does not have the coding that its Content-Encoding names."""

    code = "invalid_request"


def inflate(body: Body, encoding: str | None, max_bytes: int) -> Body:
    """Return the decompressed body; without a Content-Encoding, the body itself.

    At most `max_bytes` are decompressed, of all members of a gzip body together. Several fields are
    one `encoding`, separated by commas.

    Raises:
        MalformedCoding: the data is damaged, cut off, or followed by other bytes (`invalid_request`).
        BodyTooLarge: the result is too large (`body_too_large`).
        UnsupportedMediaType: the coding is none of `CODINGS`, or there are several
            (`unsupported_media_type`).
    """
    coding = _coding(encoding)
    if coding is None:
        return body
    inflater, rest, size = zlib.decompressobj(_WINDOW[coding]), memoryview(body), len(body)
    unpacked, left_bytes, members = list[bytes](), max_bytes, 1
    try:
        while True:
            piece = rest[:size]
            unpacked.append(inflater.decompress(piece, left_bytes + 1))
            left_bytes -= len(unpacked[-1])
            if left_bytes < 0:
                raise BodyTooLarge(max_bytes)
            rest = rest[len(piece) - len(inflater.unused_data) :]
            if not rest or (inflater.eof and (coding != "gzip" or rest[:2] != _GZIP_MARK)):
                break
            if inflater.eof:
                inflater, size, members = zlib.decompressobj(_WINDOW[coding]), PIECE_BYTES, members + 1
                if members > MAX_MEMBERS:
                    raise MalformedCoding(
                        f"the body has more than {MAX_MEMBERS} gzip members: compress it in one"
                    )
    except zlib.error as error:
        raise MalformedCoding(f"the body is not {coding}, as its Content-Encoding says: {error}") from None
    if not inflater.eof:
        raise MalformedCoding(f"the body is cut off: its {coding} data does not end")
    if rest:
        raise MalformedCoding(f"the body has {len(rest)} bytes after its {coding} data")
    return b"".join(unpacked)


def deflate(buffers: Iterable[Buffer], encoding: str) -> bytes:
    """Return the buffers, joined and compressed with a coding of `CODINGS`."""
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW[encoding])
    return b"".join([*(deflater.compress(buffer) for buffer in buffers), deflater.flush()])


async def decompress(
    body: Body, encoding: str | None, max_bytes: int, turn: AbstractAsyncContextManager[None] | None = None
) -> Body:
    """Return `inflate` of a body, in a thread and within `turn` if the body is large, or becomes large."""
    if _coding(encoding) is None:
        return body
    if len(body) <= INLINE_BYTES:
        try:
            return inflate(body, encoding, min(max_bytes, INLINE_BYTES))
        except BodyTooLarge:
            if max_bytes <= INLINE_BYTES:
                raise

    async def run() -> Body:
        async with turn or nullcontext():
            return await asyncio.to_thread(inflate, body, encoding, max_bytes)

    # Of a client that leaves, too: a thread goes on, and holds its turn until it has ended.
    return await asyncio.shield(start_task(run(), "decompressing a body"))


async def compress(buffers: list[Buffer], encoding: str) -> bytes:
    """Return `deflate` of buffers, in a thread if they are large."""
    if sum(len(buffer) for buffer in buffers) <= INLINE_BYTES:
        return deflate(buffers, encoding)
    return await asyncio.to_thread(deflate, buffers, encoding)


@lru_cache(maxsize=64)
def chosen_encoding(accept_encoding: str | None) -> str | None:
    """Return the coding of a response by the request's Accept-Encoding, or None.

    By RFC 9110 section 12.5.3, with gzip among equals. If no coding fits, the response has none, as that
    section allows. Malformed members of the field are ignored.
    """
    weights = {_ALIASES.get(name, name): weight for name, weight in parse_accept(accept_encoding).items()}
    others = weights.get("*", 0.0)
    best = max(CODINGS, key=lambda coding: weights.get(coding, others))
    weight = weights.get(best, others)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def parse_accept(field: str | None) -> dict[str, float]:
    """Return the weight of each member of an Accept or Accept-Encoding field, without malformed ones."""
    weights = {}
    for member in (field or "").lower().split(","):
        name, *parameters = (part.strip(" \t") for part in member.split(";"))
        given = next((each for each in parameters if each.startswith("q=")), "q=1")
        if name and (weight := _WEIGHT.fullmatch(given)):
            weights[name] = float(weight[1])
    return weights


def _coding(encoding: str | None) -> str | None:
    name = (encoding or "").strip(" \t").lower()
    coding = _ALIASES.get(name, name)
    if coding in ("", "identity"):
        return None
    if coding not in CODINGS:
        text = f"Content-Encoding must be one of {', '.join(CODINGS)}, applied once, or be left out"
        raise UnsupportedMediaType(text, http_headers={"Accept-Encoding": ", ".join(CODINGS)})
    return coding
