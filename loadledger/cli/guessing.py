"""Asks a model that may not be loaded, whose datatypes the server then cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadledger.tensors import Inputs, flat, is_complete, shape_of

NOT_LOADED = frozenset({"model_not_loaded", "model_unloading"})
REFUSED = "invalid_input"
"""The server's code for inputs that are not the model's; nothing was run then."""


def ask(client: Any, model: str, inputs: Inputs, **options: Any) -> Any:
    """Return a model's answer, also of one that is loaded on demand.

    Only a question has it loaded, so the first one goes out with guessed datatypes. A guess cannot change an
    answer: the server refuses datatypes that are not the model's, and can say by then what they are.

    Raises:
        ClientProblem: as of `Client.infer`.
    """
    from loadledger import ServerError  # noqa: PLC0415 - keeps `loadledger --help` quick

    try:
        return client.infer(model, inputs, **options)
    except ServerError as problem:
        if problem.code not in NOT_LOADED or is_complete(inputs) or not isinstance(inputs, Mapping):
            raise
    try:
        return client.infer(model, guessed(inputs), **options)
    except ServerError as problem:
        if problem.code != REFUSED:
            raise
        refused = problem
    try:
        return client.infer(model, inputs, **options)
    except ServerError as problem:
        raise (refused if problem.code in NOT_LOADED else problem) from None


def guessed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs as tensors, with the datatypes that their values look like.

    Raises:
        ValueError: lists are of different lengths.
    """
    return {
        name: value if isinstance(value, Mapping) else _tensor(name, value) for name, value in inputs.items()
    }


def _tensor(name: str, value: Any) -> dict[str, Any]:
    shape, data = shape_of(name, value), flat(value)
    return {"shape": shape, "datatype": _datatype(data), "data": data}


def _datatype(data: list[Any]) -> str:
    kinds = {type(each) for each in data}
    if kinds == {bool}:
        return "BOOL"
    if kinds == {int}:
        return "INT64"
    return "BYTES" if kinds == {str} else "FP32"
