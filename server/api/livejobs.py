"""Live values of unended jobs, which the log does not have."""

from __future__ import annotations

from typing import TypedDict

from events.jobs import Job, JobStatus
from runtime.consumer.consumer import Consumer


class LiveMembers(TypedDict):
    """Live members of `JobInfo`."""

    stage: str | None
    waiting_for: str | None


NOT_LIVE: LiveMembers = {"stage": None, "waiting_for": None}
"""The live members of a job of the past."""


def describe_live(consumer: Consumer, job: Job) -> LiveMembers:
    """Return `stage` of a job in progress, and `waiting_for` of a pending one."""
    runs, waits = job.status is JobStatus.IN_PROGRESS, job.status is JobStatus.PENDING
    return {
        "stage": consumer.stage(job) if runs else None,
        "waiting_for": consumer.waiting_for(job) if waits else None,
    }
