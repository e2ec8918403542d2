"""Uploads of versions, file by file: begun, received and committed by their callers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from msgspec import UNSET, UnsetType

from events.clock import uuid7
from events.types import AddedFile, Provenance
from events.versioncommands import AddVersion, RemoveVersion, find_use
from runtime.errors import RuntimeProblem
from runtime.onnxfile import MODEL_FILE
from runtime.uploads.changes import START_LIMIT_S, VersionChanges
from runtime.uploads.receive import Digests, FileReceiver, InsufficientStorage, check_path
from runtime.uploads.recovery import Recovery
from runtime.uploads.staging import StagingEntry, UploadEntry, UploadOrigin, VersionExists

MAX_UPLOADS = 1000
"""Open at once: each change looks at all of them, and a script cannot fill the disk with empty ones."""


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
    """Puts versions into the repository, and removes them, for callers.

    Args:
        changes: the repository's changes.
        recovery: finishes changes that did not end.
    """

    def __init__(self, changes: VersionChanges, recovery: Recovery) -> None:
        self.changes, self._recovery = changes, recovery

    async def add(
        self, model_id: str, version: int, actor: str, body: UploadBody, *, only_new: bool = False
    ) -> tuple[AddedFile, ...]:
        """Add a version of one file, and return its files.

        Args:
            model_id: the version's model.
            version: its number.
            actor: the event's actor.
            body: the model.
            only_new: whether the request is for a version that is not there (`If-None-Match: *`).

        Raises:
            RuntimeProblem: `repository_read_only`, `version_exists`, `precondition_failed`, `body_too_large`,
                `not_onnx`, `unsafe_file`, `invalid_model`, `digest_mismatch`, `insufficient_storage`,
                `repository_unreadable`, `repository_busy`.
            LogUnavailable: `log_unavailable`; if that is unknown, it may become visible later.
        """
        await self._recovery.prepare()
        upload = self._new_upload(UploadOrigin(model_id, version, actor), stays=False)

        async def stage() -> tuple[AddedFile, ...]:
            await self.changes.run(upload, upload.begin)
            await self._receive(upload, MODEL_FILE, body)
            return await self.changes.run(upload, upload.complete)

        try:
            return await self._add_version(upload, stage)
        except VersionExists as exists:
            if only_new:
                raise RuntimeProblem(str(exists), code="precondition_failed") from None
            raise

    async def begin_upload(
        self, model_id: str, version: int, subject: str, key: str | None
    ) -> tuple[UploadEntry, bool]:
        """Return a new upload of a version, or the subject's own with the same key; and whether it is new.

        Raises:
            RuntimeProblem: `repository_read_only`, `version_exists`, `insufficient_storage`,
                `repository_unreadable`, `repository_busy`.
            EpochOver: `log_unavailable`.
        """
        await self._recovery.prepare()
        changes = self.changes
        origin = UploadOrigin(model_id, version, subject, key, changes.elsewhere.name)
        for known in changes.uploads.values():
            if key is not None and known.origin == origin:
                return known, False
        if len(changes.uploads) >= MAX_UPLOADS:
            raise InsufficientStorage(f"{MAX_UPLOADS} uploads are open: commit or discard some of them")
        upload = self._new_upload(origin)
        upload.used_at = self.changes.now()
        changes.uploads[upload.event_id] = upload
        try:
            await changes.run(upload, upload.begin)
        except BaseException:
            changes.uploads.pop(upload.event_id, None)
            await changes.discard(upload)
            raise
        return upload, True

    async def find_upload(self, upload_id: str, model_id: str, version: int, subject: str) -> UploadEntry:
        """Return an upload of its subject.

        Raises:
            UnknownUpload: `unknown_upload`.
            RuntimeProblem: `repository_read_only`, `repository_unreadable`, `repository_busy`.
        """
        await self._recovery.prepare()
        upload = self.changes.uploads.get(upload_id.partition(".")[0])
        named = (upload_id, model_id, version, subject)
        if upload is None or (upload.id, upload.model_id, upload.version, upload.origin.subject) != named:
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
        upload.used_at = self.changes.now()
        return file, is_new

    async def commit(
        self, upload: UploadEntry, source: Provenance | UnsetType = UNSET
    ) -> tuple[AddedFile, ...]:
        """Make a version of an upload, and return its files.

        Args:
            upload: the version's upload.
            source: where its subject says that it comes from.

        Raises:
            RuntimeProblem: as `add`; the upload stays.
            LogUnavailable: `log_unavailable`; if that is unknown, it may become visible later.
        """
        self._check_open(upload)
        return await self._add_version(upload, partial(self.changes.run, upload, upload.complete), source)

    async def discard_upload(self, upload: UploadEntry) -> None:
        """End an upload, and delete its files.

        Raises:
            RuntimeProblem: `unknown_upload`, `version_exists` (it is being committed).
        """
        self._check_open(upload)
        del self.changes.uploads[upload.event_id]
        await self.changes.discard(upload)

    async def remove(
        self, model_id: str, version: int, actor: str, end_uses: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Remove a version that no load uses, after `end_uses`, if given, has ended the loads that do.

        Raises:
            RuntimeProblem: `repository_read_only`, `unknown_version`, `version_in_use`, `version_exists` (it
                is just being changed), `repository_unreadable`, `repository_busy`.
            RequestRefused: `version_in_use`, a load came first.
            LogUnavailable: `log_unavailable`; if that is unknown, it may be removed later.
        """
        await self._recovery.prepare()
        changes = self.changes
        entry = StagingEntry(changes.staging(), uuid7(), model_id, version)

        async def stage() -> None:
            await changes.run(entry, entry.begin_removal)
            if end_uses is not None:
                await end_uses()
            await changes.log.catch_up()  # with what other servers have appended
            if use := find_use(changes.log.state, model_id, version):
                raise RuntimeProblem(use, code="version_in_use")

        def command(_: None) -> RemoveVersion:  # once it is recorded, no load finds the files
            change = entry.event_id, entry.staging.conditions, changes.holder
            return RemoveVersion(model_id, version, actor, *change)

        await changes.make(entry, stage, command, entry.take)

    def _new_upload(self, origin: UploadOrigin, *, stays: bool = True) -> UploadEntry:
        max_bytes = self.changes.policy.max_bytes
        return UploadEntry(self.changes.staging(), uuid7(), origin, max_bytes, stays=stays)

    async def _add_version(
        self,
        upload: UploadEntry,
        stage: Callable[[], Awaitable[tuple[AddedFile, ...]]],
        source: Provenance | UnsetType = UNSET,
    ) -> tuple[AddedFile, ...]:
        def command(files: tuple[AddedFile, ...]) -> AddVersion:
            version = upload.model_id, upload.version, upload.origin.subject, files
            return AddVersion(
                *version, upload.event_id, upload.staging.conditions, source, self.changes.holder
            )

        return await self.changes.make(upload, stage, command, upload.place)

    async def _receive(self, upload: UploadEntry, path: str, body: UploadBody) -> AddedFile:
        """Write a body into an upload."""
        changes, run = self.changes, partial(self.changes.run, upload)
        if upload.stays:
            self._check_open(upload)
        of_subject = (
            each for each in changes.uploads.values() if each.origin.subject == upload.origin.subject
        )
        uploaded_bytes = sum(each.bytes for each in of_subject if each is not upload)
        room_bytes, max_bytes = upload.room_for(path) - uploaded_bytes, changes.policy.max_bytes
        receiver = FileReceiver(upload.new_part(), room_bytes, max_bytes, body.expected)
        try:
            await run(partial(receiver.open, body.length or 0))
            async for piece in body.pieces:
                await run(partial(receiver.write, piece))
            file = await run(partial(receiver.finish, path))
            if upload.stays:
                self._check_open(upload)
            await run(partial(upload.keep, receiver.target, file))
        finally:
            with suppress(RuntimeProblem):  # the next start deletes it
                await run(receiver.discard, START_LIMIT_S)
        return file

    def _check_open(self, upload: UploadEntry) -> None:
        """Refuse a change of an upload that has ended, or is being committed.

        Raises:
            UnknownUpload: `unknown_upload`.
            VersionExists: `version_exists`.
        """
        if self.changes.is_changing(upload.event_id):
            raise VersionExists(upload.model_id, upload.version, is_changing=True)
        if upload.event_id not in self.changes.uploads:
            raise UnknownUpload
