"""What a worker does with `Load`: check the files, create the session, run it once, measure what it takes."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime as ort

from runtime import memory
from runtime.errors import LoadRefused
from runtime.repository import FileIdentity, identify
from runtime.wire import Load, Loaded, LoadedFile, LoadStage, Prepare, Prepared, Tensor, plain_text
from runtime.worker import hugepages, sessions
from runtime.worker.background import give_way
from runtime.worker.beside import Beside, Hashing
from runtime.worker.formuse import FormUnusable, GivenForm
from runtime.worker.model import Model, model_of
from runtime.worker.warmup import warm_up

WATCHED_FROM_BYTES = 4 * 2**20
"""Of a form's files: so much of what a load takes in between can be missed when nobody watches it (see
`Beside`). A thread that does takes some milliseconds of a load, which are most of a small one."""
OnStage = Callable[[LoadStage], None]


@dataclass(frozen=True, slots=True)
class _Made:
    """A session that is ready, and what it took to make it."""

    model: Model
    loading_us: int
    warming_up_us: int | None
    prepared: str | None = None
    prepared_failure: str | None = None


def load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[Model, Loaded]:
    """Load the model that the order names.

    Args:
        order: what to load.
        given: what to run it on before it is loaded; nothing means zeros.
        on_stage: is told of each step.

    Returns:
        The model, and what to tell the server of it.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`, `warm_up_failed`.
    """
    if order.background:
        give_way()
    try:
        return _load(order, given, on_stage)
    except MemoryError as error:
        raise sessions.out_of_memory(order.memory_limit_bytes, str(error) or "MemoryError") from None
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None


def located(order: Load | Prepare) -> tuple[Path, Path, list[FileIdentity]]:
    """Find what an order names: the version's folder, the repository's root without links, and the files.

    Raises:
        LoadRefused: `unsafe_file`, or `model_changed`: these are not the files that were found.
    """
    folder, root = Path(order.folder), Path(os.path.realpath(order.root))
    before = identify(folder, root)
    if tuple(file.path for file in before) != order.files:
        raise LoadRefused("model_changed", "the model's files are no longer those that were found")
    return folder, root, before


def check_unchanged(before: list[FileIdentity], folder: Path, root: Path) -> None:
    """Refuse with `model_changed` if the files are no longer those that they were."""
    if identify(folder, root) != before:
        raise LoadRefused("model_changed", "the model's files changed while they were loaded")


def _load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[Model, Loaded]:
    folder, root, before = located(order)
    on_stage("loading")
    sources = Hashing(folder, before, order.known)
    form, why_not = _given_form(order.prepared, sources)
    used = None if form is None else order.prepared
    if not order.huge_pages or not hugepages.are_better(sum(file.bytes for file in before), used):
        hugepages.go_without()
    # Within a limit there may be no memory for a thread any more when a form turns out to be of no use.
    limited = order.memory_limit_bytes is not None
    watched = form is None or limited or form.bytes >= WATCHED_FROM_BYTES
    with Beside(sources, *(() if form is None else (form.hashing,)), watched=watched) as beside:
        try:
            made = _Loading(order, given, on_stage, beside).make(folder, root, form, why_not)
            files = beside.result(sources)
        finally:  # if they changed, that is the reason for whatever went wrong as well
            check_unchanged(before, folder, root)
    on_stage("measuring")
    return made.model, _report(made, files, beside)


def _given_form(prepared: Prepared | None, sources: Hashing) -> tuple[GivenForm | None, str | None]:
    """Return the form that a load was given, if that may be of use, or why not."""
    if prepared is None:
        return None, None
    try:
        return GivenForm(prepared, sources), None
    except FormUnusable as unusable:
        return None, str(unusable)


class _Loading:
    """Makes the session of one load."""

    def __init__(self, order: Load, given: Sequence[Tensor], on_stage: OnStage, beside: Beside) -> None:
        self._order = order
        self._given = given
        self._on_stage = on_stage
        self._beside = beside
        self._started_ns = time.perf_counter_ns()
        sessions.limit_memory(order.memory_limit_bytes)  # here, when this process has all its threads

    def make(self, folder: Path, root: Path, form: GivenForm | None, why_not: str | None) -> _Made:
        """Make it of a form, if there is one and it is of use, else of the repository's files."""
        if form is not None:
            try:
                return self._of_form(form)
            except FormUnusable as unusable:
                why_not = str(unusable)
            self._beside.watch()
        chosen = sessions.options(self._order.threads)
        session = sessions.create_checked(folder, root, chosen, self._order.memory_limit_bytes)
        return replace(self._ready(session, _since(self._started_ns)), prepared_failure=why_not)

    def _of_form(self, form: GivenForm) -> _Made:
        chosen = sessions.options_as_saved(self._order.threads)
        with _of_the_form():
            session = sessions.create(form.model_file, chosen, self._order.memory_limit_bytes)
        loading_us = _since(self._started_ns)
        self._beside.sample()
        form.check(self._beside)
        with _of_the_form():
            return replace(self._ready(session, loading_us), prepared=form.sha256)

    def _ready(self, session: ort.InferenceSession, loading_us: int) -> _Made:
        model, warming_up_us = model_of(session, self._order.max_batch_size), None
        if self._order.warm_up:  # before it is measured: what it takes to run is the model's own
            warming_up_us = warm_up(model, self._given, lambda: self._on_stage("warming_up"))
        return _Made(model, loading_us, warming_up_us)


@contextmanager
def _of_the_form() -> Iterator[None]:
    """Take whatever goes wrong for a problem of the form: if it is the model's, it will come again.

    But for memory, which to make a form's session may take more of: this process has not got it back.
    """
    try:
        yield
    except (LoadRefused, UnicodeDecodeError) as problem:
        if isinstance(problem, LoadRefused) and problem.code == "out_of_memory":
            raise
        raise FormUnusable(str(problem) or type(problem).__name__) from None


def _report(made: _Made, files: tuple[LoadedFile, ...], beside: Beside) -> Loaded:
    """Measure what the session takes, and say what it is."""
    started = time.perf_counter_ns()
    ctypes.CDLL(None).malloc_trim(0)  # in 2 ms gives back what loading took and freed: as much as it kept
    memory_bytes = memory.private_bytes()
    shared_bytes = memory.anonymous_bytes() - memory_bytes
    return Loaded(
        files=files,
        inputs=made.model.inputs,
        outputs=made.model.outputs,
        memory_bytes=memory_bytes,
        peak_memory_bytes=max(beside.peak_anonymous_bytes - shared_bytes, memory_bytes),
        loading_us=made.loading_us,
        hashing_us=beside.hashing_us,
        measuring_us=_since(started),
        warming_up_us=made.warming_up_us,
        prepared=made.prepared,
        prepared_failure=None if made.prepared_failure is None else _line(made.prepared_failure),
    )


def _line(text: str) -> str:
    return plain_text(" ".join(text.split()))


def _since(started_ns: int) -> int:
    return (time.perf_counter_ns() - started_ns) // 1000
