"""Declared inputs and outputs of a model, compared with the limits of requests and answers.

A model that no request can ask is refused at its load; an answer of fixed shapes that is too long is refused
before it is computed. Names of dimensions prove little: for a model that halves the sides of a picture,
converters give the output's sides the names of the input's, and ONNX Runtime only warns.
"""

import math
from collections.abc import Mapping, Sequence

from runtime.wire import DATATYPES, LENGTH, MAX_DIMENSIONS, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES, TensorSpec

HEAD_BYTES = 64 * 2**10
"""Part of a request's JSON before its tensors."""
OUTPUT_ADVICE = {
    "map(": "convert the model with zipmap=False (of skl2onnx: options={'zipmap': False})",
    "seq(": "end the graph with SequenceAt or ConcatFromSequence, which make a tensor of a sequence",
    "": "end the graph with a Cast to FLOAT",
}
INPUT_ADVICE = {
    "map(": "convert the model without DictVectorizer or CastMap, so that it takes a tensor",
    "seq(": "let the graph take tensors, and make the sequence of them by SequenceConstruct",
    "": "let the graph take FLOAT, and begin it with a Cast",
}


def explain_uselessness(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_request_bytes: int
) -> str | None:
    """Return why every inference of a model would be refused, and what to change, or None.

    Open lengths count as 1, and those of an output as 0.
    """
    required = [spec for spec in inputs if not spec.optional]
    for spec in required:
        if not _is_sendable(spec):
            return f"no request can give {_describe(spec, 'input', INPUT_ADVICE)}"
    sendable = [spec for spec in outputs if _is_sendable(spec)]
    if outputs and not sendable:
        return f"no answer can have {_describe(outputs[0], 'output', OUTPUT_ADVICE)}"
    needed = sum(least_bytes(spec, 1) for spec in required)
    if needed > max_request_bytes:
        return (
            f"its inputs have {needed} bytes, and a request may have {max_request_bytes}: {_enlarge(needed)}"
        )
    sizes = [least_bytes(spec, 0) for spec in sendable]
    if min(sizes, default=0) > MAX_PAYLOAD_BYTES:
        most = f"an answer may have {MAX_PAYLOAD_BYTES}: let it give less, or several outputs to choose from"
        return f"its smallest output has {min(sizes)} bytes, and {most}"
    return None


def _is_sendable(spec: TensorSpec) -> bool:
    return spec.datatype in DATATYPES and len(spec.shape) <= MAX_DIMENSIONS


def _describe(spec: TensorSpec, kind: str, advice: Mapping[str, str]) -> str:
    if spec.datatype in DATATYPES:
        return (
            f"{kind} {spec.name!r} its {len(spec.shape)} dimensions, of at most {MAX_DIMENSIONS}: join some"
        )
    fitting = next(each for mark, each in advice.items() if mark in spec.datatype)
    return f"{kind} {spec.name!r}, which is a {spec.datatype}: {fitting}"


def _enlarge(needed: int) -> str:
    mib = (needed + HEAD_BYTES) // 2**20 + 1
    if mib * 2**20 > MAX_REQUEST_BYTES:
        return "let it take less at once"
    return f"start the server with --max-request-size={mib}MiB"


def least_bytes(spec: TensorSpec, open_length: int) -> int:
    """Return the bytes of a tensor of the protocol, with `open_length` for each open length."""
    lengths = (length if length >= 0 else open_length for length in spec.shape)
    return math.prod(lengths) * (DATATYPES[spec.datatype].size or LENGTH.size)
