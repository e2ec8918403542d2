"""Sessions: their options and errors, the description of their inputs and outputs, and the warm-up."""

import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from runtime import memory
from runtime.errors import InferenceFailed, LoadRefused, RuntimeProblem
from runtime.onnxfile import check_external_data
from runtime.repository import MODEL_FILE
from runtime.wire import BY_ONNX, DATATYPES, MAX_DIMENSIONS, MAX_NAME_CHARACTERS, Tensor, TensorSpec
from runtime.worker.batching import BatchDimension
from runtime.worker.inference import Runner

OPTIONAL = re.compile(r"optional\((.*)\)")
"""How ONNX Runtime calls the type of what may have no value; it takes it as if it had, or left out."""


@dataclass(frozen=True, slots=True)
class ServingSession:
    """A session that can serve.

    Attributes:
        runner: runs it.
        inputs: all that it takes, as the server is told.
        outputs: all that it gives.
        dimension: along which requests go together, if they are to.
    """

    runner: Runner
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimension: BatchDimension | None


def describe_model(session: ort.InferenceSession, max_batch_size: int) -> ServingSession:
    """Describe a session, of which so many elements may be run at once; 0 is no batching.

    Raises:
        LoadRefused: `invalid_model`, it has names that are too long, or not the batch dimension to have.
    """
    inputs, outputs = _inputs(session), tuple(_spec(node) for node in session.get_outputs())
    dimension = None
    if max_batch_size:
        names = [node.name for node in session.get_inputs()]
        _check_batch_dimension([*inputs[: len(names)], *outputs])
        dimension = BatchDimension(max_batch_size, names)
    return ServingSession(Runner(session, inputs, outputs), inputs, outputs, dimension)


def _inputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """Describe what the session takes: last, and optional, what it has a default for."""
    defaults = (_spec(node) for node in session.get_overridable_initializers())
    return (
        *(_spec(node) for node in session.get_inputs()),
        *(msgspec.structs.replace(spec, optional=True) for spec in defaults),
    )


def _spec(node: ort.NodeArg) -> TensorSpec:
    if max(len(node.name), len(node.type)) > MAX_NAME_CHARACTERS:
        reason = f"an input or output has a name or type of more than {MAX_NAME_CHARACTERS} characters"
        raise LoadRefused("invalid_model", reason)
    inner = OPTIONAL.fullmatch(node.type)
    datatype = BY_ONNX.get(node.type if inner is None else inner[1])
    shape = tuple(length if isinstance(length, int) and length >= 0 else -1 for length in node.shape)
    name = node.type if datatype is None else datatype.name
    return TensorSpec(node.name, name, shape, optional=inner is not None)


def _check_batch_dimension(specs: Iterable[TensorSpec]) -> None:
    """Refuse a model that is said to have a batch dimension and does not."""
    for spec in specs:
        if not spec.shape or spec.shape[0] != -1:
            reason = (
                f"{spec.name!r} has shape {list(spec.shape)}: with max_batch_size the first dimension of each"
                " input and output has to be of any length (-1)"
            )
            raise LoadRefused("invalid_model", reason)


MAX_ZEROS_BYTES = 64 * 2**20
"""Of zeros: what a request may have. A model that declares more is hardly asked with that much."""
TEXT_BYTES = 40
"""Of an empty element of BYTES: numpy's reference to it, and what ONNX Runtime makes of it."""
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "bad allocation", "MemoryError")
"""How ONNX Runtime says so, and how Python does; there is no code for it."""
WITH_ZEROS = (
    "the model does not run on zeros of its declared shapes, and has to before it is loaded: give inputs that"
    " it takes as [[warm_up.inputs]] in its loadledger.toml"
)
WITH_GIVEN = (
    "the model does not run on the inputs that its loadledger.toml gives as [[warm_up.inputs]], and has to"
    " before it is loaded: correct them"
)
OR_NOT = "or switch that off there, by enabled = false under [warm_up]"


def warm_up(model: ServingSession, given: Sequence[Tensor], on_begin: Callable[[], None]) -> int | None:
    """Run a model on what is given, else on zeros of the declared shapes, where these allow it.

    Args:
        model: with a batch dimension, zeros are one element along it.
        given: what a request would bring; nothing means zeros.
        on_begin: is called before it is run, and only then.

    Returns:
        Microseconds, or None if the shapes do not allow it.

    Raises:
        LoadRefused: `warm_up_failed`, with the runtime's words and what to do.
        MemoryError: there is not enough for it.
    """
    required = [spec for spec in model.inputs if not spec.optional]
    if not given and not zeros_are_allowed(model, required):
        return None
    started_ns = time.perf_counter_ns()
    on_begin()
    try:
        _run(model, given, required)
    except RuntimeProblem as problem:
        if isinstance(problem, InferenceFailed) and is_out_of_memory(str(problem)):
            raise MemoryError(str(problem)) from None
        # Of a scalar ONNX Runtime says what it says where no shape is declared: it may have been no input.
        if not given and not all(spec.shape for spec in required):
            return None
        told = WITH_GIVEN if given else WITH_ZEROS
        raise LoadRefused("warm_up_failed", f"{told}, {OR_NOT}. It says: {problem}") from None
    return (time.perf_counter_ns() - started_ns) // 1000


def _run(model: ServingSession, given: Sequence[Tensor], required: Sequence[TensorSpec]) -> None:
    feed = model.runner.decode_inputs(given) if given else {spec.name: make_zeros(spec) for spec in required}
    if model.dimension is not None:
        model.dimension.measure(feed)
    model.runner.run(model.runner.select_outputs((), text=False), feed, ort.RunOptions())


def zeros_are_allowed(model: ServingSession, required: Sequence[TensorSpec]) -> bool:
    """Tell whether zeros can be made of these shapes, are not too many, and lead to an answer to send."""
    answers = any(spec.datatype in DATATYPES for spec in model.outputs)
    return answers and all(map(_is_known, required)) and sum(map(_bytes, required)) <= MAX_ZEROS_BYTES


def make_zeros(spec: TensorSpec) -> Any:
    """Make an input that is 0, False or the empty text throughout."""
    if spec.datatype == "BYTES":
        return np.full(_shape(spec), "", object)
    return np.zeros(_shape(spec), DATATYPES[spec.datatype].numpy)


def is_out_of_memory(text: str) -> bool:
    """Tell whether this is what ONNX Runtime says when it has no memory."""
    return any(words in text for words in OUT_OF_MEMORY)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the declared shape; an unknown first dimension is mostly the batch's, and 1 will do."""
    return (1, *spec.shape[1:]) if spec.shape[:1] == (-1,) else spec.shape


def _is_known(spec: TensorSpec) -> bool:
    shape = _shape(spec)
    return spec.datatype in DATATYPES and len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0


def _bytes(spec: TensorSpec) -> int:
    # A length of 0 does not make the others any that numpy takes.
    elements = math.prod(max(length, 1) for length in _shape(spec))
    return elements * (DATATYPES[spec.datatype].size or TEXT_BYTES)


SMALLEST_MODEL = bytes.fromhex(
    "0808 3a2f"  # ir_version 8; a graph of 47 bytes:
    "0a10 0a0178 120179 22084964656e74697479"  # a node, Identity of x to y
    "120167"  # its name, g
    "5a0b 0a0178 12060a0408011200"  # the input x: a float without dimensions
    "620b 0a0179 12060a0408011200"  # the output y
    "4204 0a00 1011"  # the operators of ONNX's opset 17
)
"""`y = x` in ONNX's own format, for a process that has no library to write it with."""
UNREADABLE_BYTES = 64 * 2**20
"""Of a file that is no ONNX file, shown to ONNX Runtime for its words on it: it need not fit into memory."""


def register_operators() -> None:
    """Create, run and drop the smallest session, before workers are forked.

    With its first session ONNX Runtime registers its operators: 3 ms and 10 MB, which every worker would
    otherwise spend again (measured with 1.31). It leaves one thread, and no descriptor.
    """
    session = ort.InferenceSession(SMALLEST_MODEL, session_options(1), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros((), np.float32)})


def session_options(threads: int) -> ort.SessionOptions:
    """Give the options of a session that computes with this many threads."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3  # errors: its warnings would push what matters out of the stderr tail
    if threads > 1:  # a thread that spins takes a core from the other models' workers
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def saved_graph_options(threads: int) -> ort.SessionOptions:
    """Give the options of a session that is made of a graph as it was saved, optimised."""
    chosen = session_options(threads)
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return chosen


def create_checked(
    folder: Path, root: Path, chosen: ort.SessionOptions, limit_bytes: int | None
) -> ort.InferenceSession:
    """Create the session of a version in the repository, all of whose references have been seen.

    Args:
        folder: the version's.
        root: the repository's root, without links.
        chosen: its options.
        limit_bytes: the memory limit, to name it.

    Raises:
        LoadRefused: `unsafe_file`, `out_of_memory`, `invalid_model`.
    """
    path = folder / MODEL_FILE
    if check_external_data(path, folder, root):
        return create_session(str(path), chosen, limit_bytes)
    create_session(
        _beginning(path), _isolated(session_options(1)), limit_bytes
    )  # says, in its own words, what is wrong
    raise LoadRefused("invalid_model", f"{MODEL_FILE} is not an ONNX file")


def create_session(
    model: str | bytes, chosen: ort.SessionOptions, limit_bytes: int | None
) -> ort.InferenceSession:
    """Create a session of a file, or of bytes; for arguments and errors see `create_checked`."""
    try:
        return ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"], enable_fallback=False)
    except MemoryError as error:
        raise out_of_memory(limit_bytes, str(error)) from None
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
        text = str(error) or type(error).__name__
        if is_out_of_memory(text):
            raise out_of_memory(limit_bytes, text) from None
        raise LoadRefused("invalid_model", text) from None


def out_of_memory(limit_bytes: int | None, text: str) -> LoadRefused:
    """Say that there is not enough memory, under this limit, if there is one."""
    reason = "the machine has no more" if limit_bytes is None else f"the limit is {limit_bytes} bytes"
    return LoadRefused("out_of_memory", f"the model needs more memory than it may take, {reason}: {text}")


def limit_memory(limit_bytes: int | None) -> None:
    """Let the process have this much more than it has: beyond it, allocations fail. None is no limit.

    To be called when it has all its threads, whose stacks count. RLIMIT_DATA counts what is mapped, touched
    or not, so what an empty worker has is no part of the limit.
    """
    if limit_bytes is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory.data_bytes() + limit_bytes
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(UNREADABLE_BYTES)


def _isolated(chosen: ort.SessionOptions) -> ort.SessionOptions:
    """Have a model that is given as bytes read no file, whatever it refers to.

    By itself ONNX Runtime (1.31, measured) finds such references from the working directory. Beneath
    `/dev/null` there is nothing, and a location that is absolute, leads out or is an address in memory it
    refuses. Bytes it would also take for its own format, which a file of this name is not.
    """
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    chosen.add_session_config_entry("session.load_model_format", "ONNX")
    return chosen
