"""What a worker does with `Prepare`: have ONNX Runtime write down what it makes of a model's files.

That is the graph as it is after all optimisations for this machine, and beside it the weights, which a load
then maps instead of reading them; "prepacked", with what the kernels make of the weights as well. Loading it
is the work of `runtime.worker.loading`.
"""

import errno
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.onnxfile import Unparsable, external_locations
from runtime.prepared.diskroom import room
from runtime.repository import MODEL_FILE, FileIdentity, identify
from runtime.wire import LoadedFile, Prepare, PrepareDone
from runtime.worker import sessions
from runtime.worker.alignment import align
from runtime.worker.background import give_way
from runtime.worker.beside import Beside, Hashing
from runtime.worker.loading import check_unchanged, located

WEIGHTS_FILE = "weights.bin"
WEIGHTS_FROM_BYTES = 16 * 2**10
"""Of a weight that goes into the file. From 128 bytes to 64 KiB, loads and memory are the same; at 1 MiB they
are 2 to 10 ms and 4 to 8 MB more (measured with six networks of 1 to 54 MB). ONNX Runtime 1.31 has to see
some shapes in the graph: with no tensor left there, every fifth conformance model does not load."""
MOST_BYTES = 64 * 2**20
"""That a form's file may have, or `MOST_TIMES` what its sources have: constants can be folded without end."""
MOST_TIMES = 4
"""Weights with what is packed of them are twice as much."""
PROBE_BYTES = 2**16
FULL = {errno.ENOSPC, errno.EDQUOT}


def prepare_form(order: Prepare) -> PrepareDone:
    """Make the form that the order names, in its folder; this process is in the background from here on.

    Raises:
        LoadRefused: `prepare_failed`, `disk_full`, or of the model's files `model_changed`, `unsafe_file`,
            `out_of_memory`.
    """
    give_way()
    try:
        return _prepare(order)
    except MemoryError as error:
        raise sessions.out_of_memory(order.memory_limit_bytes, str(error) or "MemoryError") from None
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "prepare_failed", str(error)) from None


def _prepare(order: Prepare) -> PrepareDone:
    started = time.perf_counter_ns()
    folder, root, before = located(order)
    target = Path(order.target)
    with _files_limited(order, before):
        hashing = Hashing(folder, before, order.known)
        with Beside(hashing) as beside:
            sessions.limit_memory(order.memory_limit_bytes)
            try:
                _write(order, folder, root)
                sources = beside.result(hashing)
            finally:
                check_unchanged(before, folder, root)
        align(target / MODEL_FILE, target / WEIGHTS_FILE)
    files = _written(target)
    return PrepareDone(files, sources, (time.perf_counter_ns() - started) // 1000)


@contextmanager
def _files_limited(order: Prepare, sources: Sequence[FileIdentity]) -> Iterator[None]:
    """See to it that what is written there is all there is, and nobody else's to read, or without end.

    Raises:
        LoadRefused: `disk_full`, what is written is more than half of what the disk has room for, since it is
            two files; or `prepare_failed`, more than a form may have.
    """
    target = Path(order.target)
    if any(target.iterdir()):
        raise LoadRefused("prepare_failed", f"{target} is not empty")
    os.umask(0o077)
    wanted = max(MOST_BYTES, MOST_TIMES * sum(file.bytes for file in sources))
    if order.most_bytes is not None:
        wanted = min(wanted, order.most_bytes)
    there_is = max(0, room(target)) // 2
    _limit_files(min(wanted, there_is))
    try:
        yield
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        if wanted <= there_is:
            raise LoadRefused("prepare_failed", f"a file of it has more than {wanted} bytes") from None
        raise LoadRefused("disk_full", f"{target} has room for files of {there_is} bytes") from None


def _limit_files(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))


def _write(order: Prepare, folder: Path, root: Path) -> None:
    target = Path(order.target)
    try:
        sessions.create_checked(folder, root, _options(order, target), order.memory_limit_bytes)
    except LoadRefused as refusal:
        if refusal.code != "invalid_model":
            raise
        _probe(target)
        raise LoadRefused("prepare_failed", str(refusal)) from None


def _options(order: Prepare, target: Path) -> ort.SessionOptions:
    chosen = sessions.options(order.threads)
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.optimized_model_filepath = str(target / MODEL_FILE)
    entries = {
        "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(WEIGHTS_FROM_BYTES),
        "session.save_external_prepacked_constant_initializers": str(int(order.form == "prepacked")),
    }
    for name, text in entries.items():
        chosen.add_session_config_entry(name, text)
    return chosen


def _probe(target: Path) -> None:
    """Write on, which fails if ONNX Runtime did because the disk is full, or a file as long as it may be.

    Raises:
        OSError: it does.
    """
    longest = max(target.iterdir(), key=lambda path: path.lstat().st_size, default=target / "probe")
    with longest.open("ab") as probe:
        probe.write(bytes(PROBE_BYTES))


def _written(target: Path) -> tuple[LoadedFile, ...]:
    """Return what was written, with hashes, if it is a model that refers to nothing but its own weights."""
    try:
        locations = set(external_locations(target / MODEL_FILE))
        hashing = Hashing(target, identify(target, Path(os.path.realpath(target))), ())
    except (Unparsable, LoadRefused) as problem:
        raise LoadRefused("prepare_failed", f"what was written is no model: {problem}") from None
    if not locations <= {WEIGHTS_FILE}:
        raise LoadRefused("prepare_failed", "what was written refers to files that are not its own")
    with Beside(hashing) as beside:
        return beside.result(hashing)
