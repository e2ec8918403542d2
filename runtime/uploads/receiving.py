"""One upload on its way to the disk: its bytes are counted, hashed, unpacked and synced as they arrive.

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
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from events.audit.files import sync
from events.types import AddedFile
from runtime.errors import LoadRefused, RepositoryUnreadable, RuntimeProblem
from runtime.onnxfile import (
    MODEL_FILE,
    check_external_data,
    find_model_file,
    list_model_files,
)
from runtime.store.folder import walk_files
from runtime.uploads.outline import describe_foreign_file
from runtime.uploads.paths import quote
from runtime.uploads.problems import (
    DigestMismatch,
    InsufficientStorage,
    NotOnnx,
    RepositoryReadOnly,
    UploadTooLarge,
)
from runtime.uploads.tarstream import BLOCK, GZIP, MAX_ENTRIES, GzipReader, TarReader

SYNC_BYTES = 64 * 2**20
"""Written bytes after which a file is synced: neither memory nor the last sync grows with the file."""
OVERHEAD_BYTES = 4 * BLOCK * MAX_ENTRIES
"""Of a tar beside its files: a header and padding for each entry, and an extended header with its own."""
ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
"""Of RFC 9530, section 5; others that a client sends are ignored, as the RFC demands."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):\s*")


class UploadForm(StrEnum):
    """What the body is."""

    FILE = "file"
    TAR = "tar"


@dataclass(frozen=True, slots=True)
class ExpectedDigests:
    """The digests that a body must have, by algorithm of `ALGORITHMS`."""

    values: Mapping[str, bytes]


NO_DIGESTS = ExpectedDigests({})


def parse_digests(fields: Iterable[str]) -> ExpectedDigests:
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
    return ExpectedDigests(found)


class Receiver:
    """Receives one upload into a folder.

    Args:
        folder: new and empty, without links in its path; the version's files go there.
        form: of the body.
        max_bytes: of the body, and of what it unpacks to.
        expected: the digests that it must have.
    """

    def __init__(self, folder: Path, form: UploadForm, max_bytes: int, expected: ExpectedDigests) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._expected = expected
        self._hashes = {name: hashlib.new(ALGORITHMS[name]) for name in expected.values}
        self._files = FolderSink(folder)
        self._bytes = 0
        self._is_tar = form is UploadForm.TAR
        self._beginning = b""
        self._archive: TarReader | GzipReader | None = None

    def write(self, piece: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            RuntimeProblem: `body_too_large`, `bad_archive`, `insufficient_storage`, `repository_read_only`,
                `repository_unreadable`.
        """
        self._bytes += len(piece)
        if self._bytes > self._max_bytes + (OVERHEAD_BYTES if self._is_tar else 0):
            raise UploadTooLarge(self._max_bytes)
        for digest in self._hashes.values():
            digest.update(piece)
        try:
            self._pass_on(piece)
        except OSError as error:
            raise unwritable(error) from None

    def finish(self) -> tuple[AddedFile, ...]:
        """End the upload: check it, sync it, and return its files in order of their paths.

        Raises:
            RuntimeProblem: as `write`, and `digest_mismatch`, `not_onnx`, `unsafe_file`, `invalid_model`.
        """
        self._check_digests()
        try:
            if self._archive is not None:
                self._archive.close()
            elif self._is_tar:
                raise NotOnnx("the body is empty: send a tar of the version's folder")
            else:
                self._begin_single()
                self._files.end_file()
            files = self._unwrap(self._files.files)
            self._check_model(files)
            for folder in walk_files(self._folder)[1]:
                sync(folder)
        except OSError as error:
            raise unwritable(error) from None
        return tuple(sorted(files, key=lambda file: file.path))

    def close(self) -> None:
        """Close an open file; to be called at the end, whatever it is."""
        self._files.close()

    def _pass_on(self, piece: bytes) -> None:
        if not self._is_tar:
            self._begin_single()
            self._files.write_file(memoryview(piece))
            return
        if self._archive is None:
            self._beginning += piece
            if len(self._beginning) < len(GZIP):
                return
            tar = TarReader(self._files, self._max_bytes)
            is_compressed = self._beginning.startswith(GZIP)
            self._archive = GzipReader(tar, self._max_bytes + OVERHEAD_BYTES) if is_compressed else tar
            piece, self._beginning = self._beginning, b""
        self._archive.feed(piece)

    def _begin_single(self) -> None:
        if not self._files.is_open:
            self._files.begin_file(MODEL_FILE)

    def _check_digests(self) -> None:
        for name, digest in self._hashes.items():
            if digest.digest() != self._expected.values[name]:
                found = base64.b64encode(digest.digest()).decode()
                raise DigestMismatch(
                    f"the {self._bytes} bytes that arrived have {name}=:{found}:, which is not the digest"
                    " that was sent with them: send the file again"
                )

    def _unwrap(self, files: list[AddedFile]) -> list[AddedFile]:
        """Drop a folder that all files lie in: a tar of the folder itself, and not of what is in it."""
        top = {file.path.partition("/")[0] for file in files}
        if len(top) != 1 or any("/" not in file.path for file in files):
            return files
        (name,) = top
        inner = self._folder / name
        moved = self._folder.with_name(f"{self._folder.name}.inner")
        inner.rename(moved)
        for rest in self._folder.iterdir():  # folders without files
            _remove_empty(rest)
        self._folder.rmdir()
        moved.rename(self._folder)
        return [AddedFile(file.path.partition("/")[2], file.bytes, file.sha256) for file in files]

    def _check_model(self, files: list[AddedFile]) -> None:
        paths = [file.path for file in files]
        model = find_model_file(paths)
        if model is None:
            several = list_model_files(paths)
            raise NotOnnx(
                f"several files could be the model, {', '.join(map(quote, several[:4]))}: name one"
                f" {MODEL_FILE}"
                if several
                else f"there is no model: put its ONNX file at the top of the folder, as {MODEL_FILE}"
            )
        foreign = describe_foreign_file(self._folder / model)
        if foreign is not None:
            raise NotOnnx(f"{model} {foreign}")
        try:
            check_external_data(self._folder / model, self._folder, self._folder)
        except LoadRefused as refused:
            raise _with_advice(refused) from None


def _with_advice(refused: LoadRefused) -> LoadRefused:
    advice = "; send a tar of the folder, with all files that the model names" * (
        refused.code == "unsafe_file"
    )
    return LoadRefused(refused.code, f"{refused}{advice}")


class FolderSink:
    """Writes files beneath a folder, hashes them, and syncs each.

    Attributes:
        files: what is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.files = list[AddedFile]()
        self._folder = folder
        self._descriptor = -1
        self._path = ""
        self._hash = hashlib.sha256()
        self._bytes = self._unsynced_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether a file has begun and not ended."""
        return self._descriptor >= 0

    def begin_file(self, path: str) -> None:
        """Create a file, and the folders above it."""
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(target, flags, 0o666)
        self._path, self._hash = path, hashlib.sha256()
        self._bytes = self._unsynced_bytes = 0

    def write_file(self, data: memoryview) -> None:
        """Write the next bytes of the file."""
        self._hash.update(data)
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        self._bytes += written
        self._unsynced_bytes += written
        if self._unsynced_bytes >= SYNC_BYTES:
            os.fdatasync(self._descriptor)
            self._unsynced_bytes = 0

    def end_file(self) -> None:
        """Sync the file, and add it to `files`."""
        os.fsync(self._descriptor)
        self.close()
        self.files.append(AddedFile(self._path, self._bytes, self._hash.hexdigest()))

    def close(self) -> None:
        """Close an open file, complete or not."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def check_room(folder: Path, length: int, max_bytes: int) -> None:
    """Refuse a body that is too long, or has no room on the disk, before any of it is read.

    Raises:
        UploadTooLarge: `body_too_large`.
        InsufficientStorage: `insufficient_storage`.
    """
    if length > max_bytes + OVERHEAD_BYTES:
        raise UploadTooLarge(max_bytes)
    seen = os.statvfs(folder)
    free_bytes = seen.f_bavail * seen.f_frsize
    if length > free_bytes:
        raise InsufficientStorage(
            f"the body has {length} bytes, and the repository's disk {free_bytes} free: free some space there"
        )


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


def _remove_empty(folder: Path) -> None:
    for inner in folder.iterdir():
        _remove_empty(inner)
    folder.rmdir()
