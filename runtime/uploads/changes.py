"""The way of one change of the repository: staged, then durable as an event, then visible.

Each step may be the last one: a server that ends, a client that leaves, a disk that is full or never answers.
Before its event is durable, a change leaves nothing but an upload that its caller may go on with; from then
on, it is finished: by this server, or by the next start. All work on files is done in threads, a piece at a
time, with a limit on each.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import UNSET, UnsetType

from events.clock import uuid7
from events.commands import OUTDATED, Record
from events.errors import EpochOver, LogClosed, OutcomeUnknown, RequestRefused
from events.log import Log
from events.types import SYSTEM, Draft, VersionRemoved
from events.versioncommands import AddVersion, RemoveVersion
from runtime.elsewhere import ALONE, Elsewhere
from runtime.errors import RuntimeProblem
from runtime.repository import FileSystemPool, Repository
from runtime.uploads.receive import unwritable
from runtime.uploads.staging import Staging, StagingEntry, UploadEntry, UploadPolicy, VersionExists

T = TypeVar("T")
_log = logging.getLogger(__name__)

MAX_THREADS = 8
"""Pieces that are written at once. More are no faster on any disk, and a hanging disk stops no other work."""
PIECE_LIMIT_S = 120.0
"""For one piece, the most of it syncing 64 MiB or two thousand small files, or for one step of a removal."""
START_LIMIT_S = 10.0
"""For each step of what a start has to finish: a repository that hangs must not keep it from starting."""
NOT_PLACED = "not_placed"
"""Reason of a removal that nobody asked for: something else took the place of an added version."""
_ALL = "*"
"""Key of work on the whole staging folder; no model has such a name."""


class VersionChanges:
    """Adds versions to the repository, and removes them: one change of a version at a time.

    Args:
        repository: the models.
        policy: the limits of versions.
        owner: names the part of the staging folder of a server alone.
        log: the ledger.
        elsewhere: knows the epochs of other servers.
        now: seconds since 1970.

    Attributes:
        root: the repository's folder, without links.
        uploads: the uploads that their callers may go on with, by the id of their event.
        unknown: changes that the log may have or not, with its position then.
        is_recovered: whether nothing is left to finish.
    """

    def __init__(
        self,
        repository: Repository,
        policy: UploadPolicy,
        owner: str,
        log: Log,
        *,
        elsewhere: Elsewhere = ALONE,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.repository, self.root = repository, repository.find_root()
        self.policy, self.log, self.elsewhere, self.now = policy, log, elsewhere, now
        self.uploads = dict[str, UploadEntry]()
        self.unknown = dict[str, int]()
        self.is_recovered = False
        self._owner = owner
        self._file_system = FileSystemPool(MAX_THREADS)
        self._changing = dict[tuple[str, int], str]()
        self._finishing = dict[asyncio.Task[None], str]()
        """With their models."""

    @property
    def holder(self) -> str | UnsetType:
        """This server, if its repository is its own; UNSET if all share one, or it is alone."""
        return UNSET if self.elsewhere.name is None or self.policy.writable != "own" else self.elsewhere.name

    def staging(self) -> Staging:
        """Return this server's part of the staging folder.

        Raises:
            EpochOver: `log_unavailable`.
        """
        epoch, conditions = self.elsewhere.find_epoch(self.log.state)
        return Staging(self.repository, self.root, epoch or self._owner, conditions)

    async def close(self) -> None:
        """Wait for changes whose event is on its way."""
        if self._finishing:
            _, hanging = await asyncio.wait(self._finishing, timeout=START_LIMIT_S)
            for task in hanging:  # the next start finishes them
                task.cancel()

    async def settle(self, model_id: str) -> None:
        """Wait until the versions of a model are visible whose events are recorded: a moment, if at all."""
        if tasks := [task for task, each in self._finishing.items() if each == model_id]:
            await asyncio.wait(tasks, timeout=START_LIMIT_S)

    def is_changing(self, event_id: str) -> bool:
        """Whether the change with this event is being made."""
        return event_id in self._changing.values()

    async def make(
        self,
        entry: StagingEntry,
        stage: Callable[[], Awaitable[T]],
        command: Callable[[T], AddVersion | RemoveVersion],
        last_step: Callable[[], None],
    ) -> T:
        """Make a change, and return its staged version.

        Once it is staged, its event and its last step come, whatever becomes of the request.

        Raises:
            VersionExists: `version_exists`, another change of the version has not ended.
        """
        version = entry.model_id, entry.version
        if version in self._changing:
            raise VersionExists(*version, is_changing=True)
        self._changing[version] = entry.event_id
        try:
            staged = await stage()
        except BaseException:
            if not entry.stays:
                await self.discard(entry)
            del self._changing[version]
            raise

        def note_end(task: asyncio.Task[None]) -> None:
            del self._finishing[task], self._changing[version]
            if not task.cancelled() and task.exception() is not None:
                _log.info("a change of the repository was not made: %s", task.exception())

        task = asyncio.create_task(self._finish(entry, command(staged), last_step))
        self._finishing[task] = entry.model_id
        task.add_done_callback(note_end)
        await asyncio.shield(task)
        return staged

    async def _finish(
        self, entry: StagingEntry, command: AddVersion | RemoveVersion, last_step: Callable[[], None]
    ) -> None:
        await self._record(entry, command)
        try:
            await self.run(entry, last_step)
        except VersionExists:
            await self.give_up(entry)
            raise
        except BaseException:
            self.is_recovered = False  # the next change, or the next start, finishes this one
            raise

    async def _record(self, entry: StagingEntry, command: AddVersion | RemoveVersion) -> None:
        """Submit a command; unless it was recorded, only an upload is left.

        If that is unknown, its entry stays until the log has another event, and so this one or never.
        """
        try:
            await self.log.submit(command)
        except (OutcomeUnknown, LogClosed):
            self.unknown[entry.event_id] = self.log.state.position
            self.uploads.pop(entry.event_id, None)
            raise
        except BaseException as error:
            if not entry.stays:
                await self.discard(entry)
            if isinstance(error, RequestRefused) and error.code == OUTDATED:
                raise EpochOver from None
            raise
        self.uploads.pop(entry.event_id, None)

    async def give_up(self, entry: StagingEntry) -> None:
        """Record that an added version never became visible; its files go first, so that it never will."""
        await self.run(entry, entry.discard)
        data = VersionRemoved(NOT_PLACED, server=self.holder)
        draft = Draft(uuid7(), data, SYSTEM, model_id=entry.model_id, version=entry.version)
        await self.log.submit(Record((draft,)))

    async def discard(self, entry: StagingEntry) -> None:
        """Delete an entry once no step of it runs; if a step hangs, the next change or start does."""
        try:
            await self.run(entry, entry.discard, START_LIMIT_S)
        except RuntimeProblem:
            self.is_recovered = False

    async def run(
        self, entry: StagingEntry | None, step: Callable[[], T], limit_s: float = PIECE_LIMIT_S
    ) -> T:
        """Return the result of a blocking step; steps of a model, or of the whole folder, never overlap.

        Raises:
            RepositoryBusy: `repository_busy`, it did not end in time; it goes on without effect.
            RuntimeProblem: the step's; errors of the file system are converted.
        """

        def work() -> T:
            try:
                return step()
            except OSError as error:
                raise unwritable(error) from None

        return await self._file_system.run(_ALL if entry is None else entry.model_id, work, limit_s)
