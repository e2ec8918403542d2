"""Commands for a model's first request: a line of `loadledger infer` and one of `curl`, of zeros.

Both are made from the inputs of a model's record; a length that the model leaves open is 1.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from math import prod
from typing import Any

DATATYPES: dict[str, tuple[Any, int]] = {
    "BOOL": (False, 1),
    "BYTES": ("", 4),
    **{name: (0.0, size) for name, size in (("FP16", 2), ("BF16", 2), ("FP32", 4), ("FP64", 8))},
    **{f"{sign}INT{bits}": (0, bits // 8) for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
"""By datatype: a zero, and its bytes in binary; of an empty text, these are its length."""

PICTURE_SIZES, CHANNELS, PICTURE_TYPES = 4, (1, 3), ("UINT8", "FP16", "FP32")
"""Of an input for pictures: a batch, a height, a width, and one channel or three, before or after these."""

MAX_ZEROS = 32
"""Zeros that a command line has: more are no example to type."""


def format_infer(model: Any) -> str | None:
    """Return the `loadledger infer` for a model; None if it cannot give an input.

    An input of many elements comes from a file: a picture if it has the shape of one, else an array.
    """
    if not _is_typed(model.id):
        return None
    words = ["loadledger", "infer", model.id]
    for tensor in _required(model):
        if tensor.datatype not in DATATYPES or "=" in tensor.name or not _is_typed(tensor.name):
            return None
        shape = _shape(tensor)
        given = (
            _file(tensor, shape) if prod(shape) > MAX_ZEROS else json.dumps(_zeros(tensor.datatype, shape))
        )
        words.append(f"{tensor.name}={given}")
    return shlex.join(words)


def format_curl(url: str, model: Any, token: str) -> str | None:
    """Return the `curl` for a model; None if it has an input without a datatype of the protocol.

    Args:
        url: of the server.
        model: its record.
        token: a word of the shell that expands to a token.
    """
    tensors = _required(model)
    if any(tensor.datatype not in DATATYPES for tensor in tensors):
        return None
    heads = [{"name": each.name, "datatype": each.datatype, "shape": _shape(each)} for each in tensors]
    target = shlex.quote(f"{url}/v2/models/{model.id}/infer")
    command = f'curl -sS {target} -H "Authorization: Bearer {token}"'
    if sum(prod(head["shape"]) for head in heads) <= MAX_ZEROS:
        whole = [{**head, "data": _zeros(head["datatype"], head["shape"])} for head in heads]
        body = json.dumps({"inputs": whole})
        return f"{command} \\\n  -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    sizes = [prod(head["shape"]) * DATATYPES[head["datatype"]][1] for head in heads]
    binary = [
        {**head, "parameters": {"binary_data_size": size}} for head, size in zip(heads, sizes, strict=True)
    ]
    body = json.dumps({"inputs": binary})
    return (
        f"(printf %s {shlex.quote(body)}; head -c {sum(sizes)} /dev/zero) |\n"
        f"{command} \\\n  -H 'Content-Type: application/octet-stream' "
        f"-H 'Inference-Header-Content-Length: {len(body)}' --data-binary @-"
    )


def _required(model: Any) -> Sequence[Any]:
    return [tensor for tensor in model.inputs or () if not tensor.optional]


def _file(tensor: Any, shape: Sequence[int]) -> str:
    """Return an example of a file for an input."""
    is_picture = (
        len(shape) == PICTURE_SIZES
        and (shape[1] in CHANNELS or shape[3] in CHANNELS)
        and tensor.datatype in PICTURE_TYPES
    )
    return "@image.jpg" if is_picture else f"@{re.sub(r'[^A-Za-z0-9]', '_', tensor.name)}.npy"


def _is_typed(name: str) -> bool:
    """Whether a person can type this, and it is no option."""
    return bool(name) and name.isprintable() and not name.startswith("-")


def _shape(tensor: Any) -> list[int]:
    return [1 if length < 0 else length for length in tensor.shape]


def _zeros(datatype: str, shape: Sequence[int]) -> Any:
    value, _ = DATATYPES[datatype]
    for length in reversed(shape):
        value = [value] * length
    return value
