"""What refuses the values of settings that marshmallow has no check for.

Each takes a value and raises `ValidationError` with what it must be.
"""

import errno
from pathlib import Path

import limits
from marshmallow import ValidationError

from runtime.machine import budget_bytes
from server.auth.proxies import parse_networks
from server.settings import size_bytes

OFF = "off"
MAX_TIMEOUT_S = 3600
"""The longest that a client may ask for, too."""
MAX_SHOWN_CHARACTERS = 80
"""Of a path in a message about it."""


def check_text(value: str) -> None:
    """Refuse what people cannot read."""
    if not value.strip() or not value.isprintable():
        raise ValidationError("Must be printable and not empty.")


def check_seconds(value: float) -> None:
    """Refuse what is no number of seconds, or more than may be asked for."""
    if not 0 <= value <= MAX_TIMEOUT_S:  # the range check of marshmallow lets NaN pass
        raise ValidationError(f"Must be a number of seconds from 0 to {MAX_TIMEOUT_S}.")


def check_some_seconds(value: float) -> None:
    """Refuse what `check_seconds` does, and none."""
    check_seconds(value)
    if value == 0:
        raise ValidationError("Must be more than 0 seconds.")


def check_share(value: float) -> None:
    """Refuse what is no part of a whole."""
    if not 0 <= value <= 1:  # the range check of marshmallow lets NaN pass
        raise ValidationError("Must be a number from 0 to 1.")


def check_limit(value: str) -> None:
    """Refuse what is no rate limit, nor that there is none."""
    if value == OFF:
        return
    try:
        items = limits.parse_many(value)
    except ValueError:
        items = []
    if len(items) != 1 or items[0].amount < 1:
        raise ValidationError(f"Must be one limit like 600/minute, or {OFF}.")


def check_budget(value: str) -> None:
    """Refuse what is no memory budget."""
    try:
        budget_bytes(value, limit_bytes=1)
    except ValueError as error:
        raise ValidationError(str(error)) from None


def check_networks(value: str) -> None:
    """Refuse what are no addresses or networks."""
    try:
        parse_networks(value)
    except ValueError as error:
        raise ValidationError(str(error)) from None


def check_size(value: str) -> None:
    """Refuse what is no size, or nothing."""
    try:
        size = size_bytes(value)
    except ValueError as error:
        raise ValidationError(str(error)) from None
    if size == 0:
        raise ValidationError("Must be more than 0; to prepare nothing, give --prepare=off.")


def path_refusal(path: Path) -> str | None:
    """Say why nothing can be looked for at a path, and what to do; None where it can, there or not."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        hint = "name a shorter one" if error.errno == errno.ENAMETOOLONG else "correct that or name another"
        return f"{shown_path(path)} cannot be looked at: {error.strerror}; {hint}"
    except ValueError:  # a NUL, or what the file system's encoding lacks
        return f"{shown_path(path)} has a character that no path has; correct it"
    return None


def shown_path(path: Path) -> str:
    """Return as much of a path as a line of a message has room for."""
    text = "".join(each if each.isprintable() else "\ufffd" for each in str(path))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"
