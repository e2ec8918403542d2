"""Tensors of the Open Inference Protocol: nested lists or arrays to tensors, elements to bytes and back.

Bytes are little-endian and row-major (Triton's binary tensor data extension).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""By name: a nested list, an array (anything with `tolist`) or a tensor; or a list of named tensors.

The `data` of a tensor is a nested list, or its elements in binary as bytes.
"""


@dataclass(frozen=True, slots=True)
class Form:
    """The binary form of a datatype: its code in `struct`, the types of its elements, and its numpy name."""

    code: str
    kinds: frozenset[type]
    numpy: str = ""


_REAL = frozenset({int, float})
_INTEGER = frozenset({int})
FORMS = {
    "BOOL": Form("?", frozenset({bool}), "|b1"),
    "INT8": Form("b", _INTEGER, "|i1"),
    "INT16": Form("h", _INTEGER, "<i2"),
    "INT32": Form("i", _INTEGER, "<i4"),
    "INT64": Form("q", _INTEGER, "<i8"),
    "UINT8": Form("B", _INTEGER, "|u1"),
    "UINT16": Form("H", _INTEGER, "<u2"),
    "UINT32": Form("I", _INTEGER, "<u4"),
    "UINT64": Form("Q", _INTEGER, "<u8"),
    "FP16": Form("e", _REAL, "<f2"),
    "FP32": Form("f", _REAL, "<f4"),
    "FP64": Form("d", _REAL, "<f8"),
}
_TEXTS = frozenset({str, bytes})
_LENGTH = struct.Struct("<I")


def are_tensors(inputs: Inputs) -> bool:
    """Whether all inputs are tensors, so that the model's metadata is not needed."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return all(isinstance(value, Mapping) for value in values)


def to_tensors(inputs: Inputs, metadata: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the inputs as tensors.

    Args:
        inputs: of the caller.
        metadata: of the model; without it, datatypes are guessed from the values.

    Raises:
        ValueError: the model has no such input, or its lists are ragged.
    """
    if not isinstance(inputs, Mapping):
        return [dict(tensor) for tensor in inputs]
    known = None if metadata is None else _datatypes(metadata)
    return [_tensor(name, value, known) for name, value in inputs.items()]


def flatten(name: str, value: Any) -> tuple[list[int], list[Any]]:
    """Return the shape of nested lists and their values, in row-major order; a single value has the shape [].

    Raises:
        ValueError: they are ragged.
    """
    shape: list[int] = []
    level = [value]
    while any(isinstance(item, list | tuple) for item in level):
        lengths = {len(item) if isinstance(item, list | tuple) else -1 for item in level}
        if len(lengths) > 1:
            raise ValueError(f"input {name!r}: lists beside each other must have the same length")
        shape += lengths
        level = [part for item in level for part in item]
    return shape, level


def _tensor(name: str, value: Any, known: Mapping[str, str] | None) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {"name": name, **value}
    if known is not None and name not in known:
        raise ValueError(f"the model has no input {name!r}; it has {', '.join(known) or 'none'}")
    binary = None if known is None else _numpy_bytes(known[name], value)
    if known is not None and binary is not None:
        return {"name": name, "shape": list(value.shape), "datatype": known[name], "data": binary}
    plain = value.tolist() if hasattr(value, "tolist") else value
    shape, data = flatten(name, plain)
    if hasattr(value, "shape"):  # an empty array's lists do not give its shape
        shape = [int(length) for length in value.shape]
    datatype = _looks_like(data) if known is None else known[name]
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def _looks_like(data: list[Any]) -> str:
    kinds = {type(each) for each in data}
    if kinds == {bool}:
        return "BOOL"
    if kinds == {int}:
        return "INT64"
    return "BYTES" if kinds == {str} else "FP32"


def _datatypes(metadata: Mapping[str, Any]) -> dict[str, str]:
    tensors_of = metadata.get("inputs")
    named = tensors_of if isinstance(tensors_of, list) else []
    return {
        str(tensor["name"]): str(tensor["datatype"])
        for tensor in named
        if isinstance(tensor, dict) and {"name", "datatype"} <= tensor.keys()
    }


def pack(datatype: str, values: Sequence[Any]) -> bytes | None:
    """Return elements in binary; None if they do not fit the datatype, or it is unknown."""
    kinds, form = set(map(type, values)), FORMS.get("FP32" if datatype == "BF16" else datatype)
    try:
        if datatype == "BYTES" and kinds <= _TEXTS:
            texts = [each.encode() if isinstance(each, str) else each for each in values]
            return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
        if form is None or not kinds <= form.kinds:
            return None
        packed = struct.pack(f"<{len(values)}{form.code}", *values)
    except (struct.error, OverflowError, UnicodeEncodeError):
        return None
    return _to_bfloat16(packed) if datatype == "BF16" else packed


def unpack(datatype: str, data: bytes) -> list[Any]:
    """Return the elements of a binary tensor.

    Raises:
        ValueError: the bytes are none of this datatype.
    """
    if datatype == "BYTES":
        return list(_texts(data))
    if datatype == "BF16":
        data, datatype = _from_bfloat16(data), "FP32"
    try:
        code = FORMS[datatype].code
        return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + code)}{code}", data))
    except (KeyError, struct.error):
        raise ValueError(f"{len(data)} bytes are no {datatype}") from None


def _texts(data: bytes) -> Iterator[str]:
    start = 0
    while start < len(data):
        try:
            (size,) = _LENGTH.unpack_from(data, start)
        except struct.error:
            raise ValueError("the last element of BYTES is cut off") from None
        start += _LENGTH.size
        if start + size > len(data):
            raise ValueError("the last element of BYTES is cut off")
        yield data[start : start + size].decode(errors="replace")
        start += size


def _to_bfloat16(data: bytes) -> bytes:
    """Round FP32 to BF16, half to even; NaN stays NaN."""
    count = len(data) // 4
    numbers, bits = struct.unpack(f"<{count}f", data), struct.unpack(f"<{count}I", data)
    rounded = [
        0x7FC0 if math.isnan(number) else (each + 0x7FFF + (each >> 16 & 1)) >> 16
        for number, each in zip(numbers, bits, strict=True)
    ]
    return struct.pack(f"<{count}H", *rounded)


def _from_bfloat16(data: bytes) -> bytes:
    if len(data) % 2:
        raise ValueError(f"{len(data)} bytes are no BF16")
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    return struct.pack(f"<{len(halves)}I", *(each << 16 for each in halves))


def _numpy_bytes(datatype: str, value: Any) -> bytes | None:
    """Return the bytes of a numpy array that has this datatype already; else None."""
    form = FORMS.get(datatype)
    kind = getattr(getattr(value, "dtype", None), "str", None)
    if form is None or kind != form.numpy:
        return None
    return bytes(value.tobytes())
