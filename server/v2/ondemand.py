"""On-demand loads for inferences, with exponential back-off after their failures.

One task per model and version requests the load and watches it. All inferences that wait for it share its
outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from events.commands import Receipt, RequestLoad
from events.errors import LedgerProblem
from events.jobs import Failure, Job, JobKind, JobStatus
from events.log import Log
from events.models import Model, ModelState
from events.sqlite.listing import Reader
from events.types import Cause
from runtime import errors
from runtime.consumer.consumer import PendingDemand
from runtime.router import Absent, Here, OtherVersionLoaded, Router, There
from runtime.scheduler.scheduler import back_off_s
from server.errors import ServerProblem

_log = logging.getLogger(__name__)

MAX_FAILURES = 1000
"""Beyond them the oldest is forgotten, and its model may be tried again sooner."""

_ABSENT = (ModelState.UNLOADED, ModelState.FAILED)
_PASSED_ON = (errors.InvalidModelId, errors.UnknownModel, errors.UnknownVersion, LedgerProblem)
"""Errors that the client gets as they are. Invalid settings of a model are not the client's mistake."""

Demand = tuple[str, int | None]
"""A model and the requested version; None for the highest in the repository."""


class DemandFailed(ServerProblem):
    """The model could not be loaded on demand."""

    code = "load_failed"

    def __init__(
        self, detail: str = "", retry_after_s: float = 1, *, http_headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail, http_headers=http_headers)
        self.retry_after_s = retry_after_s


class ServerStops(ServerProblem):
    """The server is stopping and loads no more models; send the request again after its next start."""

    code = "shutting_down"


@dataclass(frozen=True, slots=True)
class _Failed:
    """The last failure; `model` is the recorded model right after it."""

    reason: str
    model: Model | None
    failures: int
    until_s: float


class BackOff:
    """Exponential back-off after failed on-demand loads, until the model changes otherwise."""

    def __init__(self) -> None:
        self._failures: dict[Demand, _Failed] = {}

    def check(self, demand: Demand, model: Model | None, now_s: float) -> None:
        """Refuse a demand during its pause; forget a failure if the model has changed since.

        Raises:
            DemandFailed: `load_failed`, with the reason of the last failure.
        """
        failed = self._failures.get(demand)
        if failed is None:
            return
        if failed.model is not model:
            del self._failures[demand]
        elif now_s < failed.until_s:
            reason = f"{failed.reason}; a request in {failed.until_s - now_s:.1f} s tries again"
            raise DemandFailed(reason, failed.until_s - now_s)

    def note(
        self, demand: Demand, reason: str, before: Model | None, after: Model | None, now_s: float
    ) -> float:
        """Remember a failure, and return the pause in seconds until the next attempt.

        `before` and `after` are the recorded model when the load was requested and after its failure; the
        pauses of other versions go on.
        """
        last = self._failures.pop(demand, None)
        failures = 0 if last is None else last.failures + 1
        pause_s = back_off_s(failures)
        for other, failed in self._failures.items():
            if other[0] == demand[0] and failed.model is before:
                self._failures[other] = replace(failed, model=after)
        self._failures[demand] = _Failed(reason, after, failures, now_s + pause_s)
        while len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]
        return pause_s


@dataclass(slots=True)
class _Attempt:
    """The state of one task that waits for a model.

    Attributes:
        before: the recorded model when this task requested its load.
        own_job: the id of the load that this task requested, if it has not ended.
        watched_job: the id of the load that the task waits for, whoever requested it.
        was_lost: whether the model was lost, and is being reloaded.
    """

    demand: Demand
    subject: str
    before: Model | None = None
    own_job: str | None = None
    watched_job: str | None = None
    was_lost: bool = False


@dataclass(kw_only=True, eq=False)
class OnDemand:
    """Loads models on demand, and lets inferences wait for them.

    Attributes:
        log: holds the live state and notifies of outcomes.
        submit: submits the load for the first waiter's request.
        reader: finds jobs that have ended.
        demand: held as long as an inference waits, and until it is answered.
        look_up: returns the command that loads a model, for a version or None, and a subject.
        waiting_for: returns the reason why a job is pending.
        stopping: set when the server begins to stop; `log` notifies then.
        max_waiting: inferences that may wait for one model.
        on: whether on-demand loads are configured.
    """

    log: Log
    submit: Callable[[RequestLoad], Awaitable[Receipt]]
    reader: Reader
    router: Router
    demand: PendingDemand
    look_up: Callable[[str, int | None, str], Awaitable[RequestLoad]]
    waiting_for: Callable[[Job], str | None]
    stopping: asyncio.Event
    max_waiting: int
    on: bool
    _back_off: BackOff = field(default_factory=BackOff, init=False)
    _attempts: dict[Demand, asyncio.Task[Exception | None]] = field(default_factory=dict, init=False)
    _waiting: Counter[Demand] = field(default_factory=Counter, init=False)

    async def close(self) -> None:
        """End all waits; requested loads go on."""
        self.stopping.set()
        self.log.notify()
        await asyncio.gather(*self._attempts.values())

    def count_waiting(self, model_id: str) -> int:
        return sum(count for (waited_for, _), count in self._waiting.items() if waited_for == model_id)

    @asynccontextmanager
    async def keep_loaded(
        self, model_id: str, version: int | None, subject: str, ends_at_s: float
    ) -> AsyncIterator[Here | There]:
        """Load a model, and protect it from eviction until the context ends.

        On entry the model is ready, for a request that is sent at once: here, or at another node, which the
        scheduler has chosen. The first waiter's subject becomes the actor of the load; `ends_at_s` is the
        inference's deadline, on the loop's clock.

        Raises:
            RuntimeProblem: as `Router.find`, if on-demand loads are not configured.
            ModelNotLoaded: `model_not_loaded`, another version is loaded and is not replaced on demand.
            InferenceTimeout: `inference_timeout`.
            QueueFull: `inference_queue_full`, too many inferences wait for the model.
            DemandFailed: `load_failed`.
            UnknownModel: `unknown_model`, or UnknownVersion, `unknown_version`.
            LedgerProblem: `queue_full`, `log_unavailable`.
            ServerStops: `shutting_down`.
        """
        if not self.on:
            yield await self.router.find(model_id, version)
            return
        with self.demand.hold(model_id):
            while isinstance(target := self.router.resolve(model_id, version), Absent):
                if isinstance(target.problem, OtherVersionLoaded):
                    raise target.problem
                await self._wait((model_id, version), subject, ends_at_s)
            yield target

    async def _wait(self, demand: Demand, subject: str, ends_at_s: float) -> None:
        """Wait until any version of the model is ready; cancelling this does not affect other waiters."""
        model_id = demand[0]
        if self.count_waiting(model_id) >= self.max_waiting:
            raise errors.QueueFull(f"{self.max_waiting} inferences wait for model '{model_id}' already")
        attempt = self._attempts.get(demand)
        if attempt is None:
            attempt = asyncio.create_task(self._attempt(demand, subject), name=f"awaiting {model_id}")
            self._attempts[demand] = attempt
        self._waiting[demand] += 1
        try:
            async with asyncio.timeout_at(ends_at_s):
                problem = await asyncio.shield(attempt)
        except TimeoutError:
            reason = f"model '{model_id}' was not ready in time: {self._describe_wait(model_id)}"
            raise errors.InferenceTimeout(reason) from None
        finally:
            self._waiting[demand] -= 1
            if not self._waiting[demand]:
                del self._waiting[demand]
        if problem is not None:
            raise problem.with_traceback(None)  # several waiters raise it

    def _describe_wait(self, model_id: str) -> str:
        job = next(iter(self.log.state.queue(model_id)[-1:]), None)
        if job is None:
            return "it is not loaded yet"
        if job.status is JobStatus.IN_PROGRESS:
            return "it is still loading" if job.kind is JobKind.LOAD else "it is being unloaded"
        reason = self.waiting_for(job)
        return f"job {job.id} is pending" + (f" and waits for {reason}" if reason else "")

    async def _attempt(self, demand: Demand, subject: str) -> Exception | None:
        """Load a model for all its waiters; return their error, None if it is ready or none is left."""
        attempt = _Attempt(demand, subject)
        try:
            with self.log.subscribed() as wakeup:
                while True:
                    wakeup.clear()
                    if self.stopping.is_set():
                        return ServerStops()
                    is_loaded = not isinstance(self.router.resolve(demand[0]), Absent)
                    if is_loaded or (not self._waiting[demand] and attempt.own_job is None):
                        return None
                    if self._is_in_progress(attempt):
                        await wakeup.wait()
                    elif attempt.watched_job is not None:
                        await self._conclude(attempt, attempt.watched_job)
                    else:
                        await self._request_load(attempt)
        except (*_PASSED_ON, DemandFailed) as problem:
            return problem
        except Exception as error:  # noqa: BLE001 - or its waiters would wait forever
            _log.exception("the on-demand load of model %s failed", demand[0])
            return error
        finally:
            del self._attempts[demand]

    def _is_in_progress(self, attempt: _Attempt) -> bool:
        """Return whether a load, an unload or a reload of the model is in progress.

        Raises:
            DemandFailed: `load_failed`, the model was lost and is not reloaded any more.
        """
        model_id = attempt.demand[0]
        queue, model = self.log.state.queue(model_id), self.log.state.models.get(model_id)
        loads = [job for job in queue if job.kind is JobKind.LOAD]
        if loads:
            self._watch(attempt, loads[-1].id)
            return True
        if attempt.watched_job is not None:
            return False
        if queue or (model is not None and model.phase not in _ABSENT):
            attempt.was_lost = model is not None and model.phase is ModelState.LOST
            return True
        if attempt.was_lost and model is not None and model.error is not None:
            raise _demand_failed(model_id, model.error, None)
        return False

    def _watch(self, attempt: _Attempt, job_id: str) -> None:
        """Wait for a load from now on; a superseded one of this task is not its own any more."""
        attempt.watched_job = job_id
        if attempt.own_job != job_id and self.log.state.unended_job(attempt.own_job) is None:
            attempt.own_job = None

    async def _conclude(self, attempt: _Attempt, job_id: str) -> None:
        """Raise the error of an ended load, unless the model is loaded, or will be."""
        is_own = attempt.own_job == job_id
        attempt.own_job = attempt.watched_job = None
        job = await self.reader.job(job_id)
        if job is not None and job.superseded_by is not None:
            attempt.watched_job = job.superseded_by
            return
        if job is None or job.status is JobStatus.COMPLETED:  # loaded, and unloaded again
            return
        model = self.log.state.models.get(job.model_id)
        if model is not None and model.phase not in _ABSENT:  # a lost model is reloaded
            return
        if _is_withdrawn(job) or (job.error is None and not self._waiting[attempt.demand]):
            return  # an inference that came since asks again
        concerned = (job.version,) if job.cause is Cause.DEMAND else (None, job.version)
        if not is_own and attempt.demand[1] not in concerned:
            return
        failure = job.error or Failure("cancelled", "the load was cancelled")
        problem = _demand_failed(job.model_id, failure, job)
        if is_own:
            problem.retry_after_s = self._note_failure(attempt, str(problem), model)
        raise problem

    async def _request_load(self, attempt: _Attempt) -> None:
        """Look the model up and request its load, unless the model has changed meanwhile."""
        model_id, version = attempt.demand
        state = self.log.state
        attempt.was_lost = False
        attempt.before = state.models.get(model_id)
        self._back_off.check(attempt.demand, attempt.before, asyncio.get_running_loop().time())
        try:
            command = await self.look_up(model_id, version, attempt.subject)
        except _PASSED_ON:
            raise
        except (errors.RuntimeProblem, ServerProblem) as problem:
            reason = f"model '{model_id}' could not be loaded: {problem}"
            raise DemandFailed(reason, self._note_failure(attempt, reason, attempt.before)) from None
        is_absent = state.models.get(model_id) is attempt.before and not state.queue(model_id)
        if self._waiting[attempt.demand] and is_absent and not self.stopping.is_set():
            receipt = await self.submit(command)
            attempt.watched_job = receipt.job_id
            attempt.own_job = None if receipt.existing else receipt.job_id

    def _note_failure(self, attempt: _Attempt, reason: str, after: Model | None) -> float:
        now_s = asyncio.get_running_loop().time()
        return self._back_off.note(attempt.demand, reason, attempt.before, after, now_s)


def _is_withdrawn(job: Job) -> bool:
    """Whether the server cancelled an on-demand load that had not started, because nothing waited for it."""
    is_unstarted = job.cause is Cause.DEMAND and job.attempt == 0
    return job.status is JobStatus.CANCELLED and is_unstarted and not job.cancel_requested


def _demand_failed(model_id: str, failure: Failure, job: Job | None) -> DemandFailed:
    version = f"version {job.version}: " if job is not None else ""
    reason = f"model '{model_id}' could not be loaded: {version}{failure.message} ({failure.code})"
    headers = {"Location": f"/api/v1/jobs/{job.id}"} if job is not None else {}
    return DemandFailed(reason, http_headers=headers)
