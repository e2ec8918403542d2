# The decorators of aiohttp-apispec 3.0.0b2 that are used here; it ships no types of its own.

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from marshmallow import Schema

_Handler = TypeVar("_Handler", bound=Callable[..., object])
_AnySchema: TypeAlias = Schema | type[Schema]

def docs(**kwargs: Any) -> Callable[[_Handler], _Handler]: ...
def request_schema(
    schema: _AnySchema,
    location: str = ...,
    put_into: str | None = ...,
    example: Mapping[str, Any] | None = ...,
    add_to_refs: bool = ...,
    *,
    required: bool = ...,
) -> Callable[[_Handler], _Handler]: ...
def json_schema(
    schema: _AnySchema,
    *,
    example: Mapping[str, Any] | None = ...,
    required: bool = ...,
) -> Callable[[_Handler], _Handler]: ...
def match_info_schema(schema: _AnySchema) -> Callable[[_Handler], _Handler]: ...
def querystring_schema(schema: _AnySchema) -> Callable[[_Handler], _Handler]: ...
def headers_schema(schema: _AnySchema) -> Callable[[_Handler], _Handler]: ...
def response_schema(
    schema: _AnySchema, code: int = ..., required: bool = ..., description: str | None = ...
) -> Callable[[_Handler], _Handler]: ...
