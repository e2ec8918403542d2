"""The model repository: Triton's layout, `<root>/<model>/<version>/model.onnx`.

It is looked at when asked and nothing is remembered, so a new version is there the moment it is complete.
Symbolic links are followed as long as they stay beneath the root. A model, version or model.onnx that a
link takes elsewhere is as if it were not there; any other such file is left out of what `resolve` lists,
and makes `identify`, and so the load, refuse with `unsafe_file`.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidModelId, LoadRefused, RuntimeProblem, UnknownModel, UnknownVersion

MODEL_FILE = "model.onnx"
SUFFIX = ".onnx"
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,9}")
MAX_VERSION = 2**31 - 1
"""What a signed 32-bit integer holds: clients keep versions in one."""
MAX_FILES = 10_000
"""Beneath one version. The largest known models have hundreds; each is an entry in an event for ever."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file beneath a version's folder, as a directory listing shows it.

    `path` is relative to the folder, with slashes.
    """

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FoundFile:
    """What cannot stay the same when a file's content is changed or the file is replaced."""

    path: str
    dev: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One complete version of a model, and its files in order of their paths."""

    model_id: str
    version: int
    folder: Path
    files: tuple[FileStat, ...]


class UnsafeFile(RuntimeProblem):
    """A file of the repository is not one to be read; the message goes on from its name."""

    code = "unsafe_file"


def check_model_id(model_id: str) -> str:
    """Return the id if it is one, without a look at the file system.

    Raises:
        InvalidModelId: `invalid_model_id`, anything but `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise InvalidModelId
    return model_id


class Repository:
    """The models beneath one folder.

    Args:
        root: the folder; it may be empty, and may come into being later.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        str(self.root).encode()  # ONNX Runtime opens paths as UTF-8; say so now and not at the first load

    def folders(self) -> list[str]:
        """List the names that may be models, sorted; none is looked into."""
        return sorted(name for name in _names(self.root) if MODEL_ID.fullmatch(name))

    def models(self) -> list[str]:
        """List the ids of the models that have a complete version, sorted."""
        return [name for name in self.folders() if self._versions(name)]

    def versions(self, model_id: str) -> list[int]:
        """List the complete versions of a model, lowest first; never an empty list.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnknownModel: `unknown_model`, no such folder, or no complete version in it.
        """
        versions = self._versions(check_model_id(model_id))
        if not versions:
            raise UnknownModel(model_id)
        return versions

    def resolve(self, model_id: str, version: int | None = None) -> ModelVersion:
        """Find one version of a model, the highest when none is named.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnknownModel: `unknown_model`.
            UnknownVersion: `unknown_version`.
        """
        versions = self.versions(model_id)
        chosen = versions[-1] if version is None else version
        if chosen not in versions:
            raise UnknownVersion(model_id, chosen)
        folder = self.root / model_id / str(chosen)
        return ModelVersion(model_id, chosen, folder, tuple(_listing(folder, self.root)))

    def open_beside(self, model_id: str, name: str) -> int | None:
        """Open a file that lies beside a model's versions, for reading.

        Returns:
            A file descriptor, the caller's to close; None if there is no such file.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnsafeFile: `unsafe_file`, not a regular file within the repository, or one that cannot be read.
        """
        folder = self.root / check_model_id(model_id)
        if not os.path.lexists(folder / name):
            return None
        seen = _look(folder / name, self.root)
        if isinstance(seen, str):
            raise UnsafeFile(seen)
        if not stat.S_ISREG(seen.st_mode):
            raise UnsafeFile("is not a regular file")
        try:
            return open_identified(folder, _identity(name, seen))
        except LoadRefused as refused:
            raise UnsafeFile(f"could not be opened as it was found: {refused}") from None

    def find_unserved(self) -> Iterator[tuple[str, str]]:
        """Yield the path of each model and version that is not served as it is, and why, in words."""
        for model_id in self.folders():
            seen = _look(self.root / model_id, self.root)
            if isinstance(seen, str):
                yield model_id, seen
            elif stat.S_ISDIR(seen.st_mode):
                names = [name for name in _names(self.root / model_id) if name.isdecimal()]
                for name in names:
                    if (refusal := self._refuse_version(model_id, name)) is not None:
                        yield f"{model_id}/{name}", refusal
                if not names:
                    file = _only_model(self.root / model_id)
                    cure = f"move {file} to" if file else "add"
                    yield model_id, f"has no version: {cure} {model_id}/1/{MODEL_FILE}"
            elif model_id.endswith(SUFFIX):
                yield model_id, f"is in no model's folder: move it to {Path(model_id).stem}/1/{MODEL_FILE}"

    def _versions(self, model_id: str) -> list[int]:
        names = _names(self.root / model_id)
        return sorted(int(name) for name in names if self._refuse_version(model_id, name) is None)

    def _refuse_version(self, model_id: str, name: str) -> str | None:
        """Return why a folder of a model is no complete version; None if it is one."""
        if not VERSION.fullmatch(name) or int(name) > MAX_VERSION:
            return f"is no version, which is a number from 1 to {MAX_VERSION} without zeros before it"
        seen = _look(self.root / model_id / name / MODEL_FILE, self.root)
        if isinstance(seen, str):
            file = _only_model(self.root / model_id / name)
            return f"is not complete: its {MODEL_FILE} {seen}{f'; rename {file}' if file else ''}"
        return None if stat.S_ISREG(seen.st_mode) else f"is not complete: its {MODEL_FILE} is a folder"


def identify(folder: Path, root: Path) -> list[FoundFile]:
    """Take the identity of every file that a version consists of, in order of their paths.

    Args:
        folder: the version's folder.
        root: the repository's root, which no link may leave.

    Raises:
        LoadRefused: `unsafe_file`, for something that is not a regular file or is outside of the
            repository, or too many files; `model_changed`, when the folder or model.onnx is gone.
        MemoryError: there is too little to list a folder, of which nothing is known then.
    """
    found = []
    for path, seen in _walk(folder, Path(os.path.realpath(root))):
        if isinstance(seen, str):
            raise LoadRefused("unsafe_file", f"{path!r} {seen}")
        found.append(_identity(path, seen))
        if len(found) > MAX_FILES:
            raise LoadRefused("unsafe_file", f"the version has more than {MAX_FILES} files")
    if not any(file.path == MODEL_FILE for file in found):
        raise LoadRefused("model_changed", f"{MODEL_FILE} is no longer there")
    return sorted(found, key=lambda file: file.path)


def open_identified(folder: Path, identity: FoundFile) -> int:
    """Open a file for reading, only if it still is the one that was identified.

    Returns:
        A file descriptor, the caller's to close.

    Raises:
        LoadRefused: `model_changed`.
    """
    try:
        # Without O_NONBLOCK the open of a FIFO that has taken the file's place would wait for ever.
        descriptor = os.open(folder / identity.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise LoadRefused("model_changed", f"{identity.path!r}: {error.strerror}") from None
    if _identity(identity.path, os.fstat(descriptor)) != identity:
        os.close(descriptor)
        raise LoadRefused("model_changed", f"{identity.path!r} changed while it was loaded")
    return descriptor


def inside(path: Path, root: Path) -> bool:
    """Tell whether a path, with all links followed, is beneath the root (itself without links)."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def _identity(path: str, seen: os.stat_result) -> FoundFile:
    return FoundFile(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _listing(folder: Path, root: Path) -> list[FileStat]:
    files = []
    for path, seen in _walk(folder, root):
        if not isinstance(seen, str):
            files.append(FileStat(path, seen.st_size, seen.st_mtime_ns))
        if len(files) >= MAX_FILES:
            break
    return sorted(files, key=lambda file: file.path)


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, os.stat_result | str]]:
    """Give each file beneath a folder, or in words why it is not to be touched."""
    pending, visited = [""], set[tuple[int, int]]()
    while pending:
        within = pending.pop()
        for name in _names(folder / within):
            path = f"{within}{name}"
            seen = _look(folder / path, root)
            if isinstance(seen, str) or stat.S_ISREG(seen.st_mode):
                yield path, seen
            elif (seen.st_dev, seen.st_ino) not in visited:  # links can make a circle
                visited.add((seen.st_dev, seen.st_ino))
                pending.append(f"{path}/")
            if len(visited) > MAX_FILES:
                yield path, "is one folder too many"
                return


def _look(path: Path, root: Path) -> os.stat_result | str:
    """Look at a file or folder through its links; a string says why it is none to be opened."""
    try:
        path.name.encode()
        seen = path.stat()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not inside(path, root):
        return "leads out of the repository"
    usable = stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)
    return seen if usable else "is not a regular file"


def _only_model(folder: Path) -> str | None:
    """Return the name of the only file in a folder that looks like a model, unless there are several."""
    found = [name for name in _names(folder) if name.endswith(SUFFIX) and name != MODEL_FILE]
    return found[0] if len(found) == 1 else None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:  # not there, no folder, not ours to read: as if it were empty
        if error.errno == errno.ENOMEM:
            raise MemoryError(error.strerror) from None
        return []
