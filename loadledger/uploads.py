"""The files of a version, found in a file or a folder, and their bodies.

`find_version_files` finds them, `hash_files` hashes them; a `FileBody` is read while it is sent.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HUB_FOLDER = "onnx"
"""Where repositories of Hugging Face have their ONNX files."""
SHOWN = 4
"""Names of several that a message quotes."""
CHUNK_BYTES = 2**20
"""Bytes of a file read at once: few system calls, and visible progress."""

Progress = Callable[[int, int], None]
"""Called with the bytes sent, and the bytes of all files."""


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One file of a version: its `path` in the version's folder, with slashes, and its present place.

    Attributes:
        sha256: in hexadecimal digits, if known.
    """

    path: str
    source: Path
    bytes: int
    sha256: str | None = None


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


@dataclass(frozen=True, slots=True)
class LocalVersion:
    """The files of a version on this machine.

    Attributes:
        provenance: their source, if it has a name; see `Operations.add_files`.
        discard: deletes downloaded files once they are in their destination.
    """

    files: VersionSource
    provenance: dict[str, str] | None = None
    discard: Callable[[], None] = lambda: None


def find_version_files(path: Path, signature: str | os.PathLike[str] | None = None) -> VersionSource:
    """Return the files of a version, given a file or folder, and its signature.

    A file is the model; the files that it names belong to it. A folder has a model in it, or is a snapshot of
    Hugging Face with `onnx/model.onnx`: the model is `model.onnx` or the only `.onnx` file, and the files
    beside and beneath it belong to it, except other models and hidden files. A signature is added under its
    name if that ends in `.sig`, else as `model.sig`.

    Raises:
        ValueError: there is no model, or several, or two signatures; the message says what to do.
        OSError: a file cannot be read.
    """
    found = _find_unsigned(path)
    return found if signature is None else _add_signature(found, Path(signature))


def _find_unsigned(path: Path) -> VersionSource:
    from runtime.onnxfile import find_model_file, list_model_files

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


def _add_signature(source: VersionSource, signature: Path) -> VersionSource:
    from runtime.onnxfile import SIGNATURE_SUFFIX, is_signature_beside

    for file in source.files:
        if is_signature_beside(file.path):
            raise ValueError(f"{file.source} signs the version already: move it, or leave out {signature}")
    path = signature.name if signature.name.endswith(SIGNATURE_SUFFIX) else f"model{SIGNATURE_SUFFIX}"
    added = VersionFile(path, signature, _size_of(signature))
    return VersionSource((*source.files, added), source.left_out)


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
    from runtime.onnxfields import TooManyFields, Unparsable
    from runtime.onnxfile import describe_foreign_file, external_locations

    foreign = describe_foreign_file(source)
    if foreign is not None:
        raise ValueError(f"{source} {foreign}")
    found = {file.path: file for file in (model, *beside)}
    try:
        locations = dict.fromkeys(external_locations(source))
    except (Unparsable, TooManyFields) as problem:
        raise ValueError(f"{source} cannot be read as ONNX: {problem}") from None
    for location in locations:
        path = os.path.normpath(location)
        if path.startswith(("/", "..")) or "\0" in location:
            raise ValueError(f"{source} names {location!r}, which is not in its folder: it cannot be loaded")
        if path not in found:
            try:
                found[path] = VersionFile(path, source.parent / path, _size_of(source.parent / path))
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
class FileBody:
    """A file as the body of a request; `chunks` reads it anew each time.

    Attributes:
        sha256: the file's hash, in hexadecimal digits.
        on_chunk: called before a part is sent, with the file's bytes up to the end of that part. After the
            part would be too late for the last one, since the answer may come first.
    """

    file: VersionFile
    sha256: str
    on_chunk: Callable[[int], None]

    @property
    def headers(self) -> dict[str, str]:
        """The header fields of its request."""
        return {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(self.file.bytes),
            "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(self.sha256)).decode()}:",
        }

    def chunks(self) -> Iterator[bytes]:
        """Yield the parts of the body.

        Raises:
            ValueError: the file has changed since it was found.
            OSError: the file cannot be read.
        """
        sent = 0
        for chunk in _read_chunks(self.file):
            sent += len(chunk)
            self.on_chunk(sent)
            yield chunk


def hash_files(source: VersionSource) -> dict[str, str]:
    """Return the SHA-256 of each file by its path, in hexadecimal digits.

    Raises:
        ValueError: a file has changed since it was found.
        OSError: a file cannot be read.
    """
    return {file.path: file.sha256 or _hash(_read_chunks(file)) for file in source.files}


def make_key(digests: Mapping[str, str]) -> str:
    """Return the idempotency key of an upload, the same for the same paths and SHA-256s."""
    return _hash(f"{sha256} {path}\n".encode() for path, sha256 in sorted(digests.items()))


def _hash(chunks: Iterable[bytes]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _read_chunks(file: VersionFile) -> Iterator[bytes]:
    left = file.bytes
    with file.source.open("rb") as opened:
        while chunk := opened.read(min(CHUNK_BYTES, left)) if left else b"":
            left -= len(chunk)
            yield chunk
        if left or opened.read(1):
            raise ValueError(f"{file.source} changed while it was read: add it again when it is complete")
