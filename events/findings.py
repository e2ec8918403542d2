"""What verification says of a ledger or a file, and what somebody kept of a head, to be found again there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What kind of thing is wrong."""

    MISSING = "missing"
    HASH = "hash"
    ORDER = "order"
    EVENT = "event"
    BASE = "base"
    PROJECTIONS = "projections"
    SCHEMA = "schema"
    DAMAGED = "damaged"
    EXPECTATION = "expectation"
    SIGNATURE = "signature"


@dataclass(frozen=True, slots=True)
class Finding:
    """The first thing that is wrong: at which position, and what."""

    position: int
    problem: str
    kind: Kind = field(default=Kind.HASH, compare=False)


class Bad(Exception):
    """Something is wrong, and nothing after it is looked at."""

    def __init__(self, position: int, problem: str, kind: Kind) -> None:
        super().__init__(problem)
        self.finding = Finding(position, problem, kind)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: how many events, the head as recomputed, and the first problem, if any.

    `compared` is False where the stored projections were made by other folds than this release's. They are
    made anew before anything uses them, so they prove nothing, and were not looked at.
    """

    events: int
    position: int
    hash: bytes
    finding: Finding | None
    compared: bool = True

    @property
    def verified(self) -> bool:
        """Whether nothing is wrong."""
        return self.finding is None


_EXPECTED = re.compile(r"(\d{1,19}):([0-9a-fA-F]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Expected:
    """The event at this position has this hash."""

    position: int
    hash: bytes


def parse_expected(text: str) -> Expected:
    """Return what `POSITION:HASH` says.

    Raises:
        ValueError: it is not of that form.
    """
    match = _EXPECTED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:100]!r} is not POSITION:HASH, the hash in 64 hexadecimal digits")
    return Expected(int(match[1]), bytes.fromhex(match[2]))
