"""What bare ONNX Runtime makes of the conformance cases.

It runs them in a process of its own, which a case may kill; what it found comes back as a file.
"""

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import onnxruntime as ort
from onnx import GraphProto, TensorProto, ValueInfoProto
from onnx.backend.test.case.test_case import TestCase

from support.clients import Value
from support.onnxcases import Asked, Case, compare, node_cases, unnamed_type, value_of

MAIN = "import sys; from support.onnxcases import main; main(sys.argv[1:])"
LIMIT_S = 300.0
"""All cases take bare ONNX Runtime some 20 s; it is there so that a bug fails a test and does not hang it."""


def cases(folder: Path, *, step: int = 1) -> list[Case]:
    """Run every `step`-th case with bare ONNX Runtime; one that kills the process, or hangs, has failed.

    Args:
        folder: for files.
        step: 1 for all.
    """
    found: list[Case] = []
    while (ended := _run_from(folder / f"cases-{len(found)}", len(found), step, found)) != 0:
        last = found.pop()
        assert ended < 0, f"the process that runs the cases ended with {ended}, in {last.name}"
        assert not last.model, f"the process that runs the cases was killed by {-ended}, in none of them"
        found.append(replace(last, failed=f"it ends the process with {ended}"))
    return found


def _run_from(file: Path, done: int, step: int, found: list[Case]) -> int:
    """Run the cases after those that are done, and add them; returns the process's exit code."""
    # Not multiprocessing, which leaves a process of its own to the one that runs the tests.
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(file), str(done), str(step)],
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
    file, done, step = arguments
    warnings.simplefilter("ignore")  # numpy's, about what the cases are made from
    ort.set_default_logger_severity(4)
    with Path(file).open("wb") as stream:
        for case in node_cases()[:: int(step)][int(done) :]:
            _write(stream, Case(case.name, b"", case.rtol, case.atol))
            _write(stream, run(case))


def _write(stream: IO[bytes], item: Case) -> None:
    pickle.dump(item, stream)
    stream.flush()


def run(case: TestCase) -> Case:
    """Run one case with bare ONNX Runtime, as the worker does: one thread, defaults otherwise."""
    assert case.model is not None
    assert case.data_sets is not None
    model, graph = case.model.SerializeToString(), case.model.graph
    about = (case.name, model, case.rtol, case.atol)
    if unnamed := unnamed_type(graph):
        return Case(*about, unnamed=unnamed)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
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
