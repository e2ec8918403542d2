"""Schemas and views that several resources of the management API share."""

from __future__ import annotations

from enum import Enum
from typing import Any

from marshmallow import INCLUDE, Schema, fields, validate

from events.jobs import Failure
from runtime.repository import MAX_VERSION, MODEL_ID
from server.http.validation import ParameterInteger

MAX_PAGE = 1000
NO_NODE = "missing while there is none, and if the server is alone."
"""Of a member that names a node, for the document."""
A_MOMENT = "A position, all digits, or a time with its offset (RFC 3339), such as 2026-01-31T14:02:00Z."
"""Of a parameter that is a moment of the ledger."""
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


class PageQuerySchema(Schema):
    """Page of a list."""

    limit = ParameterInteger(load_default=100, validate=validate.Range(1, MAX_PAGE))


class AnswerSchema(Schema):
    """An answer; clients must ignore unknown members, since later releases add some."""

    class Meta:
        """Makes the document say so, too."""

        unknown = INCLUDE


class FailureSchema(AnswerSchema):
    """Why a job or a model failed."""

    code = fields.String(required=True)
    message = fields.String(required=True)


class TensorSchema(AnswerSchema):
    """A tensor, or the specification of one."""

    name = fields.String(required=True)
    datatype = fields.String(required=True)
    shape = fields.List(fields.Integer(), required=True)


def node_member(node_id: str | None) -> dict[str, str]:
    """Return the member of a node; without one there is none, so that a server alone never shows it."""
    return {} if node_id is None else {"node": node_id}


def failure_view(error: Failure | None) -> dict[str, str] | None:
    return {"code": error.code, "message": error.message} if error is not None else None
