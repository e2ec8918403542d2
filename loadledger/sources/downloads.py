"""Files that arrive: what has come of one stays under what its bytes are known by, and is gone on with.

`$XDG_CACHE_HOME/loadledger` or `~/.cache/loadledger` has them until they are added; it may be deleted at any
time while no command downloads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from loadledger.errors import SourceProblem
from loadledger.uploads import CHUNK_BYTES

RESERVE_BYTES = 2**30
"""Left free on the disk: an endless body ends before the disk does."""
CHECK_BYTES = 2**26
"""Written bytes after which the disk is looked at."""

OpenAt = Callable[[int], tuple[int, Iterable[bytes]]]
"""Given the bytes that are here, returns the offset at which pieces begin, the same or 0, and the pieces."""


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is here, and its SHA-256 in hexadecimal digits."""

    path: Path
    sha256: str


class Downloads:
    """The folder of downloads; a `with` block, at whose end other commands may have its files.

    Args:
        folder: it is made if it is not there; None: that of this user.
        on_bytes: called with how many bytes more there are; fewer, where what was here is of no use.
    """

    def __init__(self, folder: Path | None = None, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = folder or Path(cache).expanduser() / "loadledger"
        self.on_bytes = on_bytes
        self._mine = list[Path]()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def discard(self) -> None:
        """Delete the files, once they are where they were to go."""
        for path in self._mine:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._mine.clear()

    def new_folder(self, beside: Path) -> Path:
        """Return an empty folder for the contents of a file."""
        folder = beside.with_name(f"{beside.name}.files")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        self._mine.append(folder)
        return folder

    def receive(
        self, known_by: str | None, open_at: OpenAt, *, size: int | None = None, sha256: str | None = None
    ) -> Download:
        """Return a file once all of it is here; a part of it that was here is gone on with.

        Args:
            known_by: what its bytes are known by beforehand, such as a digest; without, no part stays.
            open_at: opens the file.
            size: its length in bytes, if it is known.
            sha256: that it must have, if it is known, in hexadecimal digits.

        Raises:
            SourceProblem: `digest_mismatch`, it is deleted; `source_unreachable`, another command has it;
                `no_space`; and those of `open_at`.
        """
        path = self.folder / hashlib.sha256(known_by.encode() if known_by else os.urandom(32)).hexdigest()
        try:
            file = self._lock(path)
            try:
                found = self._complete(file, open_at, size, sha256)
            except BaseException:
                if known_by is None:
                    path.unlink(missing_ok=True)
                raise
            file.flush()
        except OSError as error:
            raise SourceProblem(
                "no_space", f"{error.filename or path} cannot be written: {error.strerror}"
            ) from None
        if sha256 not in (None, found):
            path.unlink()
            raise SourceProblem(
                "digest_mismatch",
                f"it has the SHA-256 {found}, and not {sha256}: it was changed at its"
                " source or on its way, or this is another file; what arrived was deleted",
            )
        self._mine.append(path)
        return Download(path, found)

    def _lock(self, path: Path) -> IO[bytes]:
        """Open a file that no other command writes, or may delete, until the `with` block ends."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            file = self._open.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SourceProblem(
                    "source_unreachable",
                    f"another command downloads this file now, to {path}: wait for it",
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file  # else its command has just deleted it

    def _complete(self, file: IO[bytes], open_at: OpenAt, size: int | None, sha256: str | None) -> str:
        """Write what is missing of a file; return its SHA-256."""
        digest, here = hashlib.sha256(), 0
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            here += len(piece)
        self.on_bytes(here)
        if here == size or digest.hexdigest() == sha256:
            return digest.hexdigest()
        offset, pieces = open_at(here)
        if offset != here:
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            self.on_bytes(-here)
        unchecked = CHECK_BYTES
        for piece in pieces:
            unchecked += len(piece)
            if unchecked >= CHECK_BYTES:
                self._check_free()
                unchecked = 0
            file.write(piece)
            digest.update(piece)
            self.on_bytes(len(piece))
        return digest.hexdigest()

    def _check_free(self) -> None:
        if shutil.disk_usage(self.folder).free < RESERVE_BYTES:
            raise SourceProblem(
                "no_space",
                f"the disk of {self.folder} has less than {RESERVE_BYTES >> 30} GiB left: free"
                " some space, or set XDG_CACHE_HOME to a folder on another disk",
            )
