"""Generate the OpenAPI document from the routes.

`server.routing` keeps the documentation of each route at `handler.__apispec__`; this module only reads it, so
the same routes give the same bytes. It adds what follows from access and schemas: token, limits and errors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata, resources
from io import StringIO
from typing import Any

import yaml
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import fields, validate

from answers.errors import Problem
from server.auth.access import Access
from server.errors import ERRORS, media_type_of
from server.openapi.components import add_answers, share_components
from server.routing import AnswerType, Route

OPENAPI_VERSION = "3.0.3"
"""The included Swagger UI 4.1 cannot show 3.1."""

LINE_CHARACTERS = 110
"""Of the text, in which a map or list that fits stands in one line."""
TOKEN = "token"  # noqa: S105 -- the name of the security scheme

_DESCRIPTION = (
    "Loads and unloads ONNX models, each in its own process, and keeps a ledger of all requests and their "
    "outcomes. Every error has the same body with a stable `code`. Every answer has `X-Content-Type-Options: "
    "nosniff` and, but for the files of the pages, `Cache-Control: no-store`. On any route, a request that "
    "is no proper HTTP is refused with 400, 408, 414, 431, 501 or 505."
)
_HEADERS_BY_STATUS = {
    401: ["WWW-Authenticate"],
    403: ["WWW-Authenticate"],
    429: ["Retry-After", "RateLimit", "RateLimit-Policy"],
    503: ["Retry-After"],
}
_JSON = "application/json"
_LOCATIONS = {"match_info": "path", "querystring": "query", "headers": "header"}


def _pattern(_: object, field: fields.Field[Any], **__: object) -> dict[str, str]:
    r"""Return the pattern of a field as JSON Schema has it: searched for, not matched, and without `\Z`."""
    patterns = [str(each.regex.pattern) for each in field.validators if isinstance(each, validate.Regexp)]
    return {"pattern": f"^{patterns[0].removesuffix(_END)}$"} if patterns else {}


_END = r"\Z"
"""Ends our patterns: in Python, `$` matches before a line break, too. To ECMA 262 this is the letter Z."""


References = Mapping[AnswerType, Mapping[str, Any]]


def openapi_yaml(routes: Iterable[Route]) -> str:
    """Return the document as YAML; the same routes give the same text."""
    return _to_yaml(share_components(openapi_document(routes)))


def openapi_document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the document; each operation has its own parameters, body and responses."""
    spec, routes, schemas = _empty_spec(), list(routes), dict[str, Any]()
    references = add_answers(schemas, [Problem, *_answer_types(routes)])
    taken: set[str] = set()
    for route in routes:
        operation = _operation(route, references)
        operation["operationId"] = _unique(operation["operationId"], taken)
        spec.path(path=route.path, operations={route.method.lower(): operation})
    document: dict[str, Any] = spec.to_dict()
    document["components"]["schemas"] |= schemas
    for operation in (each for item in document["paths"].values() for each in item.values()):
        _complete(operation)
    first = ("openapi", "info", "security", "paths")
    return {name: document[name] for name in dict.fromkeys((*first, *document))}


def _complete(operation: dict[str, Any]) -> None:
    """Add an operation's example, and leave out that a parameter may be missing, which is the default."""
    for parameter in operation["parameters"]:
        if not parameter.get("required"):
            parameter.pop("required", None)
    example = _read_examples().get(operation["operationId"])
    if example is not None:
        operation["responses"][str(example["status"])]["content"][_JSON]["example"] = example["answer"]
        if "request" in example:
            operation["requestBody"]["content"][_JSON]["example"] = example["request"]


@cache
def _read_examples() -> Mapping[str, Any]:
    """Return examples of the operations that people try first: recorded requests and answers, by name."""
    text = resources.files(__package__).joinpath("examples.json").read_text(encoding="utf-8")
    examples: Mapping[str, Any] = json.loads(text)
    return examples


def _answer_types(routes: Iterable[Route]) -> Iterator[AnswerType]:
    for route in routes:
        for response in _apispec_of(route).get("responses", {}).values():
            if (answer := response.get("answer")) is not None:
                yield answer


def _empty_spec() -> APISpec:
    plugin = MarshmallowPlugin()
    spec = APISpec(
        title="loadledger",
        version=metadata.version("loadledger"),
        openapi_version=OPENAPI_VERSION,
        plugins=[plugin],
        info={"description": _DESCRIPTION, "license": {"name": "Apache-2.0"}},
        security=[{TOKEN: []}],
    )
    assert plugin.converter is not None
    plugin.converter.add_attribute_function(_pattern)  # type: ignore[no-untyped-call]
    bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    spec.components.security_scheme(TOKEN, bearer)
    return spec


def _operation(route: Route, references: References) -> dict[str, Any]:
    described = _apispec_of(route)
    operation = {name: described[name] for name in ("tags", "summary", "description") if name in described}
    operation["operationId"] = getattr(route.handler, "__name__", "operation")
    operation["description"] = _with_access(operation.get("description", ""), route.access)
    operation["parameters"] = list(_parameters(described))
    body = _request_body(described)
    if body is not None:
        operation["requestBody"] = body
    operation["responses"] = {**_responses(described, references), **_error_responses(route)}
    if route.access is Access.PUBLIC:
        operation["security"] = []
    return operation


def _apispec_of(route: Route) -> Mapping[str, Any]:
    return getattr(route.handler, "__apispec__", {})


def _with_access(description: str, access: Access) -> str:
    if access is Access.PUBLIC:
        who = "Needs no token."
    elif access is Access.ANY:
        who = "Needs a token of any role."
    else:
        who = f"Needs the role {' or '.join(sorted(access.value))}."
    return f"{description} {who}".strip()


def _parameters(described: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in described.get("schemas", ()):
        location = _LOCATIONS.get(entry["location"])
        if location is not None:
            yield {"in": location, "schema": entry["schema"]}
    yield from map(dict, described.get("parameters", ()))


def _request_body(described: Mapping[str, Any]) -> dict[str, Any] | None:
    if "requestBody" in described:  # of a route that reads its body itself
        return dict(described["requestBody"])
    for entry in described.get("schemas", ()):
        if entry["location"] == "json":
            content = {_JSON: {"schema": entry["schema"]}}
            return {"required": entry["options"]["required"], "content": content}
    return None


def _responses(described: Mapping[str, Any], references: References) -> dict[str, Any]:
    responses = described.get("responses", {})
    media_types = described.get("produces", [_JSON])
    return {status: _response(responses[status], media_types, references) for status in sorted(responses)}


def _response(
    declared: Mapping[str, Any], media_types: Iterable[str], references: References
) -> dict[str, Any]:
    """Return a response: the struct of its answer, if it has one, in each media type; and its own content."""
    response = {"description": declared["description"]}
    response |= {name: declared[name] for name in ("headers", "content") if name in declared}
    if "answer" in declared:
        schema = references[declared["answer"]]
        found = {media_type: {"schema": schema} for media_type in media_types}
        response["content"] = {**found, **declared.get("content", {})}
    return response


def _error_responses(route: Route) -> dict[str, Any]:
    codes: defaultdict[int, list[str]] = defaultdict(list)
    known = {*_apispec_of(route).get("x-error-codes", ()), *_implied_codes(route)}
    for code in filter(known.__contains__, ERRORS):
        codes[ERRORS[code].status].append(code)
    return {str(status): _error_response(route, codes[status]) for status in sorted(codes)}


def _error_response(route: Route, codes: list[str]) -> dict[str, Any]:
    allowed = {"properties": {"code": {"enum": codes}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Problem"}, allowed]}
    description = "; ".join(f"`{code}`: {ERRORS[code].title}" for code in codes)
    response: dict[str, Any] = {"description": description}
    headers = _HEADERS_BY_STATUS.get(ERRORS[codes[0]].status)
    if headers:
        response["headers"] = {name: {"schema": {"type": "string"}} for name in headers}
    return {**response, "content": {media_type_of(route.path): {"schema": schema}}}


def _implied_codes(route: Route) -> Iterator[str]:
    yield from ("internal", "too_many_files")
    if route.access is not Access.PUBLIC:
        yield from ("invalid_request", "no_credentials", "invalid_token", "forbidden", "too_many_failures")
        yield "rate_limited"
    locations = {declared["location"] for declared in getattr(route.handler, "__schemas__", ())}
    if "json" in locations:
        yield from ("invalid_body", "unsupported_media_type", "body_too_large", "body_timeout")
    if locations - {"json"}:
        yield "invalid_parameter"


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(taken) + 2))
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free


class _Representer(yaml.SafeDumper):
    """Represents data without anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 -- the base class asks per value
        return True


_Serializer = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml gives the same text as PyYAML in a fifth of the time."""


def _to_yaml(document: dict[str, Any]) -> str:
    """Return the text of a document, in its order; the same document gives the same text."""
    part = _Representer(StringIO(), sort_keys=False).represent_data(document)
    assert isinstance(part, yaml.MappingNode)
    _choose_styles(part, 0, 0)
    text: str = yaml.serialize(part, Dumper=_Serializer, allow_unicode=True, width=LINE_CHARACTERS)
    return text


def _choose_styles(part: yaml.ScalarNode | yaml.CollectionNode, column: int, indent: int) -> None:
    """Let maps and lists stand in one line if they fit; of words alone, a map may take two, and a list more.

    Args:
        part: a map, a list, or a text.
        column: where it would begin in one line.
        indent: of the lines that it takes otherwise.
    """
    length = column + _count_characters(part)
    if isinstance(part, yaml.MappingNode):
        is_flat = all(isinstance(value, yaml.ScalarNode) for _, value in part.value)
        part.flow_style = length <= LINE_CHARACTERS or (is_flat and length <= 2 * LINE_CHARACTERS)
        for key, value in part.value:
            is_list = isinstance(value, yaml.SequenceNode)
            if key.value == "example" and isinstance(value, yaml.CollectionNode):
                value.flow_style = True  # it is JSON
                continue
            _choose_styles(value, indent + _count_characters(key) + 2, indent if is_list else indent + 2)
    elif isinstance(part, yaml.SequenceNode):
        is_words = all(isinstance(each, yaml.ScalarNode) for each in part.value)
        part.flow_style = is_words or length <= LINE_CHARACTERS
        for value in part.value:
            _choose_styles(value, indent + 2, indent + 2)


def _count_characters(part: yaml.ScalarNode | yaml.CollectionNode) -> int:
    """Return the length of a part's text in one line."""
    if isinstance(part, yaml.MappingNode):
        return sum(_count_characters(key) + _count_characters(value) + 4 for key, value in part.value)
    if isinstance(part, yaml.SequenceNode):
        return sum(_count_characters(each) + 2 for each in part.value)
    is_quoted = not str(part.value).replace("_", "").isalnum()
    return len(part.value) + 2 * is_quoted
