"""Validation of requests: bodies are parsed strictly, and all parts are checked with schemas.

The schemas are those of the route (`handler.__schemas__` of aiohttp-apispec). Each refusal is a 400 that
names the field and the allowed values. Handlers get the result from `json_body` and similar functions.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from marshmallow import EXCLUDE, RAISE, Schema, ValidationError, fields

from runtime.strictjson import InvalidJson, loads, quote
from server.errors import ServerProblem
from server.http.bodies import IDLE_S, read_body

MAX_JSON_BYTES = 256 * 2**10
"""Management bodies have some hundred bytes. The worst of this length takes 70 ms to parse (measured)."""

MAX_REPORTED = 10
"""Mistakes that a refusal names; the others are counted."""

_JSON: web.RequestKey[Any] = web.RequestKey("json", object)
_PATH: web.RequestKey[Any] = web.RequestKey("match_info", object)
_QUERY: web.RequestKey[Any] = web.RequestKey("querystring", object)
_HEADERS: web.RequestKey[Any] = web.RequestKey("headers", object)

_INT64 = range(-(2**63), 2**63)
_NOT_INTEGER = "Must be an integer of 64 bits."
_NOT_BOOLEAN = "Must be true or false."


class InvalidBody(ServerProblem):
    """The body is invalid for this route."""

    code = "invalid_body"


class InvalidParameter(ServerProblem):
    """A parameter is invalid for this route."""

    code = "invalid_parameter"


class UnsupportedMediaType(ServerProblem):
    """A body must be declared as Content-Type: application/json, in UTF-8."""

    code = "unsupported_media_type"


class StrictInteger(fields.Integer):
    """A JSON integer of 64 bits: not 1.5, not "3", not true."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
            raise ValidationError(_NOT_INTEGER)
        return super()._deserialize(value, attr, data, **kwargs)


class StrictBoolean(fields.Boolean):
    """JSON's true or false: not 1, not "true"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if not isinstance(value, bool):
            raise ValidationError(_NOT_BOOLEAN)
        return super()._deserialize(value, attr, data, **kwargs)


class ParameterInteger(fields.Integer):
    """An integer of 64 bits in a path, a query or a header: decimal digits, no spaces, no leading +."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if re.fullmatch(r"-?[0-9]{1,19}", str(value), re.ASCII) is None or int(value) not in _INT64:
            raise ValidationError(_NOT_INTEGER)
        return super()._deserialize(int(value), attr, data, **kwargs)


class ParameterBoolean(fields.Boolean):
    """`true` or `false` in a query."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value not in {"true", "false"}:
            raise ValidationError(_NOT_BOOLEAN)
        return super()._deserialize(value == "true", attr, data, **kwargs)


class NothingSchema(Schema):
    """A part of a request that must be empty, such as a query without parameters."""


def json_body(request: web.Request) -> Any:
    """Return the body as loaded by its schema; an empty body is an empty object."""
    return request[_JSON]


def path_parameters(request: web.Request) -> Any:
    return request[_PATH]


def query_parameters(request: web.Request) -> Any:
    return request[_QUERY]


def header_fields(request: web.Request) -> Any:
    return request[_HEADERS]


async def read_json(request: web.Request, schema: Schema) -> Any:
    """Return a JSON body, for a handler that also takes other bodies; `json_body` returns it afterwards.

    Raises:
        InvalidBody: `invalid_body`.
        UnsupportedMediaType: `unsupported_media_type`.
        BodyTooLarge: `body_too_large`.
        BodyTimeout: `body_timeout`.
    """
    request[_JSON] = load_with(schema, await _body(request), "body", InvalidBody)
    return request[_JSON]


def load_with(schema: Schema, value: Any, where: str, refusal: type[Exception]) -> Any:
    """Return a value as loaded by a schema; `where` names the value in a refusal.

    Unknown members are refused, except unknown header fields.
    """
    if not isinstance(value, dict):
        raise refusal(f"{where}: Must be a JSON object.")
    try:
        return schema.load(value, unknown=EXCLUDE if where == "headers" else RAISE)
    except ValidationError as error:
        raise refusal(_describe_mistakes(schema, error, where)) from None


async def read_plain_body(request: web.Request, max_bytes: int, idle_s: float = IDLE_S) -> bytes:
    """Read a whole body that must not be compressed.

    Raises:
        UnsupportedMediaType: the body is compressed (`unsupported_media_type`).
        BodyTooLarge: `body_too_large`.
        BodyTimeout: `body_timeout`.
    """
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: leave Content-Encoding out")
    return bytes(await read_body(request, max_bytes, idle_s=idle_s))


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check path, query, header and body of a request with the route's schemas, after authentication."""
    for declared in getattr(request.match_info.handler, "__schemas__", ()):
        schema: Schema = declared["schema"]
        match declared["location"]:
            case "json":
                await read_json(request, schema)
            case "match_info":
                request[_PATH] = load_with(schema, dict(request.match_info), "path", InvalidParameter)
            case "querystring":
                request[_QUERY] = load_with(schema, _query(request, schema), "query", InvalidParameter)
            case "headers":
                request[_HEADERS] = load_with(schema, _headers(request, schema), "headers", InvalidParameter)
            case location:
                raise NotImplementedError(f"schemas of {location} are not supported")
    return await handler(request)


async def _body(request: web.Request) -> Any:
    body = await read_plain_body(request, MAX_JSON_BYTES)
    if not body:
        return {}
    if not is_json(request.headers.get(hdrs.CONTENT_TYPE, "")):
        raise UnsupportedMediaType(_describe_media_type(request.headers.get(hdrs.CONTENT_TYPE)))
    try:
        return loads(body)
    except InvalidJson as error:
        raise InvalidBody(str(error)) from None


def is_json(field: str) -> bool:
    """Return whether a Content-Type declares JSON in UTF-8.

    aiohttp's `content_type` and `charset` use the parser for e-mails: in quadratic time, 1.4 s for 8 KB of
    quotes (measured), and with a RecursionError for parentheses.
    """
    media_type, *parameters = (part.strip(" \t") for part in field.lower().split(";"))
    charsets = {
        part.removeprefix("charset=").strip('"') for part in parameters if part.startswith("charset=")
    }
    is_json = media_type == "application/json" or ("/" in media_type and media_type.endswith("+json"))
    return is_json and charsets <= {"utf-8"}


def _describe_media_type(field: str | None) -> str:
    """Return the fault of a Content-Type, and what to send; curl declares a form by default."""
    declared = "without a Content-Type" if field is None else f"declared as {quote(field)}"
    return (
        f"the body is {declared}: send JSON in UTF-8 with the header Content-Type: application/json"
        " (curl: -H 'Content-Type: application/json')"
    )


def _query(request: web.Request, schema: Schema) -> Mapping[str, object]:
    given: dict[str, object] = {}
    for name in request.query:
        values = request.query.getall(name)
        if isinstance(schema.load_fields.get(name), fields.List):
            given[name] = values
        elif len(values) > 1:
            raise InvalidParameter(f"query: {name}: Must be given once.")
        else:
            given[name] = values[0]
    return given


def _headers(request: web.Request, schema: Schema) -> Mapping[str, str]:
    names = [field.data_key or name for name, field in schema.load_fields.items()]
    # RFC 9110 section 5.3: several fields of one name are one list, separated by commas.
    return {name: ", ".join(request.headers.getall(name)) for name in names if name in request.headers}


def _describe_mistakes(schema: Schema, error: ValidationError, where: str) -> str:
    mistakes = list(_mistakes(error.messages, ""))
    texts = [
        f"{where}: {field + ': ' if field else ''}{message}" for field, message in mistakes[:MAX_REPORTED]
    ]
    if any(message == schema.error_messages["unknown"] for _, message in mistakes):
        names = sorted(field.data_key or name for name, field in schema.load_fields.items())
        texts.append(f"known are {', '.join(names)}" if names else "nothing is allowed here")
    if len(mistakes) > MAX_REPORTED:
        texts.append(f"and {len(mistakes) - MAX_REPORTED} more")
    return "; ".join(texts)


def _mistakes(messages: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the fields and messages of marshmallow's tree of errors, by name."""
    if isinstance(messages, dict):
        for name in sorted(messages, key=str):
            step = "" if name == "_schema" else f".{name}" if path else str(name)
            yield from _mistakes(messages[name], path + step)
    else:
        for message in messages if isinstance(messages, list) else [messages]:
            yield path, str(message)
