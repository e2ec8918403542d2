"""A request, its answer, and the transport that carries them.

All that a client does is written once, as coroutines over a `Transport`. The one of `AsyncClient` waits in
its event loop. The one of `Client` blocks, so what is written over it never waits, and needs no event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked.

    Attributes:
        target: path and query below the server's URL, encoded.
        repeatable: whether to ask twice does no more than to ask once.
        patience_s: how long the server may take beyond what the client allows every answer.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    repeatable: bool = True
    patience_s: float = 0.0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What it said; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Stream(Protocol):
    """A response whose body is read as it comes.

    Attributes:
        answer: status and headers; the body as well, if the status is not 200 and there is no stream.
    """

    answer: Answer

    async def read(self) -> bytes:
        """Return the next bytes; none is the end."""

    def close(self) -> None:
        """Close the connection."""


class Transport(Protocol):
    """Connections to one server; what goes wrong with one is a `ClientProblem`."""

    async def send(self, request: Request) -> Answer:
        """Return the whole answer."""

    async def open(self, request: Request) -> Stream:
        """Return the answer as a stream."""

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
