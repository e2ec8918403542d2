"""Inferences: also of a model that may have to be loaded for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadledger.asking import Setting, asked, encoded, get
from loadledger.exchange import Request
from loadledger.problems import ServerError
from loadledger.tensors import Inputs, is_complete, tensors

Json = dict[str, Any]

NOT_LOADED = frozenset({"model_not_loaded", "model_unloading"})
REFUSED = "invalid_input"
"""The server's code for inputs that are not the model's; nothing was run then."""


async def inferred(
    setting: Setting, path: str, inputs: Inputs, options: Mapping[str, Any], timeout_s: float | None
) -> Json:
    """Return the answer of the model at a path.

    Of a model that is not loaded nobody can say what it takes, and on demand nothing but a question loads it.
    So that goes out with datatypes that the values look like. This cannot change an answer, since others than
    the model's are refused; and by then the server can say which they are.

    Raises:
        ServerError: with the server's code.
        ValueError: an input is none of the model's, or its lists are of different lengths.
    """
    wanted = {name: value for name, value in options.items() if value is not None}

    async def ask(metadata: Json | None) -> Json:
        body = encoded({"inputs": tensors(inputs, metadata), **wanted})
        headers = {"Content-Type": "application/json"}
        request = Request("POST", f"{path}/infer", headers, body, repeatable=False, timeout_s=timeout_s)
        return await asked(setting, request, Json)

    async def ask_as_told() -> Json:
        """Ask with the datatypes that the server says are the model's."""
        return await ask(await asked(setting, get(path), Json))

    if is_complete(inputs):
        return await ask(None)
    try:
        return await ask_as_told()
    except ServerError as problem:
        if problem.code not in NOT_LOADED:
            raise
    try:
        return await ask(None)
    except ServerError as problem:
        if problem.code != REFUSED:
            raise
        refused = problem
    try:
        return await ask_as_told()
    except ServerError as problem:
        raise (refused if problem.code in NOT_LOADED else problem) from None
