"""The folder that prepared forms lie in: how a name is given there, taken away, and kept by nobody else.

An entry is a folder named by its key. It is made as a draft beside the others and then renamed, and before
it is removed it is renamed to a draft again: no entry is ever seen in part. Each process locks the drafts
that it works on, so that those which a killed one left can be told from them.
"""

import fcntl
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from events.errors import LedgerProblem
from runtime.errors import RuntimeProblem
from runtime.prepared.files import remove, sync

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DRAFT = re.compile(r"draft-[0-9a-f]{16}-[0-9a-f]{8}", re.ASCII)


class PreparedUnavailable(RuntimeProblem):
    """Prepared forms of models cannot be kept at the moment; models load without."""

    code = "prepared_unavailable"


class PreparedFolder:
    """The folder, for the threads of one process.

    Args:
        path: of it; neither it nor what is in it is followed as a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path.parent)) / path.name
        self._lock = threading.Lock()
        self._drafts = dict[Path, int]()

    def entry(self, key: str) -> Path:
        """Return where the entry of a key is, if it is there."""
        if not _is_key(key):
            raise ValueError(f"{key!r} is no key")
        return self.path / key

    def entries(self) -> list[Path]:
        """List the entries; a folder that is not there has none.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, it is no folder, or cannot be listed.
        """
        return [path for path in self._listed() if _is_key(path.name)]

    def leftovers(self) -> list[Path]:
        """List the drafts that no process works on, as far as locks say."""
        return [path for path in self._listed() if _is_draft(path.name) and not _is_held(path)]

    def abandoned(self) -> list[Path]:
        """List the drafts that this process does not work on."""
        return [path for path in self._listed() if _is_draft(path.name) and path not in self._drafts]

    def strangers(self) -> list[str]:
        """List the names that we do not give."""
        return [path.name for path in self._listed() if not _is_key(path.name) and not _is_draft(path.name)]

    def make(self) -> None:
        """Make the folder, or see to it that nobody else can put something there (0700).

        What is there is executed, in a way. If its group could write to it, which some systems give to all
        that is mounted, what is there may be anybody's and is removed.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, it is no folder, a link, another user's, open to
                everybody's writing, or it cannot be made.
        """
        with told(self.path):
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                self._make_ours(self.path.lstat())

    def draft(self, key: str) -> Path:
        """Make an empty folder for an entry of this key.

        Raises:
            PreparedUnavailable: `prepared_unavailable`.
        """
        self.make()
        with self.changing():
            draft = self._new_name(self.entry(key))
            draft.mkdir(mode=0o700)
            self._drafts[draft] = _held(draft)
        return draft

    def discard(self, draft: Path) -> None:
        """Remove a draft if it is there, or tell the log; what is no draft is left alone."""
        if draft.parent == self.path and _is_draft(draft.name):
            _remove(draft)
        descriptor = self._drafts.pop(draft, None)
        if descriptor is not None:
            os.close(descriptor)

    @contextmanager
    def changing(self) -> Iterator[list[Path]]:
        """Change what is there, alone in this process; what is added to the list is removed after that.

        Raises:
            PreparedUnavailable: `prepared_unavailable`, for whatever the file system refuses.
        """
        doomed = list[Path]()
        try:
            with told(self.path), self._lock:
                yield doomed
        finally:
            for path in doomed:
                _remove(path)

    def put(self, draft: Path, key: str, doomed: list[Path]) -> None:
        """Have a draft, which is on the disk, be the entry of a key instead of what was, durably."""
        path = self.entry(key)
        if os.path.lexists(path):
            self.take_away(path, doomed)
        draft.rename(path)
        sync(self.path)

    def take_away(self, path: Path, doomed: list[Path]) -> None:
        """Take an entry's name from it, if another process was not faster."""
        draft = self._new_name(path)
        with suppress(FileNotFoundError):
            path.rename(draft)
            doomed.append(draft)

    def _listed(self) -> list[Path]:
        with told(self.path):
            try:
                self._refuse_irregular(self.path.lstat())
                return sorted(self.path.iterdir(), key=lambda path: path.name)
            except FileNotFoundError:
                return []

    def _make_ours(self, seen: os.stat_result) -> None:
        self._refuse_irregular(seen)
        mode = stat.S_IMODE(seen.st_mode)
        if seen.st_uid != os.geteuid():
            raise PreparedUnavailable(
                f"{self.path} belongs to user {seen.st_uid}, and this process is user {os.geteuid()}: remove"
                " it, or give it to this user"
            )
        if mode & stat.S_IWOTH:
            raise PreparedUnavailable(
                f"everybody can write to {self.path}, so what is in it may be anybody's: remove it"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            self.path.chmod(0o700)
        if mode & stat.S_IWGRP:
            _log.warning("the group could write to %s: what was prepared is removed", self.path)
            for path in [*self.entries(), *self.abandoned()]:
                _remove(path)

    def _refuse_irregular(self, seen: os.stat_result) -> None:
        if not stat.S_ISDIR(seen.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(seen.st_mode) else "no folder"
            raise PreparedUnavailable(f"{self.path} is {what}: remove it, and a folder is made there")

    def _new_name(self, entry: Path) -> Path:
        return self.path / f"draft-{entry.name[:16]}-{secrets.token_hex(4)}"


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Say of all that the file system refuses what it means."""
    try:
        yield
    except (OSError, LedgerProblem) as error:
        raise PreparedUnavailable(f"prepared models cannot be kept in {folder}: {error}") from error


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def _is_draft(name: str) -> bool:
    return _DRAFT.fullmatch(name) is not None


def _held(draft: Path) -> int:
    """Lock a draft until the descriptor is closed, where folders can be locked."""
    descriptor = _opened(draft)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_held(draft: Path) -> bool:
    """Tell whether a process works on a draft; what cannot be locked may be worked on."""
    try:
        descriptor = _opened(draft)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _opened(draft: Path) -> int:
    return os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove(path: Path) -> None:
    if not remove(path):
        _log.warning("%s could not be removed", path)
