"""What a flow wants done: flows decide and do nothing themselves, so both clients share them.

A flow is a generator. It yields what is to be done, is sent what came of it, or has a `ClientProblem` raised
where it yielded, and returns its result. Whoever runs it does the input and output, blocking or not.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class Send:
    """Ask, and be sent the whole `Answer`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """Ask for a stream, and be sent the `Answer`: without its body if that is the stream."""

    request: Request


@dataclass(frozen=True, slots=True)
class More:
    """Be sent the next bytes of the stream, which are none at its end."""


@dataclass(frozen=True, slots=True)
class Shut:
    """Close the stream."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for a while."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Give:
    """Give values to whoever iterates."""

    values: Sequence[Any]


Effect = Send | Open | More | Shut | Pause | Give
Flow = Generator[Effect, Any, T]
