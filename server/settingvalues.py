"""The texts that settings take: sizes, rate limits, addresses of databases, and what they mean."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

AUTO = "auto"
ON = "on"
OFF = "off"
MAX_BODY_BYTES = 64 * 2**20
"""Of an inference. Triton's default (`--http-max-input-size`)."""

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,18})(MB|GB|TB|MiB|GiB|TiB|)", re.ASCII)
_SIZES = "bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB, and more than 0"
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


def parse_size(text: str) -> int:
    """Return the bytes of a size: bytes, or a whole number of MB, GB, TB, MiB, GiB or TiB.

    Raises:
        ValueError: the text is no size or 0; the message says what it must be.
    """
    size = _read_size(text)
    if size is None:
        raise ValueError(f"Must be {_SIZES}, like 20GB; to prepare no models, use --prepare=off.")
    return size


def parse_store_size(text: str) -> int | None:
    """Return the bytes of the store's size; None for auto.

    Raises:
        ValueError: the text is neither; the message says what it must be.
    """
    size = None if text == AUTO else _read_size(text)
    if size is None and text != AUTO:
        raise ValueError(f"Must be {AUTO}, {_SIZES}, like 500GB.")
    return size


def parse_upload_size(text: str) -> int:
    """Return the bytes that an added version may have.

    Raises:
        ValueError: the text is no size or 0; the message says what it must be.
    """
    size = _read_size(text)
    if size is None:
        raise ValueError(f"Must be {_SIZES}, like 20GB; to take none, use --repository-writable=off.")
    return size


def _read_size(text: str) -> int | None:
    found = _SIZE.fullmatch(text)
    return int(found[1]) * _UNITS[found[2]] or None if found is not None else None


def parse_json_size(text: str) -> int:
    """Return the bytes that the JSON of an inference may have.

    Raises:
        ValueError: the text is no size, 0, or more than a body may have; the message says what it must be.
    """
    size = _read_size(text)
    if size is None or size > MAX_BODY_BYTES:
        raise ValueError(f"Must be {_SIZES}, like 4MiB, and at most {MAX_BODY_BYTES // 2**20}MiB.")
    return size


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
