"""Reads the tables of the configuration file: [[trust]] and [[approval]], the policy for loads, and others.

The files that a rule names are read once, at the start: the policy has their contents.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from features.approvals.rules import AddedMode
from features.notify import table as notify
from features.records import table as records
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode
from features.signatures.verification import normalise_key, normalise_roots, parse_subject
from server.auth.modes import find_risk

T = TypeVar("T")

_POLICY = ("trust", "approval")
TABLES = (*_POLICY, records.NAME, notify.NAME)
"""The keys of the configuration file that are no settings."""
MAX_FILE_BYTES = 64 * 1024
"""Of a file that a rule names: the log keeps its contents."""

_READERS = {records.NAME: records.read_rules, notify.NAME: notify.read_receivers}
_KEYS = (
    *("models", "mode", "keys", "certificates", "roots", "subject", "distrusted"),
    *("approvals", "added", "emergency"),
    *records.KEYS,
    *notify.KEYS,
)
_GLOBS = validate.Regexp(
    r"[\w.*?\[\]!-]{1,256}\Z", re.ASCII, error="Must be a model or a glob, like fraud-*."
)
_DIGEST = validate.Regexp(r"[0-9a-f]{64}\Z", error="Must be a key's SHA-256: 64 digits, 0 to 9 and a to f.")


class _TrustSchema(Schema):
    @validates_schema
    def check_signers(self, rule: Mapping[str, Any], **_: Any) -> None:
        if rule["mode"] is TrustMode.ENFORCE and not rule.get("keys") and not rule.get("certificates"):
            text = "Must be given, or certificates: with neither, no version would be loaded."
            raise ValidationError(text, "keys")


def read_tables(tables: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Read the tables.

    Args:
        tables: the values of `TABLES` that the file has.
        folder: the file's, to which paths are relative.

    Returns:
        The settings `policy` and `tables`, none if there are mistakes, and these: each with its place, like
        `trust[0].keys`.
    """

    def read_keys(name: object) -> tuple[bytes, ...]:
        return _read_file(folder, name, notify.parse_secrets, is_private=True)

    def contents(normalise: Callable[[str], str]) -> fields.Field[Any]:
        return fields.Function(deserialize=lambda name: _read_file(folder, name, normalise), required=True)

    subject = fields.String(required=True, validate=_check_subject)
    certificates = Schema.from_dict({"roots": contents(normalise_roots), "subject": subject})
    models = fields.List(fields.String(validate=_GLOBS), required=True, validate=validate.Length(1))
    trust = _TrustSchema.from_dict({
        "models": models,
        "mode": fields.Enum(TrustMode, by_value=True, required=True),
        "keys": fields.List(contents(normalise_key)),
        "certificates": fields.List(fields.Nested(certificates)),
        "distrusted": fields.List(fields.String(validate=_DIGEST)),
    })  # fmt: skip
    approval = Schema.from_dict({
        "models": models,
        "approvals": fields.Integer(strict=True, validate=validate.Range(1, 100)),
        "added": fields.Enum(AddedMode, by_value=True),
        "emergency": fields.Boolean(truthy={True}, falsy={False}),
    })  # fmt: skip
    record = records.make_schema(models)
    schemas = {
        "trust": trust,
        "approval": approval,
        records.NAME: record,
        notify.NAME: notify.make_schema(read_keys),
    }
    schema = Schema.from_dict({name: _tables(each) for name, each in schemas.items()})
    try:
        loaded = schema().load(tables)
        others = {name: read(loaded[name]) for name, read in _READERS.items() if name in loaded}
    except ValidationError as error:
        return {}, [(place[1:], text) for place, text in _list_mistakes(error.messages, "")]
    policy = msgspec.convert({name: loaded[name] for name in _POLICY if name in loaded}, LoadPolicy)
    return {"policy": policy, "tables": others}, []


def _tables(schema: type[Schema]) -> fields.Field[Any]:
    text = "Must be a list of tables: write the name in [[double brackets]]."
    return fields.List(fields.Nested(schema), error_messages={"invalid": text})


def _read_file(folder: Path, name: object, read: Callable[[str], T], *, is_private: bool = False) -> T:
    """Return what is read from a file.

    Raises:
        ValidationError: it cannot be read, another user could change it (or read it, if it is private), or it
            is not of the kind.
    """
    if not isinstance(name, str) or not name or name.startswith("~"):
        raise ValidationError("Must be a path in quotes, and in full: ~ is not expanded.")
    try:
        with (folder / name).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValidationError(f"{name!r:.200} has more than {MAX_FILE_BYTES} bytes; name another file.")
        if (risk := find_risk(folder / name, is_private=is_private)) is not None:
            raise ValidationError(risk)
        return read(content.decode())
    except OSError as error:
        shown = "The file" if is_private else f"{name!r:.200}"  # the secret itself may stand there
        text = f"{shown} cannot be read: {error.strerror}; name another file."
        raise ValidationError(text) from None
    except ValueError as error:
        raise ValidationError(f"{name!r:.200} is refused: {error}.") from None


def _check_subject(text: str) -> None:
    try:
        parse_subject(text)
    except ValueError as error:
        raise ValidationError(f"Is refused: {error}.") from None


def _list_mistakes(messages: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield place and text of each entry of marshmallow's tree of errors."""
    if not isinstance(messages, dict):
        yield from ((place, str(text)) for text in messages)
        return
    for key, below in messages.items():
        path = place if key == "_schema" else f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}"
        if below == ["Unknown field."]:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "settings stand above the tables"
            yield path, f"there is no such key; {hint}"
        else:
            yield from _list_mistakes(below, path)
