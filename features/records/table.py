"""The tables `[[record]]` of the configuration file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from marshmallow import Schema, ValidationError, fields, validate

from features.records.rules import Failures, RecordRule, What
from server.config import parse_size

NAME = "record"
KEYS = ("share", "failures", "what", "max_bytes", "keep")
"""Beside `models`."""
LEAST_BYTES = 10**7
"""Of `max_bytes`: less is hardly a file."""
MAX_KEEP_S = 100 * 366 * 86400
_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([1-9]\d{0,6})([mhdw])", re.ASCII)


def make_schema(models: fields.Field[Any]) -> type[Schema]:
    """Return the schema of a table; `models` is the field of its globs."""
    return Schema.from_dict({
        "models": models,
        "share": fields.Float(validate=validate.Range(0, 1, min_inclusive=False)),
        "failures": fields.Enum(Failures, by_value=True),
        "what": fields.Enum(What, by_value=True),
        "max_bytes": fields.Function(deserialize=_read_size),
        "keep_s": fields.Function(deserialize=_read_duration, data_key="keep"),
    })  # fmt: skip


def read_rules(tables: Iterable[Mapping[str, Any]]) -> tuple[RecordRule, ...]:
    """Return the rules of tables that the schema has loaded."""
    return tuple(msgspec.convert(table, RecordRule) for table in tables)


def _read_size(given: object) -> int:
    if type(given) not in (int, str):
        raise ValidationError('Must be a number of bytes, or a size in quotes, like "10GB".')
    try:
        size = parse_size(str(given))
    except ValueError as error:
        raise ValidationError(str(error)) from None
    if size < LEAST_BYTES:
        raise ValidationError("Must be at least 10MB.")
    return size


def _read_duration(given: object) -> int:
    found = _DURATION.fullmatch(given) if isinstance(given, str) else None
    seconds = 0 if found is None else int(found[1]) * _UNITS_S[found[2]]
    if not 0 < seconds <= MAX_KEEP_S:
        raise ValidationError('Must be a duration in quotes, like "12h", "30d" or "52w".')
    return seconds
