"""Are the files of a pending load those that its model is loaded from? Then only settings change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from events.jobs import Job
from events.models import Serving
from events.state import State
from events.types import LoadedFile
from runtime.errors import RuntimeProblem
from runtime.estimates import is_same_files
from runtime.lookups import LOAD_LIMIT_S
from runtime.repository import Repository


class FileComparisons:
    """Compares the repository's files of pending loads with those of the present load, once for each job.

    Attributes:
        known: whether they are the same, by job id; None while they are being read.
        tasks: the comparisons under way.
    """

    def __init__(self, repository: Repository, wake: Callable[[], None]) -> None:
        self._repository = repository
        self._wake = wake
        self.known: dict[str, bool | None] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, job: Job, serving: Serving) -> None:
        """Begin to compare; `known` has the result when this wakes the consumer."""
        self.known[job.id] = None
        task = asyncio.create_task(self._compare(job, serving.files))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def forget_ended(self, state: State) -> None:
        """Drop what is known of jobs that have ended."""
        for job_id in [job_id for job_id in self.known if state.unended_job(job_id) is None]:
            del self.known[job_id]

    async def _compare(self, job: Job, loaded: tuple[LoadedFile, ...]) -> None:
        is_same = False
        try:
            look = partial(self._repository.resolve, job.model_id, job.version)
            found = await self._repository.lookups.run(job.model_id, look, LOAD_LIMIT_S)
            is_same = is_same_files(loaded, found.files)
        except RuntimeProblem:
            pass  # the load itself says what is wrong with the files
        finally:
            if job.id in self.known:
                self.known[job.id] = is_same
            self._wake()
