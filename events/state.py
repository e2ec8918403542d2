"""The live state: all models and the jobs that have not ended, folded one event at a time."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

from events.jobs import Job, JobKind, evolve_job
from events.models import Model, ModelState, evolve_model
from events.types import Cause, Event, ServerStarted


@dataclass(slots=True)
class State:
    """What is true after the event at `position`.

    Entities are immutable values; the two maps are the writer's, and everybody else only reads them.
    """

    position: int = 0
    recorded_at: str = ""
    models: MutableMapping[str, Model] = field(default_factory=dict)
    jobs: MutableMapping[str, Job] = field(default_factory=dict)

    def unended(self, model_id: str | None = None) -> list[Job]:
        """Return the jobs that have not ended, of one model or of all, oldest first."""
        jobs = (job for job in self.jobs.values() if not job.ended and model_id in (None, job.model_id))
        return sorted(jobs, key=lambda job: job.created_position)

    def queue(self, model_id: str) -> list[Job]:
        """Return the model's unended jobs in the order in which they are carried out."""
        return [job for job in self.unended(model_id) if in_queue(job)]

    def unended_job(self, job_id: str | None) -> Job | None:
        """Return the job unless it has ended: whether an ended one is still at hand must not matter."""
        job = self.jobs.get(job_id) if job_id is not None else None
        return None if job is None or job.ended else job

    def active(self) -> Model | None:
        """Return the active model (DESIGN.md, "Vocabulary"), or None when nothing is loaded."""
        candidates = (
            model
            for model in self.models.values()
            if model.phase in (ModelState.LOADED, ModelState.UNLOADING) and model.rank is not None
        )
        return max(candidates, key=lambda model: model.rank or 0, default=None)

    def apply(self, event: Event) -> Changes:
        """Fold one event into this state and return what it changed."""
        changes = Changes(*_evolve(self, event))
        self.models.update(changes.models)
        self.jobs.update(changes.jobs)
        self.position, self.recorded_at = event.position, event.recorded_at
        return changes

    def forget_ended(self, jobs: Iterable[Job]) -> None:
        """Drop those of `jobs` that have ended: they live in the stored table from now on."""
        for job in jobs:
            if job.ended:
                self.jobs.pop(job.id, None)


def in_queue(job: Job) -> bool:
    """Whether a job has its turn among its model's: the end of a load that was swapped out has none."""
    return job.kind is JobKind.LOAD or job.cause is not Cause.SWAP


@dataclass(frozen=True, slots=True)
class Changes:
    """The entities that an event, or a group of them, changed."""

    models: Mapping[str, Model]
    jobs: Mapping[str, Job]


def _evolve(state: State, event: Event) -> tuple[dict[str, Model], dict[str, Job]]:
    before = state.unended_job(event.job_id)
    models: dict[str, Model] = {}
    for key in _models_touched(state, event):
        old_model = state.models.get(key)
        new_model = evolve_model(old_model, event, before)
        if new_model is not None and new_model is not old_model:
            models[key] = new_model
    jobs: dict[str, Job] = {}
    for key in _jobs_touched(state, event):
        old_job = state.unended_job(key)
        new_job = evolve_job(old_job, event)
        if new_job is not None and new_job is not old_job:
            jobs[key] = new_job
    return models, jobs


def _models_touched(state: State, event: Event) -> Iterator[str]:
    if isinstance(event.data, ServerStarted):
        yield from list(state.models)
    elif event.model_id is not None:
        yield event.model_id


def _jobs_touched(state: State, event: Event) -> Iterator[str]:
    if isinstance(event.data, ServerStarted):
        yield from [job.id for job in state.jobs.values() if not job.ended]
    elif event.job_id is not None:
        yield event.job_id


class Attempt:
    """A group of events tried on top of a state, which changes only when the group is durable."""

    def __init__(self, base: State) -> None:
        self._base = base
        self._models: dict[str, Model] = {}
        self._jobs: dict[str, Job] = {}
        self.state = State(
            base.position,
            base.recorded_at,
            ChainMap(self._models, base.models),
            ChainMap(self._jobs, base.jobs),
        )

    @property
    def changes(self) -> Changes:
        """Everything the group changed so far."""
        return Changes(self._models, self._jobs)

    def commit(self) -> None:
        """Move the base on to what was tried."""
        self._base.models.update(self._models)
        self._base.jobs.update(self._jobs)
        self._base.forget_ended(self._jobs.values())
        self._base.position, self._base.recorded_at = self.state.position, self.state.recorded_at
