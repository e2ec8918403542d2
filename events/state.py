"""The live state: all models, the unended jobs and the registers, folded one event at a time.

`State` is the writer's; a `Transaction` folds new events on top of it; `Entities` folds faster, for replay
and verification.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from msgspec import Struct

from events.clock import Timestamp, add_seconds
from events.jobs import Job, JobKind, evolve_job
from events.models import Model, ModelState, evolve_model
from events.presence import Transition
from events.registers import NOTHING, OF_REGISTERS, RegisterChanges, RegisterEntry, Registers
from events.types import (
    ENDS_OF_PROCESSES,
    REPLACEMENTS,
    CancelRequested,
    Event,
    LoadJoined,
    LoadRequested,
    UnloadJoined,
    UnloadRequested,
)

T = TypeVar("T")

KEY_LIFETIME_S = 24 * 3_600
"""How long an idempotency key belongs to its first request: clients retry within a day."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A used idempotency key: the fingerprint of its request, the job that answers, and the time of use."""

    fingerprint: str
    job_id: str
    recorded_at: Timestamp

    def holds(self, now: Timestamp) -> bool:
        return now < add_seconds(self.recorded_at, KEY_LIFETIME_S)


def read_key(event: Event) -> tuple[str, KnownKey] | None:
    """Return the hash of the event's idempotency key and the key's request, or None without a key."""
    data = event.data
    if not isinstance(data, REQUESTS) or data.idempotency is None or event.job_id is None:
        return None
    given = data.idempotency
    return given.key_hash, KnownKey(given.fingerprint, event.job_id, event.recorded_at)


REQUESTS = (LoadRequested, UnloadRequested, CancelRequested, LoadJoined, UnloadJoined)
"""The events that can carry an idempotency key."""

JOINS = (LoadJoined, UnloadJoined, CancelRequested)
"""The events by which an actor joins a job."""


@dataclass(frozen=True, slots=True)
class Join:
    """An actor's part in a job of another request; `type` is the type of the recording event."""

    job_id: str
    actor: str
    type: str


def read_join(event: Event) -> Join | None:
    if not isinstance(event.data, JOINS) or event.job_id is None:
        return None
    return Join(event.job_id, event.actor, event.type)


@dataclass(frozen=True, slots=True)
class KnownRequests:
    """Idempotency keys and joins of earlier requests, for the decisions of one group."""

    keys: Mapping[str, KnownKey] = field(default_factory=dict)
    joins: Collection[Join] = ()


@dataclass(slots=True)
class State:
    """Models, jobs and registers after the event at `position`.

    Models, jobs and registers are immutable. Only the writer changes the maps.

    Attributes:
        keys: idempotency keys in memory; the writer reads the keys of its commands from the log.
        joins: joins in memory; the writer reads the joins that concern its commands from the log.
        queues: the unended jobs of each model, oldest first.
        registers: the projections that concern no model.
        backlog: the number of unended jobs.
    """

    position: int = 0
    recorded_at: Timestamp = ""
    models: MutableMapping[str, Model] = field(default_factory=dict)
    jobs: MutableMapping[str, Job] = field(default_factory=dict)
    keys: MutableMapping[str, KnownKey] = field(default_factory=dict)
    joins: set[Join] = field(default_factory=set)
    queues: MutableMapping[str, tuple[Job, ...]] = field(default_factory=dict)
    registers: Registers = field(default_factory=Registers)
    backlog: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.queues:
            self._fill_queues(job for job in sorted(self.jobs.values(), key=_age) if not job.ended)
        self.backlog = sum(map(len, self.queues.values()))

    def unended(self, model_id: str | None = None) -> list[Job]:
        """Return the unended jobs of one model or of all, oldest first."""
        if model_id is not None:
            return list(self.queues.get(model_id, ()))
        return sorted(chain.from_iterable(self.queues.values()), key=_age)

    def queue(self, model_id: str) -> list[Job]:
        """Return the unended jobs of a model in the order in which they run."""
        return [job for job in self.unended(model_id) if has_turn(job)]

    def unended_job(self, job_id: str | None) -> Job | None:
        """Return the job unless it has ended; an ended job may still be in memory."""
        job = self.jobs.get(job_id) if job_id is not None else None
        return None if job is None or job.ended else job

    def is_removed(self, model_id: str, version: int) -> bool:
        """Whether a version was removed, and not added again since."""
        return version in self.registers.find_versions(model_id).removed

    def active(self) -> Model | None:
        """Return the active model, which a request or an inference loaded last; None without one."""
        candidates = (
            model
            for model in self.models.values()
            if model.phase in (ModelState.LOADED, ModelState.UNLOADING) and model.rank is not None
        )
        return max(candidates, key=lambda model: model.rank or 0, default=None)

    def apply(self, event: Event) -> Changes:
        if type(event.data) in OF_NO_MODEL:
            changes = self._apply_to_no_model(event)
        else:
            changes = self._apply_to_one(event)
            if key := read_key(event):
                self.keys.update([key])
            if join := read_join(event):
                self.joins.add(join)
        self.position, self.recorded_at = event.position, event.recorded_at
        return changes

    def _apply_to_no_model(self, event: Event) -> Changes:
        changes = _fold_of_no_model(event, self.models, self.unended, self.registers)
        if changes.models or changes.jobs:
            unended = self.unended()
            self.models.update(changes.models)
            self.jobs.update(changes.jobs)
            self._fill_queues(changes.jobs.get(job.id, job) for job in unended)
        return changes

    def _apply_to_one(self, event: Event) -> Changes:
        """Fold an event that concerns at most one job and one model, the usual case."""
        model_id, job_id = event.model_id, event.job_id
        before = self.unended_job(job_id)
        models: Mapping[str, Model] = NOTHING
        jobs: Mapping[str, Job] = NOTHING
        if model_id is not None:
            old_model = self.models.get(model_id)
            new_model = evolve_model(old_model, event, before)
            if new_model is not None and new_model is not old_model:
                self.models[model_id] = new_model
                models = {model_id: new_model}
        if job_id is not None:
            new_job = evolve_job(before, event)
            if new_job is not None and new_job is not before:
                self.jobs[job_id] = new_job
                self._enqueue(new_job)
                jobs = {job_id: new_job}
        return Changes(models, jobs)

    def forget_ended(self, jobs: Iterable[Job]) -> None:
        """Drop the ended ones of `jobs` from memory; the stored table has them."""
        for job in jobs:
            if job.ended:
                self.jobs.pop(job.id, None)

    def _enqueue(self, job: Job) -> None:
        """Put a job at its place in its model's queue; a new job comes last, because positions only grow."""
        before = self.queues.get(job.model_id, ())
        now = () if job.ended else (job,)
        for place, each in enumerate(before):
            if each.id == job.id:
                after = before[:place] + now + before[place + 1 :]
                break
        else:
            after = before + now
        self.backlog += len(after) - len(self.queues.get(job.model_id, ()))
        self.queues[job.model_id] = after

    def _fill_queues(self, unended: Iterable[Job]) -> None:
        """Queue all unended jobs, oldest first, in linear time."""
        queues: dict[str, list[Job]] = {}
        for job in unended:
            queues.setdefault(job.model_id, []).append(job)
        self.queues.update({model_id: tuple(queue) for model_id, queue in queues.items()})


def _age(job: Job) -> int:
    return job.created_position


def has_turn(job: Job) -> bool:
    """Whether a job waits for its turn in its model's queue; the unload of a replaced load does not."""
    return job.kind is JobKind.LOAD or job.cause not in REPLACEMENTS


OF_NO_MODEL = ENDS_OF_PROCESSES | OF_REGISTERS
"""The events that concern no single model or job, in one set for a fast look-up."""


class Changes(Struct, frozen=True, gc=False):
    """The entities that an event, or a transaction, changed.

    Attributes:
        transitions: those of the servers; empty for a transaction, whose `steps` have them.
        steps: the events of a transaction that changed models or made transitions, with their changes.
    """

    models: Mapping[str, Model]
    jobs: Mapping[str, Job]
    registers: RegisterChanges = NOTHING
    transitions: Sequence[Transition] = ()
    steps: Sequence[tuple[Event, Changes]] = ()


def _fold_of_no_model(
    event: Event, models: Mapping[str, Model], unended: Callable[[], Iterable[Job]], registers: Registers
) -> Changes:
    """Return the changes by an event that concerns no single model or job; `registers` has them."""
    changed, transitions = registers.apply(event, models, unended)
    if type(event.data) not in ENDS_OF_PROCESSES:
        return Changes(NOTHING, NOTHING, changed, transitions)
    new_models = ((model, evolve_model(model, event, None)) for model in models.values())
    new_jobs = ((job, evolve_job(job, event)) for job in unended())
    return Changes(
        {new.id: new for old, new in new_models if new is not None and new is not old},
        {new.id: new for old, new in new_jobs if new is not None and new is not old},
        changed,
        transitions,
    )


class _Layers(ChainMap[str, T]):
    """Changes of a transaction over the state before; `get` is overridden because it is the hot path."""

    def get(self, key: str, default: Any = None) -> Any:
        changed, before = self.maps
        return changed[key] if key in changed else before.get(key, default)


class Transaction:
    """A transaction folded on top of a state; the state changes once the transaction is durable.

    Args:
        base: the durable state.
        known: the idempotency keys and joins that the transaction's commands name. The transaction's own keys
            are read from the log once it is durable, so the base needs none.
    """

    def __init__(self, base: State, known: KnownRequests | None = None) -> None:
        self._base = base
        self._models: dict[str, Model] = {}
        self._jobs: dict[str, Job] = {}
        self._queues: dict[str, tuple[Job, ...]] = {}
        self.state = State(
            base.position,
            base.recorded_at,
            _Layers(self._models, base.models),
            _Layers(self._jobs, base.jobs),
            _Layers({}, dict(known.keys if known is not None else {})),
            set(known.joins if known is not None else ()),
            _Layers(self._queues, base.queues),
            base.registers.share(),
        )
        self._registers: dict[str, dict[str, RegisterEntry | None]] = {}
        self._steps: list[tuple[Event, Changes]] = []

    @property
    def changes(self) -> Changes:
        return Changes(self._models, self._jobs, self._registers, steps=self._steps)

    def apply(self, event: Event) -> None:
        changes = self.state.apply(event)
        if changes.models or changes.transitions:
            self._steps.append((event, changes))
        for name, entries in changes.registers.items():
            self._registers.setdefault(name, {}).update(entries)

    def commit(self) -> None:
        self._base.models.update(self._models)
        self._base.jobs.update(self._jobs)
        self._base.forget_ended(self._jobs.values())
        self._base.queues.update(self._queues)
        for model_id in self._queues:
            if not self._base.queues[model_id]:
                del self._base.queues[model_id]
        self._base.registers = self.state.registers
        self._base.backlog = self.state.backlog
        self._base.position, self._base.recorded_at = self.state.position, self.state.recorded_at


class Entities:
    """A `State` without queues, keys and changes, folded in half the time.

    Attributes:
        common: the last event's changes that concern no single model or job.
    """

    __slots__ = ("common", "jobs", "models", "registers")

    def __init__(self) -> None:
        self.models = dict[str, Model]()
        self.jobs = dict[str, Job]()
        self.registers = Registers()
        self.common = Changes(NOTHING, NOTHING)

    def apply(self, event: Event) -> Job | None:
        """Fold one event and return the job that ended with it, which is then dropped."""
        if type(event.data) in OF_NO_MODEL:
            self._apply_to_no_model(event)
            return None
        job_id, model_id = event.job_id, event.model_id
        before = None if job_id is None else self.jobs.get(job_id)
        if model_id is not None:
            model = evolve_model(self.models.get(model_id), event, before)
            if model is not None:
                self.models[model_id] = model
        if job_id is None:
            return None
        job = evolve_job(before, event)
        if job is None or job is before:
            return None
        if not job.ended:
            self.jobs[job_id] = job
            return None
        self.jobs.pop(job_id, None)
        return job

    def _apply_to_no_model(self, event: Event) -> None:
        self.common = changes = _fold_of_no_model(event, self.models, self.jobs.values, self.registers)
        self.models.update(changes.models)
        self.jobs.update(changes.jobs)
