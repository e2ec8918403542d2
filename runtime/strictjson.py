"""JSON that means the same to every reader (RFC 8259 sections 4 and 8.1, RFC 7493 section 2).

Duplicate keys, NaN and Infinity, numbers out of range, unpaired surrogates and invalid UTF-8 are refused.
"""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 32
"""Limit of nesting; no valid body is deeper than 3."""
MAX_SHOWN_CHARACTERS = 64
"""Length of a client's text in a refusal."""

_NESTED = frozenset({dict, list})
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class InvalidJson(ValueError):
    """The text is no strict JSON; the message names the defect, and its position if the parser does."""


def loads(body: bytes) -> Any:
    """Read one JSON value.

    Raises:
        InvalidJson: the body is no strict JSON.
    """
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
        _check_depth(text, value)
        _check_surrogates(text, value)
    except UnicodeDecodeError as error:
        raise InvalidJson(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise InvalidJson("a string has an unpaired surrogate") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidJson(f"nested deeper than {MAX_DEPTH}") from None
    except InvalidJson:
        raise
    except ValueError:  # too many digits for Python to convert in reasonable time
        raise InvalidJson("an integer is out of range") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        raise InvalidJson(f"the key {quote(key)} appears twice in one object")
    return read


def _constant(literal: str) -> NoReturn:
    raise InvalidJson(f"{literal} is not a JSON number")


def _float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise InvalidJson(f"{quote(literal)} is out of range")
    return number


def _check_depth(text: str, value: Any) -> None:
    """Refuse nesting that is too deep, level by level: a call for each value would take longer."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (each.values() if type(each) is dict else each for each in level)
        level = [member for part in parts for member in part if type(member) in _NESTED]
    if level:
        raise InvalidJson(f"nested deeper than {MAX_DEPTH}")


def _check_surrogates(text: str, value: Any) -> None:
    """Refuse strings that UTF-8 cannot encode: only escapes can write them."""
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()


def quote(text: str) -> str:
    """Return a client's text as JSON, shortened for a message."""
    shown = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"
    return json.dumps(shown, ensure_ascii=False)
