"""What the scheduler looks at: the recorded state, what runs, what the operator chose, and the machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from events.clock import add_seconds
from events.jobs import Job
from events.models import LoadedModel, Model, ModelState
from events.state import State, has_turn
from events.types import SYSTEM, Cause

MIN_RESIDENCY_S = 10.0
"""How long a model that was loaded stays at least, unless somebody asks (DESIGN.md, "Defaults")."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator chose.

    Attributes:
        loads_at_once: how many loads run at once.
        budget_bytes: what all workers may take together; None is no limit.
        max_loaded: how many models may have a process; None is no limit.
        evicts: whether a load that needs room may have idle models unloaded.
        min_residency_s: how long a model stays at least before it is evicted.
        restores: whether what was loaded when the server ended is loaded again.
    """

    loads_at_once: int
    budget_bytes: int | None = None
    max_loaded: int | None = None
    evicts: bool = False
    min_residency_s: float = MIN_RESIDENCY_S
    restores: bool = True


class Phase(StrEnum):
    """What the process behind a load is doing."""

    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class LoadView:
    """The live side of one load: `LOADED`, `FAILED` and `GONE` wait to be recorded.

    `killed` says that it was killed already. A `GONE` one was serving or draining before. `dead` are the
    workers that ended and nobody had asked, recorded or not. `memory_bytes` is what is reserved for it, or
    once it is loaded what it takes, until its processes have exited. `busy` says that requests run or wait
    for it; the last one ended at `last_used_at`, null where there was none.
    """

    load_job_id: str
    model_id: str
    phase: Phase
    killed: bool = False
    dead: tuple[str, ...] = ()
    memory_bytes: int = 0
    busy: bool = False
    last_used_at: str | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a process, or will be."""
        return self.phase is not Phase.GONE


@dataclass(frozen=True, slots=True)
class PreparationView:
    """What is being prepared: of which load's files, what it may take, whether it was told to stop."""

    load_job_id: str
    memory_bytes: int
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Observations:
    """What else there is to know at this moment.

    Attributes:
        fork_server_up: whether workers can be started.
        under_pressure: whether the machine has more to do than it can.
        needs: bytes that a pending load will need, by job id; None while that is being found out.
        looked_at: the jobs whose need has not been looked for long: those that come later wait for it.
        estimated: the jobs whose need is an estimate, not what their files took before.
        awaited: the models that inferences wait for.
        last_used: when models were last used before the server's start, as far as that is known.
        preparable: what preparing the files of loads would take, in bytes by load job id, in their order.
        preparation: what is being prepared; it takes memory until its processes have exited.
    """

    fork_server_up: bool = True
    under_pressure: bool = False
    needs: Mapping[str, int | None] = field(default_factory=dict)
    looked_at: Collection[str] = ()
    estimated: Collection[str] = ()
    awaited: Collection[str] = ()
    last_used: Mapping[str, str] = field(default_factory=dict)
    preparable: Mapping[str, int] = field(default_factory=dict)
    preparation: PreparationView | None = None


def find_unload_target(state: State, unload: Job) -> str:
    """Return the load that an unload ends now: what serves, if it does, else what the request named."""
    assert unload.unload is not None
    model = state.models.get(unload.model_id)
    if unload.cause is Cause.SWAP or model is None or model.serving is None:
        return unload.unload.load_job_id
    return model.serving.load_job_id


class SchedulerView:
    """One look at everything, with what is asked more than once worked out once."""

    def __init__(
        self,
        state: State,
        running: Mapping[str, LoadView],
        policy: Policy,
        now: str,
        conditions: Observations,
    ) -> None:
        self.state, self.running, self.policy, self.now = state, running, policy, now
        self.conditions = conditions
        self.unended = state.unended()
        self._ago: dict[float, str] = {}
        self.queues: dict[str, list[Job]] = {}
        for job in self.unended:
            if has_turn(job):
                self.queues.setdefault(job.model_id, []).append(job)

    def ago(self, seconds: float) -> str:
        """Return the stamp so long before this moment."""
        if seconds not in self._ago:
            self._ago[seconds] = add_seconds(self.now, -seconds)
        return self._ago[seconds]

    def is_next(self, job: Job) -> bool:
        """Whether no earlier job of its model has to end before this one."""
        return not has_turn(job) or self.queues[job.model_id][0].id == job.id

    def alive(self, load_job_id: str) -> bool:
        """Whether there is a process behind this load."""
        run = self.running.get(load_job_id)
        return run is not None and run.alive

    @cached_property
    def free_places(self) -> int:
        """How many loads may begin."""
        loading = sum(run.phase is Phase.LOADING for run in self.running.values())
        return self.policy.loads_at_once - loading if self.conditions.fork_server_up else 0

    @cached_property
    def free_bytes(self) -> int | None:
        """What is left of the budget, which may be less than nothing; None without one."""
        budget, preparation = self.policy.budget_bytes, self.conditions.preparation
        if budget is None:
            return None
        used = sum(run.memory_bytes for run in self.running.values())
        return budget - used - (preparation.memory_bytes if preparation is not None else 0)

    @cached_property
    def leaving(self) -> frozenset[str]:
        """The loads whose processes are on their way out, or will be without anybody asking for more."""
        targets = {
            find_unload_target(self.state, job)
            for job in self.unended
            if job.unload is not None and self.is_next(job)
        }
        return frozenset(
            load_job_id
            for load_job_id, run in self.running.items()
            if run.killed or run.phase in (Phase.DRAINING, Phase.FAILED) or load_job_id in targets
        )

    @cached_property
    def coming_bytes(self) -> int:
        """What those that are leaving will give back."""
        preparation = self.conditions.preparation
        stopping = preparation.memory_bytes if preparation is not None and preparation.stopping else 0
        return stopping + sum(self.running[load_job_id].memory_bytes for load_job_id in self.leaving)

    @property
    def may_stop_preparing(self) -> bool:
        """Whether something is being prepared that was not told to stop."""
        preparation = self.conditions.preparation
        return preparation is not None and not preparation.stopping

    @cached_property
    def present(self) -> frozenset[str]:
        """The models that have a process."""
        return frozenset(run.model_id for run in self.running.values() if run.alive)

    @cached_property
    def departing(self) -> frozenset[str]:
        """The models all of whose processes are leaving."""
        staying = {run.model_id for key, run in self.running.items() if key not in self.leaving}
        return self.present - staying

    @cached_property
    def settles(self) -> bool:
        """Whether what is free will change by itself: what loads has more reserved than it will keep."""
        loading = (Phase.LOADING, Phase.LOADED)
        if self.leaving or self.conditions.preparation is not None:
            return True
        return any(run.phase in loading for run in self.running.values())

    @cached_property
    def at_rest(self) -> list[tuple[LoadedModel, LoadView]]:
        """The models that serve and of which nothing else is asked or under way."""
        serving = ((self.state.models.get(run.model_id), run) for run in self.running.values())
        return [
            (loaded, run)
            for model, run in serving
            if model is not None
            and not (model.loads or model.unloads or run.killed)
            and self.serving_run(model) is run
            and (loaded := model.loaded) is not None
        ]

    def serving_run(self, model: Model | None) -> LoadView | None:
        """Return the live side of what a model serves from, if it does."""
        if model is None or model.serving is None or model.phase is not ModelState.LOADED:
            return None
        run = self.running.get(model.serving.load_job_id)
        return run if run is not None and run.phase is Phase.SERVING else None

    def is_making_way(self, model: Model) -> bool:
        """Whether what a model serves from is being ended for the load that is next."""
        if not model.unloads:
            return False
        unended = self.state.unended(model.id)
        return any(job.cause is Cause.SWAP and job.id in model.unloads for job in unended)

    def used_at(self, model: LoadedModel, run: LoadView) -> str:
        """Return when a model that serves was used last: that somebody had it loaded counts as a use."""
        loaded_at = model.serving.loaded_at
        if model.serving.loaded_by == SYSTEM:  # which is no use; when it was used before, may be known
            loaded_at = self.conditions.last_used.get(model.id, loaded_at)
        return max(run.last_used_at or "", loaded_at)
