"""Schemas of requests that several resources of the management API share."""

from __future__ import annotations

from enum import Enum
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate

from features.labels.fold import LABEL_NAME
from runtime.repository import MAX_VERSION, MODEL_ID
from server.http.validation import ParameterInteger

MAX_PAGE = 1000
A_MOMENT = "A position, all digits, or a time with its offset (RFC 3339), such as 2026-01-31T14:02:00Z."
"""Description of a parameter for a moment of the ledger."""
_ID_RULE = "Must be 1 to 128 letters, digits, dots, underscores or hyphens, beginning with a letter or digit."


def about(text: str, **more: str) -> dict[str, Any]:
    """Return the argument of a field that describes it in the OpenAPI document."""
    return {"metadata": {"description": text, **more}}


def one_of(kind: type[Enum]) -> Any:
    return validate.OneOf([member.value for member in kind])


class ModelPathSchema(Schema):
    """The model named by the path."""

    id = fields.String(
        required=True,
        validate=validate.Regexp(rf"(?:{MODEL_ID.pattern})\Z", error=_ID_RULE),
        **about("A model's folder in the repository.", example="digits"),
    )


class ModelVersionPathSchema(ModelPathSchema):
    """The model and the version named by the path."""

    version = ParameterInteger(required=True, validate=validate.Range(1, MAX_VERSION))


_LABEL_RULE = "Must begin with a letter: 1 to 63 letters, digits, dots, underscores or hyphens."
IS_LABEL = validate.Regexp(rf"(?:{LABEL_NAME.pattern})\Z", error=_LABEL_RULE)
"""Validates the name of a label."""


class VersionOrLabel(fields.String):
    """The number of a version, or a label, which begins with a letter."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value.isascii() and value.isdigit():
            number = ParameterInteger(validate=validate.Range(1, MAX_VERSION))
            return number.deserialize(value, attr, data, **kwargs)
        return IS_LABEL(value)


class ModelServedPathSchema(ModelPathSchema):
    """The model, and the version or the label, named by the path."""

    version = VersionOrLabel(
        required=True, **about("A number, or a label: the version that it names now.", example="champion")
    )


class PageQuerySchema(Schema):
    """Page of a list."""

    limit = ParameterInteger(load_default=100, validate=validate.Range(1, MAX_PAGE))


IS_DIGEST = validate.Regexp(r"[0-9a-f]{64}\Z", error="Must be 64 digits, 0 to 9 and a to f.")
"""Validates a SHA-256 in hexadecimal."""


def _is_readable(text: str) -> None:
    """Refuse text that a terminal or a page would show as other text to a person before a decision."""
    if not text.strip() or not text.replace("\n", "").isprintable():
        raise ValidationError("Must be readable text: not blank, and without control characters.")


IS_REASON = (validate.Length(1, 1000), _is_readable)
"""Validates a person's reason for a load, or for a decision about one."""
