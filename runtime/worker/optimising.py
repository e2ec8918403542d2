"""How a worker makes an optimised model: ONNX Runtime writes its graph and weights.

The graph is written after all optimisations for this machine, with the weights in a file beside it, as they
are and as the kernels packed them. A load maps that file instead of reading and packing.

Before 1.32, ONNX Runtime writes packed weights at any offset, and its matrix kernels read them in aligned
steps: of a 250 by 250 matrix the process dies of SIGSEGV, and only if it is run on two rows at once. The
trial finds that. Of eight networks with 1.24 and 1.31 it refused only such a one.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.memory import free_disk_bytes
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import MODEL_FILE, external_locations
from runtime.wire import Optimise, Optimised
from runtime.worker import privileges, sessions

WEIGHTS_FILE = "weights.bin"
FILES = (MODEL_FILE, WEIGHTS_FILE)
"""All that a worker can write: they are made before it is confined, and it may make no others. A hostile one
fills a disk with as many files as it may make, however short each has to be. Without weights, ONNX Runtime
removes their file."""
WEIGHTS_FROM_BYTES = 16 * 2**10
"""Least size of a weight in the weights file. From 128 bytes to 64 KiB, loads and memory are the same; at 1
MiB they are 2 to 10 ms and 4 to 8 MB more (measured with six networks of 1 to 54 MB). ONNX Runtime 1.31 has
to see some shapes in the graph: with no tensor left there, every fifth conformance model does not load."""
MOST_BYTES = 64 * 2**20
"""Limit of a file, or `MOST_TIMES` its sources if that is more: constant folding has no limit."""
MOST_TIMES = 4
"""Weights and their packed copies are twice the size of the sources."""
PROBE_BYTES = 2**16
FULL = {errno.ENOSPC, errno.EDQUOT}


def create_files(order: Optimise) -> None:
    """Create the files of an optimised model, all empty, in the target folder of an order.

    Raises:
        LoadRefused: `optimise_failed`, there is no such folder, or it is not empty; `disk_full`.
    """
    os.umask(0o077)
    try:
        if os.listdir(order.target):  # noqa: PTH208 - whether there is any
            raise LoadRefused("optimise_failed", f"{order.target} is not empty")
        for name in FILES:
            Path(order.target, name).touch()
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "optimise_failed", str(error)) from None


def optimise(order: Optimise) -> Optimised:
    """Make the optimised model of an order in its target folder, in the files that `create_files` created.

    Raises:
        LoadRefused: `optimise_failed`, `disk_full`, `unsafe_file`, `out_of_memory`.
    """
    try:
        with sessions.out_of_memory_refused(order.memory_limit_bytes), _files_limited(order):
            sessions.limit_memory(order.memory_limit_bytes, mapped_bytes=order.bytes, threads=order.threads)
            _write(order, Path(order.folder), Path(os.path.realpath(order.root)))
            _check_written(Path(order.target))
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "optimise_failed", str(error)) from None
    return Optimised()


@contextmanager
def _files_limited(order: Optimise) -> Iterator[None]:
    """Limit the length of the files.

    Raises:
        LoadRefused: `disk_full`, a file exceeds its share of the disk's room; or `optimise_failed`, a file
            exceeds the limit of an optimised model.
    """
    target = Path(order.target)
    wanted = max(MOST_BYTES, MOST_TIMES * order.bytes)
    if order.most_bytes is not None:
        wanted = min(wanted, order.most_bytes)
    there_is = max(0, free_disk_bytes(target)) // len(FILES)
    privileges.limit_resource(resource.RLIMIT_FSIZE, min(wanted, there_is))
    try:
        yield
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        if wanted <= there_is:
            raise LoadRefused("optimise_failed", f"a file of it has more than {wanted} bytes") from None
        raise LoadRefused("disk_full", f"{target} has room for files of {there_is} bytes") from None


def _write(order: Optimise, folder: Path, root: Path) -> None:
    target = Path(order.target)
    try:
        sessions.create_checked(folder, root, _options(order, target), order.memory_limit_bytes)
    except LoadRefused as refusal:
        if refusal.code != "invalid_model":
            raise
        _probe(target)
        raise LoadRefused("optimise_failed", str(refusal)) from None


def _options(order: Optimise, target: Path) -> ort.SessionOptions:
    chosen = sessions.session_options(order.threads)
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.optimized_model_filepath = str(target / MODEL_FILE)
    entries = {
        "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(WEIGHTS_FROM_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }
    for name, text in entries.items():
        chosen.add_session_config_entry(name, text)
    return chosen


def _probe(target: Path) -> None:
    """Append to the longest file, to find out whether a full disk or a limit made ONNX Runtime fail.

    Raises:
        OSError: it did.
    """
    longest = max(target.iterdir(), key=lambda path: path.lstat().st_size, default=target / "probe")
    with longest.open("ab") as probe:
        probe.write(bytes(PROBE_BYTES))


def _check_written(target: Path) -> None:
    """Check that what was written is a model that refers only to its own weights.

    Raises:
        LoadRefused: `optimise_failed`.
    """
    try:
        locations = set(external_locations(target / MODEL_FILE))
    except (Unparsable, TooManyFields, FileNotFoundError) as problem:
        raise LoadRefused("optimise_failed", f"what was written is no model: {problem}") from None
    if not locations <= {WEIGHTS_FILE}:
        raise LoadRefused("optimise_failed", "what was written refers to files that are not its own")
