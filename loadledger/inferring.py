"""Inferences: also of a model that may have to be loaded for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadledger.asking import Setting, asked, encoded, get
from loadledger.exchange import Request
from loadledger.problems import ServerError
from loadledger.tensors import Inputs, is_complete, tensors

Json = dict[str, Any]

NOT_LOADED = frozenset({"model_not_loaded", "model_unloading"})
REFUSED = "invalid_input"
"""The server's code for inputs that are not the model's; nothing was run then."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked.

    Attributes:
        path: of the model.
        inputs: as they were given.
        options: what else the request says.
        timeout_s: other than the client's.
    """

    path: str
    inputs: Inputs
    options: Mapping[str, Any]
    timeout_s: float | None


async def inferred(setting: Setting, question: Question) -> Json:
    """Return a model's answer.

    Of a model that is not loaded nobody can say what it takes, and on demand nothing but a question loads it.
    So that goes out with datatypes that the values look like. This cannot change an answer, since others than
    the model's are refused; and by then the server can say which they are.

    Raises:
        ServerError: with the server's code.
        ValueError: an input is none of the model's, or its lists are of different lengths.
    """
    if is_complete(question.inputs):
        return await _sent(setting, question, None)
    try:
        return await _told(setting, question)
    except ServerError as problem:
        if problem.code not in NOT_LOADED:
            raise
    try:
        return await _sent(setting, question, None)
    except ServerError as problem:
        if problem.code != REFUSED:
            raise
        refused = problem
    try:
        return await _told(setting, question)
    except ServerError as problem:
        raise (refused if problem.code in NOT_LOADED else problem) from None


async def _told(setting: Setting, question: Question) -> Json:
    """Ask with the datatypes that the server says are the model's."""
    return await _sent(setting, question, await asked(setting, get(question.path), Json))


async def _sent(setting: Setting, question: Question, metadata: Json | None) -> Json:
    wanted = {name: value for name, value in question.options.items() if value is not None}
    body = encoded({"inputs": tensors(question.inputs, metadata), **wanted})
    headers = {"Content-Type": "application/json"}
    path, timeout_s = f"{question.path}/infer", question.timeout_s
    request = Request("POST", path, headers, body, repeatable=False, timeout_s=timeout_s)
    return await asked(setting, request, Json)
