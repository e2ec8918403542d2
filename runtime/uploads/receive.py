"""One file on its way to the disk: its bytes are counted, hashed and synced as they arrive.

Everything here blocks, and is called piece by piece in a thread. What arrived stands in a folder that nobody
else sees.
"""

import base64
import binascii
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from events.types import AddedFile
from runtime.errors import LoadRefused, MissingData, RepositoryUnreadable, RuntimeProblem
from runtime.onnxfile import (
    MODEL_FILE,
    check_external_data,
    describe_foreign_file,
    find_model_file,
    list_model_files,
)

MAX_PATH_BYTES = 1024
"""Of one path: file systems take 4096 with the folders above the repository."""
MAX_NAME_BYTES = 255
"""Length of a name in a path: the limit of ext4 and XFS."""
RESERVE_BYTES, RESERVE_PART = 2**30, 20
"""Left free on the repository's disk, or a twentieth of a small one: the ledger may be on it."""
MAX_SHOWN_CHARACTERS = 100
"""Of a path in a message."""
SYNC_BYTES = 64 * 2**20
"""Written bytes after which a file is synced: neither memory nor the last sync grows with the file."""
ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
"""Of RFC 9530, section 5; others that a client sends are ignored, as the RFC demands."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

Digests = Mapping[str, bytes]
"""Digests that a file must have, by algorithm of `ALGORITHMS`."""

_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):\s*")


class BadPath(RuntimeProblem):
    """A version must not have a file with this path."""

    code = "invalid_parameter"


class UploadTooLarge(RuntimeProblem):
    """The files have more bytes than a version, and all uploads of a subject, may have."""

    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"a version, and all uploads of a subject together, may have {max_bytes} bytes, and this is more:"
            " discard other uploads, or put it there yourself"
        )


class InsufficientStorage(RuntimeProblem):
    """The repository's disk has no room for the version."""

    code = "insufficient_storage"


class RepositoryReadOnly(RuntimeProblem):
    """The server does not change this repository."""

    code = "repository_read_only"


def check_path(path: str) -> str:
    """Return the path of a file in a version's folder, if it is one in its only spelling.

    Raises:
        BadPath: `invalid_parameter`, the path is absolute, leads upwards, is too long, or has a name that is
            empty, too long, or no printable UTF-8.
    """
    names = path.split("/")
    if path.startswith("/"):
        raise BadPath(f"{quote(path)} is an absolute path")
    if ".." in names:
        raise BadPath(f"{quote(path)} leads out of the folder")
    if "" in names or "." in names:
        raise BadPath(f"{quote(path)} is no name of a file: leave out empty names and '.'")
    try:
        is_long = len(path.encode()) > MAX_PATH_BYTES or any(
            len(name.encode()) > MAX_NAME_BYTES for name in names
        )
    except UnicodeEncodeError:
        raise BadPath(f"{quote(path)} is not UTF-8") from None
    if is_long:
        raise BadPath(f"{quote(path)} is too long: {MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} in each name")
    if not path.isprintable():
        raise BadPath(f"{quote(path)} has characters that cannot be printed")
    return path


def quote(path: str) -> str:
    """Return a path for a message: one printable line of bounded length."""
    shown = path if len(path) <= MAX_SHOWN_CHARACTERS else f"{path[:MAX_SHOWN_CHARACTERS]}…"
    return ascii(shown)


def parse_digests(fields: Iterable[str]) -> Digests:
    """Return the digests of `Repr-Digest` and `Content-Digest` fields (RFC 9530); unknown ones are ignored.

    Raises:
        ValueError: a field is no dictionary of byte sequences, or a digest has the wrong length.
    """
    found = dict[str, bytes]()
    for member in ",".join(fields).split(","):
        if not member.strip():
            continue
        match = _MEMBER.fullmatch(member)
        if match is None:
            raise ValueError("must be like sha-256=:<base64>:, separated by commas")
        name = match[1]
        if name not in ALGORITHMS:
            continue
        try:
            value = base64.b64decode(match[2], validate=True)
        except binascii.Error:
            raise ValueError(f"the value of {name} is no base64") from None
        if len(value) != hashlib.new(ALGORITHMS[name]).digest_size:
            raise ValueError(f"the value of {name} has {len(value)} bytes")
        if found.setdefault(name, value) != value:
            raise ValueError(f"{name} is given twice, with two values")
    return found


class FileReceiver:
    """Receives one file.

    Args:
        target: where it is written; nothing is there yet.
        room_bytes: its limit.
        max_bytes: the version's limit, for the message.
        expected: the digests that it must have.
    """

    def __init__(self, target: Path, room_bytes: int, max_bytes: int, expected: Digests) -> None:
        self.target = target
        self._room_bytes, self._max_bytes = room_bytes, max_bytes
        self._expected = expected
        self._hashes = {name: hashlib.new(ALGORITHMS[name]) for name in {"sha-256", *expected}}
        self._bytes = self._unsynced_bytes = 0
        self._descriptor = -1

    def open(self, length: int) -> None:
        """Create the file, unless a body of this length is too long, or finds no room on the disk.

        Raises:
            UploadTooLarge: `body_too_large`.
            InsufficientStorage: `insufficient_storage`.
            OSError: it cannot be created.
        """
        if length > self._room_bytes:
            raise UploadTooLarge(self._max_bytes)
        check_free(self.target.parent, length)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(self.target, flags, 0o666)

    def write(self, piece: bytes) -> None:
        """Write the next bytes.

        Raises:
            UploadTooLarge: `body_too_large`.
            OSError: they cannot be written.
        """
        if self._bytes + len(piece) > self._room_bytes:
            raise UploadTooLarge(self._max_bytes)
        for digest in self._hashes.values():
            digest.update(piece)
        data = memoryview(piece)
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._bytes += len(piece)
        self._unsynced_bytes += len(piece)
        if self._unsynced_bytes >= SYNC_BYTES:
            os.fdatasync(self._descriptor)
            self._unsynced_bytes = 0
            check_free(self.target.parent, 0)

    def finish(self, path: str) -> AddedFile:
        """Check the digests, sync the file, and return it with its path in the version.

        Raises:
            RuntimeProblem: `digest_mismatch`.
            OSError: it cannot be synced.
        """
        for name, value in self._expected.items():
            if self._hashes[name].digest() != value:
                found = base64.b64encode(self._hashes[name].digest()).decode()
                raise RuntimeProblem(
                    f"the {self._bytes} bytes that arrived have {name}=:{found}:, which is not the digest"
                    " that was sent with them: send the file again",
                    code="digest_mismatch",
                )
        os.fsync(self._descriptor)
        return AddedFile(path, self._bytes, self._hashes["sha-256"].hexdigest())

    def discard(self) -> None:
        """Close the file, and delete it unless it was moved; called at the end in any case."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with suppress(FileNotFoundError):
            self.target.unlink()


def check_free(folder: Path, length: int) -> None:
    """Refuse so many bytes more, if they would take the disk's reserve.

    Raises:
        InsufficientStorage: `insufficient_storage`.
    """
    seen = os.statvfs(folder)
    reserve_bytes = min(RESERVE_BYTES, seen.f_blocks * seen.f_frsize // RESERVE_PART)
    free_bytes = seen.f_bavail * seen.f_frsize - reserve_bytes
    if length > free_bytes:
        raise InsufficientStorage(
            f"{length} bytes more do not fit: the repository's disk has {max(0, free_bytes)} free, beside a"
            f" reserve of {reserve_bytes}: free some space there"
        )


def check_model(folder: Path, paths: Iterable[str]) -> None:
    """Refuse a version without a model, or whose model names files that it does not have.

    Args:
        folder: the version's folder.
        paths: its files.

    Raises:
        RuntimeProblem: `not_onnx`.
        LoadRefused: `unsafe_file`, `invalid_model`.
        OSError: a file cannot be read.
    """
    names = list(paths)
    model = find_model_file(names)
    if model is None:
        several = list_model_files(names)
        raise RuntimeProblem(
            f"several files could be the model, {', '.join(map(quote, several[:4]))}: name one {MODEL_FILE}"
            if several
            else f"there is no model: put its ONNX file at the top of the folder, as {MODEL_FILE}",
            code="not_onnx",
        )
    foreign = describe_foreign_file(folder / model)
    if foreign is not None:
        raise RuntimeProblem(f"{model} {foreign}", code="not_onnx")
    try:
        check_external_data(folder / model, folder, folder)
    except MissingData as refused:
        advice = "; send all files that the model names, in an upload"
        raise LoadRefused(refused.code, f"{refused}{advice}") from None


def unwritable(error: OSError) -> RuntimeProblem:
    """Return the problem for an error of the repository's file system."""
    if error.errno in FULL:
        return InsufficientStorage(
            f"the repository's disk has no room for the version: {error.strerror}; free some space there"
        )
    if error.errno in FORBIDDEN:
        return RepositoryReadOnly(
            f"the repository cannot be written: {error.strerror}; give its folder to the server's user"
        )
    return RepositoryUnreadable(f"the repository cannot be written: {error.strerror}")
