"""The messages between the server and the gateway's process at its start, and the limits that both know."""

from __future__ import annotations

import importlib.util

import msgspec

INSTALL = "pip install 'loadledger[grpc]'"

SOCKET = "grpc.sock"
"""The file in the data directory of the socket for the gateway's requests."""
MAX_CALLS = 1024
"""Calls at once, as many as inferences of one model may wait; half of them from one address."""
RESERVE = 64
"""Calls beyond them, each for one health check."""
PROCESS_BYTES = 96 * 2**20
"""The process itself: 33 MB at its start, 61 MB after calls of 600 KB. Floods of 10,000 calls without message
leave some 100 MB more (measured), for which the part of messages has room."""
MESSAGES_BYTES = 2**29
"""Most memory for messages."""
SHARE = 32
"""Messages have a thirty-second of a small limit, and room for two of the largest."""
COPIES = 2
"""A message is there twice while it is received, and an answer until it has been read."""


class Order(msgspec.Struct):
    """The settings of the gateway.

    Attributes:
        data: the data directory, with the server's socket.
        address: address and port to listen on.
        max_request_bytes: limit of a message.
        messages_bytes: memory for the messages of all calls.
        cert, key: files of the certificate and its key; None without TLS.
    """

    data: str
    address: str
    max_request_bytes: int
    messages_bytes: int
    cert: str | None = None
    key: str | None = None


class Announcement(msgspec.Struct):
    """The port, or why there is none."""

    port: int | None = None
    error: str = ""


def messages_bytes(limit_bytes: int, largest_bytes: int) -> int:
    """Return the memory for messages.

    Args:
        limit_bytes: the memory of the container or machine.
        largest_bytes: the largest request.
    """
    return max(min(MESSAGES_BYTES, limit_bytes // SHARE), 2 * largest_bytes)


def gateway_bytes(limit_bytes: int, largest_bytes: int) -> int:
    """Return what the gateway takes of the container's memory at most. Arguments as `messages_bytes`."""
    return PROCESS_BYTES + COPIES * messages_bytes(limit_bytes, largest_bytes)


def find_missing_package() -> str | None:
    """Return which package of the extra is not installed, and how to install it; None if all are."""
    for package in ("grpc", "google.protobuf"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # `google` itself
            found = None
        if found is None:
            return f"{package} is not installed: {INSTALL}"
    return None
