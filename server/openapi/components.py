"""Components of the OpenAPI document: schemas of answers, and what several operations have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from answers.answer import AnswerBody
from server.routing import AnswerType

_USUAL_CODES = frozenset(
    {"invalid_request", "invalid_parameter", "invalid_body", "rate_limited", "too_many_failures"}
    | {"forbidden", "too_many_files"}
)
"""Error codes that do not name a response beside others."""
_RESPONSE_NAMES: Mapping[frozenset[str], str] = {
    frozenset(codes.split()): name
    for codes, name in (
        ("no_credentials invalid_token", "Unauthorized"),
        ("rate_limited too_many_failures", "RateLimited"),
        ("invalid_parameter", "InvalidPath"),
        ("invalid_request invalid_body invalid_parameter", "InvalidBody"),
        ("invalid_model model_changed unsafe_file", "ModelNotReadable"),
        ("inference_failed inference_cancelled invalid_input not_representable", "InferenceFailed"),
        ("unknown_model unknown_version unknown_label", "UnknownModelVersionOrLabel"),
        ("version_exists repository_not_shared repository_read_only", "VersionNotAddable"),
        ("repository_unreadable repository_busy log_unavailable", "RepositoryOrLogUnavailable"),
        (
            "repository_unreadable repository_busy log_unavailable shutting_down",
            "RepositoryOrServerUnavailable",
        ),
        (
            "node_unreachable repository_unreadable repository_busy log_unavailable shutting_down",
            "NodeOrRepositoryUnavailable",
        ),
        ("model_not_loaded model_unloading node_unreachable repository_unreadable", "ModelUnavailable"),
        (
            "model_not_loaded bytes_gone node_unreachable repository_unreadable repository_busy",
            "MetadataUnavailable",
        ),
        (
            (
                "inference_queue_full bodies_full model_not_loaded load_failed out_of_service bytes_gone"
                " model_unloading model_unloaded model_replaced model_evicted model_moved node_unreachable"
                " worker_died out_of_memory fork_server_died fork_server_unavailable"
                " repository_unreadable log_unavailable shutting_down"
            ),
            "InferenceUnavailable",
        ),
    )
}
"""Names of responses by their error codes, where these would make no good name."""
_PARAMETER_NAMES: Mapping[str, Sequence[str]] = {"id": ("ModelId",), "version": ("Version", "VersionOrLabel")}
"""Names that say more than a parameter's own; the parameter of most operations has the first."""
MAX_CODES = 2
"""Error codes that a name of a response joins."""
LONG_CHARACTERS = 300
"""A shorter response that is no error stays in its operation: a reference would say less."""

Place = tuple[Any, Any, dict[str, Any]]
"""A map or list of the document, the key or index in it, and the operation around it."""


def add_answers(schemas: dict[str, Any], answers: Iterable[AnswerType]) -> dict[AnswerType, dict[str, Any]]:
    """Add the schemas of answers, and of the structs that they have, and return a reference to each."""
    types = list(dict.fromkeys(answers))
    references, found = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    classes = {each.__name__: each for each in _subclasses(AnswerBody)}
    for name, schema in sorted(found.items()):
        schemas[name] = _describe_struct(schema, classes[name])
    return dict(zip(types, references, strict=True))


def _subclasses(base: type[AnswerBody]) -> Iterator[type[AnswerBody]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)


def _describe_struct(schema: Mapping[str, Any], struct: type[AnswerBody]) -> dict[str, Any]:
    """Return OpenAPI's form of a struct's schema.

    A member that may be missing is never null (`answers.answer`), and 3.0 has `nullable` instead of a type.
    Members of a base, such as those about a moment of the past, come last.
    """
    defaults = {name for name, each in schema["properties"].items() if "default" in each}
    optional = defaults if struct.__struct_config__.omit_defaults else set[str]()
    inherited = {each.encode_name for base in struct.__bases__ for each in msgspec.structs.fields(base)}
    members = sorted(schema["properties"].items(), key=lambda member: member[0] in inherited)
    properties = {name: _describe_member(each, is_optional=name in optional) for name, each in members}
    required = [name for name in properties if name not in optional]
    text = " ".join(schema["description"].split())  # Python 3.13 takes the indentation away itself
    described = {"type": "object", "description": text, "required": required}
    return {name: value for name, value in {**described, "properties": properties}.items() if value}


def _describe_member(schema: Mapping[str, Any], *, is_optional: bool) -> dict[str, Any]:
    member = {name: value for name, value in schema.items() if name not in ("anyOf", "default", "$ref")}
    kinds = schema.get("anyOf", [{"$ref": schema["$ref"]}] if "$ref" in schema else [])
    [kind] = [each for each in kinds if each != _NULL] or [{}]
    is_nullable = _NULL in kinds and not is_optional
    if "$ref" not in kind:
        member |= kind
        if is_nullable:
            member["nullable"] = True
            member |= {"enum": [*member["enum"], None]} if "enum" in member else {}
    elif is_nullable:
        member["anyOf"] = [kind, {"type": "object", "nullable": True, "enum": [None]}]
    elif member:
        member["allOf"] = [kind]  # beside a reference, 3.0 ignores all else
    else:
        return dict(kind)
    if member.get("type") == "array":
        member.setdefault("items", {})  # which 3.0 asks for
    order = ("type", "allOf", "anyOf", "items", "nullable", "enum", "format")
    return {**{name: member[name] for name in order if name in member}, **member}


_NULL = {"type": "null"}


def share_components(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with a component for what several operations have, in place of each."""
    shared: dict[str, Any] = json.loads(json.dumps(document))
    operations = [operation for item in shared["paths"].values() for operation in item.values()]
    components = shared["components"]
    for kind, find_places, find_names in (
        ("headers", _headers, lambda key, *_: (key,)),
        ("responses", _responses, _response_names),
        ("parameters", _parameters, _parameter_names),
        ("requestBodies", _bodies, _operation_names),
    ):
        places = [place for operation in operations for place in find_places(operation)]
        components[kind] = _share(places, kind, find_names)
    first = ("parameters", "requestBodies", "responses", "headers")
    shared["components"] = {name: components[name] for name in dict.fromkeys((*first, *components))}
    return shared


def _share(
    places: Sequence[Place], kind: str, find_names: Callable[[Any, Any, dict[str, Any]], Sequence[str]]
) -> dict[str, Any]:
    """Replace what stands at several places by references, and return the components by name.

    Of those for which there is one name, that of most places has it; the others stay where they are.
    """
    texts = [json.dumps(holder[key]) for holder, key, _ in places]
    names, components = dict[str, str](), dict[str, Any]()
    for text, count in Counter(texts).most_common():
        holder, key, operation = places[texts.index(text)]
        free = [name for name in find_names(key, holder[key], operation) if name not in components]
        if count > 1 and free:
            names[text], components[free[0]] = free[0], holder[key]
    for text, (holder, key, _) in zip(texts, places, strict=True):
        if text in names:
            holder[key] = {"$ref": f"#/components/{kind}/{names[text]}"}
    return dict(sorted(components.items()))


def _headers(operation: dict[str, Any]) -> Iterator[Place]:
    for response in operation["responses"].values():
        headers = response.get("headers", {})
        yield from ((headers, name, operation) for name in headers)


def _responses(operation: dict[str, Any]) -> Iterator[Place]:
    yield from ((operation["responses"], status, operation) for status in operation["responses"])


def _parameters(operation: dict[str, Any]) -> Iterator[Place]:
    parameters = operation["parameters"]
    yield from ((parameters, index, operation) for index in range(len(parameters)))


def _bodies(operation: dict[str, Any]) -> Iterator[Place]:
    if "requestBody" in operation:
        yield operation, "requestBody", operation


def _operation_names(_: Any, value: dict[str, Any], operation: dict[str, Any]) -> Sequence[str]:
    is_long = len(json.dumps(value)) > LONG_CHARACTERS
    return (_camel_case(operation["operationId"]),) if is_long else ()


def _parameter_names(_: int, value: dict[str, Any], __: dict[str, Any]) -> Sequence[str]:
    return _PARAMETER_NAMES.get(value["name"], (_camel_case(value["name"].replace("-", "_")),))


def _response_names(status: str, value: dict[str, Any], operation: dict[str, Any]) -> Sequence[str]:
    """Return the name of a response: what is wrong; of one that is no error, the operation that has it."""
    contents: dict[str, Any] = value.get("content", {})
    media_type = next(iter(contents), "")
    schema = contents.get(media_type, {}).get("schema", {})
    if "allOf" not in schema:
        return _operation_names(status, value, operation)
    codes = schema["allOf"][1]["properties"]["code"]["enum"]
    own = frozenset(codes) - _USUAL_CODES
    name = _RESPONSE_NAMES.get(own or frozenset(codes))
    if name is None:
        named = [code for code in codes if code in own] or codes[-1:]
        name = "Or".join(_camel_case(code) for code in named) if len(named) <= MAX_CODES else None
    suffix = "" if media_type.endswith("problem+json") else "V2"
    return () if name is None else (name + suffix,)


def _camel_case(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
