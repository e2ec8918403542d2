"""How a worker loads a model: the session, from the version's files or an optimised model, and the warm-up.

It hashes nothing: the server has taken the files into its store, and hashes them there.
"""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.errors import InferenceFailed, LoadRefused, RuntimeProblem
from runtime.memory import thread_bytes
from runtime.onnxfile import MODEL_FILE, find_model_file
from runtime.wire import (
    DATATYPES,
    MAX_DIMENSIONS,
    Load,
    Loaded,
    LoadStage,
    OptimisedModel,
    Tensor,
    TensorSpec,
)
from runtime.worker import extensions, sessions
from runtime.worker.sessions import ServingSession, describe_model, is_out_of_memory

PR_SET_THP_DISABLE = 41
"""linux/prctl.h"""
ENOUGH_BYTES = 2_000_000
"""Least size of copied or packed weights for huge pages. With less a session is created no faster and can
take 2 MB more; with 5 MB it takes two thirds of the time, with 50 MB half (measured, decision 22)."""
NICENESS = 10
"""A tenth of the share of a core. With 19, a sixtieth, a preparation on a busy machine takes memory for
minutes, and its trial measures waiting."""
SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""The system call's number by machine; the C library has no function for it."""
IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT = 1, 3, 13
"""linux/ioprio.h"""
AUTOGROUP = Path("/proc/self/autogroup")
"""Where the kernel schedules each session (setsid) as one group, niceness counts only within it; this file
sets the group's."""
MAX_ZEROS_BYTES = 64 * 2**20
"""Limit of zeros: the size of a request. A model that declares more is hardly run with that much."""
TEXT_BYTES = 40
"""Size of an empty element of BYTES: numpy's reference to it, and ONNX Runtime's string."""
WITH_ZEROS = (
    "the model does not run on zeros of its declared shapes, and has to before it is loaded: give inputs that"
    " it takes as [[warm_up.inputs]] in its loadledger.toml"
)
WITH_GIVEN = (
    "the model does not run on the inputs that its loadledger.toml gives as [[warm_up.inputs]], and has to"
    " before it is loaded: correct them"
)
OR_NOT = "or switch that off there, by enabled = false under [warm_up]"
OnStage = Callable[[LoadStage], None]


def huge_pages_help(source_bytes: int, optimised: OptimisedModel | None) -> bool:
    """Return whether a session is created faster with huge pages.

    Args:
        source_bytes: the size of the version's files.
        optimised: the optimised model, if one is used. ONNX Runtime (1.31) packs weights that it has packed
            once more to find them there; the rest it only maps.
    """
    copied_bytes = source_bytes if optimised is None else optimised.bytes - source_bytes
    return copied_bytes >= ENOUGH_BYTES


def disable_huge_pages() -> None:
    """Disable huge pages in this process, whatever malloc requests; a kernel that refuses changes nothing."""
    sessions.LIBC.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def lower_priority() -> None:
    """Lower the priority of this thread, and of those that it starts, on processor and disk, for good.

    Where the kernel refuses, nothing changes.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    number = SYS_IOPRIO_SET.get(platform.machine())
    if number is not None:
        sessions.LIBC.syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)
    with contextlib.suppress(OSError):
        AUTOGROUP.write_bytes(b"%d" % NICENESS)


def clock_for(order: Load) -> Callable[[], int]:
    """Return the clock that times a worker's loading and runs, in nanoseconds.

    In the background it is the process's computing time: there a worker waits for others, and is stopped.
    """
    return time.process_time_ns if order.background else time.monotonic_ns


def load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[ServingSession, Loaded]:
    """Load the model of an order and warm it up on the given inputs; returns it and the server's report.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`, `warm_up_failed`.
    """
    try:
        with sessions.out_of_memory_refused(order.least_limit_bytes):
            return _load(order, given, on_stage)
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None
    except OSError as error:  # only without a store: nobody else writes to that
        raise LoadRefused("model_changed", f"a file of the model cannot be read any more: {error}") from None


def _load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[ServingSession, Loaded]:
    on_stage("loading")
    if not huge_pages_help(order.bytes, order.optimised):
        disable_huge_pages()
    sessions.limit_memory(
        order.hard_limit_bytes(thread_bytes()),
        order.load_limit_bytes,
        mapped_bytes=order.mapped_bytes,
        threads=order.threads,
    )
    clock = clock_for(order)
    started_ns = clock()
    session = _create_session(order)
    loading_us = (clock() - started_ns) // 1000
    model, warming_up_us = describe_model(session, order.max_batch_size), None
    # Zeros are no image, and a decoder that gets them may end the process (decision 49).
    is_possible = bool(given) or not _names_extensions(order)
    if order.warm_up and is_possible:  # before it is measured: memory of an inference belongs to the model
        warming_up_us = _warm_up(order, model, given, lambda: on_stage("warming_up"))
    sessions.return_free_memory()  # of loading: as much as the model keeps
    sessions.lift_load_limit()
    return model, Loaded(model.inputs, model.outputs, loading_us, warming_up_us)


def _warm_up(
    order: Load, model: ServingSession, given: Sequence[Tensor], on_begin: Callable[[], None]
) -> int | None:
    try:
        return warm_up(model, given, on_begin)
    except LoadRefused:
        if order.warm_up_required:
            raise
        return None


def _names_extensions(order: Load) -> bool:
    """Whether the model of an order names operators of ONNX Runtime Extensions."""
    folder = Path(order.folder if order.optimised is None else order.optimised.folder)
    name = find_model_file(each.name for each in os.scandir(folder))
    return name is not None and extensions.are_named(folder / name)


def _create_session(order: Load) -> ort.InferenceSession:
    if order.optimised is None:
        folder, root = Path(order.folder), Path(os.path.realpath(order.root))
        chosen = sessions.session_options(order.threads)
        return sessions.create_checked(folder, root, chosen, order.least_limit_bytes)
    chosen = sessions.saved_graph_options(order.threads)
    model_file = str(Path(order.optimised.folder) / MODEL_FILE)
    return sessions.create_session(model_file, chosen, order.least_limit_bytes)


def warm_up(model: ServingSession, given: Sequence[Tensor], on_begin: Callable[[], None]) -> int | None:
    """Warm-up: run a model on the given inputs, else on zeros of the declared shapes.

    Args:
        model: the model; zeros are one element along its batch dimension.
        given: inputs of its loadledger.toml; empty means zeros.
        on_begin: called before the run, and only if there is one.

    Returns:
        The duration in microseconds, or None if the shapes do not allow zeros.

    Raises:
        LoadRefused: `warm_up_failed`, with the runtime's words and what to do.
        MemoryError: there is not enough memory for it.
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
        # ONNX Runtime reports a scalar like an undeclared shape, so zeros may have been no valid input.
        if not given and not all(spec.shape for spec in required):
            return None
        advice = WITH_GIVEN if given else WITH_ZEROS
        raise LoadRefused("warm_up_failed", f"{advice}, {OR_NOT}. It says: {problem}") from None
    return (time.perf_counter_ns() - started_ns) // 1000


def _run(model: ServingSession, given: Sequence[Tensor], required: Sequence[TensorSpec]) -> None:
    feed = model.runner.decode_inputs(given) if given else {spec.name: make_zeros(spec) for spec in required}
    if model.dimension is not None:
        model.dimension.measure(feed)
    model.runner.run(model.runner.select_outputs((), text=False), feed, ort.RunOptions())


def zeros_are_allowed(model: ServingSession, required: Sequence[TensorSpec]) -> bool:
    """Return whether these shapes allow zeros, within the limit, and the model has an output to send."""
    answers = any(spec.datatype in DATATYPES for spec in model.outputs)
    return answers and all(map(_is_known, required)) and sum(map(_bytes, required)) <= MAX_ZEROS_BYTES


def make_zeros(spec: TensorSpec) -> Any:
    """Return an input of 0, False or empty texts."""
    if spec.datatype == "BYTES":
        return np.full(_shape(spec), "", object)
    return np.zeros(_shape(spec), DATATYPES[spec.datatype].numpy)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the declared shape with 1 for an open first dimension, usually the batch dimension."""
    return (1, *spec.shape[1:]) if spec.shape[:1] == (-1,) else spec.shape


def _is_known(spec: TensorSpec) -> bool:
    shape = _shape(spec)
    return spec.datatype in DATATYPES and len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0


def _bytes(spec: TensorSpec) -> int:
    # A length of 0 does not make the others any that numpy takes.
    elements = math.prod(max(length, 1) for length in _shape(spec))
    return elements * (DATATYPES[spec.datatype].size or TEXT_BYTES)
