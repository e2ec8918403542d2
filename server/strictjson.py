"""A JSON reader that takes only what means the same to every other reader.

Refused, beside what is no JSON at all: duplicate keys, nesting deeper than 32, NaN and Infinity, numbers out
of range, unpaired surrogates, invalid UTF-8 (RFC 8259 section 4 and 8.1, RFC 7493 section 2).
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_DEPTH = 32
"""No body of ours is deeper than 3; the recursive parser behind us dies at some thousands."""

# Possessive, so that a string that never ends is passed over once and not once per quote in it.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},:]|[^\s\[\]{},:"]++', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class InvalidJson(ValueError):
    """Not JSON that we take; the text says what is wrong and where."""


class _Duplicate(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Literal(ValueError):
    def __init__(self, literal: str, reason: str) -> None:
        super().__init__(reason)
        self.literal = literal


def loads(body: bytes) -> Any:
    """Read one JSON value.

    Raises:
        InvalidJson: it is none, or not a strict one.
    """
    text = _decode(body)
    if text.startswith("\ufeff"):
        raise InvalidJson("not JSON: it begins with a byte order mark")
    _check_depth(text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at {_place(text, error.pos)}") from None
    except _Duplicate as error:
        at = _place(text, _second(text, error.key))
        raise InvalidJson(f"the key {_shown(error.key)} appears twice in one object, at {at}") from None
    except _Literal as error:
        at = _place(text, _literal(text, error.literal))
        raise InvalidJson(f"{_shown(error.literal)} {error}, at {at}") from None
    _check_surrogates(text, value)
    return value


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return  # nearly every body
    depth = 0
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "[" | "{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise InvalidJson(f"nested deeper than {MAX_DEPTH} at {_place(text, token.start())}")
            case "]" | "}":
                depth -= 1


def _check_surrogates(text: str, value: Any) -> None:
    first = _SURROGATE.search(text)
    if first is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        at = _place(text, first.start())
        raise InvalidJson(
            f"a string has an unpaired surrogate; the first escape of that kind is at {at}"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return read


def _constant(literal: str) -> NoReturn:
    raise _Literal(literal, "is not a JSON number")


def _float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise _Literal(literal, "is out of range")
    return number


def _int(literal: str) -> int:
    try:
        return int(literal)
    except ValueError:  # more digits than Python turns into a number in reasonable time
        raise _Literal(literal, "is out of range") from None


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
)


def _second(text: str, key: str) -> int:
    """Find where an object has `key` for the second time. The text is known to have such an object."""
    for position, found, seen in _keys(text):
        if found == key and found in seen:
            return position
        seen.add(found)
    return 0


def _keys(text: str) -> Iterator[tuple[int, str, set[str]]]:
    """Walk over all keys: where, which, and the set that the caller keeps for the object they are in."""
    objects: list[set[str]] = []
    string: re.Match[str] | None = None
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "{":
                objects.append(set())
            case "}":
                objects.pop()
            case ":" if string is not None:
                yield string.start(), json.loads(string[0]), objects[-1]
        string = token if token[0].startswith('"') else None


def _literal(text: str, literal: str) -> int:
    return next((token.start() for token in _TOKEN.finditer(text) if token[0] == literal), 0)


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"line {line} column {column}"


def _shown(value: str) -> str:
    return json.dumps(value if len(value) <= 64 else value[:63] + "…", ensure_ascii=False)  # noqa: PLR2004
