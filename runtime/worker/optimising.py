"""How a worker makes an optimised model: ONNX Runtime writes its graph and weights.

The graph is written after all optimisations for this machine, with the weights in a file beside it, as they
are and as the kernels packed them. A load maps that file instead of reading and packing.

For a device, its provider compiles its parts of the graph, and writes the results ("EPContext") into a file
beside it: inside of it, OpenVINO copies them and takes three times as long as without any (decision 72).

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
from runtime.onnxfile import MODEL_FILE, check_external_data, external_locations, find_model_file
from runtime.wire import Optimise, Optimised, TargetDevice
from runtime.worker import extensions, privileges, providers, sessions
from runtime.worker.refusals import strip_noise

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


def list_files(order: Optimise) -> tuple[str, ...]:
    """Return the names of the files that a worker can write; a provider calls its own after the model's."""
    if order.device is None:
        return FILES
    return MODEL_FILE, f"{Path(MODEL_FILE).stem}_{order.device.library.ep_name}.bin"


def create_files(order: Optimise) -> None:
    """Create the files of an optimised model, all empty, in the target folder of an order.

    Raises:
        LoadRefused: `optimise_failed`, there is no such folder, or it is not empty; `disk_full`.
    """
    os.umask(0o077)
    try:
        if os.listdir(order.target):  # noqa: PTH208 - whether there is any
            raise LoadRefused("optimise_failed", f"{order.target} is not empty")
        for name in list_files(order):
            Path(order.target, name).touch()
    except OSError as error:
        raise LoadRefused("disk_full" if error.errno in FULL else "optimise_failed", str(error)) from None


def optimise(order: Optimise) -> Optimised:
    """Make the optimised model of an order in its target folder, in the files that `create_files` created.

    Raises:
        LoadRefused: `optimise_failed`, `disk_full`, `unsafe_file`, `out_of_memory`.
    """
    try:
        with sessions.out_of_memory_refused(order.limit_text), _files_limited(order):
            sessions.limit_memory(
                order.limit_bytes, mapped_bytes=order.bytes, threads=order.threads, device=order.device
            )
            _write(order, Path(order.folder), Path(os.path.realpath(order.root)))
            _check_written(order)
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
    there_is = max(0, free_disk_bytes(target)) // len(list_files(order))
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
        if order.device is None:
            sessions.create_checked(folder, root, _options(order, target), order.limit_text)
        else:
            _compile(order, order.device, folder, root)
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


def _compile(order: Optimise, device: TargetDevice, folder: Path, root: Path) -> None:
    name = find_model_file(each.name for each in os.scandir(folder))
    if name is None or not check_external_data(folder / name, folder, root):
        raise LoadRefused("invalid_model", "the version has no model file whose references can be checked")
    chosen = sessions.session_options(order.threads)
    extensions.register(folder / name, chosen)
    providers.add_device(device, order.threads, chosen)
    try:
        ort.ModelCompiler(
            chosen,
            str(folder / name),
            flags=ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
            graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        ).compile_to_file(str(Path(order.target, MODEL_FILE)))
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
        text = str(error)
        if sessions.is_out_of_memory(text):
            raise sessions.out_of_memory(order.limit_text, text) from None
        raise LoadRefused("invalid_model", strip_noise(text)) from None


def _probe(target: Path) -> None:
    """Append to the longest file, to find out whether a full disk or a limit made ONNX Runtime fail.

    Raises:
        OSError: it did.
    """
    longest = max(target.iterdir(), key=lambda path: path.lstat().st_size, default=target / "probe")
    with longest.open("ab") as probe:
        probe.write(bytes(PROBE_BYTES))


def _check_written(order: Optimise) -> None:
    """Check that what was written is a model that refers only to its own files.

    Raises:
        LoadRefused: `optimise_failed`.
    """
    model, beside = (Path(order.target, name) for name in list_files(order))
    try:
        locations = set(external_locations(model))
    except (Unparsable, TooManyFields, FileNotFoundError) as problem:
        raise LoadRefused("optimise_failed", f"what was written is no model: {problem}") from None
    if order.device is not None and not has_context_in(model.read_bytes(), beside.name):
        raise LoadRefused("optimise_failed", f"{order.device.name} did not write what it made into its file")
    if not locations <= {beside.name}:
        raise LoadRefused("optimise_failed", "what was written refers to files that are not its own")


def has_context_in(model: bytes, name: str) -> bool:
    """Return whether all contexts of a provider in a model are in the file of this name.

    As protocol buffers encode it: field 1 of the attribute is its name, field 4 the text.
    """
    field, text = b"ep_cache_context", name.encode()
    parts = model.split(b"\n" + bytes([len(field)]) + field)[1:]
    begin = b'"' + bytes([len(text)]) + text
    return bool(parts) and all(part.startswith(begin) for part in parts)
