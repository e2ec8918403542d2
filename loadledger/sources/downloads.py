"""Resumable downloads: a part of a file stays under its identity, such as a digest, until the next attempt.

The folder `$XDG_CACHE_HOME/loadledger` or `~/.cache/loadledger` has the files until they are added; it may be
deleted at any time while no command downloads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Self, TypeVar

from loadledger.errors import SourceProblem
from loadledger.uploads import CHUNK_BYTES

RESERVE_BYTES = 2**30
"""Free space left on the disk: an endless body ends before the disk is full."""
CHECK_BYTES = 2**26
"""Written bytes between two checks of the disk's free space."""

DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Back-off before each further attempt, enough for the restart of a server."""

T = TypeVar("T")


class OpenFile(NamedTuple):
    """A file that is being read.

    Attributes:
        offset: the position where its pieces begin.
        length: of the whole file in bytes; None if that is unknown.
    """

    offset: int
    length: int | None
    pieces: Generator[bytes, None, None]


OpenAt = Callable[[int], OpenFile]
"""Opens a file at the end of the local bytes, or at its beginning."""


@dataclass(frozen=True, slots=True)
class Download:
    """A local file, and its SHA-256 in hexadecimal digits."""

    path: Path
    sha256: str


def retry(work: Callable[[], T]) -> T:
    """Return a function's result; call it again after a transient problem."""
    for delay_s in DELAYS_S:
        try:
            return work()
        except SourceProblem as problem:
            if not problem.is_transient:
                raise
        time.sleep(delay_s)
    return work()


class _PartialFile:
    """A file that is being written, after the bytes of an earlier attempt."""

    def __init__(self, file: IO[bytes], size: int | None, downloads: Downloads) -> None:
        self.file, self._size, self._downloads = file, size, downloads
        self.digest, self.bytes = hashlib.sha256(), 0
        while piece := file.read(CHUNK_BYTES):
            self._count(piece)

    def write_rest(self, open_at: OpenAt) -> None:
        """Write a source's bytes after the local ones, or the whole file if the source begins anew."""
        source = open_at(self.bytes)
        if self._size is None and source.length is not None:
            self._downloads.on_length(source.length)
        if source.offset != self.bytes:
            self.file.seek(0)
            self.file.truncate()
            self._downloads.on_bytes(-self.bytes)
            self.digest, self.bytes = hashlib.sha256(), 0
        unchecked = CHECK_BYTES
        with closing(source.pieces) as pieces:  # closes the connection, too, in any case
            for piece in pieces:
                unchecked += len(piece)
                if unchecked >= CHECK_BYTES:
                    self._downloads.check_free()
                    unchecked = 0
                self.file.write(piece)
                self._count(piece)
                if self._size is not None and self.bytes > self._size:
                    raise SourceProblem(
                        "source_invalid", f"the source sends more than its {self._size} bytes"
                    )

    def _count(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.bytes += len(piece)
        self._downloads.on_bytes(len(piece))


def unwritable(error: OSError, path: Path) -> SourceProblem:
    return SourceProblem("no_space", f"{error.filename or path} cannot be written: {error.strerror}")


class Downloads:
    """The folder of downloads; use `with`, at whose end other commands may use its files.

    Args:
        folder: created if missing; None is this user's.

    Attributes:
        on_bytes: called with the number of new bytes; negative where local bytes were useless.
        on_length: called with the length of a file that was unknown before.
    """

    def __init__(self, folder: Path | None = None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = folder or Path(cache).expanduser() / "loadledger"
        self.on_bytes: Callable[[int], None] = lambda _: None
        self.on_length: Callable[[int], None] = lambda _: None
        self._complete, self._unresumable = list[Path](), list[Path]()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._unresumable:
            path.unlink(missing_ok=True)
        self._open.close()

    def discard(self) -> None:
        """Delete the files, once they are in their destination, and close them to free their space."""
        for path in self._complete:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._complete.clear()
        self._open.close()

    def new_folder(self, beside: Path) -> Path:
        """Return an empty folder for a file's contents."""
        folder = beside.with_name(f"{beside.name}.files")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        self._complete.append(folder)
        return folder

    def receive(
        self, identity: str | None, open_at: OpenAt, *, size: int | None = None, sha256: str | None = None
    ) -> Download:
        """Return a file once it is complete, resuming an earlier part of it.

        Args:
            identity: a name of its bytes known beforehand, such as a digest; None keeps no part.
            open_at: opens the file.
            size: its length in bytes, if known.
            sha256: its required hash in hexadecimal digits, if known.

        Raises:
            SourceProblem: `digest_mismatch`, and the file is deleted; `source_unreachable`, another command
                downloads it; `no_space`; and problems of `open_at`.
        """
        path = self.folder / hashlib.sha256(identity.encode() if identity else os.urandom(32)).hexdigest()
        if identity is None:
            self._unresumable.append(path)
        try:
            partial_file = _PartialFile(self._lock(path), size, self)
            if partial_file.bytes != size and partial_file.digest.hexdigest() != sha256:
                self._fetch_rest(partial_file, open_at, has_identity=identity is not None)
            partial_file.file.flush()
        except OSError as error:
            raise unwritable(error, path) from None
        found = partial_file.digest.hexdigest()
        if sha256 not in (None, found) or size not in (None, partial_file.bytes):
            path.unlink()
            raise SourceProblem(
                "digest_mismatch",
                f"{partial_file.bytes} bytes with the SHA-256 {found} arrived, and not {size or 'those'} with"
                f" {sha256 or 'another'}: they were changed at the source or on the way, or are of another"
                " file; they were deleted",
            )
        self._complete.append(path)
        return Download(path, found)

    def _lock(self, path: Path) -> IO[bytes]:
        """Open a file that no other command may write or delete until the `with` block ends."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            file = self._open.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SourceProblem(
                    "source_unreachable", f"another command downloads this file now, to {path}: wait for it"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file  # otherwise another command has just deleted it

    def _fetch_rest(self, partial_file: _PartialFile, open_at: OpenAt, *, has_identity: bool) -> None:
        """Fetch the rest of a file, in as many attempts as necessary."""
        delays_s = iter(DELAYS_S)
        while True:
            before = partial_file.bytes
            try:
                partial_file.write_rest(open_at)
            except SourceProblem as problem:
                if partial_file.bytes > before:
                    delays_s = iter(DELAYS_S)
                delay_s = next(delays_s, None)
                is_of_use = has_identity or not partial_file.bytes  # else the rest may be another file's
                if delay_s is None or not problem.is_transient or not is_of_use:
                    raise
            else:
                return
            time.sleep(delay_s)

    def check_free(self) -> None:
        """Refuse to write more when the disk is nearly full."""
        if shutil.disk_usage(self.folder).free < RESERVE_BYTES:
            raise SourceProblem(
                "no_space",
                f"the disk of {self.folder} has less than {RESERVE_BYTES >> 30} GiB left: free"
                " some space, or set XDG_CACHE_HOME to a folder on another disk",
            )
