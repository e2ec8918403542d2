"""Types of JSON, as schemas of OpenAPI say them, in the words of the reference pages."""

import json
from collections.abc import Mapping
from typing import Any

from server.docs.markdown import slug


def type_of(schema: Mapping[str, Any]) -> str:
    """Return a schema's type in words, with its bounds; the components that it names are links."""
    choices = schema.get("anyOf", ())
    parts = [type_of(part) for part in choices if part != _NULL]
    if "$ref" in schema:
        parts = [_link(schema["$ref"])]
    elif "enum" in schema:
        parts = [", ".join(f"`{value}`" for value in schema["enum"] if value is not None)]
    elif schema.get("type") == "array":
        parts = [f"list of {type_of(schema.get('items', {}))}"]
    elif not parts:
        parts = [_NAMES.get(schema.get("type", ""), "any value") + _bounds(schema)]
    can_be_null = schema.get("nullable") or _NULL in choices
    return " or ".join([*parts, "null"] if can_be_null else parts)


_NULL = {"type": "object", "nullable": True}
"""How OpenAPI 3.0 says null among the choices of an `anyOf`."""
_NAMES = {name: name for name in ("integer", "number", "boolean", "object")} | {"string": "text"}


def _link(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return f"[{name}](#{slug(name)})"


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    default = schema.get("default")
    bounds = [
        f"{low} to {high}" if low is not None and high is not None else "",
        f"from {low}" if low is not None and high is None else "",
        f"default {json.dumps(default)}" if default not in (None, "") else "",
    ]
    return "".join(f", {bound}" for bound in bounds if bound)
