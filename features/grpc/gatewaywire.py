"""What the server and the gateway's process tell each other at its start, and the limits that both know."""

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
