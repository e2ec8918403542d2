"""How a worker loads a model: the session, from the version's files or an optimised model, and the warm-up.

It hashes nothing: the server has taken the files into its store, and hashes them there.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.memory import thread_bytes
from runtime.onnxfile import MODEL_FILE, find_model_file
from runtime.wire import (
    Load,
    Loaded,
    LoadStage,
    OptimisedModel,
    ProviderNodes,
    Tensor,
)
from runtime.worker import privileges, providers, sessions
from runtime.worker.sessions import ServingSession, describe_model
from runtime.worker.warmup import NO_EXAMPLES, ModelWarmUp, SearchLimit

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
    privileges.LIBC.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


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
        privileges.LIBC.syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)
    with contextlib.suppress(OSError):
        AUTOGROUP.write_bytes(b"%d" % NICENESS)


def clock_for(order: Load) -> Callable[[], int]:
    """Return the clock that times a worker's loading and runs, in nanoseconds.

    In the background it is the process's computing time: there a worker waits for others, and is stopped.
    """
    return time.process_time_ns if order.background else time.monotonic_ns


def load(
    order: Load, given: Sequence[Tensor], limit: SearchLimit, on_stage: OnStage
) -> tuple[ServingSession, Loaded]:
    """Load the model of an order and warm it up on the given inputs; returns it and the server's report.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`, `warm_up_failed`; with
            batching also `rows_depend`, on a device `device_unavailable` and `fallback_refused`.
    """
    try:
        with sessions.out_of_memory_refused(order.limit_text):
            return _load(order, given, limit, on_stage)
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None
    except OSError as error:  # only without a store: nobody else writes to that
        raise LoadRefused("model_changed", f"a file of the model cannot be read any more: {error}") from None


def _load(
    order: Load, given: Sequence[Tensor], limit: SearchLimit, on_stage: OnStage
) -> tuple[ServingSession, Loaded]:
    on_stage("loading")
    if order.device is None and not huge_pages_help(order.bytes, order.optimised):
        disable_huge_pages()
    sessions.limit_memory(
        order.hard_limit_bytes(thread_bytes()),
        order.soft_limit_bytes,
        mapped_bytes=order.mapped_bytes,
        threads=order.threads,
        device=order.device,
    )
    clock = limit.clock = clock_for(order)
    started_ns = clock()
    session, placed = _create_session(order)
    loading_ns = clock() - started_ns
    model = describe_model(session, order.max_batch_size, order.max_request_bytes)
    warming_up_us, examples = None, NO_EXAMPLES
    if order.device is not None:
        providers.check_tensors(order.device, (*model.inputs, *model.outputs))
    warm_up = ModelWarmUp(order, model, given, _find_file(order), limit)
    if order.warm_up:  # before it is measured: memory of an inference belongs to the model
        began_ns = clock()
        warming_up_us, examples = warm_up.run(loading_ns, lambda: on_stage("warming_up"))
        if order.background and warming_up_us is not None:  # for a trial, which compares it with another's
            warming_up_us = (clock() - began_ns) // 1000
    dependence = warm_up.check_rows(examples, warming_up_us or 0)
    sessions.return_free_memory()  # of loading: as much as the model keeps
    sessions.lift_load_limit()
    inputs = tuple(msgspec.structs.replace(spec, example=examples.get(spec.name)) for spec in model.inputs)
    return model, Loaded(inputs, model.outputs, loading_ns // 1000, warming_up_us, placed, dependence)


def _find_file(order: Load) -> Path | None:
    folder = Path(order.folder if order.optimised is None else order.optimised.folder)
    name = find_model_file(each.name for each in os.scandir(folder))
    return None if name is None else folder / name


def _create_session(order: Load) -> tuple[ort.InferenceSession, tuple[ProviderNodes, ...]]:
    """Return the session of a load, and where its nodes run, unless that is the CPU."""
    choose = sessions.session_options if order.optimised is None else sessions.saved_graph_options
    chosen = choose(order.threads)
    device = None if order.device is None else providers.add_device(order.device, order.threads, chosen)
    if order.optimised is None:
        folder, root = Path(order.folder), Path(os.path.realpath(order.root))
        session = sessions.create_checked(folder, root, chosen, order.limit_text)
    else:
        model_file = str(Path(order.optimised.folder) / MODEL_FILE)
        session = sessions.create_session(model_file, chosen, order.limit_text)
    placed = () if order.device is None else providers.count_nodes(session, order.device, device)
    if order.optimised is not None:
        placed = order.optimised.placed or placed
    return session, placed
