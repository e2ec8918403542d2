"""Conversations of clients that violate HTTP: garbage, half requests, wrong lengths, resets at any moment."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from hostile.mutations import EDGES, mutate_bytes

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""
CHUNK_SIZES = (
    b"", b"0", b"-1", b"+3", b"0x3", b"3 ", b"3;a=b", b"3\t;", b"g", b"f" * 17, b"f" * 9000, b"7fffffff",
)  # fmt: skip
LINES = (
    b"", b"GET", b"GET /", b"GET / HTTP/1.1 x", b"GET / HTTP/0.9", b"GET / HTTP/1.0", b"GET / HTTP/2.0",
    b"PRI * HTTP/2.0", b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"TRACE / HTTP/1.1",
    b"G\0T / HTTP/1.1", b"GET /\0 HTTP/1.1", b"GET //\x80\xff HTTP/1.1",
    b"GET http://other/health/live HTTP/1.1", b"GET http://[::1/ HTTP/1.1", b"GET //[ HTTP/1.1",
    b"GET /v2/models/%00/infer HTTP/1.1", b"GET /v2/models/%ff%fe HTTP/1.1",
    b"GET /console/..%2f..%2fetc%2fpasswd HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1",
    b"GET /api/v1/models?cursor=%00%ff&limit=9e9 HTTP/1.1", b"GET /api/v1/jobs?at=%F0%9F HTTP/1.1",
    b"GET /api/v1/events/stream?after=0 HTTP/1.1",
    b"GET /api/v1/events/stream?after=99999999999999999999&type=x HTTP/1.1",
    b"GET /api/v1/events?after=-1&limit=99999 HTTP/1.1", b"GET /metrics HTTP/1.1",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1", b"GET /?" + b"a=b&" * 1500 + b" HTTP/1.1",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)  # fmt: skip
FIELDS = (
    b"Host: a\r\nHost: b", b"Host", b": x", b" folded: x", b"X: a\r\n b", b"X: a\rb", b"X: a\nb", b"X: \0",
    b"X: \xff\xfe", b"X\0: a", b"X : a", b"X: " + b"a" * 9000,
    b"\r\n".join(b"X%d: a" % number for number in range(200)), b"Content-Length: -1", b"Content-Length: +5",
    b"Content-Length: 5, 5", b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: " + b"9" * 30,
    b"Content-Length: 67108865", b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity", b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"Expect: 100-continue", b"Expect: x",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x",
    b"Connection: close, keep-alive, \0", b"Content-Type: \xff; charset=\0",
    b"Content-Type: application/json; charset=rot13", b"Content-Type: application/json; charset=utf-7",
    b"Content-Encoding: gzip", b"Accept-Encoding: gzip;q=9, *;q=-1, \xff",
    b"Prefer: wait=99999999999999999999", b'Prefer: wait=-1, wait=1; x="', b'Idempotency-Key: "\\"',
    b"If-None-Match: \xff", b"If-Modified-Since: 99 Foo 99999 99:99:99", b"Range: bytes=-1-,9e9-",
    b"Last-Event-ID: \xff-1", b"X-Request-ID: a b\xff",
    b"traceparent: 00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-zz", b"X-Forwarded-For: ::1, \xff, 999.1.1.1:x",
    b'Forwarded: for="[::1";by=\0', b"Cookie: " + b"a=b;" * 1500,
)  # fmt: skip
FILLED_BYTES = 7800
NAMES = tuple(
    b"""
    Accept Accept-Encoding Baggage Connection Content-Encoding Content-Type Cookie Expect Forwarded Host
    Idempotency-Key If-Modified-Since If-None-Match Inference-Header-Content-Length Last-Event-ID Prefer
    Range Traceparent Tracestate Transfer-Encoding Upgrade X-Forwarded-For X-Request-ID
""".split()
)
UNITS = tuple(
    rb"""
    a , ;, ; a; = a= " \ " a=" "a", ( (a) [ { < : :: / a/b; 0 1. 1.1.1.1, q=0. wait=1, %41 *
""".split()
)
"""Of which a field is filled: separators and brackets of all grammars."""
ROUTES = (
    b"GET /api/v1/models",
    b"GET /metrics",
    b"GET /docs",
    b"POST /api/v1/models/x/load",
)
"""Others than inferences; there is no model `x`."""
STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d) [^\r\n]*\r\n")


@dataclass(frozen=True, slots=True)
class Conversation:
    """The bytes of one connection of a client, in pieces with a short wait after each, and its end.

    `end` is `read` (all answers), `half` (the same, after a half-close), `close` or `reset`.
    """

    pieces: tuple[bytes, ...]
    wait_s: float
    end: str


class Talker:
    """Makes conversations with a server.

    Args:
        token: of an admin.
        model_id: a model that is loaded.
    """

    def __init__(self, token: str, model_id: str) -> None:
        self._fields = b"Host: a\r\nAuthorization: Bearer " + token.encode()
        inputs = [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]
        self._body = json.dumps({"inputs": inputs}).encode()
        self._infer = f"POST /v2/models/{model_id}/infer HTTP/1.1".encode()

    def conversation(self, rng: Random) -> Conversation:
        """Return a conversation of one or a few requests."""
        if rng.random() < 0.4:
            return Conversation((self._filled_request(rng),), 0, "read")
        data = b"".join(self._request(rng) for _ in range(rng.choice((1, 1, 1, 2, 30))))
        data = rng.choice((data, data, mutate_bytes(rng, data), rng.randbytes(rng.choice((1, 100, 70_000)))))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 2, 20))))
        pieces = tuple(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True))
        if rng.random() < 0.2:
            pieces = pieces[:-1]
        return Conversation(
            pieces, rng.choice((0, 0, 0.001, 0.02)), rng.choice(("read", "read", "half", "close", "reset"))
        )

    def _request(self, rng: Random) -> bytes:
        line, fields, body = self._infer, [self._fields], b""
        if rng.random() < 0.3:
            line = rng.choice(LINES)
        elif rng.random() < 0.3:
            line = rng.choice(ROUTES) + b" HTTP/1.1"
        fields += [rng.choice(FIELDS) for _ in range(rng.choice((0, 0, 1, 1, 3)))]
        if rng.random() < 0.4:
            fields.append(b"Transfer-Encoding: chunked")
            body = self._chunks(rng)
        elif b"POST" in line:
            length = len(self._body) + rng.choice((0, 0, 0, -1, 1, 10_000))
            fields.append(b"Content-Length: %d" % length)
            body = self._body
        rng.shuffle(fields)
        return line + b"\r\n" + b"\r\n".join(fields) + b"\r\n\r\n" + body

    def _filled_request(self, rng: Random) -> bytes:
        """Return a request that is right but for one field."""
        line = rng.choice((self._infer, *(route + b" HTTP/1.1" for route in ROUTES)))
        body = self._body if line == self._infer else b"{}" if line.startswith(b"POST") else b""
        fields = (self._fields, b"Connection: close", b"Content-Length: %d" % len(body), _filled(rng))
        return b"\r\n".join((line, *fields, b"", body))

    def _chunks(self, rng: Random) -> bytes:
        """Return a chunked body, most often a wrong one."""
        parts, position = list[bytes](), 0
        while position < len(self._body):
            piece = self._body[position : position + rng.choice((1, 7, 40))]
            position += len(piece)
            size = (
                b"%x" % len(piece)
                if rng.random() < 0.95
                else rng.choice((*CHUNK_SIZES, b"%x" % (rng.choice(EDGES) % 2**64)))
            )
            parts.append(size + rng.choice((b"\r\n",) * 20 + (b"\n", b"\r", b"")) + piece + b"\r\n")
        end = rng.choice(
            (b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: a\r\n\r\n", b"0\r\n" + b"X: a\r\n" * 500, b"", b"0")
        )
        return b"".join(parts) + end


def _filled(rng: Random) -> bytes:
    """Return a field as long as may be, of one text again and again: what takes parsers quadratic time."""
    unit = rng.choice(UNITS)
    value = rng.choice((b"", b"application/json; ", b"Bearer ")) + unit * (FILLED_BYTES // len(unit))
    return rng.choice(NAMES) + b": " + value + rng.choice((b"", b"!"))


async def talk(host: str, port: int, conversation: Conversation, limit_s: float) -> bytes:
    """Have a conversation; return what the server answered until it closed or this long."""
    with socket.socket() as connection:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, port))
        received = bytearray()
        with suppress(OSError):  # TimeoutError is one, too
            async with asyncio.timeout(limit_s):
                reading = loop.create_task(_read(connection, received))
                try:
                    for piece in conversation.pieces:
                        await loop.sock_sendall(connection, piece)
                        await asyncio.sleep(conversation.wait_s)
                    if conversation.end == "half":
                        connection.shutdown(socket.SHUT_WR)
                    if conversation.end in ("read", "half"):
                        await reading
                finally:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
        if conversation.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return bytes(received)


async def _read(connection: socket.socket, received: bytearray) -> None:
    loop = asyncio.get_running_loop()
    while piece := await loop.sock_recv(connection, 2**16):
        received += piece


def answers(received: bytes) -> list[tuple[int, bytes]]:
    """Return status and body of each answer in what a server sent; the last may be cut off.

    Raises:
        AssertionError: it is no sequence of answers.
    """
    found, position = list[tuple[int, bytes]](), 0
    while position < len(received):
        head = STATUS.match(received, position)
        end = received.find(b"\r\n\r\n", position)
        assert head is not None, received[position : position + 200]
        if end < 0:
            return found
        after = _body_end(received, received[position:end].lower(), end + 4, int(head[1]))
        found.append((int(head[1]), received[end + 4 : after]))
        position = after
    return found


def _body_end(received: bytes, fields: bytes, start: int, status: int) -> int:
    if status < 200 or status == 304:
        return start
    length = re.search(rb"\r\ncontent-length: (\d+)(?:\r\n|$)", fields)
    if length is not None:
        return start + int(length[1])
    assert b"transfer-encoding: chunked" in fields, fields
    end = received.find(b"\r\n0\r\n\r\n", start)
    return len(received) if end < 0 else end + 7
