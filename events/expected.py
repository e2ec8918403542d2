"""What somebody kept of a head, to be found again in a ledger or in a file."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
