"""Comparison of a pending load's bytes with those that its model serves: if equal, only settings change.

The version is copied and hashed before the load starts. If the bytes differ, the load goes on with that copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from events.jobs import Job
from events.models import Serving
from events.state import State
from runtime.consumer.loadfiles import LoadFiles, PendingFiles
from runtime.contents import contents_of
from runtime.errors import RuntimeProblem


class ContentComparisons:
    """Compares the bytes of pending loads with those of the present load, once for each job.

    Attributes:
        known: whether they are the same, by job id; None while they are being copied and hashed.
        tasks: the comparisons, by job id.
    """

    def __init__(self, files: PendingFiles, wake: Callable[[], None]) -> None:
        self._files = files
        self._wake = wake
        self.known: dict[str, bool | None] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, job: Job, serving: Serving) -> None:
        """Begin to compare; `known` has the result when this wakes the consumer."""
        self.known[job.id] = None
        self.tasks[job.id] = asyncio.create_task(
            self._compare(job.id, self._files.open(job), serving), name="comparing a model"
        )

    def forget_ended(self, state: State) -> None:
        """Drop what is known of ended jobs, and cancel their comparisons: their files are given back."""
        for job_id in [job_id for job_id in self.known if state.unended_job(job_id) is None]:
            del self.known[job_id]
            self.tasks.pop(job_id).cancel()

    async def _compare(self, job_id: str, files: LoadFiles, serving: Serving) -> None:
        is_same = False
        try:
            await files.obtain(None)
            is_same = await files.hash() == contents_of(serving.files)
            if is_same:
                await files.settle()
        except RuntimeProblem:
            pass  # the load itself says what is wrong with the files
        finally:
            if self.tasks.get(job_id) is asyncio.current_task():  # else the job has ended
                self.known[job_id] = is_same
                self._wake()
