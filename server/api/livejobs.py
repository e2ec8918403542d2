"""Live values of unended jobs, which the log does not have: of loads and unloads, and of adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from events.jobs import Job, JobKind, JobStatus
from runtime.consumer.consumer import Consumer
from runtime.fetch.adds import PENDING, Adds

NOT_LIVE = {"stage": None, "waiting_for": None, "progress": None}
"""Of a job of the past."""


@dataclass(frozen=True, slots=True)
class LiveJobs:
    """The parts of this server that carry out jobs, and know more of them than the log."""

    consumer: Consumer
    adds: Adds

    def describe(self, job: Job) -> dict[str, Any]:
        """Return `stage` of a job in progress, `waiting_for` of a pending one, and `progress` of an add."""
        runs, waits = job.status is JobStatus.IN_PROGRESS, job.status is JobStatus.PENDING
        if job.kind is not JobKind.ADD:
            stage = self.consumer.stage(job) if runs else None
            waiting_for = self.consumer.waiting_for(job) if waits else None
            return {**NOT_LIVE, "stage": stage, "waiting_for": waiting_for}
        add = self.adds.progress.get(job.id)
        if add is None or not runs:
            waits = add is not None and self.adds.is_full
            return {**NOT_LIVE, "waiting_for": PENDING if waits else None}
        progress = {"bytes": add.bytes, "total_bytes": add.total_bytes}
        return {"stage": add.stage, "waiting_for": None, "progress": progress}
