"""The staging folder inside the repository: what is not visible yet, and what is not visible any more.

`.uploads/<owner>/<event id>/version` holds the files of one version. No model has a name with a dot first, so
nothing lists or serves it, and a rename from here to a version's folder stays on one file system. `<owner>`
is the ledger's own key: servers that share a repository leave each other's uploads alone. A node has a part
for each epoch: once that is over, no event of what is there can come any more, and another node takes it. The
event of a change has its id before it happens, so a start finds the change that an event is of.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from events.audit.files import sync
from events.nodes import Node
from runtime.errors import UnknownVersion
from runtime.repository import Repository
from runtime.uploads.problems import RepositoryReadOnly, VersionExists

STAGING = ".uploads"
VERSION, NOTE = "version", "inode"
"""Of an entry: the version's files; and, before a removal, which folder it is that goes."""
ATTEMPTS = 3
"""To place a version beside a removal of the model's last one, which may take the model's folder away."""
KEY_DIGITS = 32
"""Of the hash of a node's key in a folder's name: no two nodes that share a repository have the same."""

_ENTRY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


def epoch_folder(node: Node) -> str:
    """Return the name of a node's part of the staging folder in its present epoch, or its last one."""
    return f"{_key_of(node)}-{node.epoch}"


def is_left(name: str, nodes: Mapping[str, Node]) -> bool:
    """Whether a part of the staging folder is of an epoch that is over."""
    key, _, epoch = name.rpartition("-")
    node = next((each for each in nodes.values() if _key_of(each) == key), None)
    if node is None or not epoch.isdecimal():
        return False
    return int(epoch) < node.epoch or (int(epoch) == node.epoch and not node.is_present)


def _key_of(node: Node) -> str:
    return hashlib.sha256((node.public_key or "").encode()).hexdigest()[:KEY_DIGITS]


class Staging:
    """The staging folder of one server. Its methods block, for ever if a file system hangs.

    Args:
        repository: the models.
        owner: names this server's part of the folder.
    """

    def __init__(self, repository: Repository, owner: str) -> None:
        self._repository = repository
        self._root = repository.root
        self._folder = self._root / STAGING / owner

    def adopt(self, nodes: Mapping[str, Node]) -> None:
        """Take the entries of epochs that are over: who was slower finds nothing to act on any more."""
        if not nodes or not self._folder.parent.is_dir():
            return
        for folder in sorted(self._folder.parent.iterdir()):
            if folder != self._folder and is_left(folder.name, nodes):
                self._make_folder()
                for entry in filter(_ENTRY.fullmatch, os.listdir(folder)):  # noqa: PTH208
                    with suppress(FileNotFoundError):
                        (folder / entry).rename(self._folder / entry)
                with suppress(OSError):
                    folder.rmdir()

    def entries(self) -> list[str]:
        """Return the event ids of changes that have not ended."""
        try:
            return sorted(name for name in os.listdir(self._folder) if _ENTRY.fullmatch(name))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def begin_addition(self, event_id: str, model_id: str, version: int) -> Path:
        """Make the entry of an upload, and return its new, empty folder for the version's files.

        Raises:
            VersionExists: `version_exists`.
            RepositoryReadOnly: `repository_read_only`, the model's folder is on another file system, leads
                out of the repository, or is another user's.
            OSError: the folder cannot be made.
        """
        self.check_free(model_id, version)
        folder = self._make_entry(event_id) / VERSION
        folder.mkdir()
        model = self._root / model_id
        if model.exists():
            self._check_movable(model, folder.parent)
        return folder

    def check_free(self, model_id: str, version: int) -> None:
        """Refuse a version that is there, complete or not.

        Raises:
            VersionExists: `version_exists`.
        """
        if os.path.lexists(self._target(model_id, version)):
            raise VersionExists(model_id, version)

    def sync(self, event_id: str) -> None:
        """Sync the names that lead to an entry, and those in it."""
        for folder in (self._folder / event_id, self._folder, self._folder.parent, self._root):
            sync(folder)

    def place(self, event_id: str, model_id: str, version: int) -> None:
        """Make an upload visible, and forget its entry; nothing happens if that was done before.

        Raises:
            VersionExists: `version_exists`, something else has the version's name now.
            OSError: the rename failed.
        """
        source, target = self._folder / event_id / VERSION, self._target(model_id, version)
        if source.is_dir():
            self._rename(source, target, model_id, version)
        sync(target.parent)
        sync(self._root)
        self.discard(event_id)

    def begin_removal(self, event_id: str, model_id: str, version: int) -> None:
        """Make the entry of a removal, which notes the folder that goes.

        Raises:
            UnknownVersion: `unknown_version`.
            RepositoryReadOnly: as `begin_addition`.
            OSError: the entry cannot be made.
        """
        target = self._target(model_id, version)
        try:
            inode = target.lstat().st_ino
        except FileNotFoundError:
            raise UnknownVersion(model_id, version) from None
        entry = self._make_entry(event_id)
        self._check_movable(target.parent, entry)
        if not target.is_symlink():
            self._check_movable(target, entry)
        (entry / NOTE).write_text(str(inode), encoding="ascii")
        self.sync(event_id)

    def take(self, event_id: str, model_id: str, version: int) -> None:
        """Move a version that is being removed out of sight, unless that was done before.

        A folder that has taken its place since is another version's, and stays.

        Raises:
            OSError: the rename failed.
        """
        entry, target = self._folder / event_id, self._target(model_id, version)
        with suppress(FileNotFoundError):
            if str(target.lstat().st_ino) == (entry / NOTE).read_text(encoding="ascii"):
                target.rename(entry / VERSION)
                sync(target.parent)
                sync(entry)
        with suppress(OSError):  # other versions, or a loadledger.toml
            target.parent.rmdir()

    def discard(self, event_id: str) -> None:
        """Delete an entry, and what is in it."""
        version = self._folder / event_id / VERSION
        if version.is_symlink():  # a version that was a link: what it leads to is not ours
            version.unlink()
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder / event_id)

    def _check_movable(self, folder: Path, entry: Path) -> None:
        """Refuse a folder whose contents cannot be moved from or to an entry: found out before the event.

        Raises:
            RepositoryReadOnly: `repository_read_only`.
        """
        shown = folder.relative_to(self._root)
        is_inside = Path(os.path.realpath(folder)).is_relative_to(self._root)
        if not is_inside or folder.stat().st_dev != entry.stat().st_dev:
            raise RepositoryReadOnly(
                f"the folder {str(shown)!r} is not on the repository's file system: change it there yourself"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RepositoryReadOnly(
                f"the folder {str(shown)!r} cannot be written by the server's user: correct its owner or mode"
            )

    def _target(self, model_id: str, version: int) -> Path:
        return self._repository.folder_of(model_id, version)

    def _make_folder(self) -> None:
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise RepositoryReadOnly(f"{folder} is a link: uploads go nowhere but into the repository")

    def _make_entry(self, event_id: str) -> Path:
        self._make_folder()
        entry = self._folder / event_id
        entry.mkdir(mode=0o700)
        return entry

    def _rename(self, source: Path, target: Path, model_id: str, version: int) -> None:
        for attempt in range(ATTEMPTS):
            target.parent.mkdir(exist_ok=True)
            try:
                source.rename(target)
            except FileNotFoundError:
                if attempt == ATTEMPTS - 1:
                    raise
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise VersionExists(model_id, version) from None
            else:
                return
