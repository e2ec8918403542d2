"""Schemas and views that several resources of the management API share."""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec
from marshmallow import INCLUDE, Schema, ValidationError, fields, validate
from msgspec import UnsetType

from events.types import LoadSignature
from events.versions import LABEL_NAME
from runtime.repository import MAX_VERSION, MODEL_ID
from server.http.validation import ParameterInteger

MAX_PAGE = 1000
NO_NODE = "missing while there is none, and if the server is alone."
"""Of a member that names a node, for the document."""
A_MOMENT = "A position, all digits, or a time with its offset (RFC 3339), such as 2026-01-31T14:02:00Z."
"""Of a parameter that is a moment of the ledger."""
_ID_RULE = "Must be 1 to 128 letters, digits, dots, underscores or hyphens, beginning with a letter or digit."


def about(text: str, **more: str | bool) -> dict[str, Any]:
    """Return the argument of a field that describes it in the OpenAPI document.

    With `is_optional=True`, an `AnswerSchema` may lack the member; others always have theirs.
    """
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


class AnswerSchema(Schema):
    """An answer has all its members but optional ones; clients must ignore unknown ones of later releases."""

    class Meta:
        """Makes the document say so, too."""

        unknown = INCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:  # noqa: ARG002
        field_obj.required = not field_obj.metadata.get("is_optional", False)


IS_DIGEST = validate.Regexp(r"[0-9a-f]{64}\Z", error="Must be 64 digits, 0 to 9 and a to f.")
"""Validates a SHA-256 in hexadecimal."""


def _is_readable(text: str) -> None:
    """Refuse what a terminal or a page shows as something else, to who reads it before a decision."""
    if not text.strip() or not text.replace("\n", "").isprintable():
        raise ValidationError("Must be readable text: not blank, and without control characters.")


IS_REASON = (validate.Length(1, 1000), _is_readable)
"""Validates what a person says for a load, or to one."""


class LoadSignatureSchema(AnswerSchema):
    """The signature of a version's files, as it was checked by the rules for the model."""

    policy = fields.String(**about("Digest of the model's rules."))
    method = fields.String(
        allow_none=True,
        validate=validate.OneOf(["key", "certificate"]),
        **about("Null if no signature was accepted, like the next two."),
    )
    signer = fields.String(allow_none=True, **about("SHA-256 of the key, or the subject of the certificate."))
    bundle = fields.String(allow_none=True, **about("SHA-256 of the signature bundle."))
    enforced = fields.Boolean(**about("Whether a rule with the mode `enforce` accepted it."))
    problem = fields.String(allow_none=True, **about("Code of what the mode `warn` let pass."))
    was_verified = fields.Boolean(
        **about("Whether today's rules refuse it, and the system reloaded bytes that were verified before.")
    )


def signature_view(signature: LoadSignature | UnsetType | None) -> dict[str, Any] | None:
    """Return a signature as `LoadSignatureSchema` has it; None without one."""
    shown: dict[str, Any] | None = msgspec.to_builtins(signature or None)
    if shown is not None:
        shown["enforced"] = shown.pop("is_enforced")
    return shown


class FailureSchema(AnswerSchema):
    """Why a job or a model failed."""

    code = fields.String()
    message = fields.String()


class TensorSchema(AnswerSchema):
    """A tensor, or the specification of one."""

    name = fields.String()
    datatype = fields.String()
    shape = fields.List(fields.Integer())


class ExampleSchema(AnswerSchema):
    """A value of an input that the model ran on when it was loaded."""

    shape = fields.List(fields.Integer())
    values = fields.String(validate=validate.OneOf(["zeros", "ones"]))
    refusal = fields.String(
        **about("Of a guess: what the model said to it, or why it was not tried.", is_optional=True)
    )


class DeclaredTensorSchema(TensorSchema):
    """An input or output of a model; -1 in its shape is any length."""

    optional = fields.Boolean(**about("Whether an input may be left out.", is_optional=True))
    dimensions = fields.List(
        fields.String(),
        **about("What the model calls each dimension; empty for one without a name.", is_optional=True),
    )
    example = fields.Nested(
        ExampleSchema,
        **about("Of an input of a loaded model: what its warm-up ran on, or a guess.", is_optional=True),
    )


def node_member(node_id: str | None) -> dict[str, str]:
    """Return the member of a node; without one there is none, so that a server alone never shows it."""
    return {} if node_id is None else {"node": node_id}
