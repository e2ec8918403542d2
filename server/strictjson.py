"""Read JSON that means the same to every reader (RFC 8259 sections 4 and 8.1, RFC 7493 section 2).

Refused, beside what is no JSON at all: duplicate keys, nesting deeper than 32, NaN and Infinity, numbers out
of range, unpaired surrogates, invalid UTF-8.
"""

import json
import math
from itertools import chain
from typing import Any, NoReturn

MAX_DEPTH = 32
"""No body of ours is deeper than 3."""


class InvalidJson(ValueError):
    """Not JSON that is taken; the text says what is wrong, and where if the parser says so."""


def loads(body: bytes) -> Any:
    """Read one JSON value.

    Raises:
        InvalidJson: it is none, or not a strict one.
    """
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
        _check(value)
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
    except ValueError:  # more digits than Python turns into a number in reasonable time
        raise InvalidJson("an integer is out of range") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise InvalidJson(f"the key {_shown(key)} appears twice in one object")
        read[key] = value
    return read


def _constant(literal: str) -> NoReturn:
    raise InvalidJson(f"{literal} is not a JSON number")


def _float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise InvalidJson(f"{_shown(literal)} is out of range")
    return number


def _check(value: Any, depth: int = 0) -> None:
    """Refuse nesting that is too deep, and strings that UTF-8 cannot encode."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise InvalidJson(f"nested deeper than {MAX_DEPTH}")
        for member in chain(value, value.values()) if isinstance(value, dict) else value:
            _check(member, depth + 1)


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 64 else f"{text[:63]}…", ensure_ascii=False)  # noqa: PLR2004
