"""Making sessions: the options that all have, and what ONNX Runtime says when it makes none."""

import os
import resource
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime import memory
from runtime.errors import LoadRefused
from runtime.onnxfile import check_external_data
from runtime.repository import MODEL_FILE
from runtime.worker.warmup import is_out_of_memory

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


def options_as_saved(threads: int) -> ort.SessionOptions:
    """Give the options of a session that is made of a graph as it was saved, optimised."""
    chosen = options(threads)
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
        return create(str(path), chosen, limit_bytes)
    create(_beginning(path), _isolated(options(1)), limit_bytes)  # says, in its own words, what is wrong
    raise LoadRefused("invalid_model", f"{MODEL_FILE} is not an ONNX file")


def create(model: str | bytes, chosen: ort.SessionOptions, limit_bytes: int | None) -> ort.InferenceSession:
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
