"""Models, versions and files of the repository: Triton's layout, `<root>/<model>/<version>/model.onnx`.

The only `.onnx` file of a version is its model, whatever its name; with several, one is `model.onnx`.

Each call reads the file system and nothing is cached, so a version exists as soon as it is complete. The root
may be a link that is re-pointed (git-sync, atomic releases): each call follows the link once, so that all its
results are of one release. Symbolic links are followed within the root. A model, version or model file behind
a link that leaves the root does not exist; a version with any other such file is refused with `unsafe_file`.

The files of a version may lie in a folder `model.onnx`, as Triton has it: that folder is then the version's.

The signature of a version (OpenSSF model signing) is a `*.sig` in its folder, or `<version>.sig`
beside the folder. The latter is a file of the version like those in the folder, with its name as path.

The files of a version are read through one descriptor of its folder (`VersionFolder`). A path may lead
elsewhere by the time it is opened, so a file is opened first (`O_PATH`, which reads nothing and waits for no
FIFO); then type and location are read from the descriptor. If the folder is exchanged meanwhile, the
descriptor stays with the folder that was opened.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import re
import stat
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar
from weakref import WeakValueDictionary

import msgspec

from events.types import LoadedFile
from runtime.errors import (
    InvalidModelId,
    LoadRefused,
    RepositoryUnreadable,
    RuntimeProblem,
    UnknownModel,
    UnknownVersion,
)
from runtime.onnxfile import MODEL_FILE, SIGNATURE_SUFFIX, SUFFIX, find_model_file, list_model_files
from runtime.timeouts import TimeoutExpired, timeout
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Count, FileNumber, Name, Tensor, Time

T = TypeVar("T")

MAX_THREADS = 32
"""Calls at once. A call takes a millisecond, so only hanging calls reach this limit."""
REQUEST_LIMIT_S = 3.0
"""Time that a request waits for a call: many files on a slow network mount take a second."""
LOAD_LIMIT_S = 30.0
"""Time that a load waits for a call; then it fails, since it may hold a load slot meanwhile."""


class RepositoryBusy(RuntimeProblem):
    """The repository does not answer at the moment."""

    code = "repository_busy"


def start_call(key: str, work: Callable[[], T], *, name: str = "file system") -> asyncio.Future[T]:
    """Call a function in a daemon thread, so that no stop of the process waits for it.

    Await the future through `asyncio.shield`: its callbacks are then called when the call has ended.

    Raises:
        RepositoryBusy: `repository_busy` for the model `key`, no thread could start.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    answer.add_done_callback(lambda late: late.cancelled() or late.exception())  # there may be no caller

    def call() -> None:
        try:
            end = partial(answer.set_result, work())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            end = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(end)

    try:
        threading.Thread(target=call, name=name, daemon=True).start()
    except RuntimeError as error:
        raise busy(key, f"cannot be read: {error}") from None
    return answer


class FileSystemPool:
    """Calls blocking functions in threads: one at a time for each model, and at most `max_threads`.

    A call on a dead network mount never returns, and its thread cannot be stopped. So the call keeps one
    thread and the turn of its model; its caller gets `repository_busy` after a limit, and later callers at
    once, until the call returns. The threads are daemons, so that no stop of the process waits for them.

    Args:
        max_threads: calls at once; hanging calls count until they return.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._free = asyncio.Semaphore(max_threads)
        self._turns = WeakValueDictionary[str, asyncio.Lock]()
        self._late = set[str]()

    async def run(self, key: str, work: Callable[[], T], limit_s: float) -> T:
        """Return a function's result; if the caller is cancelled or late, the thread goes on without effect.

        Args:
            key: the model; calls of the same key run one after the other.
            work: called in a thread.
            limit_s: how long to wait for the turn and the end of the call.

        Raises:
            RepositoryBusy: `repository_busy`, the call did not begin or end in time.
        """
        if key in self._late:
            raise busy(key, "has not answered an earlier call yet")
        turn = self._turns.setdefault(key, asyncio.Lock())
        try:
            async with timeout(limit_s):
                await turn.acquire()
                try:
                    await self._free.acquire()
                except BaseException:
                    turn.release()
                    self._late.discard(key)
                    raise
                return await asyncio.shield(self._start(key, turn, work))
        except TimeoutExpired:
            if turn.locked():
                self._late.add(key)
            raise busy(key, f"did not answer within {limit_s:g} s") from None

    def _start(self, key: str, turn: asyncio.Lock, work: Callable[[], T]) -> asyncio.Future[T]:
        def release() -> None:
            turn.release()
            self._free.release()
            self._late.discard(key)

        try:
            call = start_call(key, work)
        except RepositoryBusy:
            release()
            raise
        call.add_done_callback(lambda _: release())
        return call


def busy(key: str, reason: str) -> RepositoryBusy:
    """Return the error of a model's folder; the message is the folder's name and the reason."""
    return RepositoryBusy(f"the repository's folder of {key!r} {reason}; is its file system reachable?")


UNKNOWN = frozenset({errno.EMFILE, errno.ENFILE, errno.EIO})
"""Numbers of errors that do not tell a folder's content: a model that cannot be read may be there."""
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_NOT_THERE = _GONE | {errno.ELOOP, errno.ENAMETOOLONG}
"""Numbers of errors of a path that leads nowhere, for any caller at any time."""
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,18}")
MAX_VERSION = 2**63 - 1
"""The largest signed 64-bit integer, as Triton has it: some number their versions by the time."""
MAX_FILES = 10_000
"""Files of one version. The largest known models have hundreds; each becomes part of an event."""
HUB_FOLDER = "onnx"
"""Where repositories of Hugging Face have their ONNX files."""
MAX_NAMED = 4
"""Of several files, the number that a message names."""
IS_REMOVED = (
    "was removed, and its folder has files all the same, which are not served until it is added again: give"
    " the folder another number, or delete it with `loadledger rm` and add the version with `loadledger add`"
)
"""Of a version whose files somebody put back by hand."""
TICK_S = 0.012
"""At least the clock step of a file system's times: a file that is written to within this time after its
status was read can have the same times."""
MAX_PATHS_BYTES = 2**20
"""Bytes of the paths of all files of one version: 100 for each of `MAX_FILES`. Escaped twice, a path takes up
to seven times as much in a line of an export, whose reader accepts up to 16 MiB."""


class FoundFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a file in the repository, which changes with its content and when it is replaced.

    `path` is relative to the version's folder, with slashes. The store records it as JSON.
    """

    path: Name
    dev: FileNumber
    inode: FileNumber
    bytes: Count
    mtime_ns: Time
    ctime_ns: Time


SizedFile = FoundFile | LoadedFile
"""A file of a version as it is now, or as it was loaded: path, size and time are known of both."""


def companion_of(folder: Path) -> Path:
    """Return the path of a version's companion: the signature beside its folder, there or not."""
    return folder.with_name(f"{folder.name}{SIGNATURE_SUFFIX}")


def _title(model_id: str, name: str) -> str:
    return f"version {name} of model {model_id!r} "


def check_model_id(model_id: str) -> str:
    """Return a model id if it is valid, without I/O.

    Raises:
        InvalidModelId: `invalid_model_id`, anything but `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise InvalidModelId
    return model_id


class FoundVersions(NamedTuple):
    """The versions of a model in the repository.

    Attributes:
        served: the complete versions, lowest first.
        refusal: why the folder with the highest number is not served; None if it is, or without folders.
    """

    served: list[int]
    refusal: RuntimeProblem | None


def refuse_unserved(model_id: str, refusal: RuntimeProblem | None) -> RuntimeProblem:
    """Return the error of a model without a version to serve; `refusal` is that of its highest folder."""
    if isinstance(refusal, RepositoryUnreadable):
        return refusal
    return UnknownModel(model_id, None if refusal is None else str(refusal))


class Repository:
    """The models beneath one folder.

    Its methods block, for ever if a file system hangs: coroutines call them through `file_system`.

    Args:
        root: the folder, or a link to it; it may be empty, or be created later.
        is_removed: whether the ledger has a version as removed, so that it no longer exists.

    Attributes:
        root: its path, which may be a link.
        file_system: runs calls about one model in a thread.
    """

    def __init__(self, root: Path, is_removed: Callable[[str, int], bool] = lambda _, __: False) -> None:
        self.root = root.absolute()
        self.file_system = FileSystemPool()
        self.is_removed = is_removed
        for path in (self.root, self.find_root()):
            str(path).encode()  # ONNX Runtime opens paths as UTF-8: fail now, not at the first load

    def find_root(self) -> Path:
        """Return the root's present folder, without links."""
        return Path(os.path.realpath(self.root))

    def folders(self) -> list[str]:
        """Return the names that can be models, sorted, without reading the folders.

        Raises:
            RepositoryUnreadable: `repository_unreadable`, the root is missing, or cannot be read.
        """
        return sorted(name for name in _list_root(self.find_root()) if MODEL_ID.fullmatch(name))

    def models(self) -> list[str]:
        """Return the ids of models with a complete version, sorted; for errors see `folders`."""
        found = list[str]()
        for name in self.folders():
            with suppress(RepositoryUnreadable):  # for this model: `find_unserved` reports it
                found += [name] if self.find_versions(name).served else []
        return found

    def find_versions(self, model_id: str) -> FoundVersions:
        """Return the versions of a model; none if there is no such model.

        Raises:
            InvalidModelId: `invalid_model_id`.
            RepositoryUnreadable: `repository_unreadable`, the root or the model's folder cannot be read.
            RepositoryBusy: `repository_busy`, the folders cannot be read now.
        """
        root = self.find_root()
        names = _list_model(root, check_model_id(model_id))
        refusals = {name: self._refuse(root, model_id, name) for name in names if name.isdecimal()}
        newest = max(refusals, key=lambda name: (int(name), refusals[name] is None), default="")
        served = sorted(int(name) for name, refusal in refusals.items() if refusal is None)
        return FoundVersions(served, refusals.get(newest))

    def find_served(self, model_id: str) -> FoundVersions:
        """Return the versions of a model that has a complete version.

        Raises:
            UnknownModel: `unknown_model`, there is no such folder, or no complete version in it.
            RuntimeProblem: as `find_versions`; `repository_unreadable`, the newest version cannot be read.
        """
        found = self.find_versions(model_id)
        if not found.served:
            raise refuse_unserved(model_id, found.refusal)
        return found

    def versions(self, model_id: str) -> list[int]:
        """Return the complete versions of a model, lowest first; for errors see `find_served`."""
        return self.find_served(model_id).served

    def find_version(self, model_id: str, version: int | None = None) -> int:
        """Return the number of a model's version, by default the highest.

        Raises:
            UnknownVersion: `unknown_version`, the version is missing, or is not complete.
            RuntimeProblem: as `find_served`; `repository_unreadable`, the version cannot be read.
        """
        if version is None:
            return self.versions(model_id)[-1]
        root, name = self.find_root(), str(version)
        refusal = self._refuse(root, check_model_id(model_id), name)
        if refusal is None:
            return version
        if name in _list_model(root, model_id):
            raise refusal
        self.versions(model_id)  # raises if the model is unknown
        raise UnknownVersion(model_id, version)

    def folder_of(self, model_id: str, version: int, root: Path | None = None) -> Path:
        """Return the path of a version, which need not exist; `root` is the root of one release.

        Raises:
            InvalidModelId: `invalid_model_id`.
        """
        return (root or self.root) / check_model_id(model_id) / str(version)

    def find_file(self, model_id: str, version: int) -> Path | None:
        """Return a version's model file, or None without an unambiguous one.

        Raises:
            InvalidModelId: `invalid_model_id`.
            RepositoryUnreadable: `repository_unreadable`.
            RepositoryBusy: `repository_busy`.
        """
        folder = _inner_folder(self.folder_of(model_id, version))
        try:
            name = find_model_file(_names(folder))
        except RepositoryUnreadable as unreadable:
            raise RepositoryUnreadable(f"the folder of {model_id}/{version} {unreadable}") from None
        return folder / name if name is not None and os.access(folder / name, os.R_OK) else None

    def read_beside(self, model_id: str, name: str, max_bytes: int) -> bytes:
        """Read a file beside a model's versions; a missing file is empty.

        Raises:
            InvalidModelId: `invalid_model_id`.
            LoadRefused: `unsafe_file`, the file is too long, or not a regular file within the repository.
            RepositoryUnreadable: `repository_unreadable`.
        """
        root = self.find_root()
        path = root / check_model_id(model_id)
        if not os.path.lexists(path / name):
            return b""
        with open_folder(root, path, of_version=False) as folder, folder.open_file(name) as descriptor:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise LoadRefused("unsafe_file", f"{name!r} is not a regular file")
            try:
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    content = file.read(max_bytes + 1)
            except OSError as error:
                _refuse(name, error)
        if len(content) > max_bytes:
            raise LoadRefused("unsafe_file", f"{name!r} has more than {max_bytes} bytes")
        return content

    def find_unserved(self) -> Iterator[tuple[str, str]]:
        """Yield the path of each model and version that cannot be served, and the reason."""
        root = self.find_root()
        for model_id in self.folders():
            try:
                seen = _stat(root / model_id, root)
                if isinstance(seen, str):
                    yield model_id, seen
                elif stat.S_ISDIR(seen.st_mode):
                    names = [name for name in _names(root / model_id) if name.isdecimal()]
                    refused = ((name, self._refuse(root, model_id, name)) for name in names)
                    for name, refusal in refused:
                        if refusal is not None:
                            yield f"{model_id}/{name}", str(refusal).removeprefix(_title(model_id, name))
                    if not names:
                        yield model_id, f"has no version: {_cure_model(root / model_id, model_id)}"
                elif model_id.endswith(SUFFIX):
                    target = f"{Path(model_id).stem}/1/{MODEL_FILE}"
                    yield model_id, f"is in no model's folder: move it to {target}"
            except RepositoryUnreadable as unreadable:
                yield model_id, str(unreadable)

    @contextmanager
    def open_version(
        self, model_id: str, version: int
    ) -> Iterator[tuple[VersionFolder, tuple[FoundFile, ...]]]:
        """Open the folder of a version, and return it with the identities of its files.

        Any later write to a file changes its identity.

        Raises:
            UnknownModel: `unknown_model`.
            UnknownVersion: `unknown_version`.
            LoadRefused: `unsafe_file`; `model_changed`.
            RepositoryUnreadable: `repository_unreadable`.
        """
        if self.is_removed(model_id, version):
            self.find_version(model_id, version)  # raises
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(open_folder(self.root, self.folder_of(model_id, version)))
                files = _stat_after_tick(folder)
            except LoadRefused:  # a missing version is unknown, and neither changed nor unsafe
                self.find_version(model_id, version)
                raise
            yield folder, files

    def stat_version(self, model_id: str, version: int) -> tuple[FoundFile, ...]:
        """Return the identities of a version's files now; for errors see `VersionFolder.stat_files`."""
        with open_folder(self.root, self.folder_of(model_id, version)) as folder:
            return folder.stat_files()

    def _refuse(self, root: Path, model_id: str, name: str) -> RuntimeProblem | None:
        """Return why a version is not served, as the error of a request for it, or None if it is served."""
        try:
            reason = self._refuse_version(root, model_id, name)
        except RepositoryUnreadable as unreadable:
            return RepositoryUnreadable(f"{_title(model_id, name)}{unreadable}")
        if reason is None:
            return None
        shown = reason.encode(errors="replace").decode()  # the ledger records it, and it names files
        return UnknownVersion(model_id, int(name), f"{_title(model_id, name)}{shown}")

    def _refuse_version(self, root: Path, model_id: str, name: str) -> str | None:
        """Return why a folder is no complete version, or None if it is one.

        Raises:
            RepositoryUnreadable: `repository_unreadable`, the folder cannot be read.
        """
        if not VERSION.fullmatch(name) or int(name) > MAX_VERSION:
            return f"is no version, which is a number from 1 to {MAX_VERSION} without zeros before it"
        if self.is_removed(model_id, int(name)):
            return IS_REMOVED
        folder = _inner_folder(own := root / model_id / name)
        seen, model = _stat(folder / MODEL_FILE, root), MODEL_FILE
        if isinstance(seen, str) and isinstance(where := _stat(own, root), str):
            return where
        if isinstance(seen, str) and (named := list_model_files(_names(folder))):
            model = find_model_file(named) or ""
            if not model:
                shown = ", ".join(named[:MAX_NAMED])
                return f"has several models, {shown}: rename one to {MODEL_FILE}, or give each its own folder"
            seen = _stat(folder / model, root)
        path = (folder / model).relative_to(own)
        if isinstance(seen, str):
            return f"is not complete: its {path} {seen}{_cure_layout(folder)}"
        if not _is_readable(folder / model):
            raise RepositoryUnreadable(_describe_unreadable(errno.EACCES))
        return None if stat.S_ISREG(seen.st_mode) else f"is not complete: its {path} is a folder"


class VersionFolder:
    """An open folder of the repository; `open_folder` opens and closes it.

    `top`, the root, and `beside` are open, too: the parent folder with the `companion`, which is not `..` if
    the version is a link.

    Attributes:
        root: the repository's root without links, which no file may leave.
        path: the folder's path in the root.
    """

    def __init__(self, top: int, anchor: int, beside: int, companion: str, *, root: Path, path: Path) -> None:
        self.root, self.path = root, path
        self._top, self._anchor, self._beside, self._companion = top, anchor, beside, companion

    def stat_files(self) -> tuple[FoundFile, ...]:
        """Return the identity of each file, in order of their paths, without reading the files.

        Raises:
            LoadRefused: `unsafe_file`, a path that is no regular file or leads out of the repository, or too
                many files; `model_changed`, the model file or another file is gone.
            RepositoryUnreadable: `repository_unreadable`.
        """
        found = list[FoundFile]()
        for path, seen in self._walk():
            found.append(identity_of(path, seen))
            if len(found) > MAX_FILES:
                raise LoadRefused("unsafe_file", f"the version has more than {MAX_FILES} files")
        paths_bytes = sum(len(file.path.encode()) for file in found)
        if paths_bytes > MAX_PATHS_BYTES:
            figures = f"have {paths_bytes} bytes, and may have {MAX_PATHS_BYTES} together"
            reason = f"the paths of its files {figures}; shorten the names, or use fewer files"
            raise LoadRefused("unsafe_file", reason)
        if find_model_file(file.path for file in found) is None:
            raise LoadRefused("model_changed", "its model file is no longer there, or there are several now")
        return tuple(sorted(found, key=lambda file: file.path))

    def find_hard_links(self) -> list[str]:
        """Return the paths of files that have other hard links anywhere on their file system."""
        return sorted(path for path, seen in self._walk() if seen.st_nlink > 1)

    @contextmanager
    def open_file(self, path: str, expected: FoundFile | None = None) -> Iterator[int]:
        """Open a file for reading, if it still has the expected identity.

        Raises:
            LoadRefused: `model_changed`, `unsafe_file`.
            RepositoryUnreadable: `repository_unreadable`.
        """
        found = self._open_path(path)
        try:
            if expected is not None and identity_of(path, os.fstat(found)) != expected:
                raise LoadRefused("model_changed", f"{path!r} changed before it was copied")
            # The status is the descriptor's and not the path's, so it is of the same file.
            opened = os.open(
                f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
        except OSError as error:
            _refuse(path, error)
        finally:
            os.close(found)
        try:
            yield opened
        finally:
            os.close(opened)

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield each file's path and status; a folder that several links lead to is visited once."""
        if has_companion := self._has_companion():
            seen = self._stat_path(self._companion)
            if stat.S_ISDIR(seen.st_mode):
                reason = f"{self._companion!r} beside the version is a folder: move it away"
                raise LoadRefused("unsafe_file", reason)
            yield self._companion, seen
        pending, visited = [""], set[tuple[int, int]]()
        while pending:
            within = pending.pop()
            for name in self._list(within, visited):
                path = f"{within}{name}"
                if has_companion and path == self._companion:
                    raise LoadRefused("unsafe_file", f"{path!r} is in the version and beside it: keep one")
                seen = self._stat_path(path)
                if stat.S_ISDIR(seen.st_mode):
                    pending.append(f"{path}/")
                else:
                    yield path, seen
            if len(visited) > MAX_FILES:
                raise LoadRefused("unsafe_file", f"the version has more than {MAX_FILES} folders")

    def _has_companion(self) -> bool:
        return _mode_of(self._companion, self._beside) != 0

    def _stat_path(self, path: str) -> os.stat_result:
        descriptor = self._open_path(path)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def _list(self, within: str, visited: set[tuple[int, int]]) -> list[str]:
        """Return the names in a folder, sorted; empty if the folder was visited before."""
        try:
            listed = os.open(within or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._anchor)
        except OSError as error:
            _refuse(within or "the version's folder", error)
        try:
            self._check_location(within or ".", listed)
            seen = os.fstat(listed)
            if (seen.st_dev, seen.st_ino) in visited:  # links can make a circle
                return []
            visited.add((seen.st_dev, seen.st_ino))
            return sorted(os.listdir(listed))  # noqa: PTH208 - a descriptor
        except OSError as error:
            _refuse(within or "the version's folder", error)
        finally:
            os.close(listed)

    def _open_path(self, path: str) -> int:
        """Open a file or folder without reading it, and check its type and location."""
        within = self._beside if path == self._companion and self._has_companion() else self._anchor
        try:
            path.encode()
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=within)
        except UnicodeEncodeError:
            raise LoadRefused("unsafe_file", f"{path!r} has a name that is not UTF-8") from None
        except OSError as error:
            if error.errno == errno.ENOENT and stat.S_ISLNK(_mode_of(path, within)):
                raise LoadRefused("unsafe_file", f"{path!r} is a link that leads nowhere") from None
            _refuse(path, error)
        try:
            self._check_location(path, descriptor)
            _check_kind(path, os.fstat(descriptor).st_mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_location(self, path: str, descriptor: int) -> None:
        location = _path_of(descriptor)
        # The root may have been renamed in the meantime, and every path in it.
        if not location.is_relative_to(self.root) and not location.is_relative_to(_path_of(self._top)):
            raise LoadRefused("unsafe_file", f"{path!r} leads out of the repository")


@contextmanager
def open_folder(root: Path, folder: Path, *, of_version: bool = True) -> Iterator[VersionFolder]:
    """Open the folder of a version once, to read all files through this descriptor.

    The root is opened once, too: if it is a link, all files are of the release to which the link leads now.

    Args:
        root: the repository's root, which no path may leave.
        folder: the version's folder beneath it.
        of_version: whether a folder `model.onnx` in it has the files.

    Raises:
        LoadRefused: `model_changed`, the folder is gone; `unsafe_file`, it leads out of the repository.
        RepositoryUnreadable: `repository_unreadable`.
    """
    with ExitStack() as stack:

        def enter(path: Path | str, within: int | None = None) -> int:
            opened = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=within)
            stack.callback(os.close, opened)
            return opened

        try:
            top = enter(root)
            beside = enter(folder.parent.relative_to(root), top)
            anchor = enter(folder.name, beside)
            opened_root = _path_of(top)
            path = opened_root / folder.relative_to(root)
        except OSError as error:
            _refuse("the version's folder", error)
        with suppress(OSError):  # any other type is checked as a file
            if of_version:
                anchor, path = enter(MODEL_FILE, anchor), path / MODEL_FILE
        yield VersionFolder(top, anchor, beside, companion_of(folder).name, root=opened_root, path=path)


def _inner_folder(folder: Path) -> Path:
    """Return the folder that has a version's files: within its own, if that is a folder `model.onnx`."""
    inner = folder / MODEL_FILE
    return inner if os.path.isdir(inner) else folder  # noqa: PTH112 - False for whatever cannot be seen


def _mode_of(path: str, within: int) -> int:
    """Return the mode of a path, without following a link, or 0 if nothing is there."""
    try:
        return os.stat(path, dir_fd=within, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0
    except OSError as error:
        _refuse(path, error)


def _stat_after_tick(folder: VersionFolder) -> tuple[FoundFile, ...]:
    """Return the identities at a time after which any write to a file makes a later identity."""
    files = folder.stat_files()
    latest_ns = max(file.ctime_ns for file in files)
    if 0 <= time.time_ns() - latest_ns < TICK_S * 1e9:
        time.sleep(TICK_S)
        files = folder.stat_files()
    return files


def identity_of(path: str, seen: os.stat_result) -> FoundFile:
    return FoundFile(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _check_kind(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise LoadRefused("unsafe_file", f"{path!r} is not a regular file")


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _refuse(what: str, error: OSError) -> NoReturn:
    """Raise the refusal of a file that cannot be opened: gone, a circle of links, or unreadable now."""
    if error.errno in _GONE:
        raise LoadRefused("model_changed", f"{what!r} is no longer there") from None
    if error.errno in _NOT_THERE:
        raise LoadRefused("unsafe_file", f"{what!r} cannot be looked at: {error.strerror}") from None
    raise RepositoryUnreadable(f"{what!r} {_describe_unreadable(error.errno)}") from None


def _describe_unreadable(number: int | None) -> str:
    cure = "; let the server's user read it" if number in {errno.EACCES, errno.EPERM} else ""
    return f"cannot be read: {os.strerror(number or 0)}{cure}"


def _stat(path: Path, root: Path) -> os.stat_result | str:
    """Return the status of a file or folder behind its links, or the reason not to open it.

    Raises:
        RepositoryUnreadable: `repository_unreadable`, the status cannot be read.
    """
    try:
        path.name.encode()
        seen = path.stat()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise RepositoryUnreadable(_describe_unreadable(error.errno)) from None
        return f"cannot be looked at: {error.strerror}"
    if not Path(os.path.realpath(path)).is_relative_to(root):
        return "leads out of the repository"
    usable = stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)
    return seen if usable else "is not a regular file"


def _is_readable(file: Path) -> bool:
    """Whether the server may read a file, or it is missing, as while its folder is exchanged."""
    try:  # `os.access` does not say why not
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in {errno.EACCES, errno.EPERM}
    return True


def _cure_model(folder: Path, model_id: str) -> str:
    """Return the advice that makes a model of a folder without versions."""
    if find_model_file(_names(folder / HUB_FOLDER)) is not None:
        return f"it is laid out as by Hugging Face: `loadledger add {model_id} {folder}` takes what is needed"
    file = find_model_file(_names(folder))
    return f"{f'move {file} to' if file else 'add'} {model_id}/1/{MODEL_FILE}"


def _cure_layout(folder: Path) -> str:
    """Return the advice that makes a version of a folder with a model beneath it, or an empty text."""
    for name in _names(folder):
        with suppress(RepositoryUnreadable):
            if find_model_file(_names(folder / name)) is not None:
                return f"; move what is in {name}/ to the version's folder"
    return ""


def _list_root(root: Path) -> list[str]:
    """Return the names in the root, which must exist.

    Raises:
        RepositoryUnreadable: `repository_unreadable`.
    """
    try:
        return _names(root, may_be_missing=False)
    except RepositoryUnreadable as unreadable:
        raise RepositoryUnreadable(f"the repository's folder {unreadable}") from None


def _list_model(root: Path, model_id: str) -> list[str]:
    """Return the names in a model's folder; empty if the repository has no such model.

    Raises:
        RepositoryUnreadable: `repository_unreadable`.
    """
    try:
        names = _names(root / model_id)
    except RepositoryUnreadable as unreadable:
        _list_root(root)  # raises if the whole root is unreadable
        raise RepositoryUnreadable(f"the folder of model {model_id!r} {unreadable}") from None
    if not names and not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
        _list_root(root)
    return names


def _names(folder: Path, *, may_be_missing: bool = True) -> list[str]:
    """Return the names in a folder, sorted; empty if it is missing, or is no folder.

    Raises:
        RepositoryUnreadable: `repository_unreadable`, with only the reason.
        RepositoryBusy: `repository_busy`, the folder cannot be read now.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(error.strerror) from None
        if error.errno in UNKNOWN:
            raise busy(folder.name, f"cannot be listed: {error.strerror}") from None
        if may_be_missing and error.errno in _NOT_THERE:
            return []
        raise RepositoryUnreadable(_describe_unreadable(error.errno)) from None


DEFAULTS_FILE = "loadledger.toml"
MAX_DEFAULTS_BYTES = 64 * 1024
"""A file with every key has a few hundred bytes; this leaves room for comments and warm-up inputs."""
MAX_DOTS = 1000
"""Dots outside of numbers. tomllib takes quadratic time for a key of many parts: a minute for 64 KiB, in
which its thread competes with the event loop. A key of this many parts takes a tenth of a second."""
_NUMBER = re.compile(r"[-+\s,\[=][0-9][0-9_]*\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?(?=\s*[,\]}#\n])")
"""A number with a fraction, in a list or at the end of a line, where no part of a key can be."""
WARM_UP = "warm_up"
"""The only key that is no parameter of a load."""
NO_TEXT = frozenset({"FP16", "BF16"})
"""Datatypes that JSON cannot represent."""


class InvalidDefaults(RuntimeProblem):
    """The model's loadledger.toml is invalid."""

    code = "invalid_defaults"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The warm-up of a model: the inference that runs before the model is loaded.

    Attributes:
        enabled: whether it runs; None uses the server's setting.
        inputs: its inputs as JSON text; empty means zeros.
        required: whether the load fails if it does.
    """

    enabled: bool | None = None
    inputs: tuple[Tensor, ...] = ()
    required: bool = True


NO_WARM_UP = WarmUp(enabled=False, required=False)
"""The warm-up of a reload whose model has no valid file, or none that can be read now."""


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    datatype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data: list[Any]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool | msgspec.UnsetType = msgspec.UNSET
    inputs: tuple[_Input, ...] = ()


def defaults_name(model_id: str) -> str:
    return f"{model_id}/{DEFAULTS_FILE}"


def read_defaults(repository: Repository, model_id: str) -> dict[str, Any]:
    """Return the default parameters of a model, unchecked; empty without a file.

    The warm-up is checked and left out.

    Raises:
        InvalidDefaults: `invalid_defaults`, the file cannot be read, is too large, is no TOML, or its warm-up
            is invalid.
    """
    values, _ = _read(repository, model_id)
    return values


def read_warm_up(repository: Repository, model_id: str) -> WarmUp:
    """Return the warm-up of a model.

    Raises:
        InvalidDefaults: `invalid_defaults`, as `read_defaults`.
    """
    _, warm_up = _read(repository, model_id)
    return warm_up


def read_reload_warm_up(repository: Repository, model_id: str) -> WarmUp:
    """Return the warm-up of a reload, which must not fail for a mistake made in the file since the load."""
    try:
        return replace(read_warm_up(repository, model_id), required=False)
    except RuntimeProblem:
        return NO_WARM_UP


def _read(repository: Repository, model_id: str) -> tuple[dict[str, Any], WarmUp]:
    name = defaults_name(model_id)
    try:
        content = repository.read_beside(model_id, DEFAULTS_FILE, MAX_DEFAULTS_BYTES)
        values = _parse(content.decode("utf-8-sig"))  # Windows editors write a byte order mark
        return values, _warm_up(name, values.pop(WARM_UP, {}))
    except (LoadRefused, RepositoryUnreadable) as error:
        reason = str(error).removeprefix(f"{DEFAULTS_FILE!r} ")
        raise InvalidDefaults(f"{name} {reason}; replace it, or take it away") from None
    except UnicodeDecodeError:
        raise InvalidDefaults(f"{name} is not UTF-8, which TOML has to be") from None
    except ValueError as error:  # the parser's, or Python's for a number of thousands of digits
        raise InvalidDefaults(f"{name} is no TOML: {error}") from None
    except RecursionError:
        raise InvalidDefaults(f"{name} is nested too deeply; it takes keys with plain values") from None


def _parse(text: str) -> dict[str, Any]:
    if text.count(".") - len(_NUMBER.findall(text)) > MAX_DOTS:
        raise ValueError(f"it has more than {MAX_DOTS} dots, beside those of numbers")
    return tomllib.loads(text)


def _warm_up(file: str, table: object) -> WarmUp:
    """Check the table `warm_up`, as far as this is possible without the model."""
    try:
        read = msgspec.convert(table, _Table)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise InvalidDefaults(f"{file}: {WARM_UP}{place.rstrip('`')}: {reason}") from None
    enabled = None if read.enabled is msgspec.UNSET else read.enabled
    inputs = [_tensor(f"{file}: {WARM_UP}.inputs[{n}]", given) for n, given in enumerate(read.inputs)]
    return WarmUp(enabled, tuple(inputs))


def _tensor(where: str, given: _Input) -> Tensor:
    if given.datatype not in DATATYPES:
        known = ", ".join(sorted(DATATYPES.keys() - NO_TEXT))
        raise InvalidDefaults(f"{where}.datatype: {given.datatype[:64]!r} is no datatype; known: {known}")
    if given.datatype in NO_TEXT:
        reason = "has no form as text, so it cannot be given here"
        raise InvalidDefaults(f"{where}.datatype: {given.datatype} {reason}")
    _check_elements(f"{where}.data", given.data)
    try:
        text = json.dumps(given.data, ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError:  # Python's, for a number of thousands of digits
        raise InvalidDefaults(f"{where}.data: has a number that no datatype can hold") from None
    return Tensor(given.name, given.datatype, given.shape, text, text=True)


def _check_elements(where: str, values: list[Any]) -> None:
    for each in values:
        if isinstance(each, list):
            _check_elements(where, each)
        elif not isinstance(each, bool | int | float | str):
            raise InvalidDefaults(f"{where}: takes numbers, booleans, strings and lists of them")
        elif isinstance(each, float) and not math.isfinite(each):
            raise InvalidDefaults(f"{where}: takes no infinity and no NaN")
