"""The texts that settings take: sizes, rate limits, addresses of databases, and what they mean."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple
from urllib.parse import urlsplit

AUTO = "auto"
ON = "on"
OFF = "off"
MAX_BODY_BYTES = 64 * 2**20
"""Of an inference. Triton's default (`--http-max-input-size`)."""

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,18})(MB|GB|TB|MiB|GiB|TiB|)", re.ASCII)
SIZES = "bytes, or a number of MB, GB, TB, MiB, GiB or TiB"
"""The notations of a size, for messages and help."""
_PERCENTAGE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%", re.ASCII)
_PERIODS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE = re.compile(
    r"([1-9]\d{0,11}) *(?:/|per) *([1-9]\d{0,5})? *(second|minute|hour|day)s?", re.ASCII | re.IGNORECASE
)

LABEL = re.compile(r"[A-Za-z0-9._-]{1,63}=[A-Za-z0-9._-]{1,63}", re.ASCII)
"""A label of a node, which loads may require."""
LABEL_RULE = "Must be like zone=a: letters, digits, '.', '_' and '-', at most 63 before and after '='."
MAX_LABELS = 16
"""That a load may require: its event has them."""

DATABASE_SCHEMES = ("postgresql", "postgres")
"""The schemes of a database's address."""


def parse_size(text: str, instead: str = "") -> int:
    """Return the bytes of a size: bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB.

    Args:
        text: the size.
        instead: what to do for none at all, for the message.

    Raises:
        ValueError: the text is no size or 0; the message says what it must be.
    """
    found = _SIZE.fullmatch(text)
    size = 0 if found is None else int(found[1]) * _UNITS[found[2]]
    if not size:
        raise ValueError(f"Must be {SIZES}, whole and more than 0, like 20GB{instead}.")
    return size


def parse_prepared_size(text: str) -> int:
    """Return the bytes that prepared models may take; 0 for off. Raises as `parse_size`."""
    return 0 if text == OFF else parse_size(text, f", or {OFF}")


def parse_store_size(text: str) -> int | None:
    """Return the bytes of the store's size; None for auto, 0 for off. Raises as `parse_size`."""
    if text in (AUTO, OFF):
        return None if text == AUTO else 0
    return parse_size(text, f", {AUTO}, or {OFF}")


def parse_budget(text: str, limit_bytes: int) -> int:
    """Return the memory budget of all workers in bytes, at least 1.

    Args:
        text: a size, even above the limit (there may be swap), or a percentage of the limit, more than 0 and
            at most 100.
        limit_bytes: the memory that this container or machine may use.

    Raises:
        ValueError: the text is neither; the message says what it must be.
    """
    if not text.endswith("%"):
        return parse_size(text, ", or a percentage, like 80%")
    found = _PERCENTAGE.fullmatch(text)
    if found is None or not 0 < (percent := Decimal(found[1])) <= 100:  # noqa: PLR2004 - it is per cent
        raise ValueError("Must be a percentage of more than 0 and at most 100, like 80%.")
    return max(1, int(limit_bytes * percent / 100))


class RateLimit(NamedTuple):
    """Requests per window, and the window's length in seconds."""

    amount: int
    window_s: int


def parse_limit(text: str) -> RateLimit | None:
    """Return a rate limit, like 600/minute or 20 per 5 minutes; None for off.

    Raises:
        ValueError: the text is neither; the message says what it must be.
    """
    if text == OFF:
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(f"Must be one limit like 600/minute, or {OFF}.")
    return RateLimit(int(found[1]), int(found[2] or 1) * _PERIODS_S[found[3].lower()])


def parse_ledger(text: str) -> str:
    """Return the address of a ledger's database.

    Raises:
        ValueError: the text is no such address; the message says what it must be.
    """
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in DATABASE_SCHEMES or len(parts.path) < len("/x"):
        raise ValueError("Must be like postgresql://USER@HOST/DATABASE; the password may be in PGPASSWORD.")
    return text


def parse_node_address(text: str) -> str:
    """Return the URL of a node.

    Raises:
        ValueError: the text is none; the message says what it must be.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ValueError("Must be like http://HOST:PORT, without a path.")
    return text


def parse_labels(text: str) -> tuple[str, ...]:
    """Return labels in order, each once.

    Raises:
        ValueError: one is not of the form; the message says what it must be.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{LABEL_RULE} Several are separated by commas.")
    return tuple(sorted(set(labels)))
