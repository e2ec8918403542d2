"""Sessions: their options and errors, and the description of their inputs and outputs."""

import errno
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from features import providers
from runtime import memory
from runtime.errors import LoadRefused
from runtime.onnxfile import (
    check_external_data,
    describe_foreign_content,
    describe_tensor,
    find_model_file,
    read_head,
)
from runtime.wire import MAX_NAME_CHARACTERS, MAX_OUTPUTS, MAX_REPORT_BYTES, TensorSpec
from runtime.worker import extensions, privileges
from runtime.worker.batching import BatchDimension
from runtime.worker.declaredsizes import explain_uselessness
from runtime.worker.inference import Runner
from runtime.worker.refusals import explain_refusal, strip_noise

MAX_DESCRIBED_BYTES = MAX_REPORT_BYTES - 2**16
"""Bytes of a model's inputs and outputs: all of `Loaded` but its own two numbers."""
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate", "bad allocation", "MemoryError")
"""Texts of ONNX Runtime, OpenVINO and Python for lack of memory; ONNX Runtime has no code for it."""
SMALLEST_MODEL = bytes.fromhex(
    "0808 3a2f"  # ir_version 8; a graph of 47 bytes:
    "0a10 0a0178 120179 22084964656e74697479"  # an operator, Identity of x to y
    "120167"  # its name, g
    "5a0b 0a0178 12060a0408011200"  # the input x: a float without dimensions
    "620b 0a0179 12060a0408011200"  # the output y
    "4204 0a00 1011"  # the operators of ONNX's opset 17
)
"""`y = x` in ONNX's format; workers have no library that could write it."""
SPIN_US = 50
"""Spinning of a session's threads for the next operator, before they block. ONNX Runtime's own limit takes
the cores from other workers: eight busy models together then give 0.6 of the answers of single-threaded ones;
with 20 to 100 us they give as many, and one model alone loses nothing (decision 42)."""
HAS_SPIN_DURATION = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 26)
"""Whether ONNX Runtime knows a limit in microseconds: before 1.26 there is none."""
ARENA_BYTES = 128 * 2**20
"""Addresses that malloc takes for a thread's heap, before it gives half of them back (glibc)."""
OTHER_THREADS = 3
"""The threads for the channel, cancellations, and delayed answers."""
MAPPED_TIMES = 2
"""Addresses for each byte of a file: it is mapped weight by weight, each from the page where it begins."""
UNREADABLE_BYTES = 64 * 2**20
"""Part of an invalid file given to ONNX Runtime for its error text: the file may exceed the memory."""


@dataclass(frozen=True, slots=True)
class ServingSession:
    """A session that can serve, its inputs and outputs as reported to the server, its batch dimension."""

    runner: Runner
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimension: BatchDimension | None


def describe_model(
    session: ort.InferenceSession, max_batch_size: int, max_request_bytes: int
) -> ServingSession:
    """Return the serving session for batches of at most `max_batch_size` elements; 0 disables batching.

    Raises:
        LoadRefused: `invalid_model`, inputs or outputs are too many, one has too long a name or no batch
            dimension, or no request can ask the model.
    """
    inputs, outputs = _inputs(session), tuple(_spec(each) for each in session.get_outputs())
    _check_size(inputs, outputs)
    problem = explain_uselessness(inputs, outputs, max_request_bytes)
    if problem is not None:
        raise LoadRefused("invalid_model", problem)
    dimension = None
    if max_batch_size:
        names = [each.name for each in session.get_inputs()]
        _check_batch_dimension([*inputs[: len(names)], *outputs])
        dimension = BatchDimension(max_batch_size, names)
    return ServingSession(Runner(session, inputs, outputs), inputs, outputs, dimension)


def _inputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """Return the inputs; inputs with a default are optional and come last."""
    defaults = (_spec(each) for each in session.get_overridable_initializers())
    return (
        *(_spec(each) for each in session.get_inputs()),
        *(msgspec.structs.replace(spec, optional=True) for spec in defaults),
    )


def _spec(argument: ort.NodeArg) -> TensorSpec:
    if max(len(argument.name), len(argument.type)) > MAX_NAME_CHARACTERS:
        reason = f"an input or output has a name or type of more than {MAX_NAME_CHARACTERS} characters"
        raise LoadRefused("invalid_model", reason)
    return describe_tensor(argument.name, argument.type, argument.shape)


def _check_size(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Refuse a model whose inputs and outputs exceed one message to the server."""
    described_bytes = len(msgspec.msgpack.encode((inputs, outputs)))
    if len(outputs) > MAX_OUTPUTS or described_bytes > MAX_DESCRIBED_BYTES:
        reason = (
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs, described in {described_bytes}"
            f" bytes; at most {MAX_OUTPUTS} outputs and {MAX_DESCRIBED_BYTES} bytes are supported"
        )
        raise LoadRefused("invalid_model", reason)


def _check_batch_dimension(specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        if not spec.shape or spec.shape[0] != -1:
            reason = (
                f"{spec.name!r} has shape {list(spec.shape)}: with max_batch_size the first dimension of each"
                " input and output has to be of any length (-1)"
            )
            raise LoadRefused("invalid_model", reason)


def is_out_of_memory(text: str) -> bool:
    return any(words in text for words in OUT_OF_MEMORY)


def run_smallest_model() -> None:
    """Create, run and drop the smallest session, in the fork server.

    With its first session ONNX Runtime registers its operators: 3 ms and 10 MB, which every worker would
    otherwise spend again (measured with 1.31). The process still has one thread then, and no new descriptors.
    """
    session = ort.InferenceSession(SMALLEST_MODEL, session_options(1), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros((), np.float32)})


def session_options(threads: int) -> ort.SessionOptions:
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3  # errors: warnings would push more important lines out of the stderr tail
    if threads > 1:
        if HAS_SPIN_DURATION:
            chosen.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        else:  # threads would spin for milliseconds
            chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def create_checked(folder: Path, root: Path, chosen: ort.SessionOptions, limit: str) -> ort.InferenceSession:
    """Create the session of a version in the repository after checking all its references to files.

    Args:
        folder: the version's folder.
        root: the repository's root, without links.
        chosen: the session's options.
        limit: the lowest limit of memory, for the error text.

    Raises:
        LoadRefused: `unsafe_file`, `out_of_memory`, `invalid_model`.
    """
    model = find_model_file(each.name for each in os.scandir(folder))
    if model is None:
        raise LoadRefused("invalid_model", "the version has no model file, or several; name one model.onnx")
    path = folder / model
    is_parsed = check_external_data(path, folder, root)
    try:
        if is_parsed:
            return create_session(str(path), chosen, limit)
    except LoadRefused as refused:
        if refused.code == "invalid_model":
            _refuse_foreign(path)
        raise
    _refuse_foreign(path)
    with path.open("rb") as file:
        beginning = file.read(UNREADABLE_BYTES)
    create_session(beginning, _isolate(session_options(1)), limit)  # raises with ONNX Runtime's own words
    raise LoadRefused("invalid_model", f"{model} is not an ONNX file")


def _refuse_foreign(path: Path) -> None:
    """Refuse a file that is not a complete ONNX file, in more helpful words than the runtime's."""
    foreign = describe_foreign_content(*read_head(path))
    if foreign is not None:
        raise LoadRefused("invalid_model", f"{path.name} {foreign}") from None


def create_session(model: str | bytes, chosen: ort.SessionOptions, limit: str) -> ort.InferenceSession:
    """Create a session from a file or from bytes; for arguments and errors see `create_checked`."""
    lacks_extensions = isinstance(model, str) and extensions.register(Path(model), chosen)
    is_elsewhere = chosen.has_providers()  # all: the CPU's runs operators that they do not support
    default = None if is_elsewhere else ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(model, chosen, providers=default, enable_fallback=False)
    except MemoryError as error:
        raise out_of_memory(limit, str(error)) from None
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
        text = str(error) or type(error).__name__
        if is_out_of_memory(text) or (is_elsewhere and providers.NO_THREAD in text):
            raise out_of_memory(limit, text) from None
        said = explain_refusal(text, providers.NOT_TAKEN if is_elsewhere else "the model is not valid")
        if lacks_extensions:
            said = f"it uses operators of ONNX Runtime Extensions: {extensions.INSTALL}, and restart. {said}"
        raise LoadRefused("invalid_model", said) from None


def out_of_memory(limit: str, text: str) -> LoadRefused:
    """Return the refusal of a load for lack of memory, with its limit."""
    plain = f"the model needs more memory than it may take, {limit}"
    return LoadRefused("out_of_memory", f"{plain}: {strip_noise(text)}")


@contextmanager
def out_of_memory_refused(limit: str) -> Iterator[None]:
    """Translate lack of memory, which the C library reports as an OSError when it lists a folder.

    Raises:
        LoadRefused: `out_of_memory`.
    """
    try:
        yield
    except MemoryError as error:
        raise out_of_memory(limit, str(error) or "MemoryError") from None
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise out_of_memory(limit, str(error)) from None


def limit_memory(
    limit_bytes: int | None,
    load_limit_bytes: int | None = None,
    *,
    mapped_bytes: int,
    threads: int,
    address_bytes: int | None = 0,
) -> None:
    """Limit the memory that the process may add to its present memory; None is no limit.

    `lift_load_limit` lifts the second limit.

    Call this when the process has all its threads, whose stacks count. RLIMIT_DATA counts mapped memory,
    touched or not, so an empty worker's memory is not part of the limit. It counts no stack and no read-only
    memory, of which page tables can be made, so RLIMIT_AS limits all addresses, and superfluous addresses are
    sealed. A driver's process needs all of them.

    Args:
        limit_bytes: the permanent limit.
        load_limit_bytes: the limit until the model is loaded.
        mapped_bytes: the size of all files that may be mapped, which RLIMIT_DATA need not count.
        threads: the number of compute threads.
        address_bytes: the addresses that the process needs beside; None needs them all.
    """
    present_bytes = memory.data_bytes()
    if limit_bytes is not None:
        privileges.limit_resource(resource.RLIMIT_DATA, present_bytes + limit_bytes)
    if limit_bytes is not None and address_bytes is not None:
        heaps = threads + OTHER_THREADS
        room_bytes = limit_bytes + MAPPED_TIMES * mapped_bytes + heaps * ARENA_BYTES + address_bytes
        privileges.limit_heaps(heaps)
        privileges.seal_addresses(room_bytes)
        privileges.limit_resource(resource.RLIMIT_AS, memory.size_bytes() + room_bytes)
    if load_limit_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = present_bytes + load_limit_bytes
        soft = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def memory_limited(most_bytes: int) -> Iterator[None]:
    """Limit the memory that the process adds within the context."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = memory.data_bytes() + most_bytes
    least = allowed if soft == resource.RLIM_INFINITY else min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def describe_room() -> str:
    """Return how much more memory the process may take, as the end of a sentence; empty without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return ""
    try:
        left = memory.format_megabytes(max(0, soft - memory.data_bytes()))
    except (OSError, MemoryError):  # there is none for that, either
        return ""
    return f"; its worker may take {left} more"


def lift_load_limit() -> None:
    """Lift the limit that holds during the load."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _isolate(chosen: ort.SessionOptions) -> ort.SessionOptions:
    """Keep a model given as bytes from reading any file.

    By default ONNX Runtime (1.31, measured) resolves references from the working directory. Beneath
    `/dev/null` there is nothing, and it refuses locations that are absolute, lead out or are addresses in
    memory. ONNX Runtime would also accept bytes in its own format; this file has another one.
    """
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    chosen.add_session_config_entry("session.load_model_format", "ONNX")
    return chosen
