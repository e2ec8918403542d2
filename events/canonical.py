r"""The canonical form: the one text, and so the one sequence of bytes, that an event is hashed as.

The rule, complete, so that anybody can write it again (test vectors: `tests/events/vectors.json`):

- JSON, no white space, UTF-8; object keys sorted by Unicode code point.
- Leaf values are integers from -2^63 to 2^63-1, strings, `true`, `false` and `null`. No floats.
- In strings only `"`, `\` and U+0000 to U+001F are escaped: `\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`,
  else `\u00xx` in lower-case hexadecimal. No lone surrogates.

It is not RFC 8785, whose numbers are IEEE doubles: integers stay exact here.
`hash = SHA-256(previous hash ‖ UTF-8 of the body)`; before the first event 32 zero bytes.
"""

from __future__ import annotations

import hashlib
import json

from events.errors import NotEncodable

GENESIS = bytes(32)
"""The hash before the first event."""

_MAX = 2**63


def canonical(value: object) -> str:
    """Return `value` in canonical form.

    Raises:
        NotEncodable: a float, an integer beyond 64 bits, a key that is not a string, a lone surrogate.
    """
    _check(value, "$")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotEncodable(f"text holds a lone surrogate at character {error.start}") from None
    return text


def chain(previous: bytes, body: str) -> bytes:
    """Return the hash of `body` after an event whose hash was `previous` (32 bytes each)."""
    return hashlib.sha256(previous + body.encode()).digest()


def _check(value: object, where: str) -> None:
    match value:
        case None | bool() | str():
            return
        case int():
            if not -_MAX <= value < _MAX:
                raise NotEncodable(f"{where}: the integer does not fit into 64 bits")
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise NotEncodable(f"{where}: the key {key!r} is not a string")
                if type(item) is not str:  # nearly all are, and their place need not be spelt out
                    _check(item, f"{where}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                _check(item, f"{where}[{index}]")
        case _:
            raise NotEncodable(f"{where}: {type(value).__name__} has no canonical form")
