"""The conformance cases of the `onnx` package, and what bare ONNX Runtime answers to them.

A process of its own runs them, since a case may kill it; its findings come back in a file.
"""

import ctypes
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort
from ml_dtypes import bfloat16
from onnx import GraphProto, TensorProto, TypeProto, ValueInfoProto, numpy_helper
from onnx.backend.test.case import node
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner
from support.clients import Value
from tritonclient.utils import serialize_byte_tensor

NAMES: dict[int, str] = {
    TensorProto.BOOL: "BOOL", TensorProto.UINT8: "UINT8", TensorProto.UINT16: "UINT16",
    TensorProto.UINT32: "UINT32", TensorProto.UINT64: "UINT64", TensorProto.INT8: "INT8",
    TensorProto.INT16: "INT16", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64",
    TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT: "FP32",
    TensorProto.DOUBLE: "FP64", TensorProto.STRING: "BYTES",
}  # fmt: skip
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


SAMPLE = {
    "abs": "abs", "affinegrid": "affine_grid_3d_align_corners_expanded",
    "ai_onnx_ml.label_encoder": "ai_onnx_ml_label_encoder_string_int_no_default",
    "castlike": "castlike_FLOAT_to_BFLOAT16 castlike_DOUBLE_to_FLOAT16 castlike_FLOAT8E4M3FN_to_FLOAT16",
    "concat": "concat_1d_axis_0", "elu": "elu_example", "flatten": "flatten_axis2",
    "flexattention": "flexattention_soft_cap_expanded_ver26", "gelu": "gelu_tanh_1_expanded",
    "globalaveragepool": "globalaveragepool_precomputed", "gridsample": "gridsample_zeros_padding",
    "hardswish": "hardswish_expanded", "isinf": "isinf_positive", "leakyrelu": "leakyrelu_expanded",
    "lrn": "lrn_default", "matmulinteger": "matmulinteger", "max": "max_int8 max_uint32 max_uint64",
    "negativeloglikelihoodloss": "nllloss_NCd1d2_with_weight_expanded", "pad": "edge_pad",
    "prelu": "prelu_broadcast_expanded", "reducel2": "reduce_l2_default_axes_keepdims_example_expanded",
    "reducemax": "reduce_max_keepdims_random", "regex_full_match": "regex_full_match_basic",
    "resize": "resize_upsample_sizes_nearest", "rnn": "simple_rnn_bidirectional",
    "roialign": "roialign_mode_max", "sequenceinsert": "sequence_insert_at_back", "shrink": "shrink_hard",
    "slice": "slice_default_axes", "softmax": "softmax_axis_1", "softplus": "softplus_example",
    "split": "split_equal_parts_default_axis_opset13", "string_split": "string_split_no_delimiter",
    "topk": "top_k_same_values_2d", "transpose": "transpose_all_permutations_3",
}  # fmt: skip
"""Cases by the module of their operator: kinds of operators and datatypes of tensors; a sequence and an 8-bit
float, which the protocol has no name for; and one case that ONNX Runtime does not implement."""


def node_cases(*, sample: bool) -> list[TestCase]:
    """Return `onnx`'s cases of one operator each, in an order that stays.

    Importing an operator's module makes its cases; all modules take 10 s, those of the sample 1 s.
    """
    if not sample:
        cases: list[TestCase] = load_model_tests(kind="node")
        return cases
    for module in SAMPLE:
        import_module(f"{node.__name__}.{module}")
    names = {f"test_{name}" for of_module in SAMPLE.values() for name in of_module.split()}
    found = [case for case in node._NodeTestCases if case.name in names]
    assert len(found) == len(names), names - {case.name for case in found}
    return found


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


MAIN = "import sys; from conformance.onnxcases import main; main(sys.argv[1:])"
LIMIT_S = 300.0
"""All cases take bare ONNX Runtime some 20 s; it is there so that a bug fails a test and does not hang it."""


def cases(folder: Path, *, threads: int, sample: bool) -> list[Case]:
    """Run all cases or a sample with bare ONNX Runtime; one that kills the process, or hangs, has failed.

    Args:
        folder: for files.
        threads: how many each session computes with.
        sample: not all.
    """
    found: list[Case] = []
    about = (str(threads), "sample" if sample else "all")
    while (ended := _run_from(folder / f"cases-{len(found)}", found, about)) != 0:
        last = found.pop()
        assert ended < 0, f"the process that runs the cases ended with {ended}, in {last.name}"
        assert not last.model, f"the process that runs the cases was killed by {-ended}, in none of them"
        found.append(replace(last, failed=f"it ends the process with {ended}"))
    return found


def _run_from(file: Path, found: list[Case], about: Sequence[str]) -> int:
    """Run the cases after those that are found, and add them; returns the process's exit code."""
    # Not multiprocessing, which leaves a process of its own to the one that runs the tests.
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(file), str(len(found)), *about],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    added = _read(file)
    assert added or process.returncode == 0, "the process that runs the cases ended before the first"
    found += added
    return process.returncode


def _read(file: Path) -> list[Case]:
    """Return the cases that ran, and the one that was begun at last, if it did not end."""
    found: dict[str, Case] = {}
    with file.open("rb") as stream, suppress(EOFError, pickle.UnpicklingError):
        while True:
            case = pickle.load(stream)
            found[case.name] = case
    return list(found.values())


def main(arguments: Sequence[str]) -> None:
    """Write each case before it runs, and what came of it after."""
    file, done, threads, which = arguments
    warnings.simplefilter("ignore")  # numpy's, about what the cases are made from
    ort.set_default_logger_severity(4)
    with Path(file).open("wb") as stream:
        for case in node_cases(sample=which == "sample")[int(done) :]:
            _write(stream, Case(case.name, b"", case.rtol, case.atol))
            _write(stream, run(case, int(threads)))


def _write(stream: IO[bytes], item: Case) -> None:
    pickle.dump(item, stream)
    stream.flush()


def run(case: TestCase, threads: int) -> Case:
    """Run one case with bare ONNX Runtime, as the worker does: so many threads, defaults otherwise."""
    assert case.model is not None
    assert case.data_sets is not None
    model, graph = case.model.SerializeToString(), case.model.graph
    about = (case.name, model, case.rtol, case.atol)
    if unnamed := unnamed_type(graph):
        return Case(*about, unnamed=unnamed)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        asked = [_ask(session, graph, *data) for data in case.data_sets]
        for one in asked:
            compare(one.expected, one.answered, case.rtol, case.atol)
    except Exception as error:
        if not isinstance(error, AssertionError) and not type(error).__module__.startswith("onnxruntime."):
            raise  # a mistake here must not pass for one of ONNX Runtime's
        return Case(*about, failed=f"{type(error).__name__}: {str(error).strip()[:200]}")
    return Case(*about, asked=tuple(asked))


def _ask(
    session: ort.InferenceSession, graph: GraphProto, inputs: Sequence[Any], outputs: Sequence[Any]
) -> Asked:
    pairs = zip(graph.input, inputs, strict=False)  # an initializer may be an input too, without a value here
    given = tuple(value_of(info, item) for info, item in pairs if item is not None)
    named = zip((info.name for info in graph.output), outputs, strict=True)
    expected = {name: item for name, item in named if item is not None}
    answered, again = (_answer(session, graph.output, given) for _ in range(2))
    return Asked(given, expected, answered, answered == again)


def _answer(
    session: ort.InferenceSession, outputs: Sequence[ValueInfoProto], given: Sequence[Value]
) -> dict[str, Value]:
    nodes = (*session.get_inputs(), *session.get_outputs())
    if any("bfloat16" in node.type for node in nodes):  # numpy has no such type
        found = list(session.run_with_ort_values(None, {value.name: _ort_value(value) for value in given}))
    else:
        found = session.run(None, {value.name: value.array for value in given})
    pairs = zip(outputs, found, strict=True)
    return {info.name: value_of(info, item) for info, item in pairs if item is not None}


def _ort_value(value: Value) -> ort.OrtValue:
    if value.datatype == "BF16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.array, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value.array)
