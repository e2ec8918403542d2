"""The fold of a whole log for those who decide nothing: models and unended jobs, without queues and keys."""

from __future__ import annotations

from collections.abc import Iterable

from events.jobs import Job, evolve_job
from events.modelfold import evolve_model
from events.models import Model
from events.types import Event, ServerStarted


class Entities:
    """What `events.state.State` says of models and unended jobs, in half of the time.

    Args:
        models: as they are where the fold begins.
        jobs: that had not ended there.
    """

    __slots__ = ("jobs", "models")

    def __init__(self, models: Iterable[Model] = (), jobs: Iterable[Job] = ()) -> None:
        self.models = {model.id: model for model in models}
        self.jobs = {job.id: job for job in jobs}

    def apply(self, event: Event) -> Job | None:
        """Fold one event in and return the job that ended with it, which is then forgotten."""
        if type(event.data) is ServerStarted:
            self._restart(event)
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

    def _restart(self, event: Event) -> None:
        """Fold in what changes all models and unended jobs, and ends none."""
        models = [evolve_model(model, event, None) for model in self.models.values()]
        jobs = [evolve_job(job, event) for job in self.jobs.values()]
        self.models = {model.id: model for model in models if model is not None}
        self.jobs = {job.id: job for job in jobs if job is not None}
