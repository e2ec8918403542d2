"""The input of one scheduling decision: recorded state, running loads, policy and observations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from events.clock import LedgerClock, add_seconds
from events.jobs import NO_PROGRESS, Failure, Job, JobStatus
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.state import State, has_turn
from events.types import REPLACEMENTS, SYSTEM, Cause, LoadParameters
from features.rules import LoadPolicy
from runtime.rooms import MACHINE, Alternative, RoomLimits

MIN_RESIDENCY_S = 10.0
"""Minimum residency of a loaded model before the server unloads it: two models that do not fit together take
turns of this length, instead of evicting each other for each request."""


_RANKS = {"high": 0, "normal": 1, "low": 2}


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's settings.

    Attributes:
        loads_at_once: loads that may run at once.
        budget_bytes: memory budget of all workers; None is no limit.
        max_loaded: limit of models with a process; None is no limit.
        evicts: whether a load that needs room may evict idle models.
        takes_turns: whether it may evict busy models, too, since inferences bring these back.
        min_residency_s: seconds that a loaded model stays at least before it is evicted.
        restores: whether models that were loaded when the server ended are reloaded.
        loads: the rules for loads.
        rooms: the limits of each room beside the machine's, by its name.
    """

    loads_at_once: int
    budget_bytes: int | None = None
    max_loaded: int | None = None
    evicts: bool = False
    takes_turns: bool = False
    min_residency_s: float = MIN_RESIDENCY_S
    restores: bool = True
    loads: LoadPolicy = field(default_factory=LoadPolicy)
    rooms: Mapping[str, RoomLimits] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkShare:
    """The part of the recorded work that is this server's; of a server alone it is all.

    Attributes:
        state: the models and the unended jobs to work on.
        held: pending loads that may not start here yet, by job id, with the reason.
        is_whole: whether this server has all the work: all inferences come here, and no other has room.
    """

    state: State
    held: Mapping[str, str] = field(default_factory=dict)
    is_whole: bool = True


class Phase(StrEnum):
    """How far a load is; it is loading until its outcome is recorded."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class LoadView:
    """A running load, as the scheduler sees it.

    Attributes:
        load_job_id: the job that loaded it.
        model_id: its model.
        phase: the work of its workers; `GONE` follows `SERVING` and `DRAINING`.
        killed: whether its workers were killed.
        exited: ids of the workers that exited unexpectedly, recorded or not.
        has_outcome: whether it is known how its loading ended, which is being recorded.
        taken: the bytes that it reserves of each room, or once loaded that its workers take, until they have
            exited.
        busy: whether inferences run or wait for it.
        last_used_at: when its last inference ended; None without one.
        load_s: how many seconds the load took, from its start until it was loaded.
        requests: how many requests it has answered.
    """

    load_job_id: str
    model_id: str
    phase: Phase
    killed: bool = False
    exited: tuple[str, ...] = ()
    taken: Mapping[str, int] = field(default_factory=lambda: {MACHINE: 0})
    has_outcome: bool = False
    busy: bool = False
    last_used_at: str | None = None
    load_s: float = 0.0
    requests: int = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of the machine's memory."""
        return self.taken[MACHINE]

    @property
    def alive(self) -> bool:
        """Whether it has a process, or will have one."""
        return self.phase is not Phase.GONE


FileSizes = frozenset[tuple[str, int]]
"""Path and bytes of each file of a version."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The memory that a load will need.

    Attributes:
        alternatives: its needs on each target on which it may run, the preferred one first.
        is_proven: whether these files loaded before.
        files: the files that it is for.
        same_as: the load from which the model serves, if the files have the bytes that it loaded.
    """

    alternatives: tuple[Alternative, ...]
    is_proven: bool = False
    files: FileSizes = frozenset()
    same_as: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the machine's memory on the preferred target."""
        return self.alternatives[0].bytes


@dataclass(frozen=True, slots=True)
class Observations:
    """Measurements, and all else that is not in the log.

    Attributes:
        fork_server_up: whether workers can be started.
        under_pressure: whether the machine is under memory or CPU pressure.
        estimates: of loads until they end, by job id; None while their files are being read, a `Failure` if
            they cannot be.
        estimating: jobs whose estimate began just now, so that later loads still wait for it.
        pending_demand: models that inferences wait for.
        last_used: when models were last used before the server's start, as far as known.
        requests_per_s: decayed rates of models' requests, since the server's start.
        clock: which converts recorded times to monotonic ones.
    """

    fork_server_up: bool = True
    under_pressure: bool = False
    estimates: Mapping[str, MemoryEstimate | Failure | None] = field(default_factory=dict)
    estimating: Collection[str] = ()
    pending_demand: Collection[str] = ()
    last_used: Mapping[str, str] = field(default_factory=dict)
    requests_per_s: Mapping[str, float] = field(default_factory=dict)
    clock: LedgerClock = field(default_factory=LedgerClock)


def rank_of(parameters: LoadParameters) -> int:
    """Return the rank of a new load by its priority; loads of a lower rank start first."""
    return _RANKS.get(parameters.priority, _RANKS["normal"])


def find_unload_target(state: State, unload: Job) -> str:
    """Return the load that an unload ends: the serving one, or else the one that its request names."""
    named = None if unload.unload is None else unload.unload.load_job_id
    if named is None:
        raise RuntimeError(f"job {unload.id} ends no load")
    model = state.models.get(unload.model_id)
    if unload.cause in REPLACEMENTS or model is None or model.serving is None:
        return named
    return model.serving.load_job_id


def find_started_job(own: State, load_job_id: str) -> Job | None:
    """Return the job of a running load, or None if it has ended, or begins anew after the server's end."""
    job = own.unended_job(load_job_id)
    return job if job is not None and job.status is JobStatus.IN_PROGRESS else None


def may_end(state: State, load: Job) -> bool:
    """Whether a load's own outcome may be recorded: nobody cancels it, and no forced unload waits for it."""
    return not load.cancelling and not any(job.forced for job in state.queue(load.model_id))


PEAK_VARIATION = 8
"""A load may take an eighth more than it reserved, even if nothing is free: peaks vary from load to load."""


def load_allowance(budget_bytes: int, others_bytes: int, reserved_bytes: int) -> int:
    """Return how many bytes the workers of a load may take until the model is loaded.

    All that is free of the budget, and at least their reservation. A load that takes more than it reserved
    leaves less to the others: of loads that outgrow their reservations, the one ends that needs what another
    has taken.

    Args:
        budget_bytes: the memory budget.
        others_bytes: reservations or memory of all other loads, whichever is more.
        reserved_bytes: the load's own reservation.
    """
    return max(reserved_bytes + reserved_bytes // PEAK_VARIATION, budget_bytes - others_bytes)


class Amount(NamedTuple):
    """Bytes and model slots of a room: reserved for loads, or missing to one."""

    bytes: int = 0
    models: int = 0

    @property
    def is_none(self) -> bool:
        return self.bytes <= 0 and self.models <= 0


class LoadRoom:
    """A room in one decision: the machine's memory and model slots, or another; derived values are cached.

    Attributes:
        name: the room's name.
        limits: the limits of its bytes.
        max_loaded: limit of models with a process; None is no limit, as in each room but the machine's.
    """

    def __init__(self, view: SchedulerView, name: str) -> None:
        self._view, self.name = view, name
        policy = view.policy
        if name == MACHINE:
            self.limits, self.max_loaded = RoomLimits(name, policy.budget_bytes), policy.max_loaded
        else:
            self.limits, self.max_loaded = policy.rooms.get(name, RoomLimits(name)), None
        self._running = {key: run for key, run in view.running.items() if name in run.taken}

    @property
    def where(self) -> str:
        """The room as a suffix of a text on its memory; empty for the machine's."""
        return "" if self.name == MACHINE else f" on {self.name}"

    @property
    def budget_name(self) -> str:
        return "the budget" if self.name == MACHINE else "its budget"

    def bytes_of(self, run: LoadView | None) -> int:
        """Return the bytes that a load takes here."""
        return 0 if run is None else run.taken.get(self.name, 0)

    @cached_property
    def free_bytes(self) -> int | None:
        """The free part of the budget, negative if workers outgrew it; None without a budget."""
        if self.limits.budget_bytes is None:
            return None
        return self.limits.budget_bytes - sum(map(self.bytes_of, self._running.values()))

    @cached_property
    def exiting_bytes(self) -> int:
        """Bytes that exiting processes will release."""
        exiting = (self._running[key] for key in self._view.exiting if key in self._running)
        return sum(map(self.bytes_of, exiting))

    @cached_property
    def models_with_process(self) -> frozenset[str]:
        return frozenset(run.model_id for run in self._running.values() if run.alive)

    @cached_property
    def exiting_models(self) -> frozenset[str]:
        staying = {run.model_id for key, run in self._running.items() if key not in self._view.exiting}
        return self.models_with_process - staying

    @cached_property
    def measured_load(self) -> LoadView | None:
        """The load during which no other can start here, because its need is being measured.

        The memory of a killed load is not back before its workers have exited.
        """
        runs = self._running.values() if self.limits.is_measured else ()
        return next((run for run in runs if run.phase is Phase.LOADING or (run.killed and run.alive)), None)

    def has_slot(self, model_id: str) -> bool:
        """Whether a model has a slot that it keeps."""
        return model_id in self.models_with_process and model_id not in self.exiting_models

    def shortage(self, model_id: str, needed_bytes: int, reserved: Amount, *, after_exits: bool) -> Amount:
        """Return a load's shortage beside the reservations, now or after the exits.

        A model whose processes are exiting still has its slot and uses it if no reservation needs it.
        """
        left_models = len(self.exiting_models) - reserved.models
        left_bytes = reserved.bytes - self.exiting_bytes
        if not after_exits:
            left_models = left_models if model_id in self.exiting_models else min(0, left_models)
            left_bytes = max(0, left_bytes)
        free, most = self.free_bytes, self.max_loaded
        has_slot = most is None or self.has_slot(model_id)
        return Amount(
            0 if free is None else needed_bytes + left_bytes - free,
            0 if most is None or has_slot else len(self.models_with_process) + 1 - most - left_models,
        )


class SchedulerView:
    """Input of one scheduling decision; derived values are cached.

    All its times are monotonic: recorded times are converted (`LedgerClock`), which changes them only after
    the wall clock was set.

    Attributes:
        own: the state of this server's share.
        unended: the unended loads and unloads of the share, oldest first.
        queues: all unended jobs of their models that wait for their turn.
    """

    def __init__(
        self,
        state: State,
        running: Mapping[str, LoadView],
        policy: Policy,
        now: str,
        observations: Observations,
        *,
        share: WorkShare | None = None,
    ) -> None:
        self.state, self.running, self.policy, self.now = state, running, policy, now
        self.observations = observations
        self.to_monotonic = observations.clock.to_monotonic
        self.share = share or WorkShare(state)
        self.own = self.share.state
        self._earlier: dict[float, str] = {}
        self._rooms: dict[str, LoadRoom] = {}

    @cached_property
    def unended(self) -> list[Job]:
        return self.own.unended()

    @cached_property
    def queues(self) -> dict[str, list[Job]]:
        models = dict.fromkeys(job.model_id for job in self.unended)
        return {model_id: queue for model_id in models if (queue := self.state.queue(model_id))}

    def queued_at(self, job: Job) -> str:
        """Return since when a load waits for its turn."""
        return self.to_monotonic(job.created_at, job.created_position)

    def deadline_at(self, job: Job) -> str | None:
        """Return when a load is late and fails; None for an unload, and once the load has its outcome."""
        run = self.running.get(job.id)
        if job.deadline_at is None or (run is not None and run.has_outcome):
            return None
        return self.to_monotonic(job.deadline_at, job.created_position)

    def loaded_at(self, model: LoadedModel) -> str:
        return self.to_monotonic(model.serving.loaded_at, model.serving.position)

    def earlier_by(self, seconds: float) -> str:
        if seconds not in self._earlier:
            self._earlier[seconds] = add_seconds(self.now, -seconds)
        return self._earlier[seconds]

    def is_first_in_queue(self, job: Job) -> bool:
        """Whether no earlier job of the same model has to end first."""
        return not has_turn(job) or self.queues[job.model_id][0].id == job.id

    def alive(self, load_job_id: str) -> bool:
        run = self.running.get(load_job_id)
        return run is not None and run.alive

    @cached_property
    def free_load_slots(self) -> int:
        return self.policy.loads_at_once - len(self._loading) if self.observations.fork_server_up else 0

    def is_proven(self, job: Job) -> bool:
        """Whether the files of a load are known to load: those of reloads served until just now.

        One load of them that made no progress ends that, until they load again.
        """
        model = self.state.models.get(job.model_id)
        if model is not None and model.error is not None and model.error.code == NO_PROGRESS:
            return False
        estimate = self.find_estimate(job)
        return job.cause in RELOADS or (estimate is not None and estimate.is_proven)

    def find_estimate(self, job: Job) -> MemoryEstimate | None:
        """Return the estimate of a pending load, or None while it is unknown."""
        estimate = self.observations.estimates.get(job.id)
        return estimate if isinstance(estimate, MemoryEstimate) else None

    @cached_property
    def proven_load_runs(self) -> bool:
        """Whether a load of files that loaded before is running."""
        jobs = (self.state.unended_job(load_id) for load_id in self._loading)
        return any(job is not None and self.is_proven(job) for job in jobs)

    @cached_property
    def _loading(self) -> list[str]:
        runs = self.running.items()
        return [load_id for load_id, run in runs if run.phase is Phase.LOADING and not run.killed]

    def find_room(self, name: str) -> LoadRoom:
        if name not in self._rooms:
            self._rooms[name] = LoadRoom(self, name)
        return self._rooms[name]

    @cached_property
    def exiting(self) -> frozenset[str]:
        """Loads whose processes are exiting, or will exit through jobs that can proceed."""
        targets = {
            find_unload_target(self.state, job)
            for job in self.unended
            if job.unload is not None and self.is_first_in_queue(job)
        }
        return frozenset(
            load_job_id
            for load_job_id, run in self.running.items()
            if run.killed or run.phase is Phase.DRAINING or load_job_id in targets
        )

    @cached_property
    def will_free_more(self) -> bool:
        """Whether memory will become free without a decision: a load reserves more than it keeps."""
        return bool(self.exiting) or any(run.phase is Phase.LOADING for run in self.running.values())

    @cached_property
    def settled_models(self) -> list[tuple[LoadedModel, LoadView]]:
        """Serving models without a pending job."""
        return [
            (loaded, run)
            for run in self.running.values()
            if (loaded := self.find_loaded(run.model_id)) is not None
            and not (loaded.model.loads or loaded.model.unloads or run.killed)
            and self.find_serving(run.model_id) is run
        ]

    def find_loaded(self, model_id: str) -> LoadedModel | None:
        model = self.state.models.get(model_id)
        return model.loaded if model is not None and model.phase is ModelState.LOADED else None

    def find_serving(self, model_id: str) -> LoadView | None:
        loaded = self.find_loaded(model_id)
        run = self.running.get(loaded.serving.load_job_id) if loaded is not None else None
        return run if run is not None and run.phase is Phase.SERVING else None

    def is_being_replaced(self, model: Model) -> bool:
        if not model.unloads:
            return False
        unended = self.state.unended(model.id)
        return any(job.cause is Cause.SWAP and job.id in model.unloads for job in unended)

    def used_at(self, model: LoadedModel, run: LoadView) -> str:
        """Return when a serving model was last used; a load that a person requested counts as a use."""
        loaded_at = self.loaded_at(model)
        if model.serving.loaded_by == SYSTEM:  # a reload is no use; the last use may be known from before
            loaded_at = self.observations.last_used.get(model.id, loaded_at)
        return max(run.last_used_at or "", loaded_at)
