"""Counters of recorded events for the metrics, from the start of the server on.

A `Tally` is a fold of the durable events. Counters only grow. Their number is limited whatever clients send:
rare models share the label `OTHERS`, rare error codes the code `OTHER_CODE`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from events.clock import seconds_between
from events.jobs import Job, JobKind, JobStatus
from events.types import AccessDenied, Cause, Event, LoadFailed, ModelLoaded, ModelUnloaded, WorkerExited

OTHERS = "_others"
"""The label shared by models without a label of their own; no model can have this name."""

MAX_METRIC_LABELS = 1000
"""Models with labels of their own, some 30 lines of metrics each. The first models keep theirs: a counter
that moved to another label would decrease."""

APPEND_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Buckets for commits: a fraction of a millisecond on a healthy disk, seconds on a failing one."""

JOB_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Buckets for jobs: from the reload of a small model to a load that waits for memory until its timeout."""

MAX_CODES = 100
"""Error codes with counters of their own; there are some twenty."""

OTHER_CODE = "other"

LOAD_STAGES = ("waiting", "copying", "starting", "loading", "hashing", "warming_up", "measuring")
"""The stages of a load whose durations are in `ModelLoaded`."""

ENDS = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)

EVICTIONS = (Cause.EVICTION, Cause.IDLE)
"""Causes of automatic unloads, except swaps."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram at one moment.

    Attributes:
        bounds: the upper bounds of the buckets in seconds; the last bucket has none.
        counts: observations of each bucket alone; one bucket more than bounds.
        total_s: the sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_s: float


class Histogram:
    """A histogram of durations. An observation costs a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_total_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration; a duration equal to a bound belongs to its bucket."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total_s += seconds

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total_s)


@dataclass(slots=True)
class ModelLabels:
    """Labels of models: the first `most` models have their own, all others share one."""

    most: int = MAX_METRIC_LABELS
    _own: set[str] = field(default_factory=set)

    def of(self, model_id: str) -> str:
        if model_id not in self._own:
            if len(self._own) >= self.most:
                return OTHERS
            self._own.add(model_id)
        return model_id


class Tally:
    """Counts groups of events as they are committed.

    Attributes:
        names: labels of models.
        events: by type.
        loads: ended load jobs, by cause and status.
        unloads: ended unload jobs, by cause and status.
        load_s: durations of load jobs from request to end, by status.
        unload_s: durations of unload jobs, by status.
        stage_s: total seconds of the stages of loads.
        failures: failed loads, by error code.
        exits: unexpected exits of workers, by model.
        restarts: recoveries after such exits, by model.
        reloads: completed loads of models whose last unload was an eviction, by model.
        bypasses: loads that a person with the role `emergency` let pass.
        denied: denied requests, as recorded.
        append_s: durations of commands from `submit` until durable.
        commit_s: durations of transactions.
        write_failures: failed transactions.
    """

    def __init__(self) -> None:
        self.names = ModelLabels()
        self.events = Counter[str]()
        self.loads = Counter[tuple[str, str]]()
        self.unloads = Counter[tuple[str, str]]()
        self.load_s = {status.value: Histogram(JOB_S) for status in ENDS}
        self.unload_s = {status.value: Histogram(JOB_S) for status in ENDS}
        self.stage_s = dict.fromkeys(LOAD_STAGES, 0.0)
        self.failures = Counter[str]()
        self.exits = Counter[str]()
        self.restarts = Counter[str]()
        self.reloads = Counter[str]()
        self._evicted = set[str]()
        self.bypasses = 0
        self.denied = 0
        self.append_s = Histogram(APPEND_S)
        self.commit_s = Histogram(APPEND_S)
        self.write_failures = 0

    def count(self, events: Sequence[Event], jobs: Collection[Job]) -> None:
        """Count a group that has become durable.

        Args:
            events: the group's events.
            jobs: the jobs that the group changed, as they are after it.
        """
        for event in events:
            self.events[event.type] += 1
            if type(event.data) in _COUNTED:
                self._count_event(event, jobs)
        for job in jobs:
            if job.ended:
                self._count_job(job)

    def _count_job(self, job: Job) -> None:
        is_load = job.kind is JobKind.LOAD
        (self.loads if is_load else self.unloads)[job.cause.value, job.status.value] += 1
        if is_load and job.cause is Cause.RECOVERY and job.status is JobStatus.COMPLETED:
            self.restarts[self.names.of(job.model_id)] += 1
        changed_settings = is_load and not job.attempt and job.status is JobStatus.COMPLETED
        if job.finished_at is not None and not changed_settings:  # a change of settings takes no time
            took_s = seconds_between(job.created_at, job.finished_at)
            (self.load_s if is_load else self.unload_s)[job.status.value].observe(took_s)

    def _count_event(self, event: Event, jobs: Iterable[Job]) -> None:
        match event.data:
            case ModelLoaded(durations=durations) as loaded:
                if event.model_id in self._evicted:
                    self._evicted.remove(event.model_id)
                    self.reloads[self.names.of(event.model_id)] += 1
                for stage in LOAD_STAGES:
                    self.stage_s[stage] += (getattr(durations, f"{stage}_us") or 0) / 1e6
                self.bypasses += loaded.evidence.is_bypassed
            case LoadFailed(code=code):
                known = code in self.failures or len(self.failures) < MAX_CODES
                self.failures[code if known else OTHER_CODE] += 1
            case ModelUnloaded() if event.model_id is not None:
                is_eviction = any(job.id == event.job_id and job.cause is Cause.EVICTION for job in jobs)
                if is_eviction:
                    self._evicted.add(event.model_id)
                else:
                    self._evicted.discard(event.model_id)
            case WorkerExited() if event.model_id is not None:
                self.exits[self.names.of(event.model_id)] += 1
            case AccessDenied(count=times):
                self.denied += times


_COUNTED = frozenset({ModelLoaded, LoadFailed, ModelUnloaded, WorkerExited, AccessDenied})
"""The types handled by `Tally._count_event`, so that other events skip its `match`."""
