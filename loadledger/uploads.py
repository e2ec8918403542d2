"""The files of a version, given a file or a folder, and the body that uploads them.

`find_version_files` looks; `open_body` hashes, and makes the body of a request, which is read while it is
sent. A single file is sent as it is, several as a tar.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HUB_FOLDER = "onnx"
"""Where repositories of Hugging Face have their ONNX files."""
SHOWN = 4
"""Of several names, in a message."""
CHUNK_BYTES = 2**20
"""Of a file that is read at once: few system calls, and progress is seen."""
FILE_TYPE, TAR_TYPE = "application/octet-stream", "application/x-tar"
BLOCK_BYTES = 512
"""Of a tar, which ends with two empty blocks."""

Progress = Callable[[int, int], None]
"""Called with the bytes that were sent, and the bytes of the whole body."""


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One file of a version: `path` in the version's folder, with slashes, and where it is now."""

    path: str
    source: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class VersionSource:
    """The files of a version, the model's own first.

    Attributes:
        left_out: other models in the same folder, and their data.
    """

    files: tuple[VersionFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.bytes for file in self.files)


def find_version_files(path: Path) -> VersionSource:
    """Return the files of the version that a file or folder stands for.

    A file is the model, and takes the files along that it names. A folder is one with a model in it, or a
    snapshot of Hugging Face with `onnx/model.onnx`: the model is `model.onnx` or the only `.onnx` file, and
    what lies beside and beneath it goes along, but for other models and hidden files.

    Raises:
        ValueError: there is no model, or several, or it is none; the message says what to do.
        OSError: something cannot be read.
    """
    from runtime.onnxfile import find_model_file, list_model_files  # noqa: PLC0415 - for this command only

    if not path.is_dir():
        return _with_external(path, VersionFile("model.onnx", path, _size_of(path)), ())
    for folder in (path, path / HUB_FOLDER):
        names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
        model = find_model_file(names)
        if model is not None:
            others = [name for name in list_model_files(names) if name != model]
            return _of_folder(folder, model, others)
        if several := list_model_files(names):
            shown = ", ".join(several[:SHOWN])
            raise ValueError(f"{folder} has several models, {shown}: give the file itself, as {several[0]}")
    versions = sorted(each.name for each in path.iterdir() if each.name.isdecimal() and each.is_dir())
    if versions:
        raise ValueError(f"{path} is a model's folder: give one of its versions, as {path / versions[-1]}")
    raise ValueError(f"{path} has no .onnx file, nor has {path / HUB_FOLDER}")


def _of_folder(folder: Path, model: str, others: Iterable[str]) -> VersionSource:
    """Return a folder's files without other models."""
    found, left_out = [], list(others)
    for source in sorted(_walk(folder)):
        name = source.relative_to(folder).as_posix()
        if name == model:
            continue
        if any(name == other or name.startswith((f"{other}_", f"{other}.")) for other in others):
            left_out.append(name)
        else:
            found.append(VersionFile(name, source, _size_of(source)))
    own = VersionFile(model, folder / model, _size_of(folder / model))
    complete = _with_external(folder / model, own, found)
    taken = {file.path for file in complete.files}
    return VersionSource(complete.files, tuple(sorted(set(left_out) - taken)))


def _walk(folder: Path) -> Iterator[Path]:
    for within, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(within, name) for name in names if not name.startswith("."))


def _with_external(source: Path, model: VersionFile, beside: Iterable[VersionFile]) -> VersionSource:
    """Add the files that a model names, which must lie beside or beneath it."""
    from runtime.onnxfields import TooManyFields, Unparsable  # noqa: PLC0415
    from runtime.onnxfile import external_locations  # noqa: PLC0415
    from runtime.uploads.outline import describe_foreign_file  # noqa: PLC0415

    foreign = describe_foreign_file(source)
    if foreign is not None:
        raise ValueError(f"{source} {foreign}")
    found = {file.path: file for file in (model, *beside)}
    try:
        locations = dict.fromkeys(external_locations(source))
    except (Unparsable, TooManyFields) as problem:
        raise ValueError(f"{source} cannot be read as ONNX: {problem}") from None
    for location in locations:
        place = os.path.normpath(location)
        if place.startswith(("/", "..")) or "\0" in location:
            raise ValueError(f"{source} names {location!r}, which is not in its folder: it cannot be loaded")
        if place not in found:
            try:
                found[place] = VersionFile(place, source.parent / place, _size_of(source.parent / place))
            except FileNotFoundError:
                raise ValueError(
                    f"{source} keeps weights in {location!r}, which is not there: put it beside it"
                ) from None
    return VersionSource(tuple(found.values()))


def _size_of(path: Path) -> int:
    seen = path.stat()
    if not stat.S_ISREG(seen.st_mode):
        raise ValueError(f"{path} is not a regular file")
    return seen.st_size


@dataclass(frozen=True, slots=True)
class UploadBody:
    """The body of an upload; `chunks` reads the files anew each time.

    Attributes:
        media_type: of the body.
        length: in bytes.
        digest: SHA-256, for `Repr-Digest`.
        on_progress: called after each part.
    """

    files: VersionSource
    media_type: str
    length: int
    digest: bytes
    on_progress: Progress | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The header fields of its request."""
        return {
            "Content-Type": self.media_type,
            "Content-Length": str(self.length),
            "Repr-Digest": f"sha-256=:{base64.b64encode(self.digest).decode()}:",
            "If-None-Match": "*",
        }

    def chunks(self) -> Iterator[bytes]:
        """Yield the parts of the body.

        Raises:
            ValueError: a file has changed since it was hashed.
            OSError: a file cannot be read.
        """
        sent = 0
        for chunk in _read_chunks(self.files, is_tar=self.media_type == TAR_TYPE):
            yield chunk
            sent += len(chunk)
            if self.on_progress is not None:
                self.on_progress(sent, self.length)


def open_body(files: VersionSource, on_progress: Progress | None = None) -> UploadBody:
    """Hash the files, and return the body with them.

    Raises:
        ValueError: a file changes meanwhile, or its name cannot be sent.
        OSError: a file cannot be read.
    """
    import hashlib  # noqa: PLC0415 - commands that send no files start faster without it

    is_tar = len(files.files) > 1
    digest, length = hashlib.sha256(), 0
    for chunk in _read_chunks(files, is_tar=is_tar):
        digest.update(chunk)
        length += len(chunk)
    media_type = TAR_TYPE if is_tar else FILE_TYPE
    return UploadBody(files, media_type, length, digest.digest(), on_progress)


def _read_chunks(files: VersionSource, *, is_tar: bool) -> Iterator[bytes]:
    import tarfile  # noqa: PLC0415 - as below

    for file in files.files:
        if is_tar:
            entry = tarfile.TarInfo(file.path)
            entry.size = file.bytes
            yield entry.tobuf(tarfile.PAX_FORMAT)
        yield from _read_file(file)
        if is_tar:
            yield bytes(-file.bytes % BLOCK_BYTES)
    if is_tar:
        yield bytes(2 * BLOCK_BYTES)


def _read_file(file: VersionFile) -> Iterator[bytes]:
    left = file.bytes
    with file.source.open("rb") as opened:
        while chunk := opened.read(min(CHUNK_BYTES, left)) if left else b"":
            left -= len(chunk)
            yield chunk
        if left or opened.read(1):
            raise ValueError(f"{file.source} changed while it was read: add it again when it is complete")
