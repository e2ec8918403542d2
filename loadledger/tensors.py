"""Conversion of values to tensors and of tensors to numpy arrays, by the Open Inference Protocol.

Bytes are little-endian and row-major (Triton's binary tensor data extension). This module imports numpy, so
it is imported on use.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadledger.requests import Buffer

Array = NDArray[Any]

FORMS: Mapping[str, np.dtype[Any]] = {
    datatype: np.dtype(form)
    for datatype, form in {
        "BOOL": "?",
        "INT8": "i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "UINT8": "u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }.items()
}
"""The binary form of each datatype; BF16, which numpy lacks, is FP32 in arrays."""
_DATATYPES = {form.str: datatype for datatype, form in FORMS.items()}
_NUMBERS, _TEXTS = "biuf", "OSU"
_LENGTH = struct.Struct("<I")
_BFLOAT16 = "bfloat16"
"""Name of the dtype of the package ml_dtypes, whose arrays are accepted, too."""
_BFLOAT16_NAN = 0x7FC0
UNDECODABLE = "surrogateescape"
"""Keeps bytes of a text that are no UTF-8 in `str`, as in Python's file names."""


def guess_datatype(array: Array) -> str | None:
    """Return the datatype of an array, or None for a dtype outside of the protocol."""
    if array.dtype.kind in _TEXTS:
        return "BYTES"
    if _is_bfloat16(array):
        return "BF16"
    return _DATATYPES.get(array.dtype.newbyteorder("<").str)


def to_array(name: str, value: Any) -> Array:
    """Return a value as an array: an array as it is, nested lists with the dtype of their elements.

    Raises:
        ValueError: the lists are ragged.
    """
    try:
        array = np.asarray(value)
    except UnicodeDecodeError:  # str and bytes together
        return np.asarray(value, dtype=object)
    except (ValueError, OverflowError) as error:
        reason = "lists beside each other must have the same length"
        text = reason if "inhomogeneous" in str(error) else str(error)
        raise ValueError(f"input {name!r}: {text}") from None
    if array.dtype.kind in "SU" and not hasattr(value, "dtype"):  # numpy made texts of numbers beside texts
        return np.asarray(value, dtype=object)
    return array


def convert(name: str, array: Array, datatype: str) -> Array:
    """Return an array with the values of another in the binary form of a datatype; BF16 as FP32.

    Numbers keep their value, except that floating-point numbers are rounded to the nearest.

    Raises:
        ValueError: a value does not fit the datatype, or the protocol has no such datatype.
    """
    if datatype == "BYTES":
        return _texts(name, array)
    if _is_bfloat16(array):
        array = array.astype(np.float32)
    form = FORMS.get("FP32" if datatype == "BF16" else datatype)
    if form is None:
        raise ValueError(f"input {name!r}: there is no datatype {datatype!r}")
    if array.dtype == form and datatype != "BF16":
        return array
    if array.dtype.kind not in _NUMBERS and array.size:
        raise _misfit(name, array.flat[0], datatype)
    with np.errstate(all="ignore"):
        cast = array.astype(form)
        lost = _lost(array, _round_bfloat16(cast) if datatype == "BF16" else cast)
    if lost.any():
        raise _misfit(name, array[lost].flat[0], datatype)
    return cast


def pack(array: Array, datatype: str) -> Buffer:
    """Return the bytes of an array from `convert`, without copying a contiguous one."""
    if datatype == "BYTES":
        return b"".join(part for text in array.flat for part in (_LENGTH.pack(len(text)), text))
    if datatype == "BF16":
        array = _bfloat16_bits(array)
    flat = np.asarray(array, order="C").reshape(-1)
    return flat.view(np.uint8).data


def unpack(datatype: str, data: Buffer, shape: Sequence[int]) -> Array:
    """Return a binary tensor as an array: a view of the bytes, except for BYTES and BF16.

    Raises:
        ValueError: the bytes do not fit the datatype and shape.
    """
    count = _count(shape)
    if datatype == "BYTES":
        texts = list(_decoded(memoryview(data)))
        if len(texts) != count:
            raise ValueError(f"{len(texts)} elements are not of its shape")
        return _object_array(texts).reshape(shape)
    form = np.dtype("<u2") if datatype == "BF16" else FORMS.get(datatype)
    if form is None:
        raise ValueError(f"there is no datatype {datatype[:64]!r}")
    if len(data) != count * form.itemsize:
        raise ValueError(f"{len(data)} bytes are not of its shape")
    array = np.frombuffer(data, form) if count else np.empty(0, form)
    if datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return (array if array.flags.aligned else array.copy()).reshape(shape)


def from_json(datatype: str, data: Any, shape: Sequence[int]) -> Array:
    """Return a tensor of JSON as an array; texts as str.

    Raises:
        ValueError: the elements do not fit the datatype and shape.
    """
    _count(shape)
    array = to_array("data", data)
    if datatype != "BYTES":
        return convert("data", array, datatype).reshape(shape)
    texts = array.reshape(-1).tolist()
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("elements of BYTES have to be strings")
    return _object_array(texts).reshape(shape)


def _is_bfloat16(array: Array) -> bool:
    return array.dtype.kind == "V" and array.dtype.name == _BFLOAT16


def _count(shape: Sequence[int]) -> int:
    if any(length < 0 for length in shape):
        raise ValueError("a length is negative")
    return math.prod(shape)


def _misfit(name: str, value: Any, datatype: str) -> ValueError:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, list):
        return ValueError(f"input {name!r}: lists beside each other must have the same length")
    return ValueError(f"input {name!r}: {str(plain)[:64]!s} does not fit {datatype}")


def _lost(array: Array, cast: Array) -> Array:
    """Return for each element whether the cast has lost its value, except by rounding a float."""
    given = array.astype(np.uint8) if array.dtype.kind == "b" else array
    kinds = given.dtype.kind, cast.dtype.kind
    if kinds == ("f", "f"):
        lost = np.isfinite(given) & ~np.isfinite(cast)
    elif kinds[1] == "b":
        lost = (given != 0) & (given != 1)
    elif kinds[0] == "f":
        wide, info = given.astype(np.float64), np.iinfo(cast.dtype)
        lost = ~((wide >= info.min) & (wide < _beyond(cast)) & (np.trunc(wide) == wide))
    elif kinds[1] == "f":
        wide = cast.astype(np.float64)
        lost = (wide >= _beyond(given)) | (wide.astype(given.dtype) != given)
    else:
        info = np.iinfo(cast.dtype)
        lost = (given < info.min) | (given > info.max)
    return np.asarray(lost)


def _beyond(integers: Array) -> float:
    """Return the least number above all integers of a dtype: a power of two, exact as a float."""
    return float(np.iinfo(integers.dtype).max + 1)


def _round_bfloat16(array: Array) -> Array:
    return (_bfloat16_bits(array).astype(np.uint32) << 16).view(np.float32)


def _bfloat16_bits(array: Array) -> Array:
    """Round FP32 to the upper half of its bits, half to even; NaN stays NaN."""
    bits = np.asarray(array, np.float32, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.asarray(np.where(np.isnan(array), _BFLOAT16_NAN, rounded), "<u2")


def _texts(name: str, array: Array) -> Array:
    if array.dtype.kind not in _TEXTS and array.size:
        raise _misfit(name, array.flat[0], "BYTES")
    texts = list[bytes]()
    for text in array.reshape(-1).tolist():
        if isinstance(text, str):
            try:
                texts.append(text.encode(errors=UNDECODABLE))
            except UnicodeEncodeError:
                raise _misfit(name, ascii(text), "BYTES") from None
        elif isinstance(text, bytes):
            texts.append(text)
        else:
            raise _misfit(name, text, "BYTES")
    return _object_array(texts).reshape(array.shape)


def _object_array(values: Sequence[Any]) -> Array:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _decoded(data: memoryview) -> Iterator[str]:
    start = 0
    while start < len(data):
        end = start + _LENGTH.size
        if end > len(data):
            raise ValueError("the last element of BYTES is cut off")
        (size,) = _LENGTH.unpack_from(data, start)
        if end + size > len(data):
            raise ValueError("the last element of BYTES is cut off")
        yield bytes(data[end : end + size]).decode(errors=UNDECODABLE)
        start = end + size
