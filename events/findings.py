"""What verification says of a ledger."""

from __future__ import annotations

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
