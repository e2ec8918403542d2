"""The reference page of the HTTP interface, in Markdown, from the OpenAPI document of all routes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.docs.markdown import cell, slug, slugs
from server.docs.schemawords import type_of
from server.errors import ERRORS

Document = Mapping[str, Any]

_HEAD = """\
# HTTP

Generated from the routes, as `/openapi.yaml` and `/docs` are ([openapi.yaml](../../openapi.yaml)); a test
holds this page to them.

- **Token:** `Authorization: Bearer TOKEN`, for all but what says that it needs none.
- **Bodies** are JSON. A member that a route of `/api/v1` does not know is refused. What the server answers
  may get more members; ignore those that you do not know.
- **Errors** all have one body, [Problem](#problem), whose [code](errors.md) is stable. Its media type is
  `application/problem+json`, and `application/json` under `/v2`. An unknown path is 404 `not_found`, a method
  that a route does not take 405 with `Allow`.
- **Waiting:** a load or an unload answers 202 with its job at once, or with `Prefer: wait=N` when the job has
  ended. Under `/v2` it always waits.
- **Limits:** `RateLimit` and `RateLimit-Policy` say what is left; a 429 or 503 says with `Retry-After` when
  to come back.
"""
_EVERYWHERE = (
    "invalid_request",
    "no_credentials",
    "invalid_token",
    "rate_limited",
    "too_many_failures",
    "internal",
)
"""Codes that follow from having a token, a limit, or a server at all; said once, not with each operation."""
_ALL = f"""\
Any route can also answer {", ".join(f"`{code}`" for code in _EVERYWHERE)}; they are not repeated below.
"""
_SEVERAL = "Parameters of several routes"
_MANY = 2
"""What more operations than this say in the same words is said in a section of its own."""
_LONG = 100
"""In characters; of a shorter text, following a link would be more work than reading it again."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one path, with the anchor of its section; None where all is said with its row."""

    route: str
    anchor: str | None
    about: Mapping[str, Any]

    @property
    def tag(self) -> str:
        """The group that it is shown in."""
        return str(self.about["tags"][0])


def http_page(document: Document) -> str:
    """Return the page for an OpenAPI document, as `server.docs.openapi` makes it."""
    operations = list(_operations(document))
    shared = _shared(operations)
    parts = [_HEAD, "## Routes\n", *_routes(operations), _ALL, f"## {_SEVERAL}\n", *_PARAMETERS]
    parts += [*(_parameter(parameter) for parameter in shared.values()), ""]
    tag = ""
    for operation in operations:
        if operation.anchor is not None:
            parts += [f"## Routes: {operation.tag}\n"] if operation.tag != tag else []
            parts += _section(operation, set(shared))
            tag = operation.tag
    parts.append("## Bodies\n")
    schemas: Mapping[str, Any] = document["components"]["schemas"]
    for name in sorted(schemas):
        parts += _schema(name, schemas[name])
    return "\n".join(parts).rstrip("\n") + "\n"


def _operations(document: Document) -> Iterator[_Operation]:
    """Yield the operations, those of one tag together, tags in the order in which they come."""
    found = {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    tags = list(dict.fromkeys(operation["tags"][0] for operation in found.values()))
    routes = sorted(found, key=lambda route: tags.index(found[route]["tags"][0]))
    with_sections = [route for route in routes if not _is_a_file(found[route])]
    anchors = dict(zip(with_sections, slugs(with_sections), strict=True))
    for route in routes:
        yield _Operation(route, anchors.get(route), found[route])


def _is_a_file(operation: Mapping[str, Any]) -> bool:
    return not operation["security"] and "content" not in operation["responses"].get("200", {})


def _shared(operations: Sequence[_Operation]) -> dict[tuple[str, str], Mapping[str, Any]]:
    every = [parameter for operation in operations for parameter in operation.about["parameters"]]
    times = Counter(map(_said, every))
    return {
        _said(each): each for each in every if times[_said(each)] > _MANY and len(_said(each)[1]) >= _LONG
    }


def _said(parameter: Mapping[str, Any]) -> tuple[str, str]:
    what = parameter.get("description") or parameter["schema"].get("description", "")
    return parameter["name"], cell(what)


def _routes(operations: Sequence[_Operation]) -> Iterator[str]:
    yield from ("| route | what | who |", "| --- | --- | --- |")
    for operation in operations:
        route = f"`{operation.route}`"
        linked = route if operation.anchor is None else f"[{route}](#{operation.anchor})"
        yield f"| {linked} | {cell(operation.about['summary'])} | {_who(operation.about)} |"
    yield ""


def _who(operation: Mapping[str, Any]) -> str:
    said = str(operation["description"]).rpartition("\n")[2].rstrip(".")
    for before in ("Needs the role ", "Needs a token of ", "Needs "):
        said = said.removeprefix(before)
    return said


def _section(operation: _Operation, shared: set[tuple[str, str]]) -> Iterator[str]:
    about = operation.about
    yield f"### {operation.route}\n"
    yield f"{about['summary']}. {cell(about['description'])}\n"
    if about["parameters"]:
        yield from _PARAMETERS
        for parameter in about["parameters"]:
            is_shared = _said(parameter) in shared
            yield _parameter(parameter, f"[see above](#{slug(_SEVERAL)})" if is_shared else None)
        yield ""
    if "requestBody" in about:
        yield from _body(about["requestBody"])
    yield from _answers(about)


_PARAMETERS = ("| parameter | in | type | what |", "| --- | --- | --- | --- |")


def _parameter(parameter: Mapping[str, Any], what: str | None = None) -> str:
    name, said = _said(parameter)
    kind = type_of(parameter["schema"])
    return f"| `{name}` | {parameter['in']} | {kind} | {said if what is None else what} |"


def _body(body: Mapping[str, Any]) -> Iterator[str]:
    need = "Body" if body["required"] else "Body, may be left out"
    yield f"{need}: {_media(body['content'])}. {cell(body.get('description', ''))}".rstrip() + "\n"
    for media in body["content"].values():
        members = list(_members("", media["schema"]))
        if members:
            yield from (*_TABLE, *members, "")


def _answers(operation: Mapping[str, Any]) -> Iterator[str]:
    refused = []
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            content = _media(answer.get("content", {}))
            yield f"- **{status}** {cell(answer['description'])}{f' {content}.' if content else ''}"
            for name, header in answer.get("headers", {}).items():
                yield f"  - header `{name}`: {cell(header.get('description', ''))}"
        else:
            codes = [code for code in ERRORS if f"`{code}`:" in answer["description"]]
            told = [f"`{code}`" for code in codes if code not in _EVERYWHERE]
            refused += [f"{status} {', '.join(told)}"] if told else []
    if refused:
        yield f"- Refused: {'; '.join(refused)}"
    yield ""


def _media(content: Mapping[str, Any]) -> str:
    return " or ".join(
        f"{type_of(media['schema'])} ({name})" if name != "application/json" else type_of(media["schema"])
        for name, media in content.items()
    )


_TABLE = ("| member | type | what |", "| --- | --- | --- |")


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    members = list(_members("", schema, set(schema.get("required", ()))))
    if members:
        yield from (*_TABLE, *members, "")
    else:
        yield "No members.\n"


def _members(prefix: str, schema: Mapping[str, Any], always: set[str] | None = None) -> Iterator[str]:
    """Yield a row for each member, those of objects within it by their path.

    Args:
        prefix: what stands before a member's name.
        schema: of an object.
        always: of an answer, the members that are always there; None where nothing is said of that.
    """
    for name, member in schema.get("properties", {}).items():
        what = cell(member.get("description", ""))
        if always is not None and name not in always:
            what = f"Not always there. {what}".strip()
        yield f"| `{prefix}{name}` | {type_of(member)} | {what} |"
        yield from _members(f"{prefix}{name}.", member)
        yield from _members(f"{prefix}{name}[].", member.get("items", {}))
