"""Entries of the staging folder without a request: they are finished, kept or discarded."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from events.errors import LedgerProblem
from events.types import Event, VersionAdded, VersionRemoved
from runtime.errors import RuntimeProblem
from runtime.uploads.changes import START_LIMIT_S, VersionChanges
from runtime.uploads.staging import Staging, StagingEntry, VersionExists, check_writable, read_upload

_log = logging.getLogger(__name__)

UNUSED_LIMIT_S = 24 * 3600.0
"""Lifetime of an upload after its last file, so that it is still there the next morning."""
END_UPLOADS_EVERY_S = 600.0
"""Often enough for a disk that unused uploads have filled."""


class Recovery:
    """Finishes changes that have their event, keeps uploads, ends those that are unused, discards the rest.

    Args:
        changes: the repository's changes.
        find_event: returns the event with an id, if the ledger as it was last read has it.
    """

    def __init__(self, changes: VersionChanges, find_event: Callable[[str], Awaitable[Event | None]]) -> None:
        self._changes, self._find_event = changes, find_event
        self._recovering = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Recover at the start, and from then on; a repository that hangs is left for later."""
        await self._try_to_recover()
        await self._end_unused_uploads()
        self._following = asyncio.create_task(self._follow(), name="uploads")

    async def close(self) -> None:
        """Wait for changes whose event is on its way."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._changes.close()

    async def prepare(self) -> None:
        """Check that the repository may be changed, finish what a start could not, and end unused uploads.

        Raises:
            RepositoryReadOnly: `repository_read_only`.
        """
        changes = self._changes
        repository = changes.repository
        await changes.run(None, partial(check_writable, repository.root, changes.policy), START_LIMIT_S)
        if changes.root != (root := await changes.run(None, repository.find_root, START_LIMIT_S)):
            changes.root, changes.is_recovered = root, False
        if not changes.is_recovered:
            await self._recover()
        await self._end_unused_uploads()

    async def _follow(self) -> None:
        """Finish changes whose outcome was unknown, and those of servers that ended; end unused uploads."""
        log, servers = self._changes.log, self._changes.elsewhere.servers
        there = servers(log.state)
        with log.subscribed() as wakeup:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(END_UPLOADS_EVERY_S):
                        await wakeup.wait()
                wakeup.clear()
                await self._end_unused_uploads()
                if self._changes.unknown or servers(log.state) is not there:
                    there, self._changes.is_recovered = servers(log.state), False
                    await self._try_to_recover()

    async def _try_to_recover(self) -> None:
        try:
            await self._recover()
        except (RuntimeProblem, LedgerProblem, OSError) as problem:
            self._changes.is_recovered = False
            _log.warning("changes of the repository that had not ended cannot be finished yet: %s", problem)

    async def _recover(self) -> None:
        changes = self._changes
        async with self._recovering:
            if changes.is_recovered:
                return
            staging = changes.staging()
            changes.is_recovered = True
            changes.uploads = {  # without those of an epoch that is over, or of another release
                event_id: upload
                for event_id, upload in changes.uploads.items()
                if upload.folder.parent == staging.folder
            }
            is_over = partial(changes.elsewhere.is_over, state=changes.log.state)
            for event_id in await changes.run(None, partial(staging.adopt, is_over), START_LIMIT_S):
                if changes.is_changing(event_id) or event_id in changes.uploads:
                    continue
                try:
                    await self._recover_entry(event_id, staging)
                except (RuntimeProblem, LedgerProblem, OSError) as problem:
                    changes.is_recovered = False  # tried again by the next change, which it does not prevent
                    _log.warning("change %s of the repository cannot be finished yet: %s", event_id, problem)

    async def _recover_entry(self, event_id: str, staging: Staging) -> None:
        changes = self._changes
        is_final = changes.log.state.position > changes.unknown.get(event_id, -1)
        event = await self._find_event(event_id)
        if event is None and not is_final:
            return
        changes.unknown.pop(event_id, None)
        if event is None or event.model_id is None or event.version is None:
            await self._recover_upload(event_id, staging)
            return
        entry = StagingEntry(staging, event_id, event.model_id, event.version)
        if isinstance(event.data, VersionAdded):
            try:
                await changes.run(entry, entry.place, START_LIMIT_S)
            except VersionExists:
                await changes.give_up(entry)
        elif isinstance(event.data, VersionRemoved):
            await changes.run(entry, entry.take, START_LIMIT_S)
        _log.info("%s was finished: version %d of %s", event.type, entry.version, entry.model_id)

    async def _recover_upload(self, event_id: str, staging: Staging) -> None:
        """Keep an upload for its subject; discard an entry without a record, or of another server."""
        changes = self._changes
        read = partial(read_upload, staging, event_id, changes.policy.max_bytes)
        upload = await changes.run(None, read, START_LIMIT_S)
        if upload is None or upload.origin.server != changes.elsewhere.name:
            await changes.run(None, partial(staging.discard, event_id), START_LIMIT_S)
        else:
            changes.uploads[event_id] = upload

    async def _end_unused_uploads(self) -> None:
        for upload in list(self._changes.uploads.values()):
            is_unused = upload.used_at + UNUSED_LIMIT_S <= self._changes.now()
            if is_unused and not self._changes.is_changing(upload.event_id):
                self._changes.uploads.pop(upload.event_id, None)
                await self._changes.discard(upload)
