"""The repository's files of one version, read through one descriptor of its folder.

A path may lead elsewhere by the time it is opened, so a file is opened first (`O_PATH`, which reads nothing
and waits for no FIFO), and then the open descriptor is asked what and where it is. A folder that is exchanged
meanwhile does no harm: the descriptor stays with the one that was opened.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from runtime.errors import LoadRefused, UnknownVersion
from runtime.onnxfile import find_model_file
from runtime.repository import MAX_FILES, MAX_PATHS_BYTES, FoundFile, Repository
from runtime.store.problems import RepositoryUnreadable

TICK_S = 0.012
"""At least the clock of a file system's times: a file that is written to within it after a look at it can
have the same times."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})


class SourceFolder:
    """The open folder of one version; `open_sources` opens and closes it."""

    def __init__(self, anchor: int, root: str) -> None:
        self._anchor = anchor
        self._root = root

    def stat_files(self) -> tuple[FoundFile, ...]:
        """Return the identity of each file, in order of their paths, without reading any.

        Raises:
            LoadRefused: `unsafe_file`, something that is no regular file or leads out of the repository, or
                too many files; `model_changed`, when the model file or another file is gone.
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

    @contextmanager
    def open_file(self, file: FoundFile) -> Iterator[int]:
        """Open a file for reading if it is still the one that was looked at.

        Raises:
            LoadRefused: `model_changed`, `unsafe_file`.
            RepositoryUnreadable: `repository_unreadable`.
        """
        place = self._open_path(file.path)
        try:
            if identity_of(file.path, os.fstat(place)) != file:
                raise LoadRefused("model_changed", f"{file.path!r} changed before it was copied")
            # Of the descriptor and not of the path again, so that it is the same file.
            opened = os.open(
                f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
        except OSError as error:
            _refuse(file.path, error)
        finally:
            os.close(place)
        try:
            yield opened
        finally:
            os.close(opened)

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield each file's path and status; a folder that several links lead to is visited once."""
        pending, visited = [""], set[tuple[int, int]]()
        while pending:
            within = pending.pop()
            for name in self._list(within, visited):
                path = f"{within}{name}"
                descriptor = self._open_path(path)
                try:
                    seen = os.fstat(descriptor)
                finally:
                    os.close(descriptor)
                if stat.S_ISDIR(seen.st_mode):
                    pending.append(f"{path}/")
                else:
                    yield path, seen
            if len(visited) > MAX_FILES:
                raise LoadRefused("unsafe_file", f"the version has more than {MAX_FILES} folders")

    def _list(self, within: str, visited: set[tuple[int, int]]) -> list[str]:
        """Return the names in a folder, sorted; none if it was visited before."""
        try:
            listed = os.open(within or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._anchor)
        except OSError as error:
            _refuse(within or "the version's folder", error)
        try:
            self._check_place(within or ".", listed)
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
        """Open a file or folder without reading it, and check what it is and where it lies."""
        try:
            path.encode()
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=self._anchor)
        except UnicodeEncodeError:
            raise LoadRefused("unsafe_file", f"{path!r} has a name that is not UTF-8") from None
        except OSError as error:
            if error.errno == errno.ENOENT and self._is_link(path):
                raise LoadRefused("unsafe_file", f"{path!r} is a link that leads nowhere") from None
            _refuse(path, error)
        try:
            self._check_place(path, descriptor)
            _check_kind(path, os.fstat(descriptor).st_mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _is_link(self, path: str) -> bool:
        try:
            return stat.S_ISLNK(os.stat(path, dir_fd=self._anchor, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def _check_place(self, path: str, descriptor: int) -> None:
        place = _place_of(descriptor)
        if place != self._root and not place.startswith(self._root.rstrip("/") + "/"):
            raise LoadRefused("unsafe_file", f"{path!r} leads out of the repository")


@contextmanager
def open_sources(root: Path, folder: Path) -> Iterator[SourceFolder]:
    """Open the folder of a version once; everything of it is then read through this descriptor.

    Args:
        root: the repository's root, which nothing may leave.
        folder: the version's folder beneath it.

    Raises:
        LoadRefused: `model_changed`, the folder is gone; `unsafe_file`, it leads out of the repository.
        RepositoryUnreadable: `repository_unreadable`.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        top = os.open(root, flags)
        try:
            place = _place_of(top)
        finally:
            os.close(top)
        anchor = os.open(folder, flags)
    except OSError as error:
        _refuse("the version's folder", error)
    try:
        yield SourceFolder(anchor, place)
    finally:
        os.close(anchor)


@contextmanager
def open_version(
    repository: Repository, model_id: str, version: int
) -> Iterator[tuple[SourceFolder, tuple[FoundFile, ...]]]:
    """Open the folder of a version, and look at its files.

    Raises:
        UnknownModel: `unknown_model`.
        UnknownVersion: `unknown_version`.
        LoadRefused: `unsafe_file`; `model_changed`.
        RepositoryUnreadable: `repository_unreadable`.
    """
    if repository.is_removed(model_id, version):
        raise UnknownVersion(model_id, version)
    with ExitStack() as stack:
        try:
            sources = stack.enter_context(
                open_sources(repository.root, repository.folder_of(model_id, version))
            )
            files = _look_after_tick(sources)
        except LoadRefused:  # what is not there is unknown, and neither changed nor unsafe
            repository.resolve(model_id, version)
            raise
        yield sources, files


def _look_after_tick(sources: SourceFolder) -> tuple[FoundFile, ...]:
    """Look at the files when whatever is written to them from now on has a later time."""
    files = sources.stat_files()
    latest_ns = max(file.ctime_ns for file in files)
    if 0 <= time.time_ns() - latest_ns < TICK_S * 1e9:
        time.sleep(TICK_S)
        files = sources.stat_files()
    return files


def refuse_changed(before: Iterable[FoundFile], now: Iterable[FoundFile]) -> None:
    """Refuse what may be of two versions: a file was replaced or written to while others were copied.

    Links and access rights may change meanwhile, and so the ctime.

    Raises:
        LoadRefused: `model_changed`.
    """
    if [_content_identity(file) for file in before] != [_content_identity(file) for file in now]:
        raise LoadRefused(
            "model_changed",
            "the model's files changed while they were copied: load it again when they are complete",
        )


def _content_identity(file: FoundFile) -> tuple[str, int, int, int, int]:
    return file.path, file.dev, file.inode, file.bytes, file.mtime_ns


def identity_of(path: str, seen: os.stat_result) -> FoundFile:
    return FoundFile(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _check_kind(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise LoadRefused("unsafe_file", f"{path!r} is not a regular file")


def _place_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _refuse(what: str, error: OSError) -> NoReturn:
    """Raise the refusal of a file that cannot be opened: gone, a circle of links, or not readable now."""
    if error.errno in _GONE:
        raise LoadRefused("model_changed", f"{what!r} is no longer there") from None
    if error.errno in {errno.ELOOP, errno.ENAMETOOLONG}:
        raise LoadRefused("unsafe_file", f"{what!r} cannot be looked at: {error.strerror}") from None
    raise RepositoryUnreadable(f"{what!r} cannot be read: {error.strerror}") from None
