"""Commands for a model's first request: lines of `loadledger infer`, and one of `curl`.

The commands use the examples that the server tried when it loaded the model; without an example, open lengths
are 1.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

from answers.tensors import ModelTensor, TensorExample

DATATYPES: dict[str, tuple[Any, int]] = {
    "BOOL": (False, 1),
    "BYTES": ("", 4),
    **{name: (0.0, size) for name, size in (("FP16", 2), ("BF16", 2), ("FP32", 4), ("FP64", 8))},
    **{f"{sign}INT{bits}": (0, bits // 8) for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
"""By datatype, a zero and its bytes in binary; for an empty text, these are its length."""

BINARY_ONLY = ("FP16", "BF16")
"""Datatypes without a form in JSON."""

NAMELESS = '@[{"'
"""Beginning of an argument of `loadledger infer` without the name of its input."""

MAX_DIMENSIONS = 64
"""Dimensions of a tensor that a server accepts."""

PICTURE_SIZES, CHANNELS, PICTURE_TYPES = 4, (1, 3), ("UINT8", "FP16", "FP32")
"""The shape of a picture's input: a batch, height and width, and one channel or three before or after."""

MAX_TYPED = 10
"""Numbers of an input on a command line that a person might type."""

MAX_ZEROS, MAX_ONES = 32, 4096
"""Numbers of an input as JSON in a `curl`; further zeros come from /dev/zero."""


def example_of(tensor: ModelTensor) -> TensorExample:
    """Return an input's example, or else a guess."""
    if tensor.example is not None:
        return tensor.example
    guess = [1 if length < 0 else length for length in tensor.shape]
    return TensorExample(shape=guess, values="zeros", refusal="the server has not tried the model")


def describe_guess(model: Any) -> str | None:
    """Return which sizes are guesses, and why, or None if the model ran on the server's example."""
    guessed = [each for each in _required(model) if example_of(each).refusal]
    opened = [f"{each.name} {each.describe_shape()}" for each in guessed if min(each.shape, default=0) < 0]
    sizes = f" (sizes are guesses: {', '.join(opened)})" if opened else ""
    return f"the answer may be a refusal{sizes}: {example_of(guessed[0]).refusal}" if guessed else None


def format_infer(model: Any, options: Sequence[str] = ()) -> Iterator[str]:
    """Yield lines of `loadledger infer`: one that runs as printed, and one with a file for the largest input.

    Args:
        model: its record, or its metadata with an `id`.
        options: options of the command, which name the server.
    """
    required, command = _required(model), ["loadledger", "infer", *options, model.id]
    if not _is_typed(model.id) or not all(map(_is_sent, required)):
        return
    values = {_name(tensor): _value(tensor) for tensor in required}
    given = [f"{name}={value}" for name, value in values.items()]
    yield shlex.join([*command, *(given or ['{"inputs": []}'])])
    largest = max(required, key=lambda each: prod(example_of(each).shape), default=None)
    if largest is not None and prod(example_of(largest).shape) > MAX_TYPED:
        values[_name(largest)] = _file(largest)
        yield shlex.join([*command, *(f"{name}={value}" for name, value in values.items())])


def format_curl(url: str, model: Any, token: str) -> str | None:
    """Return the `curl` for a model, or None if it would be too long or cannot give an input.

    If an output has no form in JSON, all outputs are requested in binary, and go to a file.

    Args:
        url: the server's URL.
        model: the model's record.
        token: a shell expression that expands to a token.
    """
    tensors, zero_bytes = [], 0
    for tensor in _required(model):
        example, head = example_of(tensor), {"name": tensor.name, "datatype": tensor.datatype}
        count, is_binary = prod(example.shape), tensor.datatype in BINARY_ONLY
        if not _is_sent(tensor) or (example.values == "ones" and count > MAX_ONES):
            return None
        if is_binary or (example.values == "zeros" and count > MAX_ZEROS):
            size = count * DATATYPES[tensor.datatype][1]
            zero_bytes += size
            tensors.append(head | {"shape": example.shape, "parameters": {"binary_data_size": size}})
        else:
            data = _nested(tensor.datatype, example)
            tensors.append(head | {"shape": example.shape, "data": data if example.shape else [data]})
    request: dict[str, Any] = {"inputs": tensors}
    target, file = shlex.quote(f"{url}/v2/models/{model.id}/infer"), ""
    if any(output.datatype in BINARY_ONLY for output in model.outputs or ()):
        request["parameters"], file = {"binary_data_output": True}, " --fail-with-body --output answer.bin"
    body, command = json.dumps(request), f'curl -sS{file} {target} -H "Authorization: Bearer {token}"'
    note = (
        "# answer.bin gets JSON, then the bytes of the outputs; `loadledger infer` prints them\n"
        if file
        else ""
    )
    if not zero_bytes:
        return f"{note}{command} \\\n  -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return (
        f"{note}(printf %s {shlex.quote(body)}; head -c {zero_bytes} /dev/zero) |\n"
        f"{command} \\\n  -H 'Content-Type: application/octet-stream' "
        f"-H 'Inference-Header-Content-Length: {len(body)}' --data-binary @-"
    )


def _required(model: Any) -> Sequence[ModelTensor]:
    return [tensor for tensor in model.inputs or () if not tensor.optional]


def _value(tensor: ModelTensor) -> str:
    """Return a value for a command line: the numbers if few, else the word for made-up values."""
    example = example_of(tensor)
    if 0 < prod(example.shape) <= MAX_TYPED:
        return json.dumps(_nested(tensor.datatype, example))
    fill = "random" if isinstance(DATATYPES[tensor.datatype][0], float) else example.values
    return fill if tensor.shape == example.shape else f"{fill}:{'x'.join(map(str, example.shape))}"


def _file(tensor: ModelTensor) -> str:
    """Return an example of a file for an input; a picture only if Pillow is installed."""
    shape = tensor.shape
    is_picture = (
        len(shape) == PICTURE_SIZES
        and (shape[1] in CHANNELS or shape[3] in CHANNELS)
        and tensor.datatype in PICTURE_TYPES
    )
    return "@image.jpg" if is_picture and find_spec("PIL") is not None else "@FILE.npy"


def _is_sent(tensor: ModelTensor) -> bool:
    """Whether a request can have a value for an input."""
    return tensor.datatype in DATATYPES and len(example_of(tensor).shape) <= MAX_DIMENSIONS


def _name(tensor: ModelTensor) -> str:
    """Return an input's name for NAME=VALUE, as a JSON text if it would be ambiguous."""
    is_plain = _is_typed(tensor.name) and "=" not in tensor.name and tensor.name[0] not in NAMELESS
    return tensor.name if is_plain else json.dumps(tensor.name)


def _is_typed(name: str) -> bool:
    """Whether a person can type a name, and it cannot be taken for an option."""
    return bool(name) and name.isprintable() and not name.startswith("-")


def _nested(datatype: str, example: TensorExample) -> Any:
    if not prod(example.shape):
        return []
    value = DATATYPES[datatype][0]
    if example.values == "ones":
        value = True if value is False else 1
    for length in reversed(example.shape):
        value = [value] * length
    return value
