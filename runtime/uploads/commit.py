"""The way of one addition or removal: staged, then durable as an event, then visible.

Each step may be the last one: a server that ends, a client that leaves, a disk that is full or never answers.
Before its event is durable, a change leaves nothing but an upload that its caller may go on with; from then
on, it is finished: by this server, or by the next start. All work on files is done in threads, a piece at a
time, with a limit on each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from msgspec import UNSET, UnsetType

from events.accept import find_use
from events.clock import uuid7
from events.commands import OUTDATED, AddVersion, Command, Receipt, Record, RemoveVersion
from events.errors import EpochOver, LedgerProblem, LogClosed, OutcomeUnknown, RequestRefused
from events.log import Log
from events.types import SYSTEM, AddedFile, Draft, Event, Provenance, VersionAdded, VersionRemoved
from features.nodes.commands import NodeCurrent
from runtime.errors import RuntimeProblem
from runtime.onnxfile import MODEL_FILE
from runtime.repository import FileSystemPool, Repository
from runtime.uploads.receive import (
    Digests,
    FileReceiver,
    InsufficientStorage,
    check_path,
    check_room,
    unwritable,
)
from runtime.uploads.staging import (
    Staging,
    StagingEntry,
    UploadEntry,
    UploadOrigin,
    UploadPolicy,
    VersionExists,
    check_writable,
    epoch_folder,
    read_upload,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)

MAX_THREADS = 8
"""Pieces that are written at once. A disk is no faster with more, and one that hangs stops no other work."""
PIECE_LIMIT_S = 120.0
"""For one piece, the most of it syncing 64 MiB or two thousand small files, or for one step of a removal."""
START_LIMIT_S = 10.0
"""For each step of what a start has to finish: a repository that hangs must not keep it from starting."""
UNUSED_LIMIT_S = 24 * 3600.0
"""After its last file, an upload ends: who goes on with it the next morning still finds it."""
MAX_UPLOADS = 1000
"""Open at once: each change looks at all of them, and a script cannot fill the disk with empty ones."""
END_UPLOADS_EVERY_S = 600.0
"""Often enough for a disk that unused uploads have filled."""
NOT_PLACED = "not_placed"
"""Reason of a removal that nobody asked for: something else took the place of an added version."""
_ALL = "*"
"""Key of work on the whole staging folder; no model has such a name."""


class UnknownUpload(RuntimeProblem):
    """The caller has no such upload of this version: begin another one."""

    code = "unknown_upload"


@dataclass(frozen=True, slots=True)
class UploadBody:
    """The body of a request that has one file.

    Attributes:
        pieces: its bytes as they arrive.
        length: in bytes, if it is known.
        expected: digests that it must have.
    """

    pieces: AsyncIterator[bytes]
    length: int | None = None
    expected: Digests = field(default_factory=dict)


class Uploads:
    """Puts versions into the repository, and removes them.

    Args:
        repository: the models.
        policy: what is taken.
        owner: names the part of the staging folder of a server without nodes.
        log: the ledger.
        submit: records a command.
        find_event: returns the event with an id, if the ledger as it was last read has it.
        node_id: of this node; None without nodes.
        now: seconds since 1970.
    """

    def __init__(
        self,
        repository: Repository,
        policy: UploadPolicy,
        owner: str,
        *,
        log: Log,
        submit: Callable[[Command], Awaitable[Receipt]],
        find_event: Callable[[str], Awaitable[Event | None]],
        node_id: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._repository, self._root = repository, repository.find_root()
        self._policy = policy
        self._owner, self._node_id = owner, node_id
        self._log, self._submit, self._find_event = log, submit, find_event
        self._now = now
        self._file_system = FileSystemPool(MAX_THREADS)
        self._changing = dict[tuple[str, int], str]()
        self._uploads = dict[str, UploadEntry]()
        self._recovering = asyncio.Lock()
        self._finishing = dict[asyncio.Task[None], str]()
        """With their models."""
        self._is_recovered = False
        self._unknown = dict[str, int]()
        self._following: asyncio.Task[None] | None = None

    @property
    def holder(self) -> str | UnsetType:
        """This node, if its repository is its own; UNSET if all share one, or there are none."""
        return UNSET if self._node_id is None or self._policy.writable != "own" else self._node_id

    async def open(self) -> None:
        """Finish what has its event, and discard the rest; a repository that hangs is left for later."""
        await self._try_to_recover()
        await self._end_unused_uploads()
        self._following = asyncio.create_task(self._follow(), name="uploads")

    async def _follow(self) -> None:
        """Finish changes whose outcome was unknown, and those of nodes that ended; end unused uploads."""
        nodes = self._log.state.registers.nodes
        with self._log.subscribed() as wakeup:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(END_UPLOADS_EVERY_S):
                        await wakeup.wait()
                wakeup.clear()
                await self._end_unused_uploads()
                if self._unknown or self._log.state.registers.nodes is not nodes:
                    nodes, self._is_recovered = self._log.state.registers.nodes, False
                    await self._try_to_recover()

    async def _try_to_recover(self) -> None:
        try:
            await self._recover()
        except (RuntimeProblem, LedgerProblem, OSError) as problem:
            self._is_recovered = False
            _log.warning("changes of the repository that had not ended cannot be finished yet: %s", problem)

    async def close(self) -> None:
        """Wait for changes whose event is on its way."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        if self._finishing:
            _, hanging = await asyncio.wait(self._finishing, timeout=START_LIMIT_S)
            for task in hanging:  # the next start finishes them
                task.cancel()

    async def settle(self, model_id: str) -> None:
        """Wait until the versions of a model are visible whose events are recorded: a moment, if at all."""
        if tasks := [task for task, each in self._finishing.items() if each == model_id]:
            await asyncio.wait(tasks, timeout=START_LIMIT_S)

    async def add(
        self, model_id: str, version: int, actor: str, body: UploadBody, *, only_new: bool = False
    ) -> tuple[AddedFile, ...]:
        """Add a version of one file, and return its files.

        Args:
            model_id: of the version.
            version: its number.
            actor: of the event.
            body: the model.
            only_new: whether the request is for a version that is not there (`If-None-Match: *`).

        Raises:
            RuntimeProblem: `repository_read_only`, `version_exists`, `precondition_failed`, `body_too_large`,
                `not_onnx`, `unsafe_file`, `invalid_model`, `digest_mismatch`, `insufficient_storage`,
                `repository_unreadable`, `repository_busy`.
            LogUnavailable: `log_unavailable`; if that is unknown, it may become visible later.
        """
        try:
            await self._prepare()
            upload = self._new_upload(UploadOrigin(model_id, version, actor), stays=False)
            self._begin(upload)
            try:
                await self._run(upload, upload.begin)
                await self._receive(upload, MODEL_FILE, body)
                files = await self._run(upload, upload.complete)
            except BaseException:
                await self._discard(upload)
                self._end(upload)
                raise
            await self._finish(upload, self._make_visible(upload, files))
        except VersionExists as exists:
            if only_new:
                raise RuntimeProblem(str(exists), code="precondition_failed") from None
            raise
        return files

    async def begin_upload(
        self, model_id: str, version: int, subject: str, key: str | None
    ) -> tuple[UploadEntry, bool]:
        """Return a new upload of a version, or the subject's own with the same key; and whether it is new.

        Raises:
            RuntimeProblem: `repository_read_only`, `version_exists`, `insufficient_storage`,
                `repository_unreadable`, `repository_busy`.
            EpochOver: `log_unavailable`.
        """
        await self._prepare()
        origin = UploadOrigin(model_id, version, subject, key, self._node_id)
        for known in self._uploads.values():
            if key is not None and known.origin == origin:
                return known, False
        if len(self._uploads) >= MAX_UPLOADS:
            raise InsufficientStorage(f"{MAX_UPLOADS} uploads are open: commit or discard some of them")
        upload = self._new_upload(origin)
        upload.used_at = self._now()
        self._uploads[upload.id] = upload
        try:
            await self._run(upload, upload.begin)
        except BaseException:
            self._forget_upload(upload)
            await self._discard(upload)
            raise
        return upload, True

    async def find_upload(self, upload_id: str, model_id: str, version: int, subject: str) -> UploadEntry:
        """Return an upload of its subject.

        Raises:
            UnknownUpload: `unknown_upload`.
            RuntimeProblem: `repository_read_only`, `repository_unreadable`, `repository_busy`.
        """
        await self._prepare()
        upload = self._uploads.get(upload_id)
        named = (model_id, version, subject)
        if upload is None or (upload.model_id, upload.version, upload.origin.subject) != named:
            raise UnknownUpload
        return upload

    async def add_file(self, upload: UploadEntry, path: str, body: UploadBody) -> tuple[AddedFile, bool]:
        """Add a file to an upload, and return it; and whether the upload had none with its path.

        Raises:
            RuntimeProblem: `unknown_upload`, `invalid_parameter`, `version_exists` (it is being committed),
                `body_too_large`, `digest_mismatch`, `insufficient_storage`, `repository_read_only`,
                `repository_unreadable`, `repository_busy`.
        """
        check_path(path)
        is_new = path not in upload.files
        file = await self._receive(upload, path, body)
        upload.used_at = self._now()
        return file, is_new

    async def commit(
        self, upload: UploadEntry, source: Provenance | UnsetType = UNSET
    ) -> tuple[AddedFile, ...]:
        """Make a version of an upload, and return its files.

        Args:
            upload: of the version.
            source: where its subject says that it comes from.

        Raises:
            RuntimeProblem: as `add`; the upload stays.
            LogUnavailable: `log_unavailable`; if that is unknown, it may become visible later.
        """
        self._check_open(upload)
        self._begin(upload)
        try:
            files = await self._run(upload, upload.complete)
        except BaseException:
            self._end(upload)
            raise
        await self._finish(upload, self._make_visible(upload, files, source))
        return files

    async def discard_upload(self, upload: UploadEntry) -> None:
        """End an upload, and delete its files.

        Raises:
            RuntimeProblem: `unknown_upload`, `version_exists` (it is being committed).
        """
        self._check_open(upload)
        del self._uploads[upload.id]
        await self._discard(upload)

    async def remove(
        self,
        model_id: str,
        version: int,
        actor: str,
        end_uses: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Remove a version that no load uses, once `end_uses`, if there is one, has ended those that do.

        Raises:
            RuntimeProblem: `repository_read_only`, `unknown_version`, `version_in_use`, `version_exists` (it
                is just being changed), `repository_unreadable`, `repository_busy`.
            RequestRefused: `version_in_use`, a load came first.
            LogUnavailable: `log_unavailable`; if that is unknown, it may be removed later.
        """
        await self._prepare()
        entry = StagingEntry(self._staging(), uuid7(), model_id, version)
        self._begin(entry)
        try:
            await self._run(entry, entry.begin_removal)
            if end_uses is not None:
                await end_uses()
            await self._check_unused(model_id, version)
        except BaseException:
            await self._discard(entry)
            self._end(entry)
            raise
        await self._finish(entry, self._make_invisible(entry, actor))

    async def _check_unused(self, model_id: str, version: int) -> None:
        """Check that no load uses a version, after all that other nodes have appended."""
        await self._log.catch_up()
        use = find_use(self._log.state, model_id, version)
        if use is not None:
            raise RuntimeProblem(use, code="version_in_use")

    def _begin(self, entry: StagingEntry) -> None:
        """Begin a change of a version, one at a time.

        Raises:
            VersionExists: `version_exists`.
        """
        if (entry.model_id, entry.version) in self._changing:
            raise VersionExists(entry.model_id, entry.version, is_changing=True)
        self._changing[entry.model_id, entry.version] = entry.event_id

    def _end(self, entry: StagingEntry) -> None:
        del self._changing[entry.model_id, entry.version]

    def _staging(self) -> Staging:
        """Return this server's part of the staging folder.

        Raises:
            EpochOver: `log_unavailable`.
        """
        if self._node_id is None:
            return Staging(self._repository, self._root, self._owner)
        node = self._log.state.registers.nodes.get(self._node_id)
        if node is None or not node.is_present:
            raise EpochOver
        conditions = (NodeCurrent(node.id, node.epoch),)
        return Staging(self._repository, self._root, epoch_folder(node), conditions)

    def _new_upload(self, origin: UploadOrigin, *, stays: bool = True) -> UploadEntry:
        return UploadEntry(self._staging(), uuid7(), origin, self._policy.max_bytes, stays=stays)

    async def _prepare(self) -> None:
        """Check that the repository may be changed, finish what a start could not, and end unused uploads.

        Raises:
            RepositoryReadOnly: `repository_read_only`.
        """
        await self._run(None, partial(check_writable, self._repository.root, self._policy), START_LIMIT_S)
        if self._root != (root := await self._run(None, self._repository.find_root, START_LIMIT_S)):
            self._root, self._is_recovered = root, False
        if not self._is_recovered:
            await self._recover()
        await self._end_unused_uploads()

    async def _receive(self, upload: UploadEntry, path: str, body: UploadBody) -> AddedFile:
        """Write a body into an upload."""
        if upload.stays:
            self._check_open(upload)
        of_subject = (each for each in self._uploads.values() if each.origin.subject == upload.origin.subject)
        uploaded_bytes = sum(each.bytes for each in of_subject if each is not upload)
        room_bytes, max_bytes = upload.room_for(path) - uploaded_bytes, self._policy.max_bytes
        await self._run(
            upload, partial(check_room, self._repository.root, body.length or 0, room_bytes, max_bytes)
        )
        receiver = FileReceiver(upload.new_part(), room_bytes, max_bytes, body.expected)
        try:
            await self._run(upload, receiver.open)
            async for piece in body.pieces:
                await self._run(upload, partial(receiver.write, piece))
            file = await self._run(upload, partial(receiver.finish, path))
            if upload.stays:
                self._check_open(upload)
            await self._run(upload, partial(upload.keep, receiver.target, file))
        finally:
            with suppress(RuntimeProblem):  # the next start deletes it
                await self._run(upload, receiver.discard, START_LIMIT_S)
        return file

    def _check_open(self, upload: UploadEntry) -> None:
        """Refuse what would change an upload that has ended, or is being committed.

        Raises:
            UnknownUpload: `unknown_upload`.
            VersionExists: `version_exists`.
        """
        if upload.event_id in self._changing.values():
            raise VersionExists(upload.model_id, upload.version, is_changing=True)
        if upload.id not in self._uploads:
            raise UnknownUpload

    async def _end_unused_uploads(self) -> None:
        """Discard uploads to which no file was added for `UNUSED_LIMIT_S`."""
        for upload in list(self._uploads.values()):
            is_unused = upload.used_at + UNUSED_LIMIT_S <= self._now()
            if is_unused and upload.event_id not in self._changing.values():
                self._uploads.pop(upload.id, None)
                await self._discard(upload)

    async def _make_visible(
        self, upload: UploadEntry, files: tuple[AddedFile, ...], source: Provenance | UnsetType = UNSET
    ) -> None:
        version = (upload.model_id, upload.version, upload.origin.subject, files)
        command = AddVersion(*version, upload.event_id, upload.staging.conditions, source, self.holder)
        await self._record(upload, command)
        try:
            await self._run(upload, upload.place)
        except VersionExists:
            await self._give_up(upload)
            raise
        except BaseException:
            self._is_recovered = False  # the next change, or the next start, finishes this one
            raise

    async def _make_invisible(self, entry: StagingEntry, actor: str) -> None:
        conditions = entry.staging.conditions
        version = (entry.model_id, entry.version)
        command = RemoveVersion(*version, actor, entry.event_id, conditions, self.holder)
        await self._record(entry, command)  # from here on, no load finds the files
        try:
            await self._run(entry, entry.take)
        except BaseException:
            self._is_recovered = False
            raise
        await self._run(entry, entry.discard)

    async def _record(self, entry: StagingEntry, command: AddVersion | RemoveVersion) -> None:
        """Submit a command; one that was not recorded leaves nothing but an upload.

        If that is unknown, its entry stays until the log has another event, and so this one or never.
        """
        try:
            await self._submit(command)
        except (OutcomeUnknown, LogClosed):
            self._unknown[entry.event_id] = self._log.state.position
            self._forget_upload(entry)
            raise
        except BaseException as error:
            if not entry.stays:
                await self._discard(entry)
            if isinstance(error, RequestRefused) and error.code == OUTDATED:
                raise EpochOver from None
            raise
        self._forget_upload(entry)

    def _forget_upload(self, entry: StagingEntry) -> None:
        if isinstance(entry, UploadEntry):
            self._uploads.pop(entry.id, None)

    async def _finish(self, entry: StagingEntry, work: Coroutine[Any, Any, None]) -> None:
        """Await what must not stop half-way, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._finishing[task] = entry.model_id

        def note_end(task: asyncio.Task[None]) -> None:
            del self._finishing[task]
            self._end(entry)
            if not task.cancelled() and task.exception() is not None:
                _log.info("a change of the repository was not made: %s", task.exception())

        task.add_done_callback(note_end)
        await asyncio.shield(task)

    async def _recover(self) -> None:
        """Finish changes whose event is durable, and keep uploads; discard the rest of servers that ended."""
        async with self._recovering:
            if self._is_recovered:
                return
            staging = self._staging()
            self._is_recovered = True
            self._uploads = {  # those of an epoch that is over, or of another release, are not here any more
                upload.id: upload
                for upload in self._uploads.values()
                if upload.folder.parent == staging.folder
            }
            await self._run(None, partial(staging.adopt, self._log.state.registers.nodes), START_LIMIT_S)
            for event_id in await self._run(None, staging.entries, START_LIMIT_S):
                known = {*self._changing.values(), *(upload.event_id for upload in self._uploads.values())}
                if event_id in known:
                    continue
                try:
                    await self._recover_one(event_id, staging)
                except (RuntimeProblem, LedgerProblem, OSError) as problem:
                    self._is_recovered = False  # tried again by the next change, which it does not prevent
                    _log.warning("change %s of the repository cannot be finished yet: %s", event_id, problem)

    async def _recover_one(self, event_id: str, staging: Staging) -> None:
        is_final = self._log.state.position > self._unknown.get(event_id, -1)
        event = await self._find_event(event_id)
        if event is None and not is_final:
            return
        self._unknown.pop(event_id, None)
        if event is None or event.model_id is None or event.version is None:
            await self._recover_upload(event_id, staging)
            return
        entry = StagingEntry(staging, event_id, event.model_id, event.version)
        if isinstance(event.data, VersionAdded):
            try:
                await self._run(entry, entry.place, START_LIMIT_S)
            except VersionExists:
                await self._give_up(entry)
        elif isinstance(event.data, VersionRemoved):
            await self._run(entry, entry.take, START_LIMIT_S)
            await self._run(entry, entry.discard, START_LIMIT_S)
        _log.info("%s was finished: version %d of %s", event.type, entry.version, entry.model_id)

    async def _recover_upload(self, event_id: str, staging: Staging) -> None:
        """Keep an upload for its subject; discard what is none, or was another node's."""
        read = partial(read_upload, staging, event_id, self._policy.max_bytes)
        upload = await self._run(None, read, START_LIMIT_S)
        if upload is None or upload.origin.node_id != self._node_id:
            await self._run(None, partial(staging.discard, event_id), START_LIMIT_S)
        else:
            self._uploads[upload.id] = upload

    async def _give_up(self, entry: StagingEntry) -> None:
        """Record that an added version never became visible; its files go first, so that it never will."""
        await self._run(entry, entry.discard)
        data = VersionRemoved(NOT_PLACED, self.holder)
        draft = Draft(uuid7(), data, SYSTEM, model_id=entry.model_id, version=entry.version)
        await self._submit(Record((draft,)))

    async def _discard(self, entry: StagingEntry) -> None:
        """Delete an entry once no step of it runs; if a step hangs, the next change or start does."""
        try:
            await self._run(entry, entry.discard, START_LIMIT_S)
        except RuntimeProblem:
            self._is_recovered = False

    async def _run(
        self, entry: StagingEntry | None, step: Callable[[], T], limit_s: float = PIECE_LIMIT_S
    ) -> T:
        """Return what a step returns that blocks; steps of a model, or of the whole folder, never overlap.

        Raises:
            RepositoryBusy: `repository_busy`, it did not end in time; it goes on without effect.
            RuntimeProblem: of the step; errors of the file system are made into one.
        """

        def work() -> T:
            try:
                return step()
            except OSError as error:
                raise unwritable(error) from None

        return await self._file_system.run(_ALL if entry is None else entry.model_id, work, limit_s)
