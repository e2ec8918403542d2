"""The live stages of unfinished jobs, as tails tell them: the latest of each, not what was in between.

They are no facts and not in the log, so there is nothing to catch up with: who comes later gets the present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from events.jobs import Job
from events.log import Log
from events.stored import EventFilter

STAGE = "stage"
"""The name of such a notice, which a filter on `type` may ask for."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a job is, and as which change that became known."""

    number: int
    job_id: str
    model_id: str
    stage: str | None
    waiting_for: str | None

    @property
    def members(self) -> dict[str, object]:
        """Return what is told of it."""
        return {
            "job_id": self.job_id,
            "model_id": self.model_id,
            "stage": self.stage,
            "waiting_for": self.waiting_for,
        }


class Stages:
    """What was last seen of each unfinished job.

    Args:
        log: whose unfinished jobs they are.
        stage: tells the stage of a job.
        waiting_for: tells what a job waits for.
    """

    def __init__(
        self,
        log: Log,
        stage: Callable[[Job], str | None],
        waiting_for: Callable[[Job], str | None],
    ) -> None:
        self._log = log
        self._stage = stage
        self._waiting_for = waiting_for
        self._seen = dict[str, Stage]()
        self.changes = 0

    @property
    def any_to_come(self) -> bool:
        """Whether there is a job whose stage may change."""
        return bool(self._log.state.jobs)

    def look(self) -> bool:
        """Look at all unfinished jobs; returns whether something has changed."""
        before, jobs = self.changes, self._log.state.jobs
        for job_id in self._seen.keys() - jobs.keys():
            del self._seen[job_id]
        for job in jobs.values():
            seen, now = self._seen.get(job.id), (self._stage(job), self._waiting_for(job))
            if now != ((seen.stage, seen.waiting_for) if seen is not None else (None, None)):
                self.changes += 1
                self._seen[job.id] = Stage(self.changes, job.id, job.model_id, *now)
        return self.changes > before

    def since(self, change: int, wanted: EventFilter) -> Iterator[Stage]:
        """Return what became known after a change; filters on the model, the job and the type apply.

        Stages have no actor: a filter on that lets none pass.
        """
        if change >= self.changes or wanted.actors or (wanted.types and STAGE not in wanted.types):
            return
        for stage in self._seen.values():
            if (
                stage.number > change
                and (not wanted.models or stage.model_id in wanted.models)
                and (not wanted.jobs or stage.job_id in wanted.jobs)
            ):
                yield stage
