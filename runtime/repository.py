"""The model repository: Triton's layout, `<root>/<model>/<version>/model.onnx`.

The only `.onnx` file of a version is its model, whatever its name; with several, one is `model.onnx`.

Each call reads the file system and nothing is cached, so a version exists as soon as it is complete. Symbolic
links are followed within the root. A model, version or model file behind a link that leaves the root does not
exist; `resolve` omits any other such file, and the load fails with `unsafe_file`.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from runtime.errors import InvalidModelId, LoadRefused, RuntimeProblem, UnknownModel, UnknownVersion
from runtime.filesystem import FileSystemPool, busy
from runtime.onnxfile import MODEL_FILE, SUFFIX, find_model_file, list_model_files

UNKNOWN = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO})
"""Numbers of errors that leave open what a folder has: a model that cannot be looked at may be there."""
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,9}")
MAX_VERSION = 2**31 - 1
"""The largest signed 32-bit integer, in which clients keep versions."""
MAX_FILES = 10_000
"""Files of one version. The largest known models have hundreds; each becomes part of an event."""
HUB_FOLDER = "onnx"
"""Where repositories of Hugging Face have their ONNX files."""
MAX_NAMED = 4
"""Of several files, in a message."""
MAX_PATHS_BYTES = 2**20
"""Bytes of the paths of all files of one version: 100 for each of `MAX_FILES`. Escaped twice, a path takes up
to seven times as much in a line of an export, which its reader takes up to 16 MiB of."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file of a version, as a directory listing shows it.

    `path` is relative to the folder, with slashes.
    """

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FoundFile:
    """The identity of a file, which changes if its content changes or the file is replaced."""

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
    """A file of the repository must not be read; the message continues its name."""

    code = "unsafe_file"


def check_model_id(model_id: str) -> str:
    """Return a model id if it is valid, without I/O.

    Raises:
        InvalidModelId: `invalid_model_id`, anything but `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise InvalidModelId
    return model_id


class Repository:
    """The models beneath one folder.

    Its methods block, for ever if a file system hangs: a coroutine calls them through `file_system`.

    Args:
        root: the folder; it may be empty, or be created later.

    Attributes:
        file_system: runs calls about one model in a thread.
        is_removed: whether the ledger has a version as removed: to every look it is not there any more.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.file_system = FileSystemPool()
        self.is_removed: Callable[[str, int], bool] = lambda _, __: False
        str(self.root).encode()  # ONNX Runtime opens paths as UTF-8: fail now, not at the first load

    def folders(self) -> list[str]:
        """Return the names that can be models, sorted, without looking into them."""
        return sorted(name for name in _names(self.root) if MODEL_ID.fullmatch(name))

    def models(self) -> list[str]:
        """Return the ids of models with a complete version, sorted."""
        return [name for name in self.folders() if self._versions(name)]

    def versions(self, model_id: str) -> list[int]:
        """Return the complete versions of a model, lowest first, at least one.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnknownModel: `unknown_model`, no such folder, or no complete version in it.
            RepositoryBusy: `repository_busy`, that cannot be known now.
        """
        versions = self._versions(check_model_id(model_id))
        if not versions:
            raise UnknownModel(model_id)
        return versions

    def find_version(self, model_id: str, version: int | None = None) -> int:
        """Return the number of a model's version, by default the highest.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnknownModel: `unknown_model`.
            UnknownVersion: `unknown_version`.
            RepositoryBusy: `repository_busy`.
        """
        versions = self.versions(model_id)
        chosen = versions[-1] if version is None else version
        if chosen not in versions:
            raise UnknownVersion(model_id, chosen)
        return chosen

    def resolve(self, model_id: str, version: int | None = None) -> ModelVersion:
        """Return a version of a model with its files, by default the highest. Raises as `find_version`."""
        chosen = self.find_version(model_id, version)
        folder = self.folder_of(model_id, chosen)
        return ModelVersion(model_id, chosen, folder, tuple(_listing(folder, self.root)))

    def folder_of(self, model_id: str, version: int) -> Path:
        """Return the folder of a version, whether or not it is there.

        Raises:
            InvalidModelId: `invalid_model_id`.
        """
        return self.root / check_model_id(model_id) / str(version)

    def find_file(self, model_id: str, version: int) -> Path | None:
        """Return a version's model file; None if it has none that can be told.

        Raises:
            InvalidModelId: `invalid_model_id`.
            RepositoryBusy: `repository_busy`.
        """
        folder = self.folder_of(model_id, version)
        name = find_model_file(_names(folder))
        return folder / name if name is not None and os.access(folder / name, os.R_OK) else None

    def read_beside(self, model_id: str, name: str, max_bytes: int) -> bytes:
        """Read a file beside a model's versions; empty if there is none.

        Raises:
            InvalidModelId: `invalid_model_id`.
            UnsafeFile: `unsafe_file`, too long, not a regular file within the repository, or unreadable.
        """
        folder = self.root / check_model_id(model_id)
        if not os.path.lexists(folder / name):
            return b""
        seen = _stat(folder / name, self.root)
        if isinstance(seen, str):
            raise UnsafeFile(seen)
        if not stat.S_ISREG(seen.st_mode):
            raise UnsafeFile("is not a regular file")
        try:
            with os.fdopen(open_identified(folder, _identity(name, seen)), "rb") as file:
                content = file.read(max_bytes + 1)
        except LoadRefused as refused:
            raise UnsafeFile(f"could not be opened as it was found: {refused}") from None
        except OSError as error:
            raise UnsafeFile(f"cannot be read: {error.strerror}") from None
        if len(content) > max_bytes:
            raise UnsafeFile(f"has more than {max_bytes} bytes")
        return content

    def find_unserved(self) -> Iterator[tuple[str, str]]:
        """Yield the path of each model and version that cannot be served, and the reason."""
        for model_id in self.folders():
            seen = _stat(self.root / model_id, self.root)
            if isinstance(seen, str):
                yield model_id, seen
            elif stat.S_ISDIR(seen.st_mode):
                names = [name for name in _names(self.root / model_id) if name.isdecimal()]
                for name in names:
                    if (refusal := self._refuse_version(model_id, name)) is not None:
                        yield f"{model_id}/{name}", refusal
                if not names:
                    yield model_id, f"has no version: {_cure_model(self.root / model_id, model_id)}"
            elif model_id.endswith(SUFFIX):
                yield model_id, f"is in no model's folder: move it to {Path(model_id).stem}/1/{MODEL_FILE}"

    def find_hard_links(self, model_id: str, version: int) -> list[str]:
        """Return the paths of a version's files that have other names, anywhere on their file system."""
        files = islice(_walk(self.folder_of(model_id, version), self.root), MAX_FILES)
        return sorted(path for path, seen in files if not isinstance(seen, str) and seen.st_nlink > 1)

    def _versions(self, model_id: str) -> list[int]:
        names = _names(self.root / model_id)
        return sorted(int(name) for name in names if self._refuse_version(model_id, name) is None)

    def _refuse_version(self, model_id: str, name: str) -> str | None:
        """Return why a folder is no complete version; None if it is one."""
        if not VERSION.fullmatch(name) or int(name) > MAX_VERSION:
            return f"is no version, which is a number from 1 to {MAX_VERSION} without zeros before it"
        if self.is_removed(model_id, int(name)):
            return "was removed: delete the folder if it stays, and add the version again"
        folder = self.root / model_id / name
        seen, model = _stat(folder / MODEL_FILE, self.root), MODEL_FILE
        if isinstance(seen, str) and (named := list_model_files(_names(folder))):
            model = find_model_file(named) or ""
            if not model:
                shown = ", ".join(named[:MAX_NAMED])
                return f"has several models, {shown}: rename one to {MODEL_FILE}, or give each its own folder"
            seen = _stat(folder / model, self.root)
        if isinstance(seen, str):
            return f"is not complete: its {model} {seen}{_cure_layout(folder)}"
        return None if stat.S_ISREG(seen.st_mode) else f"is not complete: its {model} is a folder"


def open_identified(folder: Path, identity: FoundFile) -> int:
    """Open a file for reading if it still has this identity.

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


def _identity(path: str, seen: os.stat_result) -> FoundFile:
    return FoundFile(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _listing(folder: Path, root: Path) -> list[FileStat]:
    found = ((path, seen) for path, seen in _walk(folder, root) if not isinstance(seen, str))
    files = (FileStat(path, seen.st_size, seen.st_mtime_ns) for path, seen in islice(found, MAX_FILES))
    return sorted(files, key=lambda file: file.path)


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, os.stat_result | str]]:
    """Yield each file beneath a folder, with its status or the reason not to open it."""
    pending, visited = [""], set[tuple[int, int]]()
    while pending:
        within = pending.pop()
        for name in _names(folder / within):
            path = f"{within}{name}"
            seen = _stat(folder / path, root)
            if isinstance(seen, str) or stat.S_ISREG(seen.st_mode):
                yield path, seen
            elif (seen.st_dev, seen.st_ino) not in visited:  # links can make a circle
                visited.add((seen.st_dev, seen.st_ino))
                pending.append(f"{path}/")
            if len(visited) > MAX_FILES:
                yield path, "is one folder too many"
                return


def _stat(path: Path, root: Path) -> os.stat_result | str:
    """Return the status of a file or folder behind its links, or the reason not to open it."""
    try:
        path.name.encode()
        seen = path.stat()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not Path(os.path.realpath(path)).is_relative_to(root):
        return "leads out of the repository"
    usable = stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)
    return seen if usable else "is not a regular file"


def _cure_model(folder: Path, model_id: str) -> str:
    """Return what makes a model of a folder without versions."""
    if find_model_file(_names(folder / HUB_FOLDER)) is not None:
        return f"it is laid out as by Hugging Face: `loadledger add {model_id} {folder}` takes what is needed"
    file = find_model_file(_names(folder))
    return f"{f'move {file} to' if file else 'add'} {model_id}/1/{MODEL_FILE}"


def _cure_layout(folder: Path) -> str:
    """Return what makes a version of a folder whose model lies beneath it, if one does."""
    for name in _names(folder):
        if find_model_file(_names(folder / name)) is not None:
            return f"; move what is in {name}/ to the version's folder"
    return ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:  # missing, no folder, or unreadable: like an empty one
        if error.errno == errno.ENOMEM:
            raise MemoryError(error.strerror) from None
        if error.errno in UNKNOWN:
            raise busy(folder.name, f"cannot be listed: {error.strerror}") from None
        return []
