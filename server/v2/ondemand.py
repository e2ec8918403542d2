"""Load on demand: an inference for a model that is not loaded has it loaded, and waits, where that is on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from events.commands import RequestLoad
from events.errors import LedgerProblem
from events.jobs import Failure, Job, JobKind, JobStatus
from events.log import Log
from events.models import Model, ModelState
from events.reader import Reader
from runtime.errors import (
    InferenceTimeout,
    InvalidModelId,
    QueueFull,
    RuntimeProblem,
    UnknownModel,
    UnknownVersion,
)
from runtime.leases import Leases
from runtime.router import ModelNotLoaded, ModelUnloading, OtherVersionLoaded, Router
from server.errors import ServerProblem

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""As a lost model's (DESIGN.md, "Crash")."""
MAX_SETBACKS = 1000
"""Beyond so many the oldest is forgotten: that model is then tried sooner than it might be, nothing else."""

Wish = tuple[str, int | None]
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


@dataclass(frozen=True, slots=True)
class _Setback:
    """The last failure; `model` is what was recorded right after it."""

    reason: str
    model: Model | None
    pause_s: float
    until_s: float


class Setbacks:
    """The failures that count: those after which nothing else has happened to the model."""

    def __init__(self) -> None:
        self._by_wish: dict[Wish, _Setback] = {}

    def check(self, wish: Wish, model: Model | None, now_s: float) -> None:
        """Let pass what may be asked for; forgets a failure that somebody's load or unload has outdated.

        Raises:
            DemandFailed: `load_failed`, with the reason of the last time.
        """
        setback = self._by_wish.get(wish)
        if setback is None:
            return
        if setback.model is not model:
            del self._by_wish[wish]
        elif now_s < setback.until_s:
            told = f"{setback.reason}; it is tried again when asked in {setback.until_s - now_s:.1f} s"
            raise DemandFailed(told, setback.until_s - now_s)

    def note(self, wish: Wish, reason: str, before: Model | None, after: Model | None, now_s: float) -> float:
        """Remember a failure, and return how many seconds the wish is to rest.

        Args:
            wish: what was asked for.
            reason: for those who ask meanwhile.
            before: the model as recorded when it was asked for.
            after: and when that had failed; for other versions, this attempt is no news.
            now_s: on the loop's clock.
        """
        last = self._by_wish.pop(wish, None)
        pause_s = FIRST_PAUSE_S if last is None else min(LONGEST_PAUSE_S, last.pause_s * 2)
        for other, setback in self._by_wish.items():
            if other[0] == wish[0] and setback.model is before:
                self._by_wish[other] = replace(setback, model=after)
        self._by_wish[wish] = _Setback(reason, after, pause_s, now_s + pause_s)
        while len(self._by_wish) > MAX_SETBACKS:
            del self._by_wish[next(iter(self._by_wish))]
        return pause_s


_log = logging.getLogger(__name__)

_ABSENT = (ModelState.UNLOADED, ModelState.FAILED)
_PASSED_ON = (InvalidModelId, UnknownModel, UnknownVersion, LedgerProblem)
"""What whoever asks has to know as it is; that a model's own settings are wrong is not his mistake."""

Call = Callable[[str, int | None, str], Awaitable[RequestLoad]]
"""Returns the command that loads a model, for a version or None, and the subject who asks."""


class ServerStops(ServerProblem):
    """The server stops, so nobody waits for a model any more; ask again at its next start."""

    code = "shutting_down"


@dataclass(frozen=True, slots=True)
class Means:
    """What it takes to have a model loaded, and to know of it.

    Attributes:
        look_up: makes the command of a load.
        waiting_for: says what a pending job waits for.
        stopping: is set when the server begins to stop; `log` notifies then.
        max_waiting: inferences that may wait for one model.
    """

    log: Log
    reader: Reader
    router: Router
    setbacks: Setbacks
    look_up: Call
    waiting_for: Callable[[Job], str | None]
    stopping: asyncio.Event
    max_waiting: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """The load that this wait asked for, by which wish, and the model as it was before."""

    job_id: str
    wish: Wish
    before: Model | None


class Awaited:
    """One model, as long as an inference waits for it or the load that one asked for goes on.

    Args:
        model_id: which.
        means: as of all.
        on_end: is called when nothing is waited for any more, before anybody else can run.
    """

    def __init__(self, model_id: str, means: Means, on_end: Callable[[], None]) -> None:
        self._model_id = model_id
        self._means = means
        self._on_end = on_end
        self._waiting: dict[asyncio.Future[Exception | None], tuple[int | None, str]] = {}
        self._wakeup = means.log.subscribe()
        self._asked: _Asked | None = None
        self._watched: str | None = None
        self._was_lost = False
        self._task = asyncio.create_task(self._run(), name=f"awaiting {model_id}")

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def close(self) -> None:
        """End the wait; what was asked for goes on."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._tell(ServerStops())  # a task that had not begun has told nobody

    async def wait(self, version: int | None, subject: str) -> None:
        """Wait until the model can be asked, in whichever version; to cancel this harms nobody else.

        Raises:
            DemandFailed: `load_failed`.
            UnknownModel: `unknown_model`, or UnknownVersion, `unknown_version`.
            QueueFull: `inference_queue_full`, as many wait as may.
            LedgerProblem: `queue_full`, `log_unavailable`.
            ServerStops: `shutting_down`.
        """
        if len(self._waiting) >= self._means.max_waiting:
            raise QueueFull(f"{self._means.max_waiting} inferences wait for model '{self._model_id}' already")
        told: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._waiting[told] = version, subject
        try:
            problem = await told
        finally:
            if self._waiting.pop(told, None) is not None and not self._waiting:
                self._wakeup.set()
        if problem is not None:
            raise problem.with_traceback(None)  # many raise it, each anew

    def reason(self) -> str:
        """Say what is being waited for."""
        job = next(iter(self._means.log.state.queue(self._model_id)[-1:]), None)
        if job is None:
            return "it is not loaded yet"
        if job.status is JobStatus.IN_PROGRESS:
            return "it is still loading" if job.kind is JobKind.LOAD else "it is being unloaded"
        reason = self._means.waiting_for(job)
        return f"job {job.id} is pending" + (f" and waits for {reason}" if reason else "")

    async def _run(self) -> None:
        means, seen, nothing = self._means, object(), object()
        try:
            while self._waiting or self._asked is not None:
                self._wakeup.clear()
                model = means.log.state.models.get(self._model_id)
                if model is not seen or means.stopping.is_set():  # else the news is of other models
                    seen = nothing if await self._step(model) else model
                if seen is not nothing:
                    await self._wakeup.wait()
        except Exception as error:  # noqa: BLE001 - a defect is told to those who would wait for ever
            _log.exception("the wait for model %s failed", self._model_id)
            self._tell(error)
        finally:
            self._on_end()
            self._means.log.unsubscribe(self._wakeup)
            self._tell(ServerStops())

    async def _step(self, model: Model | None) -> bool:
        """Do the one thing to do now; whether to look again at once, or when the model has changed."""
        queue = self._means.log.state.queue(self._model_id)
        loads = [job for job in queue if job.kind is JobKind.LOAD]
        if self._means.stopping.is_set():
            self._end(ServerStops())
        elif self._means.router.is_ready(self._model_id):
            self._end(None)
        elif loads:
            self._watched = loads[-1].id
            return False
        elif self._watched is not None:
            await self._conclude(self._watched, model)
        elif queue or (model is not None and model.phase not in _ABSENT):
            self._was_lost = model is not None and model.phase is ModelState.LOST
            return False
        elif self._was_lost and model is not None and model.error is not None:
            self._end(self._problem(model.error, None, None))
        elif self._waiting:
            await self._ask(model)
        return True

    async def _conclude(self, job_id: str, model: Model | None) -> None:
        """Tell what became of the load that was waited for, unless something else is to come of it."""
        asked, self._asked, self._watched = self._asked, None, None
        job = await self._means.reader.job(job_id)
        if job is None or job.status is JobStatus.COMPLETED:  # loaded, and gone again
            return
        if model is not None and model.phase not in _ABSENT:  # what was lost is loaded again and again
            return
        if job.error is None and not self._waiting:  # cancelled for want of anybody who waits
            return
        failure = job.error or Failure("cancelled", "the load was cancelled")
        if asked is None or asked.job_id != job_id:
            self._tell(self._problem(failure, job, None), None, job.version)
            return
        problem = self._problem(failure, job, (asked, model))
        self._tell(problem, asked.wish[1], job.version)

    def _problem(
        self, failure: Failure, job: Job | None, asked: tuple[_Asked, Model | None] | None
    ) -> DemandFailed:
        version = f"version {job.version}: " if job is not None else ""
        reason = f"model '{self._model_id}' could not be loaded: {version}{failure.message} ({failure.code})"
        headers = {"Location": f"/api/v1/jobs/{job.id}"} if job is not None else {}
        if asked is None:
            return DemandFailed(reason, http_headers=headers)
        return DemandFailed(reason, self._note(*asked, reason), http_headers=headers)

    async def _ask(self, before: Model | None) -> None:
        """Request the load that the first who waits wants, once it is looked up."""
        version, subject = next(iter(self._waiting.values()))
        wish = self._model_id, version
        self._was_lost = False
        now_s = asyncio.get_running_loop().time()
        try:
            self._means.setbacks.check(wish, before, now_s)
            command = await self._means.look_up(self._model_id, version, subject)
            if self._waiting and self._is_absent(before):
                receipt = await self._means.log.submit(command)
                assert receipt.job_id is not None
                self._watched = receipt.job_id
                self._asked = None if receipt.existing else _Asked(receipt.job_id, wish, before)
        except (*_PASSED_ON, DemandFailed) as problem:
            self._tell(problem, version)
        except (RuntimeProblem, ServerProblem) as problem:
            reason = f"model '{self._model_id}' could not be loaded: {problem}"
            pause_s = self._means.setbacks.note(wish, reason, before, before, now_s)
            self._tell(DemandFailed(reason, pause_s), version)

    def _is_absent(self, before: Model | None) -> bool:
        state = self._means.log.state
        return state.models.get(self._model_id) is before and not state.queue(self._model_id)

    def _note(self, asked: _Asked, after: Model | None, reason: str) -> float:
        now_s = asyncio.get_running_loop().time()
        return self._means.setbacks.note(asked.wish, reason, asked.before, after, now_s)

    def _end(self, outcome: Exception | None) -> None:
        self._asked = None
        self._tell(outcome)

    def _tell(self, outcome: Exception | None, *versions: int | None) -> None:
        """Wake those who want one of these versions, or all."""
        for told, (version, _) in list(self._waiting.items()):
            if not versions or version in versions:
                del self._waiting[told]
                if not told.done():
                    told.set_result(outcome)


class Demand:
    """The models that inferences wait for.

    Args:
        means: what it takes to have them loaded.
        leases: held as long as an inference waits, and until it is answered.
        on: whether inferences have models loaded at all.
    """

    def __init__(self, means: Means, leases: Leases, *, on: bool) -> None:
        self._means = means
        self._leases = leases
        self._on = on
        self._awaited: dict[str, Awaited] = {}

    async def close(self) -> None:
        """End all waits; what was asked for goes on."""
        await asyncio.gather(*(awaited.close() for awaited in self._awaited.values()))

    def waiting(self, model_id: str) -> int:
        """Return how many inferences wait for a model."""
        awaited = self._awaited.get(model_id)
        return awaited.waiting if awaited is not None else 0

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
            Exception: what `Awaited.wait` raises.
        """
        if not self._on:
            await self._means.router.route_or_why(model_id, version)
            yield
            return
        with self._leases.hold(model_id):
            while not self._can_be_asked(model_id, version):
                await self._wait(model_id, version, subject, ends_at_s)
            yield

    def _can_be_asked(self, model_id: str, version: int | None) -> bool:
        try:
            self._means.router.route(model_id, version)
        except OtherVersionLoaded:
            raise
        except (ModelNotLoaded, ModelUnloading):
            return False
        return True

    async def _wait(self, model_id: str, version: int | None, subject: str, ends_at_s: float) -> None:
        awaited = self._awaited.get(model_id)
        if awaited is None:
            awaited = Awaited(model_id, self._means, lambda: self._forget(model_id))
            self._awaited[model_id] = awaited
        try:
            async with asyncio.timeout_at(ends_at_s):
                await awaited.wait(version, subject)
        except TimeoutError:
            told = f"model '{model_id}' could not be asked within the inference's time: {awaited.reason()}"
            raise InferenceTimeout(told) from None

    def _forget(self, model_id: str) -> None:
        self._awaited.pop(model_id, None)
