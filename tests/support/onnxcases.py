"""The conformance cases that the `onnx` package carries, in the protocol's terms."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from ml_dtypes import bfloat16
from onnx import GraphProto, TensorProto, TypeProto, ValueInfoProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner
from tritonclient.utils import serialize_byte_tensor

from support.clients import Value

NAMES: dict[int, str] = {
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32",
    TensorProto.UINT64: "UINT64",
    TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64",
    TensorProto.STRING: "BYTES",
}
"""What the protocol calls ONNX's element types; it has no name for the others."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One set of inputs of a case.

    Attributes:
        inputs: those that have a value.
        expected: the outputs that have a value, as the case has them.
        answered: what bare ONNX Runtime gave.
        repeats: whether it gave the same bytes when it was asked again.
    """

    inputs: tuple[Value, ...]
    expected: dict[str, Any]
    answered: dict[str, Value]
    repeats: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A conformance case.

    Attributes:
        name: as `onnx` calls it.
        model: the file.
        rtol: the relative difference from what is expected that the case allows.
        atol: the absolute one.
        asked: what is asked, if bare ONNX Runtime passes.
        unnamed: the type that the protocol has no name for, if there is one.
        failed: why bare ONNX Runtime does not pass, if it does not.
    """

    name: str
    model: bytes
    rtol: float
    atol: float
    asked: tuple[Asked, ...] = ()
    unnamed: str | None = None
    failed: str | None = None


def node_cases() -> list[TestCase]:
    """Return all of `onnx`'s cases of one operator each, in an order that stays."""
    cases: list[TestCase] = load_model_tests(kind="node")
    return cases


def unnamed_type(graph: GraphProto) -> str | None:
    """Return the first type among inputs and outputs that the protocol has no name for."""
    names = (_unnamed(info.type) for info in (*graph.input, *graph.output))
    return next((name for name in names if name), None)


def _unnamed(kind: TypeProto) -> str | None:
    form = kind.WhichOneof("value")
    if form == "optional_type":
        inner = _unnamed(kind.optional_type.elem_type)
        return inner and f"optional {inner}"
    if form != "tensor_type":
        return str(form).removesuffix("_type")
    element = kind.tensor_type.elem_type
    return None if element in NAMES else str(TensorProto.DataType.Name(element))


def compare(expected: Mapping[str, Any], found: Mapping[str, Value], rtol: float, atol: float) -> None:
    """Assert that outputs are what a case expects, by the rules of `onnx`'s own runner."""
    assert found.keys() == expected.keys(), f"outputs {list(found)}, expected are {list(expected)}"
    arrays = [_comparable(found[name]) for name in expected]
    Runner.assert_similar_outputs([_numpy(item) for item in expected.values()], arrays, rtol, atol)


def _numpy(item: Any) -> Any:
    """Return what a case has as an array: it may be an array, a number, or a message of ONNX's."""
    array = numpy_helper.to_array(item) if isinstance(item, TensorProto) else np.asarray(item)
    return array.astype(object) if array.dtype.kind in "US" else array


def _comparable(value: Value) -> Any:
    return value.array.view(bfloat16) if value.datatype == "BF16" else value.array


def value_of(info: ValueInfoProto, found: Any) -> Value:
    """Give what a case or ONNX Runtime has the binary form of the protocol."""
    kind = info.type.optional_type.elem_type if info.type.HasField("optional_type") else info.type
    datatype = NAMES[kind.tensor_type.elem_type]
    if isinstance(found, ort.OrtValue) and datatype == "BF16":
        data = ctypes.string_at(found.data_ptr(), found.tensor_size_in_bytes())
        return Value(info.name, datatype, tuple(found.shape()), data)
    array = _numpy(found.numpy() if isinstance(found, ort.OrtValue) else found)
    data = (
        serialize_byte_tensor(array.astype(object)).item()
        if datatype == "BYTES" and array.size
        else array.tobytes()
    )
    return Value(info.name, datatype, array.shape, data)
