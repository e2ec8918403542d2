"""The tables `[[notify]]` of the configuration file."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from marshmallow import Schema, ValidationError, fields, validate
from yarl import URL

NAME = "notify"
KEYS = ("url", "secret_file", "name", "from")
NOW = "now"

_PREFIX = "whsec_"
_KEY_BYTES = range(24, 65)
"""Of a secret, as Standard Webhooks has it."""
_MAX_SECRETS = 2
_HOST = re.compile(r"[\w:-][\w.:-]*", re.ASCII)
_NAME = validate.Regexp(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z", error="Must be letters, digits, '.', '_' and '-', at most 63."
)


class Receiver(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One table: where events are sent.

    Attributes:
        name: in metrics, messages and the name of its file; by default the URL's host and port.
        url: its path may be a secret, so that messages have the name alone.
        keys: sign each delivery: the present one, and while it is replaced the one before.
        first: position of the first event for a new receiver; None begins with the next event.
    """

    name: str
    url: str
    keys: tuple[bytes, ...]
    first: int | None = None

    def __repr__(self) -> str:
        return f"Receiver({self.name!r})"


def make_schema(read_keys: Callable[[object], tuple[bytes, ...]]) -> type[Schema]:
    """Return the schema of a table; `read_keys` reads the file that `secret_file` names."""
    return Schema.from_dict({
        "url": fields.String(required=True, validate=_check_url),
        "keys": fields.Function(deserialize=read_keys, required=True, data_key="secret_file"),
        "name": fields.String(validate=_NAME),
        "first": fields.Function(deserialize=_read_first, data_key="from"),
    })  # fmt: skip


def read_receivers(tables: Iterable[Mapping[str, Any]]) -> tuple[Receiver, ...]:
    """Return the receivers of tables that the schema has loaded.

    Raises:
        ValidationError: two have one name.
    """
    named = ({"name": URL(table["url"]).host_port_subcomponent, **table} for table in tables)
    receivers = tuple(msgspec.convert(table, Receiver) for table in named)
    names = [receiver.name for receiver in receivers]
    for number, name in enumerate(names):
        if name in names[:number]:
            text = f"There is another receiver {name}: give this one a name of its own."
            raise ValidationError({NAME: {number: {"name": [text]}}})
    return receivers


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Return the keys of a file of secrets, one in each line.

    Raises:
        ValueError: it has none, or others; the message has nothing of them.
    """
    keys = tuple(_decode_secret(line) for line in text.split())
    if not 1 <= len(keys) <= _MAX_SECRETS or not all(len(key) in _KEY_BYTES for key in keys):
        raise ValueError(
            f"it must have one line like {_PREFIX}…, 24 to 64 bytes in base64, as"
            f' `echo "{_PREFIX}$(openssl rand -base64 32)"` prints one, or two while one replaces the other'
        )
    return keys


def _decode_secret(line: str) -> bytes:
    if not line.startswith(_PREFIX):
        return b""
    try:
        return base64.b64decode(line.removeprefix(_PREFIX), validate=True)
    except ValueError:
        return b""


def _check_url(text: str) -> None:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not _HOST.fullmatch(url.raw_host or ""):
        raise ValidationError("Must be like https://HOST/PATH.")
    if url.user is not None or url.password is not None:
        raise ValidationError("Must have no user and no password: the signature says who sends.")


def _read_first(given: object) -> int | None:
    if given == NOW:
        return None
    if type(given) is not int or not 0 < given < 2**63:
        raise ValidationError(f'Must be "{NOW}", or the position of the first event to send, from 1 on.')
    return given
