"""Several servers in requests of loads: fields of the body, and what a server alone makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate
from msgspec import UNSET

from server.api.schemas import about
from server.config import MAX_NODE_ATTRIBUTES, NODE_ATTRIBUTE, NODE_ATTRIBUTE_RULE, Config
from server.http.validation import StrictInteger

MAX_COPIES = 64
"""As many as instances; where there are fewer servers, each has one copy at most."""


class NodeFieldsSchema(Schema):
    """Parameters of a load at several servers."""

    node_attributes = fields.List(
        fields.String(
            validate=validate.Regexp(rf"(?:{NODE_ATTRIBUTE.pattern})\Z", error=NODE_ATTRIBUTE_RULE)
        ),
        validate=validate.Length(max=MAX_NODE_ATTRIBUTES),
        allow_none=True,
        **about(
            "Attributes that its node must have, `name=value` each; a server alone ignores them. "
            "Default: none."
        ),
    )
    copies = StrictInteger(
        validate=validate.Range(1, MAX_COPIES),
        **about("At how many nodes the model is to be loaded; more than 1 needs nodes. Default: 1."),
    )


def settle_parameters(merged: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """Return the parameters as a load has them.

    Raises:
        ValidationError: a server alone is asked for copies.
    """
    is_alone, copies = config.ledger is None, merged.get("copies", UNSET)
    if is_alone and copies not in (UNSET, 1):
        raise ValidationError(
            "a server alone has one of each model; use instances for more workers", field_name="copies"
        )
    attributes = tuple(sorted(set(merged.get("node_attributes") or ())))
    return {"copies": UNSET if is_alone else copies, "node_attributes": attributes or UNSET}
