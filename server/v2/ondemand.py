"""Load on demand: an inference for a model that is not loaded has it loaded, and waits, where that is on.

One task per model and version asks for the load and watches it; all inferences that wait share its outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from events.commands import RequestLoad
from events.errors import LedgerProblem
from events.jobs import Failure, Job, JobKind, JobStatus
from events.log import Log, Receipt
from events.models import Model, ModelState
from events.sqlite.reader import Reader
from events.types import Cause
from runtime.consumer.usage import PendingDemand
from runtime.errors import (
    InferenceTimeout,
    InvalidModelId,
    QueueFull,
    RuntimeProblem,
    UnknownModel,
    UnknownVersion,
)
from runtime.router import ModelNotLoaded, ModelUnloading, OtherVersionLoaded, Router
from server.errors import ServerProblem

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""As a lost model's (DESIGN.md, "Crash")."""
MAX_FAILURES = 1000
"""Beyond so many the oldest is forgotten: that model is then tried sooner than it might be, nothing else."""

_ABSENT = (ModelState.UNLOADED, ModelState.FAILED)
_PASSED_ON = (InvalidModelId, UnknownModel, UnknownVersion, LedgerProblem)
"""What whoever asks has to know as it is; that a model's own settings are wrong is not his mistake."""

Demand = tuple[str, int | None]
"""A model, and the version of it that is named; None is whatever version the repository has to offer."""


class DemandFailed(ServerProblem):
    """The model could not be loaded on demand.

    Args:
        detail: why.
        retry_after_s: before that, it is not tried again on demand.
        http_headers: such as where the job is.
    """

    code = "load_failed"

    def __init__(
        self, detail: str = "", retry_after_s: float = 1, *, http_headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail, http_headers=http_headers)
        self.retry_after_s = retry_after_s


class ServerStops(ServerProblem):
    """The server stops, so nobody waits for a model any more; ask again at its next start."""

    code = "shutting_down"


@dataclass(frozen=True, slots=True)
class _Failed:
    """The last failure; `model` is what was recorded right after it."""

    reason: str
    model: Model | None
    pause_s: float
    until_s: float


class BackOff:
    """Exponential back-off after failed on-demand loads, until something else happens to the model."""

    def __init__(self) -> None:
        self._failures: dict[Demand, _Failed] = {}

    def check(self, demand: Demand, model: Model | None, now_s: float) -> None:
        """Let pass what may be asked for; forget a failure that somebody's load or unload has outdated.

        Raises:
            DemandFailed: `load_failed`, with the reason of the last time.
        """
        failed = self._failures.get(demand)
        if failed is None:
            return
        if failed.model is not model:
            del self._failures[demand]
        elif now_s < failed.until_s:
            told = f"{failed.reason}; it is tried again when asked in {failed.until_s - now_s:.1f} s"
            raise DemandFailed(told, failed.until_s - now_s)

    def note(
        self, demand: Demand, reason: str, before: Model | None, after: Model | None, now_s: float
    ) -> float:
        """Remember a failure, and return for how many seconds nobody tries again.

        Args:
            demand: what was asked for.
            reason: for those who ask meanwhile.
            before: the model as recorded when it was asked for.
            after: and when that had failed; for other versions, this attempt is no news.
            now_s: on the loop's clock.
        """
        last = self._failures.pop(demand, None)
        pause_s = FIRST_PAUSE_S if last is None else min(LONGEST_PAUSE_S, last.pause_s * 2)
        for other, failed in self._failures.items():
            if other[0] == demand[0] and failed.model is before:
                self._failures[other] = replace(failed, model=after)
        self._failures[demand] = _Failed(reason, after, pause_s, now_s + pause_s)
        while len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]
        return pause_s


@dataclass(slots=True)
class _Attempt:
    """What one task knows of a model that it waits for.

    Attributes:
        demand: the model and version.
        subject: in whose name it asks.
        before: the model as it was when this asked for its load.
        asked: the id of the load that this asked for, if that is under way.
        watched: the id of the load that is waited for, whoever asked for it.
        was_lost: whether the model was lost, and is loaded again without being asked for.
    """

    demand: Demand
    subject: str
    before: Model | None = None
    asked: str | None = None
    watched: str | None = None
    was_lost: bool = False


class OnDemand:
    """The models that inferences wait for.

    Args:
        log: holds the live state and notifies of outcomes.
        submit: submits the command of a load.
        reader: finds jobs that have ended.
        router: says whether a model can be asked.
        demand: held as long as an inference waits, and until it is answered.
        look_up: makes the command that loads a model, for a version or None, and the subject who asks.
        waiting_for: says what a pending job waits for.
        stopping: is set when the server begins to stop; `log` notifies then.
        max_waiting: inferences that may wait for one model.
        on: whether inferences have models loaded at all.
    """

    def __init__(
        self,
        *,
        log: Log,
        submit: Callable[[RequestLoad], Awaitable[Receipt]],
        reader: Reader,
        router: Router,
        demand: PendingDemand,
        look_up: Callable[[str, int | None, str], Awaitable[RequestLoad]],
        waiting_for: Callable[[Job], str | None],
        stopping: asyncio.Event,
        max_waiting: int,
        on: bool,
    ) -> None:
        self._log = log
        self._submit = submit
        self._reader = reader
        self._router = router
        self._demand = demand
        self._look_up = look_up
        self._waiting_for = waiting_for
        self._stopping = stopping
        self._max_waiting = max_waiting
        self._on = on
        self._back_off = BackOff()
        self._attempts: dict[Demand, asyncio.Task[Exception | None]] = {}
        self._waiting = Counter[Demand]()

    async def close(self) -> None:
        """End all waits; what was asked for goes on."""
        self._stopping.set()
        self._log.notify()
        await asyncio.gather(*self._attempts.values())

    def waiting(self, model_id: str) -> int:
        """Return how many inferences wait for a model."""
        return sum(count for (waited_for, _), count in self._waiting.items() if waited_for == model_id)

    @asynccontextmanager
    async def loaded(
        self, model_id: str, version: int | None, subject: str, ends_at_s: float
    ) -> AsyncIterator[None]:
        """Have a model loaded that nobody could be asked of, and keep it from being evicted meanwhile.

        On entry it can be asked, if it is asked at once.

        Args:
            model_id: which.
            version: the one that is named, or None.
            subject: who asks; the load is requested in the name of the first who does.
            ends_at_s: on the loop's clock, when the inference is given up.

        Raises:
            RuntimeProblem: where this is off, what `Router.route_or_why` raises.
            ModelNotLoaded: `model_not_loaded`, another version is loaded: that is not replaced on demand.
            InferenceTimeout: `inference_timeout`.
            QueueFull: `inference_queue_full`, as many wait as may.
            DemandFailed: `load_failed`.
            UnknownModel: `unknown_model`, or UnknownVersion, `unknown_version`.
            LedgerProblem: `queue_full`, `log_unavailable`.
            ServerStops: `shutting_down`.
        """
        if not self._on:
            await self._router.route_or_why(model_id, version)
            yield
            return
        with self._demand.hold(model_id):
            while not self._can_be_asked(model_id, version):
                await self._wait((model_id, version), subject, ends_at_s)
            yield

    def _can_be_asked(self, model_id: str, version: int | None) -> bool:
        try:
            self._router.route(model_id, version)
        except OtherVersionLoaded:
            raise
        except (ModelNotLoaded, ModelUnloading):
            return False
        return True

    async def _wait(self, demand: Demand, subject: str, ends_at_s: float) -> None:
        """Wait until the model can be asked, in whichever version; to cancel this harms nobody else."""
        model_id = demand[0]
        if self.waiting(model_id) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} inferences wait for model '{model_id}' already")
        attempt = self._attempts.get(demand)
        if attempt is None:
            attempt = asyncio.create_task(self._attempt(demand, subject), name=f"awaiting {model_id}")
            self._attempts[demand] = attempt
        self._waiting[demand] += 1
        try:
            async with asyncio.timeout_at(ends_at_s):
                problem = await asyncio.shield(attempt)
        except TimeoutError:
            told = f"model '{model_id}' could not be asked within the inference's time: {self._why(model_id)}"
            raise InferenceTimeout(told) from None
        finally:
            self._waiting[demand] -= 1
            if not self._waiting[demand]:
                del self._waiting[demand]
        if problem is not None:
            raise problem.with_traceback(None)  # many raise it, each anew

    def _why(self, model_id: str) -> str:
        """Say what is being waited for."""
        job = next(iter(self._log.state.queue(model_id)[-1:]), None)
        if job is None:
            return "it is not loaded yet"
        if job.status is JobStatus.IN_PROGRESS:
            return "it is still loading" if job.kind is JobKind.LOAD else "it is being unloaded"
        reason = self._waiting_for(job)
        return f"job {job.id} is pending" + (f" and waits for {reason}" if reason else "")

    async def _attempt(self, demand: Demand, subject: str) -> Exception | None:
        """Wait for a model for all who do; return why it cannot be asked, None if it can or nobody waits."""
        attempt, wakeup = _Attempt(demand, subject), self._log.subscribe()
        try:
            while True:
                wakeup.clear()
                if self._stopping.is_set():
                    return ServerStops()
                if self._router.is_ready(demand[0]) or (not self._waiting[demand] and attempt.asked is None):
                    return None
                if self._is_under_way(attempt):
                    await wakeup.wait()
                elif attempt.watched is not None:
                    await self._conclude(attempt, attempt.watched)
                else:
                    await self._ask(attempt)
        except (*_PASSED_ON, DemandFailed) as problem:
            return problem
        except Exception as error:  # noqa: BLE001 - a defect is told to those who would wait for ever
            _log.exception("the wait for model %s failed", demand[0])
            return error
        finally:
            del self._attempts[demand]
            self._log.unsubscribe(wakeup)

    def _is_under_way(self, attempt: _Attempt) -> bool:
        """Whether something of the model goes on whose end is to be waited for.

        Raises:
            DemandFailed: `load_failed`, the model was lost and has been given up.
        """
        model_id = attempt.demand[0]
        queue, model = self._log.state.queue(model_id), self._log.state.models.get(model_id)
        loads = [job for job in queue if job.kind is JobKind.LOAD]
        if loads:
            attempt.watched = loads[-1].id
            return True
        if attempt.watched is not None:
            return False
        if queue or (model is not None and model.phase not in _ABSENT):
            attempt.was_lost = model is not None and model.phase is ModelState.LOST
            return True
        if attempt.was_lost and model is not None and model.error is not None:
            raise _demand_failed(model_id, model.error, None)
        return False

    async def _conclude(self, attempt: _Attempt, job_id: str) -> None:
        """Raise what became of the load that was waited for, unless something else is to come of it."""
        is_own = attempt.asked == job_id
        attempt.asked = attempt.watched = None
        job = await self._reader.job(job_id)
        if job is None or job.status is JobStatus.COMPLETED:  # loaded, and gone again
            return
        model = self._log.state.models.get(job.model_id)
        if model is not None and model.phase not in _ABSENT:  # what was lost is loaded again and again
            return
        if job.error is None and not self._waiting[attempt.demand]:  # cancelled since nobody waits
            return
        meant = (job.version,) if job.cause is Cause.DEMAND else (None, job.version)
        if not is_own and attempt.demand[1] not in meant:
            return
        failure = job.error or Failure("cancelled", "the load was cancelled")
        problem = _demand_failed(job.model_id, failure, job)
        if is_own:
            problem.retry_after_s = self._note(attempt, str(problem), model)
        raise problem

    async def _ask(self, attempt: _Attempt) -> None:
        """Request the load, once it is looked up, unless something has happened to the model meanwhile."""
        model_id, version = attempt.demand
        state = self._log.state
        attempt.was_lost = False
        attempt.before = state.models.get(model_id)
        self._back_off.check(attempt.demand, attempt.before, asyncio.get_running_loop().time())
        try:
            command = await self._look_up(model_id, version, attempt.subject)
        except _PASSED_ON:
            raise
        except (RuntimeProblem, ServerProblem) as problem:
            reason = f"model '{model_id}' could not be loaded: {problem}"
            raise DemandFailed(reason, self._note(attempt, reason, attempt.before)) from None
        is_absent = state.models.get(model_id) is attempt.before and not state.queue(model_id)
        if self._waiting[attempt.demand] and is_absent and not self._stopping.is_set():
            receipt = await self._submit(command)
            attempt.watched = receipt.job_id
            attempt.asked = None if receipt.existing else receipt.job_id

    def _note(self, attempt: _Attempt, reason: str, after: Model | None) -> float:
        now_s = asyncio.get_running_loop().time()
        return self._back_off.note(attempt.demand, reason, attempt.before, after, now_s)


def _demand_failed(model_id: str, failure: Failure, job: Job | None) -> DemandFailed:
    version = f"version {job.version}: " if job is not None else ""
    reason = f"model '{model_id}' could not be loaded: {version}{failure.message} ({failure.code})"
    headers = {"Location": f"/api/v1/jobs/{job.id}"} if job is not None else {}
    return DemandFailed(reason, http_headers=headers)
