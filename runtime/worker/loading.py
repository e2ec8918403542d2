"""How a worker loads a model: the session, from the version's files, the rows of batches, and the warm-up.

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
from runtime.rows.judgement import MAX_REASON_CHARACTERS, Judgement
from runtime.rows.walk import judge_rows
from runtime.wire import Load, Loaded, LoadStage, ProviderOperators, Tensor, plain_text
from runtime.worker import privileges, sessions
from runtime.worker.sessions import ServingSession, describe_model
from runtime.worker.warmup import NO_EXAMPLES, ModelWarmUp, SearchLimit

PR_SET_THP_DISABLE = 41
"""linux/prctl.h"""
ENOUGH_BYTES = 2_000_000
"""Least size of a version's files for huge pages. Below it a session is created no faster and can take 2 MB
more; with 5 MB it takes two thirds of the time, with 50 MB half (measured, decision 22)."""
ROWS_DEPEND = (
    "with max_batch_size, requests of several clients run together as rows of one batch, and {}. Load it with"
    ' max_batch_size 0, or with dependent_rows "allow" if such answers will do'
)
NO_FILE = "there is no file of the model to read its operators from"
NOT_READ = "its operators cannot be read"
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
    file, warming_up_us, examples = _find_file(order), None, NO_EXAMPLES
    rows = None if order.max_batch_size <= 1 else _judge_rows(order, file)
    if order.target is not None:
        providers.check_tensors(order.target, (*model.inputs, *model.outputs))
    if order.warm_up:  # before measuring: memory of an inference belongs to the model
        warm_up = ModelWarmUp(order, model, given, file, limit)
        warming_up_us, examples = warm_up.run(loading_ns, lambda: on_stage("warming_up"))
    return_free_memory()  # freed by loading: as much as the model keeps
    sessions.lift_load_limit()
    inputs = tuple(msgspec.structs.replace(spec, example=examples.get(spec.name)) for spec in model.inputs)
    return model, Loaded(inputs, model.outputs, loading_ns // 1000, warming_up_us, placed, rows)


def _judge_rows(order: Load, file: Path | None) -> Judgement:
    """Return whether the rows of a batch are independent.

    Raises:
        LoadRefused: `rows_depend`, unless the load allows dependent rows, or may not fail for them.
    """
    try:
        judged = Judgement("unknown", NO_FILE) if file is None else judge_rows(file)
    except (MemoryError, OSError) as error:  # the model fits all the same, and is loaded without batches
        judged = Judgement("unknown", f"{NOT_READ}: {str(error) or 'memory is short'}")
    if judged.verdict == "dependent" and order.rows_required and not order.dependent_rows:
        raise LoadRefused("rows_depend", ROWS_DEPEND.format(judged.reason))
    return Judgement(judged.verdict, plain_text(judged.reason, MAX_REASON_CHARACTERS))


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
