"""A client of HTTP/2 that sends which frames it likes (RFC 9113), with fields that no table compresses."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE = 0, 1, 3, 4, 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
MAX_FRAME_BYTES = 16 * 2**10
"""Without another setting of the server."""
LIMIT_S = 120.0
OTHER_ADDRESS = "127.0.0.2"
"""The address of these clients: limits of an address do not touch usual clients."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def message(payload: bytes, declared: int | None = None) -> bytes:
    """Return a message of gRPC, which may declare another length than it has."""
    return struct.pack(">BI", 0, len(payload) if declared is None else declared) + payload


def _text(text: str) -> bytes:
    """Return a text with its length, an integer with a prefix of 7 bits (RFC 7541 section 5)."""
    left, encoded = len(text), bytearray()
    if left < 0x7F:
        encoded.append(left)
    else:
        encoded.append(0x7F)
        left -= 0x7F
        while left >= 0x80:
            encoded.append(left % 0x80 + 0x80)
            left //= 0x80
        encoded.append(left)
    return bytes(encoded) + text.encode()


class Http2Connection:
    """One connection; it reads nothing unless it is asked to.

    Args:
        window: bytes that the server may send on a stream.
    """

    def __init__(self, connected: socket.socket, address: str, window: int) -> None:
        self._socket, self._authority, self._stream = connected, address, -1
        setting = struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        self.send(PREFACE + frame(SETTINGS, 0, 0, setting) + frame(SETTINGS, ACK, 0))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def call(self, path: str, token: str = "") -> int:
        """Begin a call; return its stream."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": self._authority,
            "te": "trailers",
            "content-type": "application/grpc",
            **({"authorization": f"Bearer {token}"} if token else {}),
        }
        self._stream += 2
        block = b"".join(b"\x10" + _text(name) + _text(value) for name, value in fields.items())
        self.send(frame(HEADERS, END_HEADERS, self._stream, block))
        return self._stream

    def send_data(self, stream: int, data: bytes, *, ends: bool = False) -> None:
        parts = [data[at : at + MAX_FRAME_BYTES] for at in range(0, len(data), MAX_FRAME_BYTES)] or [b""]
        for part in parts:
            is_last = ends and part is parts[-1]
            self.send(frame(DATA, END_STREAM if is_last else 0, stream, part))

    def read_some(self) -> bytes:
        """Return what the server has sent, or sends next; nothing if it has closed the connection."""
        return self._socket.recv(2**16)


@contextmanager
def http2(address: str, window: int = 65535) -> Iterator[Http2Connection]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), LIMIT_S, (OTHER_ADDRESS, 0)) as connected:
        yield Http2Connection(connected, address, window)
