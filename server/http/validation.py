"""Checks what a request carries against the schemas its handler was decorated with, before the handler runs.

The schemas are those of aiohttp-apispec's decorators (`handler.__schemas__`). Each error is a 400 that names
the field and what is allowed there. What was read is at `json_body(request)` and its like.

Read JSON that means the same to every reader (RFC 8259 sections 4 and 8.1, RFC 7493 section 2).

Refused, beside what is no JSON at all: duplicate keys, nesting deeper than 32, NaN and Infinity, numbers out
of range, unpaired surrogates, invalid UTF-8.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NoReturn

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from marshmallow import EXCLUDE, RAISE, Schema, ValidationError, fields

from server.errors import ServerProblem

MAX_DEPTH = 32
"""No body of ours is deeper than 3."""


class InvalidJson(ValueError):
    """Not JSON that is taken; the text says what is wrong, and where if the parser says so."""


def loads(body: bytes) -> Any:
    """Read one JSON value.

    Raises:
        InvalidJson: it is none, or not a strict one.
    """
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
        _check(value)
    except UnicodeDecodeError as error:
        raise InvalidJson(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise InvalidJson("a string has an unpaired surrogate") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidJson(f"nested deeper than {MAX_DEPTH}") from None
    except InvalidJson:
        raise
    except ValueError:  # more digits than Python turns into a number in reasonable time
        raise InvalidJson("an integer is out of range") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise InvalidJson(f"the key {_shown(key)} appears twice in one object")
        read[key] = value
    return read


def _constant(literal: str) -> NoReturn:
    raise InvalidJson(f"{literal} is not a JSON number")


def _float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise InvalidJson(f"{_shown(literal)} is out of range")
    return number


def _check(value: Any, depth: int = 0) -> None:
    """Refuse nesting that is too deep, and strings that UTF-8 cannot encode."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise InvalidJson(f"nested deeper than {MAX_DEPTH}")
        for member in chain(value, value.values()) if isinstance(value, dict) else value:
            _check(member, depth + 1)


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 64 else f"{text[:63]}…", ensure_ascii=False)  # noqa: PLR2004


MAX_JSON_BYTES = 1024 * 1024
"""Management bodies are some hundred bytes; this is room for any of them and cheap to parse."""

BODY_IDLE_S = 30.0
"""Also ends what nobody else does: after a malformed chunk the framework lets a reader wait for ever."""

MIN_PROGRESS_BYTES = 256 * 2**10
"""In BODY_IDLE_S, of what is longer: 70 kbit/s. Who sends one byte at a time would hold memory for days."""

READ_BYTES = 2**20
"""Of a body that is being read, so much may wait to be; more means fewer turns for long ones."""

MAX_REPORTED = 10  # mistakes told at once; the rest is counted

_JSON: web.RequestKey[Any] = web.RequestKey("json", object)
_PATH: web.RequestKey[Any] = web.RequestKey("match_info", object)
_QUERY: web.RequestKey[Any] = web.RequestKey("querystring", object)
_HEADERS: web.RequestKey[Any] = web.RequestKey("headers", object)

_INT64 = range(-(2**63), 2**63)
_NOT_INTEGER = "Must be an integer of 64 bits."
_NOT_BOOLEAN = "Must be true or false."


class InvalidBody(ServerProblem):
    """The body is not what this route takes."""

    code = "invalid_body"


class InvalidParameter(ServerProblem):
    """A parameter is not what this route takes."""

    code = "invalid_parameter"


class UnsupportedMediaType(ServerProblem):
    """A body must be declared as Content-Type: application/json, in UTF-8."""

    code = "unsupported_media_type"


class BodyTooLarge(ServerProblem):
    """The body is larger than this route takes."""

    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the body must not be larger than {max_bytes} bytes")


class BodyTimeout(ServerProblem):
    """The rest of the body did not come in time."""

    code = "body_timeout"


class StrictInteger(fields.Integer):
    """A JSON integer of 64 bits: not 1.5, not "3", not true."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
            raise ValidationError(_NOT_INTEGER)
        return super()._deserialize(value, attr, data, **kwargs)


class StrictBoolean(fields.Boolean):
    """JSON's true or false and nothing that resembles them."""

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
    """A place where nothing is taken: a query string without parameters, for one."""


def json_body(request: web.Request) -> Any:
    """Return the body as its schema loaded it; an empty body is an empty object."""
    return request[_JSON]


def path_parameters(request: web.Request) -> Any:
    """Return the variable parts of the path as their schema loaded them."""
    return request[_PATH]


def query_parameters(request: web.Request) -> Any:
    """Return the query parameters as their schema loaded them."""
    return request[_QUERY]


def header_fields(request: web.Request) -> Any:
    """Return the header fields as their schema loaded them."""
    return request[_HEADERS]


def load_with(schema: Schema, value: Any, where: str, refusal: type[Exception]) -> Any:
    """Return what a schema makes of a value.

    Args:
        schema: what is taken; unknown header fields are ignored, everywhere else they are refused.
        value: an object of JSON or TOML, parameters, or header fields.
        where: what the value is, for the message.
        refusal: raised for what the schema does not take.
    """
    if not isinstance(value, dict):
        raise refusal(f"{where}: Must be a JSON object.")
    try:
        return schema.load(value, unknown=EXCLUDE if where == "headers" else RAISE)
    except ValidationError as error:
        raise refusal(_told(schema, error, where)) from None


async def read_body(request: web.Request, max_bytes: int, idle_s: float = BODY_IDLE_S) -> bytes:
    """Read a whole body that is not compressed.

    Raises:
        UnsupportedMediaType: it is (`unsupported_media_type`).
        BodyTooLarge: `body_too_large`.
        BodyTimeout: `body_timeout`.
    """
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: leave Content-Encoding out")
    return await read_encoded_body(request, max_bytes, idle_s=idle_s)


async def read_encoded_body(
    request: web.BaseRequest,
    max_bytes: int,
    take: Callable[[int], None] | None = None,
    idle_s: float = BODY_IDLE_S,
) -> bytes:
    """Read a whole body as it is, within a limit of its own: the application's is the largest of any route.

    Args:
        request: whose body nobody has read yet.
        max_bytes: what it may have.
        take: told how many bytes have come, as they come; may refuse them.
        idle_s: how long the next part, or the end, may take.

    Raises:
        BodyTooLarge: by its declared length or by what came (`body_too_large`).
        BodyTimeout: in `idle_s` seconds came less than MIN_PROGRESS_BYTES, and not the end (`body_timeout`).
    """
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(max_bytes)
    content = request.content
    if content.is_eof():  # most bodies came with their head: nothing to wait for
        body = content.read_nowait()
        if take is not None:
            take(len(body))
        return body
    content.set_read_chunk_size(READ_BYTES)
    pieces, length = list[bytes](), 0
    loop = asyncio.get_running_loop()
    until, enough = loop.time() + idle_s, MIN_PROGRESS_BYTES
    try:
        while not content.at_eof():
            async with asyncio.timeout_at(until):
                piece, _ = await content.readchunk()  # the other ways to read join pieces, to be joined again
            length += len(piece)
            if length >= enough:
                until, enough = loop.time() + idle_s, length + MIN_PROGRESS_BYTES
            if length > max_bytes:
                raise BodyTooLarge(max_bytes)
            if take is not None:
                take(len(piece))
            pieces.append(piece)
    except TimeoutError:
        raise BodyTimeout from None
    return b"".join(pieces)


@web.middleware
async def validation_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check path, query, header and body of a request whose handler has schemas; must be inside of auth."""
    for declared in getattr(request.match_info.handler, "__schemas__", ()):
        schema: Schema = declared["schema"]
        match declared["location"]:
            case "json":
                request[_JSON] = load_with(schema, await _body(request), "body", InvalidBody)
            case "match_info" | "path":
                request[_PATH] = load_with(schema, dict(request.match_info), "path", InvalidParameter)
            case "querystring" | "query":
                request[_QUERY] = load_with(schema, _query(request, schema), "query", InvalidParameter)
            case "headers":
                request[_HEADERS] = load_with(schema, _headers(request, schema), "headers", InvalidParameter)
            case location:
                raise NotImplementedError(f"no route of ours takes {location}")
    return await handler(request)


async def _body(request: web.Request) -> Any:
    body = await read_body(request, MAX_JSON_BYTES)
    if not body:
        return {}
    media_type, charset = request.content_type, request.charset or "utf-8"
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType
    if charset.lower() != "utf-8":
        raise UnsupportedMediaType
    try:
        return loads(body)
    except InvalidJson as error:
        raise InvalidBody(str(error)) from None


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
    # RFC 9110 section 5.3: several fields of one name mean their values in one, separated by commas.
    return {name: ", ".join(request.headers.getall(name)) for name in names if name in request.headers}


def _told(schema: Schema, error: ValidationError, where: str) -> str:
    mistakes = list(_mistakes(error.messages, ""))
    told = [
        f"{where}: {field + ': ' if field else ''}{message}" for field, message in mistakes[:MAX_REPORTED]
    ]
    if any(message == schema.error_messages["unknown"] for _, message in mistakes):
        names = sorted(field.data_key or name for name, field in schema.load_fields.items())
        told.append(f"known are {', '.join(names)}" if names else "nothing is taken here")
    if len(mistakes) > MAX_REPORTED:
        told.append(f"and {len(mistakes) - MAX_REPORTED} more")
    return "; ".join(told)


def _mistakes(messages: Any, path: str) -> Iterator[tuple[str, str]]:
    """Flatten marshmallow's tree of messages to (field, message), in the order of their names."""
    if isinstance(messages, dict):
        for name in sorted(messages, key=str):
            step = "" if name == "_schema" else f".{name}" if path else str(name)
            yield from _mistakes(messages[name], path + step)
    else:
        for message in messages if isinstance(messages, list) else [messages]:
            yield path, str(message)
