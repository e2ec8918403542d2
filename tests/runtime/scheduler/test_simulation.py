"""Anything happens in any order, with more models than memory, and in the end everything ends."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from msgspec import UNSET
from support.fleet import of_both
from support.history import CONTENTS, PLAIN, at
from support.worlds import Process, World, request_of, withdrawal_of

from events.clock import add_seconds, seconds_between
from events.commands import Command, Condition, JobUnchanged, ModelUnchanged, WorkerServes
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.jobs import NO_PROGRESS, Job, JobKind, JobStatus
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.serving import Serving
from events.types import (
    Cause,
    Justification,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    ModelLoaded,
    ModelUnloaded,
    UnloadRequested,
    WorkerExited,
)
from events.values import Credential
from features.approvals.commands import ApprovedBytes
from features.approvals.rules import AddedMode, ApprovalRule
from features.devices.names import CPU
from features.rules import LoadPolicy
from runtime.rooms import MACHINE, Alternative, RoomLimits
from runtime.scheduler import actions
from runtime.scheduler.actions import Action, Decision
from runtime.scheduler.admission import PRIORITY_AGING_S
from runtime.scheduler.eviction import LOADS_PER_TURN, TURN_S
from runtime.scheduler.scheduler import MAX_INCIDENTS
from runtime.scheduler.view import (
    MIN_RESIDENCY_S,
    LoadView,
    MemoryEstimate,
    Phase,
    Policy,
    rank_of,
)

UNFORCED = (
    actions.StartLoad,
    actions.FailLoad,
    actions.RequestReload,
    actions.FailModel,
    actions.RecordExits,
    actions.UnloadForReplacement,
    actions.UnloadAutomatically,
    actions.ChangeSettings,
)
"""What is not done to a model before its forced unload has ended."""

URGENT = (Cause.RECOVERY, Cause.SWAP)
"""Of these one may load beside as many as may at once."""

NEVER_OVERTAKING_LIMIT_S = 120
"""Who has waited that long is overtaken by nobody who came later."""

PRESSURE_LIMIT_S = 60
"""Who has waited that long waits for the machine's pressure no longer."""


class WatchedWorld(World):
    """A world whose every action is checked before it is done."""

    def needs(self, job: Job) -> tuple[Alternative, ...]:
        """Return what a load needs on each of its devices; nothing before it is known."""
        estimate = self.estimates.get(job.id)
        return estimate.alternatives if isinstance(estimate, MemoryEstimate) else (Alternative({MACHINE: 0}),)

    def limits_of(self, room: str) -> tuple[float, float]:
        """Return the budget of a room, and the most models there."""
        if room != MACHINE:
            return self.policy.rooms[room].budget_bytes or inf, inf
        return self.policy.budget_bytes or inf, self.policy.max_loaded or inf

    def bytes_of(self, processes: Iterable[Process], room: str) -> int:
        """Return what processes reserve or take in a room."""
        return sum(process.run.list_taken().get(room, 0) for process in processes)

    def taken_bytes(self, room: str) -> int:
        """Return what is reserved or taken in a room in all."""
        return self.bytes_of(self.live.values(), room)

    def is_proven(self, job: Job) -> bool:
        """Whether the files of a load loaded before, and made progress the last time."""
        model = self.state.models.get(job.model_id)
        error = model.error if model is not None else None
        is_known = job.cause in RELOADS or job.id in self.proven()
        return is_known and (error is None or error.code != NO_PROGRESS)

    def loads_proven(self) -> list[Job]:
        """Return the running loads of files that loaded before."""
        running = self.running().items()
        loading = [load for load, run in running if run.phase is Phase.LOADING and not run.killed]
        jobs = map(self.state.unended_job, loading)
        return [job for job in jobs if job is not None and self.is_proven(job)]

    def check_pause(self, decision: Decision) -> None:
        """Files that loaded before wait for others of that kind only, however many loads never end."""
        super().check_pause(decision)
        for job_id, reason in decision.waiting_for.items():
            job = self.state.unended_job(job_id)
            if job is not None and self.is_proven(job) and reason.startswith("a free load slot"):
                assert self.loads_proven()

    def act(self, action: Action) -> None:
        self._check_force(action)
        match action:
            case actions.StartLoad(job, chosen):
                assert chosen in self.needs(job)
                self._check_start(job, chosen)
            case actions.UnloadForReplacement(job, load):
                self._check_way(job, load)
            case actions.ChangeSettings(job, load):
                self._check_settled(job, load)
            case actions.UnloadAutomatically(model, cause, job_id, ends_turn):
                self._check_end(model, cause, self.state.unended_job(job_id), ends_turn=ends_turn)
            case actions.FailLoad(job) if job.id in self.live:
                assert not self.running()[job.id].has_outcome
            case actions.FinishUnload(_, load) if load in self.live:
                assert self.live[load].run.has_exited
            case _:
                pass
        super().act(action)

    def _check_settled(self, job: Job, load: str) -> None:
        """What a load asks for is loaded, by all of its workers, when only its settings apply."""
        assert job.load is not None
        assert self.state.queue(job.model_id)[0].id == job.id
        serving = self.state.models[job.model_id].serving
        assert serving is not None
        assert (serving.load_job_id, serving.version) == (load, job.version)
        assert serving.parameters.instances == len(serving.worker_ids) == job.load.instances

    def _check_force(self, action: Action) -> None:
        """Nothing else is done to a model before its forced unload has ended, with all its processes."""
        model, position = self.model_of(action), self._position_of(action)
        forced = [job.created_position for job in self.state.queue(model) if job.forced]
        if forced and isinstance(action, UNFORCED):
            assert isinstance(action, actions.FailLoad)
            assert position > forced[-1]  # behind it one may be late
        if isinstance(action, actions.FinishUnload) and any(job.forced for job in action.jobs):
            assert not [process for process in self.alive() if process.model_id == model]

    def _position_of(self, action: Action) -> int:
        match action:
            case actions.FinishUnload(jobs):
                return jobs[0].created_position
            case actions.JobAction(job):
                return job.created_position
        return 0

    def _check_start(self, job: Job, need: Alternative) -> None:
        assert job.load is not None
        assert self.state.queue(job.model_id)[0].id == job.id
        assert not job.cancelling
        may_exceed = job.cause in URGENT or (self.is_proven(job) and not self.loads_proven())
        assert len(self.loading()) < self.policy.loads_at_once + may_exceed
        assert self._has_room(job, need)
        assert not self.measured_in(need)
        self._check_first_device(job, need)
        if job.load.strategy == "in_place" and job.cause not in (Cause.RECOVERY, Cause.DEMAND):
            assert job.model_id not in {process.model_id for process in self.serving()}
        yields = job.load.priority == "low" and job.cause not in RELOADS
        if self.under_pressure and yields and not self._made_way(job):
            assert self._waited_s(job) >= PRESSURE_LIMIT_S
        self._check_turn(job, [need])

    def _has_room(self, job: Job, need: Alternative) -> bool:
        """Whether there is memory and a place for a load now."""
        return all(
            self.taken_bytes(room) + needed_bytes <= self.limits_of(room)[0]
            and (job.model_id in self.present(room) or len(self.present(room)) < self.limits_of(room)[1])
            for room, needed_bytes in need.needs.items()
        )

    def _check_first_device(self, job: Job, need: Alternative) -> None:
        """No load passes over a device of another provider that has room, or only measures a load."""
        pending = [
            each for each in self.state.unended() if each.load is not None and each.id not in self.live
        ]
        if pending != [job]:  # room may be reserved
            return
        needs = self.needs(job)
        for before in needs[: needs.index(need)]:
            assert before.target.group == need.target.group or not self._has_room(job, before)

    def measured_in(self, need: Alternative) -> list[LoadView]:
        """Return the loads whose share of a device's own memory is not known yet, or not back."""
        rooms = [name for name, limits in self.policy.rooms.items() if limits.is_measured]
        own = need.needs.keys() & rooms
        runs = [run for run in self.running().values() if own & run.taken.keys()]
        return [run for run in runs if run.phase is Phase.LOADING or (run.killed and run.alive)]

    def _check_way(self, job: Job, load: str) -> None:
        """What serves is ended for a load only if that can begin at once in its place."""
        assert job.load is not None
        assert job.load.strategy != "beside" or job.cause is Cause.DEMAND
        assert job.cause is not Cause.RECOVERY
        model = self.state.models[job.model_id]
        assert model.serving is not None
        assert model.serving.load_job_id == load
        assert not self._swap_outs(model)
        can_start = [need for need in self.needs(job) if self._fits_without(need, self.live[load])]
        assert can_start
        self._check_turn(job, can_start)

    def _fits_without(self, need: Alternative, replaced: Process) -> bool:
        """Whether there is memory for a load when what it replaces has gone."""
        return not self.measured_in(need) and all(
            self.taken_bytes(room) - self.bytes_of([replaced], room) + needed_bytes <= self.limits_of(room)[0]
            for room, needed_bytes in need.needs.items()
        )

    def _check_turn(self, job: Job, needs: Sequence[Alternative]) -> None:
        """No load takes room from one that came first and waits too long, also not by an eviction."""
        if self._made_way(job) or job.cause in RELOADS:
            return
        for other in self.state.unended():
            waits = other.kind is JobKind.LOAD and other.id not in self.live
            came_first = other.created_position < job.created_position and other.cause not in RELOADS
            if waits and came_first and self._is_ready(other) and not self._has_room_for(job, needs, other):
                assert self._waited_s(other) < NEVER_OVERTAKING_LIMIT_S

    def _has_room_for(self, job: Job, needs: Sequence[Alternative], other: Job) -> bool:
        """Whether both fit, on some of their devices, when what is leaving has gone.

        A model that stays takes nobody's place.
        """
        leaving = [process for process in self.alive() if process.killed or process.unloading]
        pairs = ((need, theirs) for need in needs for theirs in self.needs(other))
        return any(self._fit_both(job, need, other, theirs, leaving) for need, theirs in pairs)

    def _fit_both(
        self, job: Job, need: Alternative, other: Job, theirs: Alternative, leaving: Collection[Process]
    ) -> bool:
        """Whether a load takes nothing of what another one needs."""
        for room, needed_bytes in need.needs.items():
            if room not in theirs.needs:
                continue
            budget_bytes, max_loaded = self.limits_of(room)
            others = [process for process in self.live.values() if process not in leaving]
            staying = self.present(room, without=leaving)
            models = staying | {job.model_id, other.model_id}
            if self.bytes_of(others, room) + needed_bytes + theirs.needs[room] > budget_bytes:
                return False
            if job.model_id not in staying and len(models) > max_loaded:
                return False
        return True

    def _is_ready(self, job: Job) -> bool:
        """Whether only the others are in a load's way."""
        is_next = self.state.queue(job.model_id)[0].id == job.id
        is_known = isinstance(self.estimates.get(job.id), MemoryEstimate)
        model = self.state.models.get(job.model_id)
        makes_way = model is not None and bool(self._swap_outs(model))
        return is_next and is_known and not makes_way

    def _swap_outs(self, model: Model) -> list[Job]:
        """Return the unended jobs by which a model makes way for its next version."""
        unended = self.state.unended(model.id)
        return [job for job in unended if job.cause is Cause.SWAP and job.id in model.unloads]

    def _made_way(self, job: Job) -> bool:
        model = self.state.models.get(job.model_id)
        return job.cause is Cause.SWAP or (model is not None and model.previous is not None)

    def _waited_s(self, job: Job) -> float:
        return seconds_between(job.created_at, self.now)

    def _check_end(
        self, loaded: LoadedModel, cause: Cause, for_job: Job | None, *, ends_turn: bool = False
    ) -> None:
        """A model that the system unloads by itself has no request, or had its turn, and had its time."""
        model, serving = loaded.model, loaded.serving
        assert not self.state.queue(model.id)
        if cause is Cause.RESTART:
            assert (model.phase, self.policy.restores) == (ModelState.LOST, False)
            return
        process = self.live[serving.load_job_id]
        assert process.view(None, "").phase is Phase.SERVING
        is_busy = process.busy or model.id in self.demanded
        assert not is_busy or ends_turn
        if ends_turn:
            self._check_end_of_turn(serving, for_job, is_busy=is_busy)
        assert not serving.parameters.pinned
        if cause is Cause.IDLE:
            assert serving.parameters.keep_alive_s is not None
            idle_since = max(process.last_used_at or "", serving.loaded_at)
            assert add_seconds(idle_since, serving.parameters.keep_alive_s) <= self.now
        if cause is Cause.EVICTION:
            assert self.policy.evicts
            assert add_seconds(serving.loaded_at, self.policy.min_residency_s) <= self.now
            self._check_need_to_evict(for_job)

    def _check_end_of_turn(self, serving: Serving, job: Job | None, *, is_busy: bool) -> None:
        """A busy model gives way after its turn, to a load that has waited and starts before its next one."""
        assert job is not None
        assert self.policy.takes_turns
        turn_s = max(TURN_S, self.policy.min_residency_s)
        assert self._waited_s(job) >= turn_s
        if is_busy:
            load_s = self.live[serving.load_job_id].load_s
            assert seconds_between(serving.loaded_at, self.now) >= max(turn_s, LOADS_PER_TURN * load_s)
            if not self._made_way(job) and job.cause not in RELOADS:
                assert job.load is not None
                minutes = int(self._waited_s(job) // PRIORITY_AGING_S)
                assert rank_of(job.load) - min(2, minutes) <= rank_of(serving.parameters)

    def _check_need_to_evict(self, job: Job | None) -> None:
        rooms = [MACHINE, *self.policy.rooms]
        if job is None:
            assert any(self.taken_bytes(room) > self.limits_of(room)[0] for room in rooms)
            return
        assert job.cause is not Cause.RESTART
        # It lacks room for itself, or beside those for which room is reserved.
        waiting = [
            each for each in self.state.unended() if each.load is not None and each.id not in self.live
        ]
        own = {room for need in self.needs(job) for room in need.needs}
        assert any(self._is_short(room, waiting) for room in own)
        self._check_turn(job, self.needs(job))

    def _is_short(self, room: str, waiting: Sequence[Job]) -> bool:
        """Whether there is not room for all these loads, wherever they may run."""
        budget_bytes, max_loaded = self.limits_of(room)
        needed = {job.model_id: 0 for job in waiting} if room == MACHINE else {}
        total_bytes = 0
        for job in waiting:
            found = [need.needs[room] for need in self.needs(job) if room in need.needs]
            if found:
                needed[job.model_id] = max(found)
                total_bytes += max(found)
        models = self.present(room) | needed.keys()
        return len(models) > max_loaded or self.taken_bytes(room) + total_bytes > budget_bytes

    def present(self, room: str = MACHINE, *, without: Collection[Process] = ()) -> set[str]:
        """Return the models with a process in a room."""
        running = self.running()
        return {
            process.model_id
            for load, process in self.live.items()
            if running[load].alive and room in running[load].taken and process not in without
        }

    def check_memory(self) -> None:
        """What a load has reserved counts until it has loaded, what it takes until its workers are gone."""
        running = self.running()
        for load, process in self.live.items():
            is_coming = not (process.started or process.killed or process.failure)
            if process.left or is_coming:
                taken = process.measured_bytes if process.loaded else process.reserved_bytes
                assert running[load].memory_bytes >= taken
            elif process.started:
                assert running[load].memory_bytes == 0

    def check_operations(self) -> None:
        """Never are there two operations on one model, and never too many at once."""
        running = self.running().items()
        loads = [load for load, run in running if run.phase is Phase.LOADING and not run.killed]
        loading = [self.state.unended_job(load) for load in loads]
        most = self.policy.loads_at_once
        assert len(loading) <= most + 1
        if len(loading) > most:  # the proof of a reload's files is gone once one of them made no progress
            assert any(job is not None and (job.cause in RELOADS or self.is_proven(job)) for job in loading)
        for room, limits in self.policy.rooms.items():
            there = [run for _, run in running if room in run.taken and run.phase is Phase.LOADING]
            assert len(there) <= 1 or not limits.is_measured
        for name, model in self.state.models.items():
            unended = self.state.unended(name)
            own = [job for job in unended if job.kind is JobKind.LOAD or job.id in model.unloads]
            begun = [job for job in own if job.status is JobStatus.IN_PROGRESS]
            # The start of a load that is not live was recorded by an append that raised: it starts again.
            if any(job.kind is JobKind.LOAD and job.id in self.live for job in begun):
                assert len(begun) == 1
            assert len([process for process in self.loading() if process.model_id == name]) <= 1
            if model.previous is not None:
                assert model.state in {ModelState.LOADING, ModelState.LOST}  # after an end of the server
                assert model.serving is None
                assert model.loads

    def check_rest(self) -> None:
        """Every job has ended, and there is a process for each model that is loaded, and none else."""
        assert self.state.unended() == []
        models = self.state.models.values()
        loaded = [model for model in models if model.phase is ModelState.LOADED]
        assert {model.serving.load_job_id for model in loaded if model.serving} == self.live.keys()
        for model in loaded:
            assert model.serving is not None
            assert model.serving.worker_ids == tuple(self.live[model.serving.load_job_id].left)
            whole = len(model.serving.worker_ids) == model.serving.parameters.instances
            assert whole != model.degraded
            assert whole or len(model.incidents) >= MAX_INCIDENTS or model.serving.kept_as_is
        for model in models:
            assert model.phase is not ModelState.LOST
            assert model.previous is None
            if model.phase is ModelState.UNLOADED:
                self._check_unloaded(model)

    def _check_unloaded(self, model: Model) -> None:
        """A model that was loaded is so no more only because its end was asked for, or that of its reload."""
        own = [event for event in self.events if event.model_id == model.id]
        loaded = [number for number, event in enumerate(own) if isinstance(event.data, ModelLoaded)]
        since = own[loaded[-1] :] if loaded else []
        ended = {event.job_id for event in since if isinstance(event.data, ModelUnloaded)}
        unloads = {
            event.id
            for event in own
            if isinstance(event.data, UnloadRequested) and event.data.cause is not Cause.SWAP
        }
        reloads = {
            event.id for event in own if isinstance(event.data, LoadRequested) and event.data.cause in RELOADS
        }
        assert not since or unloads & ended or reloads & self.cancelled


NAMES = st.sampled_from(["a", "b", "c"])
OUTCOMES = st.sampled_from(["loaded", "loaded", "loaded", "refused", "dies", "other files"])

RULES = st.sampled_from(
    [
        LoadPolicy(),
        LoadPolicy(approval=(ApprovalRule(("b",)),)),
        LoadPolicy(approval=(ApprovalRule(("[bc]",), 2), ApprovalRule(("b",), added=AddedMode.RECORDED))),
        LoadPolicy(approval=(ApprovalRule(("*",), emergency=False),)),
    ]
)

EMERGENCY = Justification(Credential(), "fire", "fire")

LIMITS = st.builds(
    RoomLimits,
    title=st.just("the device"),
    budget_bytes=st.sampled_from([100, 100, None]),
    is_measured=st.sampled_from([True, True, False]),
)

POLICIES = st.builds(
    Policy,
    loads_at_once=st.integers(1, 2),
    budget_bytes=st.sampled_from([100, 100, 100, None]),
    max_loaded=st.sampled_from([None, None, 1, 2]),
    evicts=st.booleans(),
    takes_turns=st.booleans(),
    min_residency_s=st.sampled_from([0.0, 10.0]),
    restores=st.sampled_from([True, True, False]),
    loads=RULES,
    rooms=st.fixed_dictionaries({"cuda:0": LIMITS, "cuda:1": LIMITS}),
)

DEVICES = st.sampled_from(
    [
        *(UNSET, UNSET, UNSET, UNSET, UNSET, UNSET, UNSET, ("cuda:0",), ("cuda:1",), ("cuda:*",)),
        *(("cuda:1", "cpu"), ("cpu", "cuda:0"), ("npu:0", "cuda:0"), ("npu:0",)),
    ]
)
"""Of a load; there is no `npu:0`."""
DEFAULT_DEVICES = st.sampled_from([(CPU,), (CPU,), ("cuda:0",), ("cuda:0",), ("cuda:*", CPU)])
"""Of loads that name none: what most of them contend for."""

PARAMETERS = st.builds(
    LoadParameters,
    priority=st.sampled_from(["normal", "normal", "high", "low"]),
    timeout_s=st.sampled_from([5, 300, 300]),
    keep_alive_s=st.sampled_from([None, None, -1, 0, 20]),
    strategy=st.sampled_from(["beside", "in_place", "auto"]),
    pinned=st.sampled_from([False, False, False, True]),
    instances=st.sampled_from([1, 1, 1, 2]),
    devices=DEVICES,
)


def is_special(parameters: LoadParameters, name: str) -> bool:
    """Whether a request has to name a parameter."""
    return getattr(parameters, name) not in (1, UNSET)


LOADS = st.builds(
    lambda name, version, contents, parameters, asked, said: RequestLoad(
        name,
        version,
        contents,
        "alice",
        parameters,
        asked=frozenset(asked | {each for each in ("instances", "devices") if is_special(parameters, each)}),
        justification=said,
    ),
    NAMES,
    st.sampled_from([1, 1, 2]),
    st.sampled_from([CONTENTS, CONTENTS, CONTENTS, None]),
    PARAMETERS,
    st.sets(st.sampled_from(["pinned", "keep_alive_s", "timeout_s", "strategy"])),
    st.sampled_from([UNSET, UNSET, UNSET, EMERGENCY]),
)

KINDS = st.sampled_from(["load", "unload", "force", "cancel", "withdraw", "withdraw"])
"""Of the commands that clients give."""

APPROVING = st.sampled_from([("bob", "carol"), ("bob", "carol"), ("alice", "carol"), ("alice",), ()])
"""The persons who approve a version before a load of it."""

TURNS = st.sampled_from([0, 1, 2, 3, 100, 100])
"""That the consumer takes before the next thing happens; with the last it comes to rest."""

TROUBLES: dict[str, Callable[[World], object]] = {
    "fork server dies": World.lose_fork_server,
    "fork server is back": lambda world: setattr(world, "fork_server_up", True),
    "a fork fails": World.fail_fork,
    "outcomes wait": lambda world: setattr(world, "outcomes_wait", True),
    "outcomes can be recorded": lambda world: setattr(world, "outcomes_wait", False),
    "log loses": lambda world: setattr(world, "fault", "lost"),
    "server is killed": lambda world: world.restart(unclean=True),
    "server is stopped": lambda world: world.restart(unclean=False),
    "pressure": lambda world: setattr(world, "under_pressure", True),
    "no pressure": lambda world: setattr(world, "under_pressure", False),
}


def pick(processes: list[Process], which: int) -> list[Process]:
    """Return one of the processes, if there is any."""
    return [processes[which % len(processes)]] if processes else []


class Simulation(RuleBasedStateMachine):
    """Anything happens in any order, and in the end everything ends."""

    def __init__(self) -> None:
        super().__init__()
        self.world = WatchedWorld()

    @initialize(policy=POLICIES, loads=st.lists(LOADS, max_size=3), devices=DEFAULT_DEVICES)
    def begin(self, policy: Policy, loads: list[RequestLoad], devices: tuple[str, ...] = (CPU,)) -> None:
        self.world = WatchedWorld(policy)
        self.world.default_devices = devices
        for load in loads:
            self.somebody_loads_and_all_goes_well(load, 100)

    @rule(load=LOADS, turns=TURNS)
    def somebody_loads(self, load: RequestLoad, turns: int) -> None:
        self.world.submit(load)
        self.world.work(turns)

    @rule(load=LOADS, turns=TURNS, approving=APPROVING, adds=st.booleans())
    def somebody_loads_and_all_goes_well(
        self,
        load: RequestLoad,
        turns: int,
        approving: Sequence[str] = ("bob", "carol"),
        *,
        adds: bool = False,
    ) -> None:
        if adds:
            self.world.add_version(load.model_id, load.version, "pia")
        for by in approving:
            self.world.approve(load.model_id, load.version, by)
        self.world.submit(load)
        self.world.let_loads_end(turns)

    @rule(
        does=st.sampled_from(["approve", "approve", "withdraw", "withdraw late", "add"]),
        load=LOADS,
        by=st.sampled_from(["alice", "bob", "bob", "carol"]),
        turns=TURNS,
    )
    def somebody_approves_or_withdraws_or_adds_what_is_loaded(
        self, does: str, load: RequestLoad, by: str, turns: int
    ) -> None:
        match does:
            case "approve":
                self.world.approve(load.model_id, load.version, by)
            case "add":
                self.world.add_version(load.model_id, load.version, by)
            case "withdraw":
                self.world.submit(withdrawal_of(load.model_id, self.world.state))
            case _:
                self.come_first(load, "withdraw")
        self.world.submit(load)
        self.world.work(turns)

    @rule(name=NAMES, version=st.sampled_from([1, 1, 2]), turns=TURNS)
    def files_change(self, name: str, version: int, turns: int) -> None:
        self.world.log.changes[name, version] ^= 1
        self.world.work(turns)

    @rule(rules=RULES, unclean=st.booleans(), turns=TURNS)
    def server_starts_with_other_rules(self, rules: LoadPolicy, turns: int, *, unclean: bool) -> None:
        self.world.restart(unclean=unclean)
        self.world.policy = replace(self.world.policy, loads=rules)
        self.world.work(turns)

    @rule(name=NAMES | st.none(), force=st.booleans(), holds=st.booleans(), turns=TURNS)
    def somebody_unloads(self, name: str | None, *, force: bool, holds: bool, turns: int) -> None:
        self.world.submit(
            RequestUnload(name, "alice", force, takes_out_of_service=holds, until_asked=not holds)
        )
        self.world.work(turns)

    @rule(which=st.integers(0, 3), turns=TURNS)
    def somebody_cancels(self, which: int, turns: int) -> None:
        unended = self.world.state.unended()
        if unended:
            self.world.submit(RequestCancel(unended[which % len(unended)].id, "alice"))
        self.world.work(turns)

    @rule(load=LOADS, kind=KINDS, turns=TURNS)
    def somebody_comes_first(self, load: RequestLoad, kind: str, turns: int) -> None:
        self.come_first(load, kind)
        self.world.work(turns)

    def come_first(self, load: RequestLoad, kind: str) -> None:
        """Record a command on the model of what the consumer appends next, right before that."""

        def build_command(action: Action) -> Command:
            return request_of(kind, self.world.model_of(action), self.world.state, load)

        self.world.meanwhile.append(build_command)

    @rule(
        which=st.integers(0, 3),
        outcome=OUTCOMES,
        keeps=st.sampled_from([50, 100, 130]),
        took_s=st.sampled_from([0.0, 0.0, 20.0]),
        late=st.booleans(),
        turns=TURNS,
    )
    def a_load_ends(
        self, which: int, outcome: str, keeps: int, took_s: float, turns: int, *, late: bool
    ) -> None:
        self.world.concludes_late = late
        for process in pick(self.world.loading(), which) if self.world.fork_server_up else []:
            process.load_s = took_s
            process.finish(outcome, keeps)
        self.world.work(turns)

    @rule(which=st.integers(0, 3), turns=TURNS)
    def a_load_makes_no_progress(self, which: int, turns: int) -> None:
        for process in pick(self.world.loading(), which):
            process.hang(self.world.now)
        self.world.work(turns)

    @rule(which=st.integers(0, 3), count=st.sampled_from([1, 1, 2]), turns=TURNS)
    def workers_of_a_model_die(self, which: int, count: int, turns: int) -> None:
        for process in pick(self.world.alive(), which):
            process.die(WorkerExited(None, 9, ()), *process.left[:count])
        self.world.work(turns)

    @rule(which=st.integers(0, 3), ends=st.booleans(), turns=TURNS)
    def requests_come_and_go(self, which: int, *, ends: bool, turns: int) -> None:
        for process in pick(self.world.serving(), which):
            process.busy = True
            if ends:
                process.answer(self.world.now)
        self.world.work(turns)

    @rule(name=NAMES, turns=TURNS)
    def demand_for_a_model_begins_or_ends(self, name: str, turns: int) -> None:
        self.world.demanded ^= {name}
        self.world.work(turns)

    @rule(name=NAMES, version=st.sampled_from([1, 2]), turns=TURNS)
    def an_inference_asks_for_a_model(self, name: str, version: int, turns: int) -> None:
        self.world.demanded.add(name)
        self.world.submit(RequestLoad(name, version, CONTENTS, "pia", cause=Cause.DEMAND))
        self.world.work(turns)

    @rule(
        load=LOADS,
        changes=st.booleans(),
        leads_away=st.booleans(),
        asked=st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=3),
        turns=TURNS,
    )
    def a_model_is_away_before_inferences_ask_for_it(
        self, load: RequestLoad, asked: Sequence[int], turns: int, *, changes: bool, leads_away: bool
    ) -> None:
        """Its files may change meanwhile, and an inference of an earlier release may have loaded others.

        Inferences ask for the loaded version, or for the other one.
        """
        name, versions = load.model_id, (load.version, 3 - load.version)
        self.world.submit(load)
        self.world.let_loads_end(turns)
        self.world.submit(RequestUnload(name, "alice", force=True, until_asked=True))
        self.world.let_loads_end(turns)
        self.world.log.changes[name, load.version] ^= changes
        self.world.demanded.add(name)
        if leads_away:
            self.world.load_as_before(name, versions[asked[-1]])
            self.world.let_loads_end(turns)
        for which in asked:
            self.world.submit(RequestLoad(name, versions[which], CONTENTS, "pia", cause=Cause.DEMAND))
            self.world.let_loads_end(turns)

    @rule(which=st.integers(0, 3), turns=TURNS)
    def a_model_grows(self, which: int, turns: int) -> None:
        for process in pick(self.world.serving(), which):
            process.measured_bytes += 30
            process.keeps_percent += 40
        self.world.work(turns)

    @rule(turns=TURNS)
    def estimates_end_and_the_next_take_time(self, turns: int) -> None:
        self.world.finish_estimates()
        self.world.estimates_take_time = True
        self.world.work(turns)

    @rule(turns=TURNS)
    def ending_processes_end(self, turns: int) -> None:
        self.world.end_all()
        self.world.work(turns)

    @rule(
        seconds=st.sampled_from([0.001, 1, 12, 12, 35, 65, 400]),
        first=st.none() | st.tuples(LOADS, KINDS),
        turns=TURNS,
    )
    def time_passes(self, seconds: float, first: tuple[RequestLoad, str] | None, turns: int) -> None:
        self.world.now = add_seconds(self.world.now, seconds)
        if first is not None:
            self.come_first(*first)
        self.world.work(turns)

    @rule(turns=TURNS)
    def a_commit_is_durable_but_raises(self, turns: int) -> None:
        self.world.fault = "unsure"
        self.world.work(turns)

    @rule(trouble=st.sampled_from(list(TROUBLES)), turns=TURNS)
    def there_is_trouble(self, trouble: str, turns: int) -> None:
        TROUBLES[trouble](self.world)
        self.world.work(turns)

    @rule(outcome=OUTCOMES)
    def all_is_calm_for_a_while(self, outcome: str) -> None:
        self.world.calm_down(outcome)
        self.world.check_rest()

    @invariant()
    def no_more_than_one_operation_on_a_model_at_a_time(self) -> None:
        self.world.check_operations()

    @invariant()
    def memory_counts_until_processes_are_gone(self) -> None:
        self.world.check_memory()

    def teardown(self) -> None:
        self.world.calm_down("loaded")
        self.world.check_rest()


Simulation.TestCase.settings = settings(
    PLAIN, max_examples=of_both(short=60, long=5_000), stateful_step_count=50
)
TestSimulation = Simulation.TestCase


class CarelessWorld(WatchedWorld):
    """A world that appends without the conditions of one kind."""

    without: type[Condition]

    def list_conditions(self, action: Action) -> tuple[Condition, ...]:
        return tuple(each for each in super().list_conditions(action) if not isinstance(each, self.without))


def cancel_before_start(world: World) -> None:
    world.submit(RequestLoad("a", 1, (), "alice"))
    world.meanwhile.append(lambda _: RequestCancel(world.state.queue("a")[0].id, "alice"))
    world.settle()


def unload_before_reload(world: World) -> None:
    world.submit(RequestLoad("a", 1, (), "alice"))
    world.settle()
    world.progress("loaded")
    world.settle()
    for process in world.serving():
        process.die(WorkerExited(None, 9, ()), *process.left)
    decision = world.settle()
    world.now = decision.wake_at or world.now
    world.meanwhile.append(lambda _: RequestUnload("a", "alice"))
    world.settle()


def record_exit_unsurely(world: World) -> None:
    parameters = LoadParameters(instances=2)
    world.submit(RequestLoad("a", 1, (), "alice", parameters, asked=frozenset({"instances"})))
    world.settle()
    world.progress("loaded")
    world.settle()
    for process in world.serving():
        process.die(WorkerExited(None, 9, ()), *process.left[:1])
    world.fault = "unsure"
    world.settle()


def withdraw_before_start(world: World) -> None:
    world.policy = replace(world.policy, loads=LoadPolicy(approval=(ApprovalRule(("a",)),)))
    world.approve("a", 1, "bob")
    world.submit(RequestLoad("a", 1, (), "alice"))
    world.meanwhile.append(lambda _: withdrawal_of("a", world.state))
    world.settle()


@pytest.mark.parametrize(
    ("happens", "condition"),
    [
        (cancel_before_start, JobUnchanged),
        (withdraw_before_start, ApprovedBytes),
        (unload_before_reload, ModelUnchanged),
        (record_exit_unsurely, WorkerServes),
    ],
)
def test_simulation_sees_facts_appended_without_a_condition(
    happens: Callable[[World], None], condition: type[Condition]
) -> None:
    happens(WatchedWorld())
    careless = CarelessWorld()
    careless.without = condition
    with pytest.raises(AssertionError):
        happens(careless)


@pytest.mark.parametrize("loads_at_once", [1, 2, 3])
def test_proven_load_starts_at_once_beside_loads_that_never_end(loads_at_once: int) -> None:
    """More models than there are slots hang whenever they load, and are always loaded again."""
    world = World(Policy(loads_at_once, budget_bytes=10_000))
    world.submit(RequestLoad("c", 1, CONTENTS, "alice"))
    world.settle()
    world.progress("loaded")
    world.settle()
    for _ in range(5):
        world.submit(RequestUnload("c", "alice"))
        world.settle()
        world.end_all()
        for name, version in (("a", 1), ("b", 1), ("d", 1), ("e", 1)):
            world.submit(RequestLoad(name, version, CONTENTS, "mallory"))
        world.settle()
        for process in world.loading():
            process.hang(world.now)
        assert len(world.loading()) == loads_at_once
        asked_at = world.now
        world.submit(RequestLoad("c", 1, CONTENTS, "alice"))
        world.settle()
        (loading,) = (process for process in world.loading() if process.model_id == "c")
        assert world.now == asked_at
        loading.finish("loaded")
        world.settle()
        assert world.state.models["c"].state is ModelState.LOADED
        world.progress("loaded")
        world.settle()
    failed = {event.data.code for event in world.events if isinstance(event.data, LoadFailed)}
    assert NO_PROGRESS in failed


def test_models_that_do_not_fit_together_take_turns() -> None:
    world = World(Policy(loads_at_once=2, budget_bytes=100, evicts=True))
    for _ in range(100):
        for name, version in {"b": 2, "c": 1}.items():
            world.submit(RequestLoad(name, version, CONTENTS, "alice", LoadParameters(timeout_s=3_600)))
        world.settle()
        world.progress("loaded")
        world.settle()
        world.now = add_seconds(world.now, 1)
    loaded = [event for event in world.events if isinstance(event.data, ModelLoaded)]
    assert len(loaded) >= 100 // (MIN_RESIDENCY_S + 3)
    for first, second in pairwise(loaded):
        assert first.model_id != second.model_id
        assert seconds_between(first.recorded_at, second.recorded_at) >= MIN_RESIDENCY_S


BUSY = Policy(loads_at_once=2, max_loaded=1, evicts=True, takes_turns=True, min_residency_s=0)
PATIENT = LoadParameters(timeout_s=3_600)
PINNED = LoadParameters(timeout_s=3_600, pinned=True)


class Stay(NamedTuple):
    """A model's stay in memory, in seconds since the start; one that goes on ends at infinity."""

    model_id: str
    since_s: float
    until_s: float = inf


def ask_without_a_pause(policy: Policy, seconds: int, **parameters: LoadParameters) -> list[Stay]:
    """Let clients ask each of these models without a pause; return the stays of the models.

    Loads and unloads take no time; an inference for a model that is not loaded asks for its load.
    """
    world = World(policy)
    for _ in range(seconds):
        for name, given in parameters.items():
            if name not in {process.model_id for process in world.serving()}:
                world.demanded.add(name)
                world.submit(RequestLoad(name, 1, CONTENTS, "pia", given, Cause.DEMAND))
        for _ in range(3):
            world.settle()
            for process in world.serving():
                process.busy = True
                world.demanded.discard(process.model_id)
            world.progress("loaded")
        world.now = add_seconds(world.now, 1)
    stays = dict[str | None, Stay]()
    for number, event in enumerate(world.events):
        now_s = seconds_between(at(0), event.recorded_at)
        if isinstance(event.data, ModelLoaded):
            stays[event.model_id] = Stay(event.model_id or "", now_s)
        elif isinstance(event.data, ModelUnloaded):
            stays[str(number)] = stays.pop(event.model_id)._replace(until_s=now_s)
    return sorted(stays.values(), key=lambda stay: stay.since_s)


@pytest.mark.parametrize(("room", "names"), [(1, "ab"), (1, "abc"), (2, "abc"), (2, "abcde"), (3, "abcde")])
def test_busy_models_take_turns_of_the_stated_length(room: int, names: str) -> None:
    stays = ask_without_a_pause(replace(BUSY, max_loaded=room), 600, **dict.fromkeys(names, PATIENT))
    total_s = Counter[str]()
    for stay in stays:
        total_s[stay.model_id] += round(min(stay.until_s, 600) - stay.since_s)
    assert min(total_s.values()) >= 0.7 * max(total_s.values())
    longest_wait_s = TURN_S * ceil((len(names) - room) / room)
    for name in names:
        own = [stay for stay in stays if stay.model_id == name]
        for stay, following in pairwise(own):
            assert stay.until_s - stay.since_s >= TURN_S
            assert TURN_S <= following.since_s - stay.until_s <= longest_wait_s + 1


def test_model_of_high_priority_gives_way_to_aged_loads_only() -> None:
    high = LoadParameters(timeout_s=3_600, priority="high")
    stays = ask_without_a_pause(BUSY, 600, a=high, b=PATIENT)
    assert len(stays) >= 2 * 600 // (PRIORITY_AGING_S + TURN_S + 2)
    for stay in stays[:-1]:
        stay_s = PRIORITY_AGING_S if stay.model_id == "a" else TURN_S
        assert stay_s <= stay.until_s - stay.since_s <= stay_s + 1


@pytest.mark.parametrize(
    ("policy", "first"),
    [(replace(BUSY, takes_turns=False), PATIENT), (replace(BUSY, evicts=False), PATIENT), (BUSY, PINNED)],
)
def test_busy_model_does_not_give_way(policy: Policy, first: LoadParameters) -> None:
    assert ask_without_a_pause(policy, 600, a=first, b=PATIENT) == [Stay("a", 0)]
