"""Answers of the API: what a test does not name is null where it may be, else empty."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from answers.answer import AnswerBody

A = TypeVar("A", bound=AnswerBody)

_EMPTY: dict[type[inspect.Type], Any] = {
    inspect.StrType: "",
    inspect.IntType: 0,
    inspect.FloatType: 0.0,
    inspect.BoolType: False,
    inspect.ListType: [],
    inspect.DictType: {},
}


def fill(kind: type[A], /, **members: Any) -> A:
    """Return an answer with these members."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return kind(**{**_empty_members(described), **members})


def fill_json(kind: type[AnswerBody], /, **members: Any) -> dict[str, Any]:
    """Return an answer as JSON has it, with these members, which need not be ones of an answer."""
    return {**msgspec.to_builtins(fill(kind)), **members}


def _empty_members(described: inspect.StructType) -> dict[str, Any]:
    return {field.name: _empty(field.type) for field in described.fields if field.required}


def _empty(described: inspect.Type) -> Any:
    if isinstance(described, inspect.Metadata):
        return _empty(described.type)
    if isinstance(described, inspect.UnionType):
        assert described.includes_none
        return None
    if isinstance(described, inspect.StructType):
        return described.cls(**_empty_members(described))
    return _EMPTY[type(described)]
