"""The files of one load: obtained, hashed and settled in threads, which end with the load.

A thread cannot be cancelled: it sees between two pieces that nobody needs its result. Whatever it still has
then is given back when it ends, so that nothing stays in the store for a load that is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from events.jobs import Job
from events.models import Serving
from events.state import State
from events.types import Contents, LoadedFile, contents_of
from runtime.errors import RuntimeProblem
from runtime.filesystem import LOAD_LIMIT_S, busy, start_call
from runtime.store.contents import ModelContents, VersionFiles
from runtime.timeouts import TimeoutExpired, timeout

T = TypeVar("T")

THREAD = "files of a load"
RETRY_S = 1.0
"""Pause before files are given back once more, where no thread could start."""


class LoadFiles:
    """The files of one load.

    Attributes:
        found: the files, once they are obtained.
        pieces: how many pieces of files were copied or hashed.
    """

    def __init__(self, contents: ModelContents, model_id: str, version: int) -> None:
        self.found: VersionFiles | None = None
        self._contents = contents
        self._model_id, self._version = model_id, version
        self._running = 0
        self.pieces = 0
        self._keeping = threading.Lock()
        self._cancelled = self._closed = False

    @property
    def version_files(self) -> VersionFiles:
        """The obtained files.

        Raises:
            RuntimeError: they have not been obtained.
        """
        if self.found is None:
            raise RuntimeError(f"the files of {self._model_id!r} have not been obtained")
        return self.found

    async def obtain(self, expected: Sequence[LoadedFile] | None) -> VersionFiles:
        """Obtain the files, once; for arguments and further errors see `ModelContents.obtain`.

        Raises:
            RepositoryBusy: `repository_busy`, nothing of them could be read for `LOAD_LIMIT_S`.
        """
        if expected is not None and self.found is None and self._contents.store is not None:
            # Whatever the repository is like: it may not be there any more.
            await asyncio.shield(self._start(partial(self._find, expected)))
        if self.found is None:
            await self._check_answers()
            obtaining = self._start(partial(self._obtain, expected))
            try:
                async with timeout(LOAD_LIMIT_S, lambda: self.pieces):
                    await asyncio.shield(obtaining)
            except TimeoutExpired:
                if obtaining.done():  # in time after all
                    obtaining.result()
                    return self.version_files
                reason = f"has given nothing to copy for {LOAD_LIMIT_S:g} s"
                raise busy(self._model_id, reason) from None
        return self.version_files

    async def hash(self) -> Contents:
        """Hash the files unless their hashes are known; for errors see `ModelContents.hash`."""
        files = self.version_files
        if files.sha256s is None:
            await asyncio.shield(self._start(partial(self._contents.hash, files, self._is_cancelled)))
        return files.contents or ()

    async def settle(self) -> VersionFiles:
        """Keep the hashed files for later loads; for errors see `ModelContents.settle`."""
        files = self.version_files
        if files.copy is not None or not files.is_stored:
            await asyncio.shield(self._start(partial(self._contents.settle, files)))
        return files

    async def make_durable(self) -> None:
        """Sync the settled files to the disk; for errors see `ModelContents.make_durable`."""
        await asyncio.shield(self._start(partial(self._contents.make_durable, self.version_files)))

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        """Give the files back, as soon as no thread works on them."""
        self.cancel()
        self._closed = True
        self._release_if_idle()

    async def _check_answers(self) -> None:
        """List the version's folder in the pool, of which a file system that hangs takes one thread only.

        Raises:
            RepositoryBusy: `repository_busy`.
        """
        repository = self._contents.repository
        find = partial(repository.find_file, self._model_id, self._version)
        await repository.file_system.run(self._model_id, find, LOAD_LIMIT_S)

    def _find(self, expected: Sequence[LoadedFile]) -> None:
        self._keep(self._contents.find(self._model_id, self._version, expected, self._is_cancelled))

    def _obtain(self, expected: Sequence[LoadedFile] | None) -> None:
        self._keep(self._contents.obtain(self._model_id, self._version, expected, self._is_cancelled))

    def _keep(self, files: VersionFiles | None) -> None:
        """Keep the files that a thread found first: one that hung may come back beside a later one."""
        with self._keeping:
            if self.found is None:
                self.found = files
                return
        if files is not None:
            self._contents.release(files)

    def _is_cancelled(self) -> bool:
        self.pieces += 1
        return self._cancelled

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        answer = start_call(self._model_id, work, self._end, name=THREAD)
        self._running += 1
        return answer

    def _end(self) -> None:
        self._running -= 1
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        if self._closed and not self._running:
            self._release_found()

    def _release_found(self) -> None:
        files, self.found = self.found, None
        if files is not None:
            self._release(files)

    def _release(self, files: VersionFiles) -> None:
        try:
            threading.Thread(target=self._contents.release, args=(files,), name=THREAD).start()
        except RuntimeError:  # no new thread; a long copy would take its time on the loop
            asyncio.get_running_loop().call_later(RETRY_S, self._release, files)


class PendingFiles:
    """The files of loads that have not started, by job; whether they have the bytes that their models serve.

    If so, a load only changes settings. To compare, the version is copied and hashed before the load
    starts; if the bytes differ, the load goes on with that copy.

    Args:
        wake: called when a comparison has ended.

    Attributes:
        unchanged: whether the bytes are the same, by job id; None while they are being copied and hashed.
        comparisons: the tasks that compare, by job id.
    """

    def __init__(self, contents: ModelContents, wake: Callable[[], None] = lambda: None) -> None:
        self._contents = contents
        self._wake = wake
        self._files: dict[str, LoadFiles] = {}
        self.unchanged: dict[str, bool | None] = {}
        self.comparisons: dict[str, asyncio.Task[None]] = {}

    def open(self, job: Job) -> LoadFiles:
        if job.id not in self._files:
            version, _ = job.load_order
            self._files[job.id] = LoadFiles(self._contents, job.model_id, version)
        return self._files[job.id]

    def take(self, job: Job) -> LoadFiles:
        """Return the files of a load that starts; the caller closes them."""
        files = self.open(job)
        del self._files[job.id]
        return files

    def compare(self, job: Job, serving: Serving) -> None:
        self.unchanged[job.id] = None
        self.comparisons[job.id] = asyncio.create_task(
            self._compare(job.id, self.open(job), serving), name="comparing a model"
        )

    def forget_ended(self, state: State) -> None:
        """Give the files of jobs back that have ended, and cancel their comparisons."""
        for job_id in [job_id for job_id in self.unchanged if state.unended_job(job_id) is None]:
            del self.unchanged[job_id]
            self.comparisons.pop(job_id).cancel()
        for job_id in [job_id for job_id in self._files if state.unended_job(job_id) is None]:
            self._files.pop(job_id).close()

    def close(self) -> None:
        for files in self._files.values():
            files.close()

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
            if self.comparisons.get(job_id) is asyncio.current_task():  # else the job has ended
                self.unchanged[job_id] = is_same
                self._wake()
