"""The versions of models: a load holds the files of a version, from the store or else from the repository.

`Versions.version` finds stored files, or takes a private copy; the hashes are known if the repository still
has the stored files, or if the load must have certain bytes. Else `HeldVersion.hash` computes the hashes
while the session is created, and `settle` keeps the copy under its name. Without a store, workers load from
the repository itself.

Blocking calls run in daemon threads, so that a file system that hangs delays only its model. A thread cannot
be stopped: between two pieces it sees that its caller has left, and then gives its files back.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from events.jobs import BYTES_GONE
from events.types import Contents, LoadedFile, contents_of, digest_of
from runtime.errors import (
    CopyCancelled,
    LoadRefused,
    RepositoryUnreadable,
    RuntimeProblem,
    UnknownModel,
    UnknownVersion,
)
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import (
    FOREIGN_HEAD_BYTES,
    FileWindows,
    ModelTensors,
    describe_foreign_content,
    find_model_file,
    read_tensors,
)
from runtime.repository import (
    LOAD_LIMIT_S,
    FoundFile,
    Repository,
    SizedFile,
    VersionFolder,
    busy,
    open_folder,
    start_call,
)
from runtime.store.folder import (
    OnPiece,
    StoredFile,
    explain_os_errors,
    hash_descriptor,
    hash_file,
    on_no_piece,
)
from runtime.store.store import Source, Store
from runtime.timeouts import TimeoutExpired, timeout

T = TypeVar("T")

THREAD = "files of a model"
MAX_KEPT_TENSORS = 256
"""Kept inputs and outputs of files; each has at most 64 KiB."""
GIVE_BACK_RETRY_S = 1.0
"""Pause before files are given back again, after no thread could start."""


class Versions:
    """The versions of a repository, and what the store has of them.

    Methods that are not coroutines block.

    Args:
        repository: the source of versions.
        store: workers load from it; without a store the repository must not change.

    Attributes:
        changed: the versions of which the repository had other files when they were compared last, with the
            digest of the bytes that were loaded.
    """

    def __init__(self, repository: Repository, store: Store | None) -> None:
        self.repository = repository
        self.store = store
        self.changed = dict[tuple[str, int], str]()
        self._sources = dict[tuple[str, int], Source]()
        self._tensors = dict[FoundFile, ModelTensors | str]()

    @property
    def folders(self) -> set[str]:
        """The server's folders that messages about a model may name."""
        roots = {str(self.repository.root), str(self.repository.find_root())}
        return roots | ({str(self.store.path)} if self.store is not None else set())

    def read_tensors(self, model_id: str, version: int | None) -> tuple[int, ModelTensors]:
        """Return a version, by default the highest, and the inputs and outputs that its file declares.

        Raises:
            LoadRefused: `invalid_model`, the file declares no readable ones; `unsafe_file`, `model_changed`.
            RuntimeProblem: `unknown_model`, `unknown_version`, `repository_unreadable`.
        """
        chosen = self.repository.versions(model_id)[-1] if version is None else version
        with self.repository.open_version(model_id, chosen) as (folder, found):
            file = _choose_model_file(found)
            known = self._tensors.get(file)
            if known is None:
                with folder.open_file(file.path, file) as descriptor:
                    known = _read_tensors(descriptor, file)
                if len(self._tensors) >= MAX_KEPT_TENSORS:
                    self._tensors.clear()
                self._tensors[file] = known
        if isinstance(known, str):
            raise LoadRefused("invalid_model", known)
        return chosen, known

    def known_contents(self, model_id: str, version: int) -> Contents | None:
        """Return the contents of a version if the repository still has the files that were loaded from it.

        Raises:
            LoadRefused: `unsafe_file`, `model_changed`.
            RepositoryUnreadable: `repository_unreadable`.
        """
        source = self.read_source(model_id, version)
        if source is None or source.files != self.repository.stat_version(model_id, version):
            return None
        return source.contents

    def has_changed(self, model_id: str, version: int, loaded: Iterable[LoadedFile]) -> bool:
        """Whether the repository's files differ from those that were loaded, judged by their identities.

        Without a source record they differ if their paths or lengths do. A version that cannot be read counts
        as unchanged.
        """
        loaded = tuple(loaded)
        contents, has_changed = contents_of(loaded), False
        with suppress(LoadRefused, RepositoryUnreadable):
            if self.read_source(model_id, version) is not None:
                has_changed = self.known_contents(model_id, version) != contents
            else:
                present = self.repository.stat_version(model_id, version)
                has_changed = {(each.path, each.bytes) for each in present} != {
                    (each.path, each.bytes) for each in loaded
                }
        if has_changed:
            self.changed[model_id, version] = digest_of(contents)
        else:
            self.changed.pop((model_id, version), None)
        return has_changed

    def read_source(self, model_id: str, version: int) -> Source | None:
        """Return the bytes and files that a version had when it was loaded last."""
        if self.store is None:
            return self._sources.get((model_id, version))
        return self.store.read_source(model_id, version)

    def record_source(self, model_id: str, version: int, source: Source) -> None:
        """Record the bytes of a version, so that later loads and requests know them by the files."""
        if self.store is None:
            self._sources[model_id, version] = source
        else:
            self.store.record_source(model_id, version, source)

    def look_at(self, model_id: str, version: int) -> tuple[tuple[FoundFile, ...], Contents | None]:
        """Return the files of a version in the repository, and their contents if these are known.

        For errors see `Repository.open_version`.
        """
        with self.repository.open_version(model_id, version) as (_, found):
            source = self.read_source(model_id, version)
            return found, source.contents if source is not None and source.files == found else None

    async def stat(self, model_id: str, version: int) -> tuple[FoundFile, ...]:
        """Return the identities of a version's files; for errors see `Repository.open_version`.

        Raises:
            LoadRefused: `invalid_model`, the model's file has another format, or is not complete.
            RepositoryBusy: `repository_busy`, the identities are not known within `LOAD_LIMIT_S`.
        """

        def find_files() -> tuple[FoundFile, ...]:
            with self.repository.open_version(model_id, version) as (folder, found):
                file = _choose_model_file(found)
                with folder.open_file(file.path, file) as descriptor:
                    foreign = describe_foreign_content(_read_head(descriptor), file.bytes)
                if foreign is not None:  # a worker would refuse it, but only once there is room for one
                    raise LoadRefused("invalid_model", f"{file.path} {foreign}")
                return found

        return await self.repository.file_system.run(model_id, find_files, LOAD_LIMIT_S)

    async def has_bytes_of(self, model_id: str, version: int, loaded: Sequence[LoadedFile]) -> bool:
        """Whether the repository's files have the bytes that were loaded; False if unknown for now.

        Unknown files are hashed where they lie, without a copy. Equal files are recorded as known.
        """
        held = HeldVersion(self, model_id, version)
        try:
            return await held.has_bytes_of(loaded)
        except RuntimeProblem:
            return False
        finally:
            held.leave()

    @asynccontextmanager
    async def version(
        self,
        model_id: str,
        version: int,
        expected: Sequence[LoadedFile] | None = None,
        on_piece: OnPiece = on_no_piece,
        *,
        may_copy: bool = True,
    ) -> AsyncIterator[HeldVersion]:
        """Hold the files of a version: those of the repository, or those of a load before.

        The files are given back at the end of the context, without waiting for a thread.

        Args:
            model_id: the model.
            version: its version.
            expected: the files that the version must have, as the ledger has them: from the store, whatever
                the repository has, or else from the repository; None takes the present files.
            on_piece: called after each piece of a file that was copied or hashed, in any thread.
            may_copy: whether `expected` files that are no longer in the store may be copied again.

        Raises:
            RepositoryBusy: `repository_busy`, nothing of the files could be read for `LOAD_LIMIT_S`.
            RuntimeProblem: `bytes_gone`, `expected` are nowhere.
            RuntimeProblem: `unknown_model`, `unknown_version`, or an error of the copy: see `Store.take`.
        """
        held = HeldVersion(self, model_id, version, on_piece)
        try:
            await held.obtain(expected, may_copy=may_copy)
            yield held
        finally:
            held.leave()


class HeldVersion:
    """The files of a version, which nobody else changes until the end of `Versions.version`.

    They are found in the repository, taken into a private copy, and settled in the store, or found there.

    Attributes:
        root: the folder that no file may leave.
        folder: the folder that workers load from; it changes when a private copy is settled.
        files: as the repository has them, or had them when they were loaded, in order of their paths.
        sha256s: their hashes, in the same order; None until they are known.
        digest: the digest of the held version of the store, or None.
        copying_us: the duration of the copy into the store; None if the files were there.
        hashing_us: the duration of hashing; 0 if the hashes were known.
    """

    def __init__(
        self, versions: Versions, model_id: str, version: int, on_piece: OnPiece = on_no_piece
    ) -> None:
        self.model_id, self.version = model_id, version
        self._versions, self._repository, self._store = versions, versions.repository, versions.store
        self._on_piece = on_piece
        self.root, self.folder = self._repository.root, self._repository.folder_of(model_id, version)
        self.files: tuple[SizedFile, ...] = ()
        self.sha256s: tuple[str, ...] | None = None
        self.digest: str | None = None
        self.copying_us: int | None = None
        self.hashing_us = 0
        self._found: tuple[FoundFile, ...] = ()
        self._hashed: tuple[StoredFile, ...] = ()
        self._copy: Path | None = None
        self._running: asyncio.Future[Any] | None = None
        self._pieces = 0
        self._has_left = False

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def is_stored(self) -> bool:
        """Whether workers load from the store."""
        return self._store is not None

    @property
    def loaded_files(self) -> tuple[LoadedFile, ...]:
        """The files as the ledger records them.

        Raises:
            RuntimeError: the files have not been hashed.
        """
        if self.sha256s is None:
            raise RuntimeError(f"the files in {self.folder} have not been hashed")
        return tuple(
            LoadedFile(file.path, file.bytes, file.mtime_ns, sha256)
            for file, sha256 in zip(self.files, self.sha256s, strict=True)
        )

    @property
    def contents(self) -> Contents | None:
        """The path and hash of each file; None until the hashes are known."""
        return None if self.sha256s is None else contents_of(self.loaded_files)

    async def obtain(self, expected: Sequence[LoadedFile] | None, *, may_copy: bool = True) -> None:
        """Find or take the files, once; for arguments and errors see `Versions.version`."""
        if expected is not None:  # the repository may not exist any more
            await self._run(partial(self._find, contents_of(expected), expected))
        if not self.files:
            if self._store is not None and not may_copy:
                raise self._gone("they are not copied for this")
            await self._read_repository(partial(self._take, is_reload=expected is not None))
        if expected is not None and await self.hash() != contents_of(expected):
            raise self._gone(_describe_difference(self.loaded_files, expected))

    async def has_bytes_of(self, loaded: Sequence[LoadedFile]) -> bool:
        """Whether the repository has the bytes that were loaded; for errors see `Versions.version`."""
        return await self._read_repository(partial(self._compare, loaded))

    async def hash(self) -> Contents:
        """Hash the files, unless their hashes are known.

        Raises:
            LoadRefused: `model_changed`, files of the repository itself changed meanwhile.
            RuntimeProblem: `store_unavailable`, `repository_unreadable`, `repository_busy`.
        """
        if self.sha256s is None:
            await self._run(self._hash)
        return contents_of(self.loaded_files)

    async def settle(self) -> None:
        """Keep hashed files for later loads: a private copy gets its name in the store.

        Raises:
            RuntimeProblem: `store_unavailable`, `repository_busy`.
        """
        if self.digest is None:
            await self._run(self._settle)

    async def make_durable(self) -> None:
        """Sync settled files to the disk.

        Raises:
            RuntimeProblem: `store_unavailable`, `repository_busy`; the next start does not find them.
        """
        if self._store is not None and self.digest is not None:
            await self._run(partial(self._store.make_durable, self.digest))

    def leave(self) -> None:
        """Give the files back once no thread works on them, and remove a copy that is not settled."""
        self._has_left = True
        if self._running is None or self._running.done():
            self._release()
        else:
            self._running.add_done_callback(lambda _: self._release())

    async def _run(self, work: Callable[[], T]) -> T:
        self._running = running = start_call(self.model_id, work, name=THREAD)
        return await asyncio.shield(running)

    async def _read_repository(self, work: Callable[[], T]) -> T:
        """Return the result of work that reads files of the repository in a thread.

        The version's folder is listed first, in the pool, so that a file system that hangs takes one thread.

        Raises:
            RepositoryBusy: `repository_busy`, no progress for `LOAD_LIMIT_S`.
        """
        find_file = partial(self._repository.find_file, self.model_id, self.version)
        await self._repository.file_system.run(self.model_id, find_file, LOAD_LIMIT_S)
        try:
            async with timeout(LOAD_LIMIT_S, lambda: self._pieces):
                return await self._run(work)
        except TimeoutExpired:
            raise busy(self.model_id, f"has given nothing to copy for {LOAD_LIMIT_S:g} s") from None

    def _end_piece(self) -> None:
        """Count a piece of a file, and end the thread's work if nobody waits for the files any more."""
        if self._has_left:
            raise CopyCancelled
        self._pieces += 1
        self._on_piece()

    def _find(self, contents: Contents, files: Sequence[SizedFile]) -> bool:
        """Hold stored files, with their times in the repository; returns False if the store has none."""
        digest = digest_of(contents)
        if self._store is None or self._store.find(digest, self._end_piece) is None:
            return False
        self.digest, self.sha256s = digest, tuple(sha256 for _, sha256 in contents)
        self.root = self.folder = self._store.folder_of(digest)
        self.files = tuple(sorted(files, key=lambda file: file.path))
        return True

    def _take(self, *, is_reload: bool) -> None:
        """Find or take the files of the repository; a reload cannot go on without them."""
        try:
            with self._repository.open_version(self.model_id, self.version) as (folder, found):
                self._take_from(folder, found)
        except (UnknownModel, UnknownVersion):
            if not is_reload:
                raise
            _check_mounted(self._repository.root)
            raise self._gone("the repository has no such version any more") from None
        except LoadRefused as refused:
            if not is_reload or refused.code != "unsafe_file":
                raise
            raise self._gone(f"of what the repository has, {refused}") from None

    def _take_from(self, folder: VersionFolder, found: tuple[FoundFile, ...]) -> None:
        source = self._versions.read_source(self.model_id, self.version)
        known = source.contents if source is not None and source.files == found else None
        if known is not None and self._find(known, found):
            return
        if self._store is not None:
            began_ns = time.monotonic_ns()
            self.root = self.folder = self._copy = self._store.take(folder, found, self._end_piece)
            self.copying_us = (time.monotonic_ns() - began_ns) // 1000
        else:
            self.root, self.folder = folder.root, folder.path
            self.sha256s = None if known is None else tuple(sha256 for _, sha256 in known)
        self.files = self._found = found

    def _compare(self, loaded: Sequence[LoadedFile]) -> bool:
        contents = contents_of(loaded)
        with self._repository.open_version(self.model_id, self.version) as (folder, found):
            source = self._versions.read_source(self.model_id, self.version)
            if source is not None and source.files == found:
                return source.contents == contents
            if [(file.path, file.bytes) for file in found] != [(file.path, file.bytes) for file in loaded]:
                return False
            for file, (_, sha256) in zip(found, contents, strict=True):
                if _hash_source(folder, file, self._end_piece) != sha256:
                    return False
            _refuse_changed(folder, found)
        self._versions.record_source(self.model_id, self.version, Source(contents, found))
        return True

    def _hash(self) -> None:
        began_ns = time.monotonic_ns()
        if self._store is not None:
            with explain_os_errors(self._store.path):
                hashed = (hash_file(self.folder, file.path, self._end_piece) for file in self.files)
                self._hashed = tuple(hashed)
            self.sha256s = tuple(file.sha256 for file in self._hashed)
        else:
            version = self._repository.folder_of(self.model_id, self.version, self.root)
            with open_folder(self.root, version) as folder:
                sha256s = tuple(_hash_source(folder, file, self._end_piece) for file in self._found)
                _refuse_changed(folder, self._found)
            self.sha256s = sha256s
        self.hashing_us = (time.monotonic_ns() - began_ns) // 1000

    def _settle(self) -> None:
        if self._store is not None and self._copy is not None:
            self.digest = self._store.settle(self._copy, self._hashed).digest
            self.root = self.folder = self._store.folder_of(self.digest)
        source = Source(contents_of(self.loaded_files), self._found)
        self._versions.record_source(self.model_id, self.version, source)

    def _release(self) -> None:
        if self._store is not None and self.digest is not None:
            give_back = partial(self._store.release, self.digest)
        elif self._store is not None and self._copy is not None:
            give_back = partial(self._store.discard, self._copy)
        else:
            return
        try:
            threading.Thread(target=give_back, name=THREAD).start()
        except RuntimeError:  # no new thread; a long copy would block the loop
            asyncio.get_running_loop().call_later(GIVE_BACK_RETRY_S, self._release)

    def _gone(self, reason: str) -> RuntimeProblem:
        return RuntimeProblem(
            f"version {self.version} of {self.model_id!r} served from bytes that the store does not have any"
            f" more, and {reason}: load the model again to use what the repository has now",
            code=BYTES_GONE,
        )


def _hash_source(folder: VersionFolder, file: FoundFile, on_piece: OnPiece) -> str:
    """Return the SHA-256 of a file where it lies; another file in its place is refused."""
    with folder.open_file(file.path, file) as descriptor:
        try:
            return hash_descriptor(descriptor, on_piece)
        except OSError as error:
            raise RepositoryUnreadable(f"{file.path!r} cannot be read: {error.strerror}") from None


def _refuse_changed(folder: VersionFolder, files: tuple[FoundFile, ...]) -> None:
    """Refuse files that may have been written to while they were read."""
    if folder.stat_files() != files:
        raise LoadRefused("model_changed", "the model's files changed while they were loaded")


def _read_tensors(descriptor: int, file: FoundFile) -> ModelTensors | str:
    """Return a file's inputs and outputs, or why they cannot be read."""
    try:
        return read_tensors(FileWindows(descriptor), file.bytes)
    except TooManyFields as problem:
        return f"{file.path}: {problem}"
    except Unparsable:
        foreign = describe_foreign_content(_read_head(descriptor), file.bytes)
        return f"{file.path} {foreign or 'is not an ONNX file'}"
    except OSError as error:
        raise RepositoryUnreadable(f"{file.path!r} cannot be read: {error.strerror}") from None


def _choose_model_file(found: Sequence[FoundFile]) -> FoundFile:
    """Return the model's file of an open version; one without it does not open."""
    name = find_model_file(each.path for each in found)
    return next(each for each in found if each.path == name)


def _read_head(descriptor: int) -> bytes:
    return os.pread(descriptor, FOREIGN_HEAD_BYTES, 0)


def _check_mounted(root: Path) -> None:
    """Refuse to judge by a repository that is not mounted."""
    try:
        is_empty = not list(root.iterdir())
    except OSError as error:
        raise RepositoryUnreadable(f"the repository cannot be read: {error.strerror}") from None
    if is_empty:
        raise RepositoryUnreadable("the repository is empty: is it mounted?")


def _describe_difference(present: Sequence[LoadedFile], expected: Sequence[LoadedFile]) -> str:
    now = {file.path: file.sha256 for file in present}
    for file in expected:
        if now.get(file.path) != file.sha256:
            is_now = now.get(file.path, "gone")
            return f"in the repository {file.path!r} with SHA-256 {file.sha256} is now {is_now}"
    return "the repository has more files now"
