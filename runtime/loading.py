"""What a worker does with `Load`: check the files, create the session, hash and measure beside it."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import onnxruntime as ort

from runtime import memory
from runtime.errors import LoadRefused
from runtime.onnxfile import check_external_data
from runtime.repository import MODEL_FILE, FileIdentity, identify, open_identified
from runtime.wire import BY_ONNX, MAX_NAME_CHARACTERS, Load, Loaded, LoadedFile, LoadStage, TensorSpec

HASH_BLOCK_BYTES = 2**18
"""What stays in a core's own cache: the session beside it needs what the cores share."""
HASHED_BLOCKS_A_SAMPLE = 16
"""2.5 ms of hashing, after which the memory is looked at."""
SAMPLE_INTERVAL_S = 0.005
"""Of the memory taken while loading. A sample costs 0.03 ms; walking the mappings would cost 0.7 ms, and hold
up the session when it maps memory: 10 ms more for a load of 60 (measured)."""
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
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "bad allocation")
"""How ONNX Runtime says so; it has no code of its own for it."""
OPTIONAL = re.compile(r"optional\((.*)\)")
"""How ONNX Runtime calls the type of what may have no value; it takes it as if it had, or left out."""


@dataclass(frozen=True, slots=True)
class Model:
    """A session that can serve, and what to tell the server of it."""

    session: ort.InferenceSession
    report: Loaded


def load(order: Load, on_stage: Callable[[LoadStage], None]) -> Model:
    """Load the model that the order names.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`.
    """
    try:
        return _load(order, on_stage)
    except MemoryError as error:
        raise _out_of_memory(order, str(error) or "MemoryError") from None
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None


def _load(order: Load, on_stage: Callable[[LoadStage], None]) -> Model:
    folder, root = Path(order.folder), Path(os.path.realpath(order.root))
    before = identify(folder, root)
    if tuple(file.path for file in before) != order.files:
        raise LoadRefused("model_changed", "the model's files are no longer those that were found")
    on_stage("loading")
    with _Beside(folder, before, order.known) as beside:
        started = time.perf_counter_ns()
        try:
            session = _create_checked(order, folder, root)
            loading_us = _since(started)
            files = beside.result()
        finally:  # if they changed, that is the reason for whatever went wrong as well
            _check_unchanged(before, folder, root)
    inputs, outputs = _inputs(session), tuple(_spec(node) for node in session.get_outputs())
    if order.max_batch_size:
        _check_batch_dimension([*inputs[: len(session.get_inputs())], *outputs])
    on_stage("measuring")
    return Model(session, _report(inputs, outputs, files, loading_us, beside))


def _report(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    files: tuple[LoadedFile, ...],
    loading_us: int,
    beside: "_Beside",
) -> Loaded:
    """Measure what the session takes, and say what it is."""
    started = time.perf_counter_ns()
    ctypes.CDLL(None).malloc_trim(0)  # in 2 ms gives back what loading took and freed: as much as it kept
    memory_bytes = memory.private_bytes()
    shared_bytes = memory.anonymous_bytes() - memory_bytes
    return Loaded(
        files=files,
        inputs=inputs,
        outputs=outputs,
        memory_bytes=memory_bytes,
        peak_memory_bytes=max(beside.peak_anonymous_bytes - shared_bytes, memory_bytes),
        loading_us=loading_us,
        hashing_us=beside.hashing_us,
        measuring_us=_since(started),
    )


def _check_unchanged(before: list[FileIdentity], folder: Path, root: Path) -> None:
    if identify(folder, root) != before:
        raise LoadRefused("model_changed", "the model's files changed while they were loaded")


def warm_up() -> None:
    """Create, run and drop the smallest session, before workers are forked.

    With its first session ONNX Runtime registers its operators: 3 ms and 10 MB, which every worker would
    otherwise spend again (measured with 1.31). It leaves one thread, and no descriptor.
    """
    session = ort.InferenceSession(SMALLEST_MODEL, options(1), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros((), np.float32)})


def options(threads: int) -> ort.SessionOptions:
    """Give the options of a session that computes with this many threads."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3  # errors: its warnings would push what matters out of the stderr tail
    if threads > 1:  # a thread that spins takes a core from the other models' workers
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def _create_checked(order: Load, folder: Path, root: Path) -> ort.InferenceSession:
    """Create the session, of a file all of whose references have been seen."""
    path = folder / MODEL_FILE
    if order.memory_limit_bytes is not None:  # here, when this process has all its threads
        _limit_memory(order.memory_limit_bytes)
    if check_external_data(path, folder, root):
        return _create(str(path), options(order.threads), order)
    isolated = _isolated(options(order.threads))
    _create(_beginning(path), isolated, order)  # which says, in its own words, what is wrong
    raise LoadRefused("invalid_model", f"{MODEL_FILE} is not an ONNX file")


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


def _create(model: str | bytes, chosen: ort.SessionOptions, order: Load) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"], enable_fallback=False)
    except MemoryError as error:
        raise _out_of_memory(order, str(error)) from None
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
        text = str(error) or type(error).__name__
        if any(words in text for words in OUT_OF_MEMORY):
            raise _out_of_memory(order, text) from None
        raise LoadRefused("invalid_model", text) from None


def _out_of_memory(order: Load, text: str) -> LoadRefused:
    limit = order.memory_limit_bytes
    reason = "the machine has no more" if limit is None else f"the limit is {limit} bytes"
    return LoadRefused("out_of_memory", f"the model needs more memory than it may take, {reason}: {text}")


def _limit_memory(limit_bytes: int) -> None:
    """Let the process have this much more than it has: beyond it, allocations fail.

    RLIMIT_DATA counts what is mapped, touched or not, so what an empty worker has is no part of the limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory.data_bytes() + limit_bytes
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


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


def _since(started_ns: int) -> int:
    return (time.perf_counter_ns() - started_ns) // 1000


class _Beside:
    """Hashes the files and watches the process's memory in one thread, beside what is in the `with` block.

    One thread, because starting one takes some milliseconds of a load (measured).
    """

    def __init__(self, folder: Path, files: Iterable[FileIdentity], known: Iterable[LoadedFile]) -> None:
        self.hashing_us = 0
        self.peak_anonymous_bytes = 0
        self._folder = folder
        self._files = files
        self._known = {_key(file): file.sha256 for file in known}
        self._hashed: list[LoadedFile] = []
        self._problem: Exception | None = None
        self._all_hashed = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hashing and sampling")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def result(self) -> tuple[LoadedFile, ...]:
        """Wait for the hashes.

        Raises:
            LoadRefused: `model_changed`, for a file that is no longer the one that was identified.
        """
        self._all_hashed.wait()
        if self._problem is not None:
            raise self._problem
        return tuple(self._hashed)

    def _run(self) -> None:
        started = time.perf_counter_ns()
        try:
            for file in self._files:
                digest = self._known.get(_key(file)) or self._digest(file)
                self._hashed.append(
                    LoadedFile(file.path, *_key(file)[1:], sha256=digest),
                )
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits for the hashes has to know
            self._problem = error
        self.hashing_us = _since(started)
        self._all_hashed.set()
        while not self._over.wait(SAMPLE_INTERVAL_S):
            self._sample()

    def _digest(self, file: FileIdentity) -> str:
        digest = hashlib.sha256()
        descriptor = open_identified(self._folder, file)
        try:
            block = memoryview(bytearray(HASH_BLOCK_BYTES))
            for number in itertools.count(1):
                length = os.readv(descriptor, [block])
                if not length or self._over.is_set():
                    break
                digest.update(block[:length])
                if number % HASHED_BLOCKS_A_SAMPLE == 0:
                    self._sample()
        finally:
            os.close(descriptor)
        return digest.hexdigest()

    def _sample(self) -> None:
        with contextlib.suppress(MemoryError):  # then the peak is known well enough
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, memory.anonymous_bytes())


def _key(file: FileIdentity | LoadedFile) -> tuple[str, int, int, int, int, int]:
    return file.path, file.dev, file.inode, file.bytes, file.mtime_ns, file.ctime_ns
