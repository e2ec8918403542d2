"""What was recorded since the server started, counted for the metrics as it becomes durable.

Another fold of the same events: whatever the ledger says happened is counted, and nothing else. It begins at
nothing with each start of the server, as counters do.

What is counted for the metrics: histograms of durations, and for which models apart from the others.

Nothing here is ever counted down, and nothing grows with what clients send.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from events.clock import seconds_between
from events.jobs import Job, JobKind, JobStatus
from events.types import AccessDenied, Cause, Data, Event, LoadFailed, ModelLoaded, Unknown, WorkerExited

OTHERS = "_others"
"""The label of all models that have none of their own; no model can be called that."""

MAX_LABELS = 1000
"""Models that are told apart, some 30 lines of text each. Those that come first stay: a counter that moved
from one label to another would go back."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram as it was at one moment.

    Attributes:
        bounds: the upper bounds of its buckets, in seconds, without the last one's, which has none.
        counts: of each bucket alone, one more than there are bounds.
        total_s: the sum of all that was observed.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_s: float


class Histogram:
    """How often something took how long. To observe is a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_total_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one that took so long; what is exactly a bound is within it."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total_s += seconds

    def observed(self) -> HistogramSnapshot:
        """Return what was observed until now."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total_s)


@dataclass(slots=True)
class ModelLabels:
    """The models that are told apart; once one is, or is not, that stays so."""

    most: int = MAX_LABELS
    _own: set[str] = field(default_factory=set)

    def of(self, model_id: str) -> str:
        """Return the label of a model: its id, or `OTHERS`."""
        if model_id not in self._own:
            if len(self._own) >= self.most:
                return OTHERS
            self._own.add(model_id)
        return model_id


APPEND_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""A durable commit takes from a fraction of a millisecond to what a sick disk makes of it."""
JOB_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""From a small model that is loaded again to one that waits for memory until its time is up."""
NO_FORM = "none"
"""Which prepared form a load used that used none."""
MAX_CODES = 100
"""Reasons of failed loads that are told apart; there are some twenty."""
OTHER_CODE = "other"
STAGES = ("waiting", "starting", "loading", "hashing", "warming_up", "measuring")
"""The parts of a load that `ModelLoaded` has durations of."""
ENDS = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)
EVICTIONS = (Cause.EVICTION, Cause.IDLE)
"""Why a model is unloaded that nobody asked to unload, nor put another version in the place of."""


class Tally:
    """Counts groups of events as they are committed.

    Attributes:
        names: which models are told apart.
        events: by type.
        loads: load jobs that ended, by cause and status.
        unloads: unload jobs that ended, likewise.
        load_s: how long load jobs took from their request to their end, by status.
        unload_s: how long unload jobs took, likewise.
        stage_s: what the parts of loads took, in seconds.
        failures: loads that failed, by code.
        forms: loads that completed, by the prepared form that they used.
        exits: workers that ended and nobody had asked, by model.
        restarts: models that were loaded again after that, by model.
        denied: refused requests, as far as they are recorded.
        append_s: how long commands took from being handed to the log until they were durable.
        commit_s: how long transactions took.
        write_failures: transactions that failed.
    """

    def __init__(self, names: ModelLabels | None = None) -> None:
        self.names = names or ModelLabels()
        self.events = Counter[str]()
        self.loads = Counter[tuple[str, str]]()
        self.unloads = Counter[tuple[str, str]]()
        self.load_s = {status.value: Histogram(JOB_S) for status in ENDS}
        self.unload_s = {status.value: Histogram(JOB_S) for status in ENDS}
        self.stage_s = dict.fromkeys(STAGES, 0.0)
        self.failures = Counter[str]()
        self.forms = Counter[str]()
        self.exits = Counter[str]()
        self.restarts = Counter[str]()
        self.denied = 0
        self.append_s = Histogram(APPEND_S)
        self.commit_s = Histogram(APPEND_S)
        self.write_failures = 0

    def count(self, events: Sequence[Event], jobs: Iterable[Job]) -> None:
        """Count a group that has become durable.

        Args:
            events: all of it.
            jobs: what the group changed, as it was after it; each ends once.
        """
        for event in events:
            kind = type(event.data)
            self.events[event.type] += 1
            step = _STEPS.get(kind)
            if step is not None:
                step(self, event, event.data)
        for job in jobs:
            if job.ended:
                self._ended(job)

    def _ended(self, job: Job) -> None:
        is_load = job.kind is JobKind.LOAD
        (self.loads if is_load else self.unloads)[job.cause.value, job.status.value] += 1
        if is_load and job.cause is Cause.RECOVERY and job.status is JobStatus.COMPLETED:
            self.restarts[self.names.of(job.model_id)] += 1
        if job.finished_at is not None and job.keeps is None:  # what only changed its parameters took nothing
            took_s = seconds_between(job.created_at, job.finished_at)
            (self.load_s if is_load else self.unload_s)[job.status.value].observe(took_s)

    def _loaded(self, _: Event, data: ModelLoaded) -> None:
        durations = data.durations
        if not durations.total_us:  # the workers of an earlier load go on
            return
        self.forms[data.prepared.form if data.prepared is not None else NO_FORM] += 1
        for stage in STAGES:
            self.stage_s[stage] += (getattr(durations, f"{stage}_us") or 0) / 1e6

    def _load_failed(self, _: Event, data: LoadFailed) -> None:
        known = data.code in self.failures or len(self.failures) < MAX_CODES
        self.failures[data.code if known else OTHER_CODE] += 1

    def _exited(self, event: Event, _: WorkerExited) -> None:
        if event.model_id is not None:
            self.exits[self.names.of(event.model_id)] += 1

    def _denied(self, _: Event, data: AccessDenied) -> None:
        self.denied += data.count


_STEPS: Mapping[type[Data | Unknown], Callable[[Tally, Event, Any], None]] = {
    ModelLoaded: Tally._loaded,  # noqa: SLF001 - its own table
    LoadFailed: Tally._load_failed,  # noqa: SLF001
    WorkerExited: Tally._exited,  # noqa: SLF001
    AccessDenied: Tally._denied,  # noqa: SLF001
}
"""What is counted of events of these types, beside that there were some."""
