"""How a worker loads a model: the session, from the version's files, and the warm-up.

The worker hashes nothing: the server has taken the files into its store, and hashes them there.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import onnxruntime as ort

from features import providers
from runtime.errors import LoadRefused
from runtime.memory import return_free_memory, thread_bytes
from runtime.onnxfile import find_model_file
from runtime.wire import Load, Loaded, LoadStage, ProviderOperators, Tensor
from runtime.worker import privileges, sessions
from runtime.worker.sessions import ServingSession, describe_model
from runtime.worker.warmup import NO_EXAMPLES, ModelWarmUp, SearchLimit

PR_SET_THP_DISABLE = 41
"""linux/prctl.h"""
ENOUGH_BYTES = 2_000_000
"""Least size of a version's files for huge pages. Below it a session is created no faster and can take 2 MB
more; with 5 MB it takes two thirds of the time, with 50 MB half (measured, decision 22)."""
OnStage = Callable[[LoadStage], None]


def disable_huge_pages() -> None:
    """Disable huge pages in this process, whatever malloc requests; a refusal by the kernel is ignored."""
    privileges.LIBC.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def load(
    order: Load, given: Sequence[Tensor], limit: SearchLimit, on_stage: OnStage
) -> tuple[ServingSession, Loaded]:
    """Load an order's model and warm it up on the given inputs; returns the model and the server's report.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`, `warm_up_failed`; with
            batching also `rows_depend`, and what a target beside the CPU refuses.
    """
    try:
        with sessions.out_of_memory_refused(order.limit_text):
            return _load(order, given, limit, on_stage)
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None
    except OSError as error:  # only without a store: nobody else writes to the store
        raise LoadRefused("model_changed", f"a file of the model cannot be read any more: {error}") from None


def _load(
    order: Load, given: Sequence[Tensor], limit: SearchLimit, on_stage: OnStage
) -> tuple[ServingSession, Loaded]:
    on_stage("loading")
    if order.target is None and order.bytes < ENOUGH_BYTES:
        disable_huge_pages()
    sessions.limit_memory(
        order.hard_limit_bytes(thread_bytes()),
        order.soft_limit_bytes,
        mapped_bytes=order.bytes,
        threads=order.threads,
        address_bytes=0 if order.target is None else order.target.address_bytes,
    )
    started_ns = time.monotonic_ns()
    session, placed = _create_session(order)
    loading_ns = time.monotonic_ns() - started_ns
    model = describe_model(session, order.max_batch_size, order.max_request_bytes)
    warming_up_us, examples = None, NO_EXAMPLES
    if order.target is not None:
        providers.check_tensors(order.target, (*model.inputs, *model.outputs))
    warm_up = ModelWarmUp(order, model, given, _find_file(order), limit)
    if order.warm_up:  # before measuring: memory of an inference belongs to the model
        warming_up_us, examples = warm_up.run(loading_ns, lambda: on_stage("warming_up"))
    dependence = warm_up.check_rows(examples, warming_up_us or 0)
    return_free_memory()  # freed by loading: as much as the model keeps
    sessions.lift_load_limit()
    inputs = tuple(msgspec.structs.replace(spec, example=examples.get(spec.name)) for spec in model.inputs)
    return model, Loaded(inputs, model.outputs, loading_ns // 1000, warming_up_us, placed, dependence)


def _find_file(order: Load) -> Path | None:
    folder = Path(order.folder)
    name = find_model_file(each.name for each in os.scandir(folder))
    return None if name is None else folder / name


def _create_session(order: Load) -> tuple[ort.InferenceSession, tuple[ProviderOperators, ...]]:
    """Return the session of a load, and, unless that is the CPU, where its operators run."""
    chosen = sessions.session_options(order.threads)
    added = None if order.target is None else providers.add_target(order.target, order.threads, chosen)
    folder, root = Path(order.folder), Path(os.path.realpath(order.root))
    session = sessions.create_checked(folder, root, chosen, order.limit_text)
    return session, () if order.target is None else providers.count_operators(session, order.target, added)
