"""The staging folder inside the repository, for versions that are not visible yet, or not any more.

`.uploads/<owner>/<event id>/version` holds the files of one version. No model has a name with a dot first, so
nothing lists or serves it, and a rename from here to a version's folder stays on one file system. `<owner>`
is the ledger's own key: servers that share a repository leave each other's uploads alone. One of several that
share a ledger has a part for each epoch: once that is over, another server takes what is there. The event of
a change has its id before it happens, so a start finds the change that an event is of.

An upload that its caller may go on with has a record beside its files: whose it is, and the digest of each
file that is complete. It is read after a restart only. A line counts if the file with its inode is there, so
neither a kill between the two nor a lost line makes a record of what did not arrive.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import msgspec

from events.commands import Condition
from events.files import sync
from events.types import AddedFile
from features.facts import STORED_NAMES
from runtime.errors import RepositoryUnreadable, RuntimeProblem, UnknownVersion
from runtime.repository import IS_REMOVED, MAX_FILES, MAX_PATHS_BYTES, Repository, companion_of
from runtime.store.folder import walk_files
from runtime.uploads.receive import BadPath, RepositoryReadOnly, UploadTooLarge, check_model, quote

Writable = Literal["auto", "on", "off", "own"]
STAGING = ".uploads"
VERSION, NOTE, RECORD = "version", "inode", "upload"
"""Of an entry: the version's files; before a removal, which folder it is that goes; an upload's record."""

_ENTRY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


class VersionExists(RuntimeProblem):
    """The repository has this version, or it is just being added or removed."""

    code = "version_exists"

    def __init__(
        self, model_id: str, version: int, *, is_changing: bool = False, is_removed: bool = False
    ) -> None:
        how = "is just being added or removed" if is_changing else "exists"
        how += ", and a version is never overwritten: choose another number"
        super().__init__(f"version {version} of {model_id!r} {IS_REMOVED if is_removed else how}")


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """Whether this server changes its repository, and how large a version it takes.

    Attributes:
        writable: whether it changes the repository; `auto` does if the folder belongs to the server's user.
        is_immutable: whether nobody may ever change a file there (`--store-size=off`).
        unshared: why it changes nothing, one of several that do not know whether they share it; "" if not so.
        max_bytes: limit of one version.
    """

    writable: Writable = "auto"
    is_immutable: bool = False
    unshared: str = ""
    max_bytes: int = 2**63


def check_writable(root: Path, policy: UploadPolicy) -> None:
    """Refuse changes of a repository that this server only reads.

    Raises:
        RepositoryReadOnly: `repository_read_only`, with advice.
        RuntimeProblem: `repository_not_shared`, likewise.
    """
    advice = "put versions into its folder yourself"
    if policy.writable == "off":
        raise RepositoryReadOnly(
            f"this server does not change its repository (--repository-writable): {advice}"
        )
    if policy.is_immutable:
        raise RepositoryReadOnly(
            f"nobody may change a file of this repository (--store-size=off): {advice}, under a new number"
        )
    if policy.unshared:
        raise RuntimeProblem(policy.unshared, code="repository_not_shared")
    try:
        seen = root.stat()
    except OSError as error:
        raise RepositoryReadOnly(f"the repository's folder cannot be used: {error.strerror}") from None
    is_writable = os.access(root, os.W_OK | os.X_OK)
    if not is_writable or (policy.writable == "auto" and seen.st_uid != os.geteuid()):
        whose = "belongs to another user" if is_writable else "cannot be written by the server's user"
        raise RepositoryReadOnly(
            f"the repository's folder {whose}: {advice}, or give it to the server's user"
            + (", or start the server with --repository-writable=on" if is_writable else "")
        )


class Staging:
    """The staging folder of one server. Its methods block, for ever if a file system hangs.

    Args:
        repository: the models.
        root: its folder, without links: all steps of a change are in the release where it began.
        owner: names this server's part of the folder.
        conditions: conditions of each change's event: the epoch in which it began goes on.
    """

    def __init__(
        self, repository: Repository, root: Path, owner: str, conditions: tuple[Condition, ...] = ()
    ) -> None:
        self.repository, self.root = repository, root
        self.folder = root / STAGING / owner
        self.conditions = conditions

    def adopt(self, is_over: Callable[[str], bool]) -> list[str]:
        """Take the entries of epochs that are over, and return the event ids of changes that have not ended.

        The slower of two finds no entry any more.
        """
        if not self.folder.parent.is_dir():
            return []
        for folder in sorted(self.folder.parent.iterdir()):
            if folder != self.folder and is_over(folder.name):
                self.make_folder()
                for entry in filter(_ENTRY.fullmatch, os.listdir(folder)):  # noqa: PTH208
                    with suppress(FileNotFoundError):
                        (folder / entry).rename(self.folder / entry)
                with suppress(OSError):
                    folder.rmdir()
        try:
            return sorted(filter(_ENTRY.fullmatch, os.listdir(self.folder)))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def make_folder(self) -> None:
        """Make this server's part of the folder.

        Raises:
            RepositoryReadOnly: `repository_read_only`, there is a link.
            OSError: it cannot be made.
        """
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise RepositoryReadOnly(f"{folder} is a link: uploads go nowhere but into the repository")

    def discard(self, event_id: str) -> None:
        """Delete an entry with its files."""
        version = self.folder / event_id / VERSION
        if version.is_symlink():  # a version that was a link: what it leads to is not ours
            version.unlink()
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder / event_id)


class StagingEntry:
    """One change's folder in the staging folder. Its methods block.

    Args:
        staging: where it is.
        event_id: the id of the change's future event, and the entry's name.
        model_id: the version's model.
        version: its number.

    Attributes:
        stays: whether the entry stays when its change does not become an event.
    """

    stays = False

    def __init__(self, staging: Staging, event_id: str, model_id: str, version: int) -> None:
        self.staging = staging
        self.event_id, self.model_id, self.version = event_id, model_id, version
        self.folder = staging.folder / event_id
        self._root = staging.root
        self._target = staging.repository.folder_of(model_id, version, staging.root)
        self._companion = companion_of(self._target)

    def check_free(self) -> None:
        """Refuse a version that exists, complete or not, or whose signature exists.

        Raises:
            RuntimeProblem: `version_exists`; `repository_unreadable`, it leads to another folder by now.
        """
        if self.staging.repository.find_root() != self._root:
            raise RepositoryUnreadable("the repository leads to another folder since this began: begin anew")
        if os.path.lexists(self._target):
            is_removed = self.staging.repository.is_removed(self.model_id, self.version)
            raise VersionExists(self.model_id, self.version, is_removed=is_removed)
        if os.path.lexists(self._companion):  # it would be a file of the version, but not of its event
            what = f"'{self.model_id}/{self._companion.name}' signs a version that is not there"
            reason = f"{what}: send it as a file of the version and delete it, or choose another number"
            raise RuntimeProblem(reason, code="version_exists")

    def sync(self) -> None:
        """Sync the names that lead to the entry, and those in it."""
        for folder in (self.folder, self.staging.folder, self.staging.folder.parent, self._root):
            sync(folder)

    def place(self) -> None:
        """Make a version visible, and forget its entry; nothing happens if that was done before.

        Raises:
            VersionExists: `version_exists`, something else has the version's name now.
            OSError: the rename failed.
        """
        if (self.folder / VERSION).is_dir():
            self._target.parent.mkdir(exist_ok=True)
            try:
                (self.folder / VERSION).rename(self._target)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise VersionExists(self.model_id, self.version) from None
        sync(self._target.parent)
        sync(self._root)
        self.discard()

    def begin_removal(self) -> None:
        """Make the entry of a removal, which notes the folder that goes.

        Raises:
            UnknownVersion: `unknown_version`.
            RepositoryReadOnly: as `UploadEntry.begin`.
            OSError: the entry cannot be made.
        """
        try:
            inode = self._target.lstat().st_ino
        except FileNotFoundError:
            raise UnknownVersion(self.model_id, self.version) from None
        self._make()
        self._check_movable(self._target.parent)
        if not self._target.is_symlink():
            self._check_movable(self._target)
        (self.folder / NOTE).write_text(str(inode), encoding="ascii")
        self.sync()

    def take(self) -> None:
        """Move a version that is being removed out of sight, unless that was done before, and delete it.

        A folder that has taken its place since is another version's, and stays with its companion.

        Raises:
            OSError: the rename failed.
        """
        with suppress(FileNotFoundError):
            if str(self._target.lstat().st_ino) == (self.folder / NOTE).read_text(encoding="ascii"):
                # First: after a crash in between, the inode says that this is unfinished. Once the folder is
                # moved, a companion that is left could be that of a later version with the same number.
                self._delete_companion()
                self._target.rename(self.folder / VERSION)
                sync(self._target.parent)
                sync(self.folder)
        with suppress(OSError):  # other versions, or a loadledger.toml
            self._target.parent.rmdir()
        self.discard()

    def _delete_companion(self) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):  # a folder is no companion
            self._companion.unlink()

    def discard(self) -> None:
        self.staging.discard(self.event_id)

    def _check_movable(self, folder: Path) -> None:
        """Refuse a folder whose contents cannot be moved from or to the entry: found out before the event.

        Raises:
            RepositoryReadOnly: `repository_read_only`.
        """
        shown = folder.relative_to(self._root)
        is_inside = Path(os.path.realpath(folder)).is_relative_to(self._root)
        if not is_inside or folder.stat().st_dev != self.folder.stat().st_dev:
            raise RepositoryReadOnly(
                f"the folder {str(shown)!r} is not on the repository's file system: change it there yourself"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RepositoryReadOnly(
                f"the folder {str(shown)!r} cannot be written by the server's user: correct its owner or mode"
            )

    def _make(self) -> None:
        self.staging.make_folder()
        self.folder.mkdir(mode=0o700)


class UploadOrigin(msgspec.Struct, frozen=True, rename=STORED_NAMES):
    """An upload's version and creator: the first line of its record.

    Attributes:
        subject: the only subject that may use it, and the actor of its event.
        key: hash of the Idempotency-Key of its first request; None without one.
        server: its server among several; None if it is alone.
    """

    model_id: str
    version: int
    subject: str
    key: str | None = None
    server: str | None = None


class _RecordedFile(msgspec.Struct):
    file: AddedFile
    inode: int


class UploadEntry(StagingEntry):
    """A version on its way: an entry to which files are added one by one.

    Args:
        origin: the upload's version and creator.
        max_bytes: limit of all files together.
        stays: whether its subject can go on with it; else it has no record, and ends with its request.

    Attributes:
        id: the event's, with the name of the server, if that is not alone.
        files: the complete files, by path.
        used_at: when the last file was added, in seconds since 1970.
    """

    def __init__(
        self, staging: Staging, event_id: str, origin: UploadOrigin, max_bytes: int, *, stays: bool = True
    ) -> None:
        super().__init__(staging, event_id, origin.model_id, origin.version)
        self.id = event_id if origin.server is None else f"{event_id}.{origin.server}"
        self.origin, self.max_bytes, self.stays = origin, max_bytes, stays
        self.files = dict[str, AddedFile]()
        self.used_at = 0.0

    def begin(self) -> None:
        """Make the entry.

        Raises:
            VersionExists: `version_exists`.
            RepositoryReadOnly: `repository_read_only`, the model's folder is on another file system, leads
                out of the repository, or is another user's.
            OSError: the folder cannot be made.
        """
        self.check_free()
        self._make()
        (self.folder / VERSION).mkdir()
        if self._target.parent.exists():
            self._check_movable(self._target.parent)
        if self.stays:
            (self.folder / RECORD).write_bytes(msgspec.json.encode(self.origin))

    def new_part(self) -> Path:
        """Return where a file goes while it arrives."""
        return self.folder / f"part-{uuid4()}"

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files.values())

    def room_for(self, path: str) -> int:
        """Return how many bytes a file may have beside the others."""
        return self.max_bytes - sum(file.bytes for file in self.files.values() if file.path != path)

    def keep(self, part: Path, file: AddedFile) -> None:
        """Add a file that has arrived; another one with its path is replaced.

        Raises:
            BadPath: `invalid_parameter`, a folder has its path, or a file that of a folder above it; or
                there are too many.
            UploadTooLarge: `body_too_large`, because of files that have arrived meanwhile.
            OSError: it cannot be moved.
        """
        if len(self.files) >= MAX_FILES and file.path not in self.files:
            raise BadPath(f"a version may have {MAX_FILES} files, and this one has more")
        if file.bytes > self.room_for(file.path):
            raise UploadTooLarge(self.max_bytes)
        target, inode = self.folder / VERSION / file.path, part.stat().st_ino
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.rename(target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise BadPath(f"{quote(file.path)} is a file and a folder") from None
        if self.stays:
            with (self.folder / RECORD).open("ab") as record:  # a line may follow half of one
                record.write(b"\n" + msgspec.json.encode(_RecordedFile(file, inode)))
        self.files = {**self.files, file.path: file}  # others read it meanwhile

    def complete(self) -> tuple[AddedFile, ...]:
        """Check the version, sync it, and return its files in order of their paths.

        Raises:
            RuntimeProblem: `not_onnx`, `unsafe_file`, `invalid_model`, `invalid_parameter`, `version_exists`.
            OSError: something cannot be read or synced.
        """
        check_model(self.folder / VERSION, self.files)
        folders = walk_files(self.folder / VERSION)[1]
        for count, most, what in (
            (len(folders) - 1, MAX_FILES, "folders"),
            (sum(map(len, map(str.encode, self.files))), MAX_PATHS_BYTES, "bytes in the paths of its files"),
        ):
            if count > most:
                raise BadPath(f"a version may have {most} {what}, and this one has more")
        for folder in folders:
            sync(folder)
        self.sync()
        self.check_free()
        return tuple(sorted(self.files.values(), key=lambda file: file.path))


def read_upload(staging: Staging, event_id: str, max_bytes: int) -> UploadEntry | None:
    """Return an upload from its record and its files, or None without a record.

    Incomplete files are deleted.

    Raises:
        OSError: something cannot be read.
    """
    record = staging.folder / event_id / RECORD
    try:
        first, *lines = record.read_bytes().split(b"\n")
        origin = msgspec.json.decode(first, type=UploadOrigin)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    upload = UploadEntry(staging, event_id, origin, max_bytes)
    upload.used_at = record.stat().st_mtime
    version = upload.folder / VERSION
    for line in lines:
        with suppress(msgspec.MsgspecError, FileNotFoundError, NotADirectoryError):
            recorded = msgspec.json.decode(line, type=_RecordedFile)
            seen = (version / recorded.file.path).lstat()
            if (seen.st_ino, seen.st_size) == (recorded.inode, recorded.file.bytes):
                upload.files[recorded.file.path] = recorded.file
    for path in {*walk_files(upload.folder)[0]} - {RECORD, *(f"{VERSION}/{path}" for path in upload.files)}:
        (upload.folder / path).unlink()
    return upload
