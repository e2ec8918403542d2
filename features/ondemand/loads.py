"""On-demand loads for inferences, with exponential back-off after their failures.

One task per model and version requests the load and watches it. All inferences that wait share its outcome.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from events.commands import Receipt
from events.errors import LedgerProblem, RequestRefused
from events.jobcommands import RequestLoad
from events.jobs import BYTES_GONE, Failure, Job, JobKind, JobStatus
from events.log import Log
from events.models import Model, ModelState
from events.sqlite.listing import Reader
from events.state import State
from events.types import Cause
from events.versions import ModelVersions
from features.ondemand.rules import find_demand_refusal
from runtime import errors
from runtime.consumer.consumer import PendingDemand
from runtime.router import Absent, Here, OtherVersionLoaded, Router, There, Version, queue_full
from runtime.scheduler.scheduler import back_off_s
from server.errors import ServerProblem

_log = logging.getLogger(__name__)

MAX_FAILURES = 1000
"""Remembered failures; beyond this the oldest is forgotten, and its model may be tried again sooner."""

_ABSENT = (ModelState.UNLOADED, ModelState.FAILED)

WAIT_ENDS = COMPLETED, FORWARDED, FAILED = "completed", "forwarded", "failed"
"""Ends of an inference's wait: the model is loaded here, or at another server; or the inference gave up."""

Demand = tuple[str, int | None, str]
"""A model and the requested version, or None for the version that a person chose last, else the highest.

Then the requesting subject, if the model's rules depend on it, so that subjects do not share a refusal.
"""


class DemandFailed(ServerProblem):
    """The model could not be loaded on demand: `load_failed`, or the code of a cause that a person ends."""

    def __init__(
        self,
        detail: str = "",
        retry_after_s: float = 1,
        *,
        code: str = "load_failed",
        http_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail, code=code, http_headers=http_headers)
        self.retry_after_s = retry_after_s


_NO_SUCH = (errors.InvalidModelId, errors.UnknownModel, errors.UnknownVersion)
_PASSED_ON = (*_NO_SUCH, LedgerProblem)
"""Errors that the client gets unchanged. Invalid settings of a model are not the client's mistake."""


class RecordedModel(NamedTuple):
    """A model and its versions as they are recorded; a change of either ends the back-off."""

    model: Model | None
    versions: ModelVersions | None

    @classmethod
    def of(cls, state: State, model_id: str) -> RecordedModel:
        return cls(state.models.get(model_id), state.registers.versions.get(model_id))

    def is_same(self, other: RecordedModel) -> bool:
        return self.model is other.model and self.versions is other.versions


@dataclass(frozen=True, slots=True)
class _Failed:
    """The last failure, and the recorded model right after it."""

    problem: DemandFailed
    known: RecordedModel
    failures: int
    until_s: float


class BackOff:
    """Exponential back-off after failed on-demand loads, until the model or its versions change otherwise."""

    def __init__(self) -> None:
        self._failures: dict[Demand, _Failed] = {}

    def check(self, demand: Demand, known: RecordedModel, now_s: float) -> None:
        """Refuse a demand during its pause; forget a failure after another change of the model.

        Raises:
            DemandFailed: with the code and the reason of the last failure.
        """
        failed = self._failures.get(demand)
        if failed is None:
            return
        if not failed.known.is_same(known):
            del self._failures[demand]
        elif now_s < failed.until_s:
            left_s = failed.until_s - now_s
            reason = f"{failed.problem}; a request in {left_s:.1f} s tries again"
            raise DemandFailed(reason, left_s, code=failed.problem.code)

    def note(
        self,
        demand: Demand,
        problem: DemandFailed,
        before: RecordedModel,
        after: RecordedModel,
        now_s: float,
    ) -> float:
        """Remember a failure, and return the pause in seconds until the next attempt.

        `before` and `after` are the recorded model at the request of the load and after its failure; the
        pauses of other versions go on.
        """
        last = self._failures.pop(demand, None)
        failures = 0 if last is None else last.failures + 1
        pause_s = back_off_s(failures)
        for other, failed in self._failures.items():
            if other[0] == demand[0] and failed.known.is_same(before):
                self._failures[other] = replace(failed, known=after)
        self._failures[demand] = _Failed(problem, after, failures, now_s + pause_s)
        while len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]
        return pause_s


@dataclass(kw_only=True, eq=False)
class OnDemand:
    """Loads models on demand, and lets inferences wait for them.

    Attributes:
        log: holds the live state and notifies of outcomes.
        submit: submits the load for the first waiter's request.
        reader: finds jobs that have ended.
        demand: held while an inference waits, and until it is answered.
        look_up: returns the command that loads a model, for a version or None, and a subject; if a person has
            chosen a version, that is the one.
        waiting_for: returns the reason why a job is pending.
        stopping: set when the server begins to stop; `log` notifies then.
        is_personal: says whether the rules for a model depend on the requester.
        max_waiting: inferences that may wait for one model, unless its load has another limit.
        on: whether on-demand loads are configured.
        waited_s: how long inferences waited for loads, by the end of the wait: one of `WAIT_ENDS`.
    """

    log: Log
    submit: Callable[[RequestLoad], Awaitable[Receipt]]
    reader: Reader
    router: Router
    demand: PendingDemand
    look_up: Callable[[str, int | None, str], Awaitable[RequestLoad]]
    waiting_for: Callable[[Job], str | None]
    stopping: asyncio.Event
    is_personal: Callable[[str], bool]
    max_waiting: int
    on: bool
    waited_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAIT_ENDS, 0.0), init=False)
    _back_off: BackOff = field(default_factory=BackOff, init=False)
    _attempts: dict[Demand, asyncio.Task[Exception | None]] = field(default_factory=dict, init=False)
    _waiting: Counter[Demand] = field(default_factory=Counter, init=False)

    async def close(self) -> None:
        """End all waits; requested loads go on."""
        self.stopping.set()
        self.log.notify()
        await asyncio.gather(*self._attempts.values())

    def count_waiting(self, model_id: str) -> int:
        return sum(count for (waited_for, *_), count in self._waiting.items() if waited_for == model_id)

    def check_queue(self, model_id: str) -> None:
        """Check that another inference may wait for a model.

        Raises:
            QueueFull: `inference_queue_full`.
        """
        own = [job.load.max_queue for job in self.log.state.queue(model_id) if job.load is not None]
        limit = (own[-1] if own else 0) or self.max_waiting
        if self.count_waiting(model_id) >= limit:
            raise queue_full(model_id, limit, "wait until it is loaded")

    @asynccontextmanager
    async def keep_loaded(
        self, model_id: str, version: Version | None, subject: str, ends_at_s: float
    ) -> AsyncIterator[Here | There]:
        """Load a model, and protect it from eviction until the context ends.

        On entry the model is ready, for a request that is sent at once: here, or at another server, which
        the scheduler has chosen. The first waiter's subject becomes the actor of the load; `ends_at_s` is the
        inference's deadline, on the loop's clock.

        Raises:
            RuntimeProblem: as `Router.find`, if on-demand loads are not configured.
            ModelNotLoaded: `model_not_loaded`, another version is loaded and is not replaced on demand.
            InferenceTimeout: `inference_timeout`.
            QueueFull: `inference_queue_full`, too many inferences wait for the model.
            DemandFailed: `load_failed`; `bytes_gone`, what a person chose is nowhere any more.
            UnknownModel: `unknown_model`, or UnknownVersion, `unknown_version`.
            UnknownName: `unknown_label`.
            LedgerProblem: `out_of_service`, `model_not_loaded`, `queue_full`, `log_unavailable`.
            ServerProblem: `shutting_down`.
        """
        if not self.on:
            yield await self.router.find(model_id, version)
            return
        with self.demand.hold(model_id):
            began_s, end = time.monotonic(), FAILED
            try:
                while isinstance(target := self.router.resolve(model_id, version, returns=True), Absent):
                    if isinstance(target.problem, OtherVersionLoaded):
                        raise target.problem
                    who = subject if self.is_personal(model_id) else ""
                    demand = model_id, self.router.find_version(model_id, version), who
                    await self._wait(demand, subject, ends_at_s)
                end = COMPLETED if isinstance(target, Here) else FORWARDED
            finally:
                self.waited_s[end] += time.monotonic() - began_s
            yield target

    async def _wait(self, demand: Demand, subject: str, ends_at_s: float) -> None:
        """Wait until any version of the model is ready; cancelling one waiter does not affect others."""
        model_id = demand[0]
        self.check_queue(model_id)
        attempt = self._attempts.get(demand)
        if attempt is None:
            attempt = asyncio.create_task(self._attempt(demand, subject), name=f"awaiting {model_id}")
            self._attempts[demand] = attempt
        self._waiting[demand] += 1
        try:
            async with asyncio.timeout_at(ends_at_s):
                problem = await asyncio.shield(attempt)
        except asyncio.CancelledError:
            self.demand.keep(model_id)
            raise
        except TimeoutError:
            self.demand.keep(model_id)
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
        """Load a model for all its waiters; return their error, or None if it is ready or all have left."""
        try:
            return await self._load(demand, subject)
        except (*_PASSED_ON, DemandFailed) as problem:
            return problem
        except Exception as error:  # noqa: BLE001 - or its waiters would wait forever
            _log.exception("the on-demand load of model %s failed", demand[0])
            return error
        finally:
            del self._attempts[demand]

    async def _load(self, demand: Demand, subject: str) -> Exception | None:
        """Wait for the work on a model, request its load if there is none, and return its failure."""
        model_id = demand[0]
        before = RecordedModel(None, None)  # when this task requested its load
        own_job: str | None = None  # the load that this task requested, until it has ended
        watched_job: str | None = None  # the load that this task waits for, whoever requested it
        was_lost = False
        with self.log.subscribed() as wakeup:
            while not self.stopping.is_set():
                wakeup.clear()
                returns = demand[1] is None
                is_loaded = not isinstance(self.router.resolve(model_id, returns=returns), Absent)
                if is_loaded or (not self._waiting[demand] and own_job is None):
                    return None
                state = self.log.state
                queue, model = state.queue(model_id), state.models.get(model_id)
                loads = [job.id for job in queue if job.kind is JobKind.LOAD]
                if loads:
                    watched_job = loads[-1]
                    if own_job != watched_job and state.unended_job(own_job) is None:  # it was superseded
                        own_job = None
                    await wakeup.wait()
                elif watched_job is not None:
                    is_own, job = own_job == watched_job, await self.reader.job(watched_job)
                    own_job, watched_job = None, None if job is None else job.superseded_by
                    if job is not None and watched_job is None:
                        problem = self._find_failure(job, demand, before, is_own=is_own)
                        if problem is not None:
                            return problem
                elif queue or (model is not None and model.phase not in _ABSENT and not model.is_to_return):
                    was_lost = model is not None and model.phase is ModelState.LOST
                    await wakeup.wait()
                elif was_lost and model is not None and model.error is not None:
                    return _demand_failed(model_id, model.error, None)  # there will be no further reload
                else:
                    before, was_lost = RecordedModel.of(state, model_id), False
                    receipt = await self._request_load(demand, subject, before)
                    if receipt is not None:
                        watched_job, own_job = receipt.job_id, None if receipt.existing else receipt.job_id
        reason = "the server stops and loads no more models; send the request again after its next start"
        return ServerProblem(reason, code="shutting_down")

    def _find_failure(
        self, job: Job, demand: Demand, before: RecordedModel, *, is_own: bool
    ) -> DemandFailed | None:
        """Return the waiters' error for an ended load, or None if they wait for another attempt.

        They may also have waited for an unload.
        """
        if job.kind is JobKind.UNLOAD:
            return None
        known = RecordedModel.of(self.log.state, job.model_id)
        model = known.model
        if job.status is JobStatus.COMPLETED or (model is not None and model.phase not in _ABSENT):
            return None  # the model was loaded, and unloaded again; or it was lost, and is reloaded
        if _is_withdrawn(job) or (job.error is None and not self._waiting[demand]):
            return None  # an inference that arrived since asks again
        concerned = (job.version,) if job.cause is Cause.DEMAND else (None, job.version)
        is_others = demand[1] not in concerned or (demand[2] and demand[2] != job.requested_by)
        if not is_own and is_others:
            return None
        failure = job.error or Failure("cancelled", "the load was cancelled")
        problem = _demand_failed(job.model_id, failure, job)
        if is_own:
            problem.retry_after_s = self._note_failure(demand, problem, before, known)
        return problem

    async def _request_load(self, demand: Demand, subject: str, before: RecordedModel) -> Receipt | None:
        """Look the model up and request its load, unless the model has changed meanwhile."""
        model_id, version, _ = demand
        refusal = find_demand_refusal(before.model, before.versions or ModelVersions(model_id), version)
        if refusal is not None:
            raise RequestRefused(refusal.code, refusal.message)
        self._back_off.check(demand, before, asyncio.get_running_loop().time())
        try:
            command = await self.look_up(model_id, version, subject)
        except _PASSED_ON:
            raise
        except (errors.RuntimeProblem, ServerProblem) as problem:
            failed = DemandFailed(f"model '{model_id}' could not be loaded: {problem}")
            failed.retry_after_s = self._note_failure(demand, failed, before, before)
            raise failed from None
        state = self.log.state
        is_absent = state.models.get(model_id) is before.model and not state.queue(model_id)
        if not self._waiting[demand] or not is_absent or self.stopping.is_set():
            return None
        return await self.submit(command)

    def _note_failure(
        self, demand: Demand, problem: DemandFailed, before: RecordedModel, after: RecordedModel
    ) -> float:
        return self._back_off.note(demand, problem, before, after, asyncio.get_running_loop().time())


def _is_withdrawn(job: Job) -> bool:
    """Whether the server cancelled an on-demand load before its start, because nothing waited for it."""
    is_unstarted = job.cause is Cause.DEMAND and job.attempt == 0
    return job.status is JobStatus.CANCELLED and is_unstarted and not job.cancel_requested


def _demand_failed(model_id: str, failure: Failure, job: Job | None) -> DemandFailed:
    version = f"version {job.version}: " if job is not None else ""
    reason = f"model '{model_id}' could not be loaded: {version}{failure.message} ({failure.code})"
    headers = {"Location": f"/api/v1/jobs/{job.id}"} if job is not None else {}
    code = BYTES_GONE if failure.code == BYTES_GONE else "load_failed"
    return DemandFailed(reason, code=code, http_headers=headers)
