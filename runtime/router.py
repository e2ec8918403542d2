"""Routing: resolves where a model is, by the recorded state, so that routing moves with its event."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from events.jobs import BYTES_GONE, Job
from events.log import Log
from events.models import Model, ModelState
from events.types import LoadParameters
from runtime.consumer.running import RunningLoad
from runtime.elsewhere import ALONE, Elsewhere
from runtime.errors import ModelNotLoaded, QueueFull, RuntimeProblem, WorkerDied
from runtime.lostmodels import describe_unload, explain_loss
from runtime.process.inflight import Answer
from runtime.process.sharedmemory import Region
from runtime.process.worker import Worker
from runtime.repository import REQUEST_LIMIT_S, Repository, RepositoryBusy
from runtime.statistics import InferenceTimes
from runtime.wire import Outcome, Tensor, TensorSpec, WantedOutput


class ModelUnloading(RuntimeProblem):
    """The model is being unloaded and takes no more inferences."""

    code = "model_unloading"


class ModelRecovering(ModelNotLoaded):
    """The model lost its worker and is being reloaded."""


class ModelReplaced(ModelRecovering):
    """The model is being replaced in place: the old version was unloaded first."""


class BytesGone(ModelNotLoaded):
    """The bytes that served are nowhere any more."""

    code = BYTES_GONE
    retry_after_s = None  # a person decides what to load


class OtherVersionLoaded(ModelNotLoaded):
    """Another version than the named one is loaded."""


class UnknownName(RuntimeProblem):
    """No version of the model has this name."""

    code = "unknown_label"


_WITHOUT_LOAD = (ModelState.UNLOADED, ModelState.FAILED)

Version = int | str
"""A version as a request names it: its number, or a name."""


class InferenceRequest(msgspec.Struct, frozen=True, gc=False):
    """A decoded request.

    Without `outputs`, all outputs are requested. `text` is the form of those that are not listed: JSON, or
    else binary. `timeout_us` is the client's timeout in microseconds, or None. `region` is
    where binary tensors lie, if that is the memory that a worker shares. `priority` is the client's: 1 is the
    highest, and 0 none.
    """

    id: str | None
    timeout_us: int | None
    tensors: tuple[Tensor, ...]
    outputs: tuple[WantedOutput, ...] = ()
    text: bool = False
    region: Region | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Here:
    """The running load that answers for a model.

    Attributes:
        position: the position of its `ModelLoaded`.
        max_queue: how many of its inferences may be queued or running.
        has_copies: whether the model is loaded at other servers, too.
        gives_way: whether an inference that names no version brings back what a person chose.
    """

    model_id: str
    version: int
    position: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: RunningLoad
    max_queue: int
    has_copies: bool = False
    gives_way: bool = False

    @property
    def max_batch_size(self) -> int:
        """Requests that may run together; 0 without batching."""
        return self.load.parameters.max_batch_size

    @property
    def source(self) -> str:
        """The load behind an answer, for the response header that refers to the ledger."""
        return f"{self.model_id}/{self.version};position={self.position}"

    def count_answer(self, outcome: Outcome, times: InferenceTimes) -> None:
        """Count an answered inference, now that its response is written."""
        # The load's statistics of now: they are replaced when it ends.
        statistics, now_ms = self.load.statistics, time.time_ns() // 10**6
        statistics.count_success(outcome, times, time.monotonic_ns(), now_ms)

    def check_queue(self) -> None:
        """Check that another inference may be queued.

        Raises:
            QueueFull: `inference_queue_full`.
        """
        workers = self.load.serving
        in_flight = workers[0].in_flight if len(workers) == 1 else sum([each.in_flight for each in workers])
        if in_flight >= self.max_queue:
            raise queue_full(self.model_id, self.max_queue, "are queued or running")

    def choose_worker(self) -> Worker:
        """Return the least busy worker, in whose memory the body of a request will lie."""
        return _least_busy(self.load.serving)


@dataclass(frozen=True, slots=True)
class There:
    """The other server at which a model is loaded.

    Attributes:
        server: its name.
        version: the requested one; None is any.
        is_last: whether a copy has failed already, so that this server's answer counts in any case.
    """

    server: str
    version: int | None = None
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """No load answers for a model: why."""

    problem: ModelNotLoaded | ModelUnloading


Target = Here | There | Absent


class Answered(msgspec.Struct, frozen=True, gc=False):
    """A load's answer to an inference."""

    here: Here
    outcome: Outcome
    outputs: Sequence[Tensor]


class Router:
    """Resolves models to the running loads; the repository only says why there is none.

    At most `max_queue` inferences of one model may be queued or running, unless its load has another limit.
    `elsewhere` knows other servers.
    """

    def __init__(
        self,
        log: Log,
        loads: Mapping[str, RunningLoad],
        repository: Repository,
        *,
        max_queue: int,
        elsewhere: Elsewhere = ALONE,
    ) -> None:
        self._elsewhere = elsewhere
        self._log = log
        self._loads = loads
        self._repository = repository
        self._max_queue = max_queue
        self._known: dict[str, tuple[Model, Here]] = {}

    def find_version(self, model_id: str, version: Version | None) -> int | None:
        """Return the number of the version in a request, or None if the request names none.

        Raises:
            UnknownName: no version has the name.
        """
        if not isinstance(version, str):
            return version
        versions = self._log.state.registers.find_versions(model_id)
        number = versions.versions_by_name.get(version)
        if number is None:
            raise UnknownName(versions.describe_unknown(version))
        return number

    def resolve(
        self,
        model_id: str,
        version: Version | None = None,
        *,
        spreads: bool = False,
        returns: bool = False,
    ) -> Target:
        """Return where a model, in this version if there is one, is now. This has no effect.

        A name stands for its version of now, so one that moves with a load is ready before and after. A copy
        here answers. With `spreads`, that of another server does if the one here is clearly busier. With
        `returns`, a model is absent that is to return to what a person chose, unless a version is named.

        Raises:
            UnknownName: no version has the name.
        """
        model = self._log.state.models.get(model_id)
        number = self.find_version(model_id, version)
        known = self._known.get(model_id)
        here = known[1] if known is not None and known[0] is model else self._find(model_id, model)
        target = self._check(here, version, number) if isinstance(here, Here) else here
        if isinstance(target, Here):
            if returns and target.gives_way and number is None:
                return Absent(ModelReplaced(f"model '{model_id}' returns to the version that a person chose"))
            is_left = spreads and target.has_copies and self._find_copy(model_id, number, target.load)
            return is_left or target
        has_copies = model is not None and bool(model.others)
        return (self._find_copy(model_id, number) if has_copies else None) or target

    def _find_copy(self, model_id: str, version: int | None, own: RunningLoad | None = None) -> There | None:
        """Return another server that answers for a model, or None if there is none, or `own` answers."""
        state = self._log.state
        model = state.models.get(model_id)
        server = None if model is None else self._elsewhere.choose(model, state, version, own)
        return None if server is None else There(server, version)

    def _check(self, here: Here, version: Version | None, number: int | None) -> Here | Absent:
        """Return a load, or why it does not answer now."""
        model_id = here.model_id
        if (refusal := self._elsewhere.refusal()) is not None:
            return Absent(refusal)
        if number is not None and number != here.version:
            return Absent(OtherVersionLoaded(self._describe_other(here, version, number)))
        if not here.load.serving:
            if here.load.draining:
                return Absent(_unloading(model_id, here.load.unload))
            return _just_died(model_id)
        return here

    def _describe_other(self, here: Here, version: Version | None, number: int) -> str:
        """Return why the version of a request does not answer."""
        model_id, loaded = here.model_id, f"version {here.version} is"
        what = f"version {number} of model '{model_id}' is not loaded"
        if isinstance(version, str):
            what = self._log.state.registers.find_versions(model_id).describe_name(version)
            loaded = f"{loaded} loaded"
        body = f'{{"version": {number}}}'
        return f"{what}, {loaded}; load it with POST /api/v1/models/{model_id}/load and body {body}"

    def is_ready(self, model_id: str, version: Version | None = None) -> bool:
        return isinstance(self.resolve(model_id, version), Here)

    async def find(self, model_id: str, version: Version | None = None) -> Here:
        """Return the load of a model; a refusal also checks whether the repository has the model.

        Raises:
            UnknownModel: `unknown_model`, neither loaded nor in the repository.
            UnknownName: no version has the name.
            ModelNotLoaded: `model_not_loaded`.
            ModelUnloading: `model_unloading`.
            RepositoryUnreadable: `repository_unreadable`, whether there is the model cannot be known.
        """
        target = self.resolve(model_id, version)
        if isinstance(target, Here):
            return target
        if isinstance(target, There):
            raise ModelNotLoaded(f"model '{model_id}' is loaded at '{target.server}', not here")
        model = self._log.state.models.get(model_id)
        is_known = model is not None and (model.is_missed or model.state not in _WITHOUT_LOAD)
        if not is_known:
            look = partial(self._repository.versions, model_id)
            with suppress(RepositoryBusy):
                await self._repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
        raise target.problem

    async def infer(
        self,
        here: Here,
        request: InferenceRequest,
        timeout_s: float,
        times: InferenceTimes,
        *,
        version: Version | None = None,
        worker: Worker | None = None,
        spreads: bool = False,
    ) -> Answered | There | Absent:
        """Run one inference, at most `timeout_s` seconds; cancelling this stops the run.

        An inference that was queued when its worker died is repeated once, when the model is reloaded; if
        that is not here, its new target is returned. With `spreads`, another copy is returned at once if
        there is one, as it is if the queue is full. A failure is counted; the caller counts an answer with
        `Here.count_answer` when it is written.

        Args:
            here: the load, as it was resolved just now.
            request: the inputs.
            timeout_s: its limit.
            times: the request's times; the router adds its own.
            version: the requested one, for a repetition; None is any.
            worker: in whose memory the inputs lie. Without one, or if it has died, it is the least busy.
            spreads: whether another copy may answer instead.

        Raises:
            QueueFull: `inference_queue_full`.
            RuntimeProblem: the worker's error.
        """
        times.asked_ns = began_ns = time.monotonic_ns()
        try:
            try:
                outcome, outputs = await self._ask(here, request, timeout_s, worker)
            except (QueueFull, WorkerDied) as problem:
                if isinstance(problem, WorkerDied) and problem.begun:
                    raise _explain(here, problem) from problem  # the request may be what killed the worker
                named = None if version is None else here.version
                other = self._find_copy(here.model_id, named) if here.has_copies and spreads else None
                if other is not None:
                    here.load.statistics.count_failure(time.monotonic_ns() - times.arrived_ns)
                    return replace(other, is_last=True)
                if isinstance(problem, QueueFull):
                    raise
                left_s = timeout_s - (time.monotonic_ns() - began_ns) / 1e9
                if not await self._is_reloaded(here.model_id, version, left_s):
                    raise _explain(here, problem) from problem
                times.asked_ns = time.monotonic_ns()
                times.waited_ns += times.asked_ns - began_ns
                target = self.resolve(here.model_id, version)
                if not isinstance(target, Here):
                    here.load.statistics.count_failure(times.asked_ns - times.arrived_ns)
                    return target
                here, left_s = target, timeout_s - (times.asked_ns - began_ns) / 1e9
                outcome, outputs = await self._ask(here, request, left_s)
        except BaseException as error:  # a cancelled request is a use, too
            here.load.last_used_ns = ended_ns = time.monotonic_ns()
            if isinstance(error, RuntimeProblem):
                here.load.statistics.count_failure(ended_ns - times.arrived_ns)
            raise
        here.load.last_used_ns = times.answered_ns = time.monotonic_ns()
        return Answered(here, outcome, outputs)

    def _ask(
        self, here: Here, request: InferenceRequest, timeout_s: float, worker: Worker | None = None
    ) -> Awaitable[Answer]:
        workers = here.load.serving
        if worker not in workers:
            worker = _least_busy(workers)
        here.check_queue()
        return worker.infer(
            request.tensors,
            request.outputs,
            text=request.text,
            timeout_s=timeout_s,
            region=request.region,
            level=choose_level(here.load.parameters, request.priority),
        )

    async def _is_reloaded(self, model_id: str, version: Version | None, timeout_s: float) -> bool:
        """Wait until a model is not being reloaded any more; return False if that takes too long."""

        def has_ended() -> bool:
            target = self.resolve(model_id, version)
            return not (isinstance(target, Absent) and isinstance(target.problem, ModelRecovering))

        return await self._log.wait_until(has_ended, timeout_s)

    def _find(self, model_id: str, model: Model | None) -> Target:
        """Find a model; a load here is cached until the model's recorded state changes."""
        self._known.pop(model_id, None)
        seen = None if model is None else self._elsewhere.view(model)
        serving = seen.serving if seen is not None else None
        if model is None or seen is None or serving is None or model.phase is not ModelState.LOADED:
            return Absent(_not_loaded(model_id, model, self._log.state.jobs))
        server = self._elsewhere.locate(seen, self._log.state)
        if server is not None:
            return There(server)
        load = self._loads.get(serving.load_job_id)
        if load is None or load.report is None:
            return _just_died(model_id)
        inputs, outputs = load.report.inputs, load.report.outputs
        of_model = model.serving or serving  # a copy has the settings of the first
        max_queue = of_model.parameters.max_queue or self._max_queue
        has_copies, gives_way = bool(model.others), model.is_to_return
        about = inputs, outputs, load, max_queue, has_copies, gives_way
        here = Here(model_id, serving.version, serving.position, *about)
        self._known[model_id] = model, here
        return here


def choose_level(parameters: LoadParameters, priority: int) -> int:
    """Return the level of an inference, as Triton does: what is none of the model's is its default."""
    levels = parameters.priority_levels or 0
    return priority if 1 <= priority <= levels else parameters.default_priority_level or levels


def queue_full(model_id: str, limit: int, doing: str) -> QueueFull:
    """Return the refusal of an inference because so many of its model are waiting."""
    cure = "a load of the model, or its loadledger.toml, sets another limit with max_queue"
    return QueueFull(f"{limit} inferences of model '{model_id}' {doing}, and no more may; {cure}")


def _not_loaded(
    model_id: str, model: Model | None, jobs: Mapping[str, Job]
) -> ModelNotLoaded | ModelUnloading:
    state = model.state if model is not None else ModelState.UNLOADED
    if model is not None and model.previous is not None:
        return ModelReplaced(f"model '{model_id}' is being replaced by another version")
    if model is not None and state is ModelState.UNLOADING:
        return _unloading(model_id, next((jobs[each] for each in model.unloads if each in jobs), None))
    if model is not None and model.phase is ModelState.LOST:
        return ModelRecovering(f"model '{model_id}' lost its worker and is being loaded again")
    if state is ModelState.LOADING:
        return ModelNotLoaded(f"model '{model_id}' is still loading")
    error = model.error if model is not None and model.is_missed else None
    if error is not None:
        kind = BytesGone if error.code == BYTES_GONE else ModelNotLoaded
        return kind(f"model '{model_id}' failed: {error.message} ({error.code})")
    chosen = model.chosen or None if model is not None else None
    by = f": {chosen.by} unloaded it {chosen.at}" if chosen is not None and chosen.version is None else ""
    return ModelNotLoaded(
        f"model '{model_id}' is not loaded{by}; load it with POST /api/v1/models/{model_id}/load"
    )


def _unloading(model_id: str, unload: Job | None) -> ModelUnloading:
    return ModelUnloading(f"model '{model_id}' is being unloaded{describe_unload(unload)}")


def _explain(here: Here, death: WorkerDied) -> RuntimeProblem:
    """Return the error of an inference whose worker has died."""
    is_expected = death.worker_id in here.load.expected_exits
    return explain_loss(here.model_id, death, here.load.unload, is_expected=is_expected)


def _just_died(model_id: str) -> Absent:
    problem = f"the worker of model '{model_id}' has just died; it is being started again"
    return Absent(ModelRecovering(problem))


def _least_busy(workers: Sequence[Worker]) -> Worker:
    return workers[0] if len(workers) == 1 else min(workers, key=_count_requests)


def _count_requests(worker: Worker) -> int:
    """Return how many inferences a worker has, with those whose bodies are still arriving."""
    return worker.in_flight + worker.tensor_memory.requests.regions
