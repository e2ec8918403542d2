"""The contents of model versions: a load takes them from the store, or else from the repository.

A load asks `obtain` for the files. Their hashes are known if the repository still has the files that were
stored, or if the load must have certain bytes; else `hash` finds them beside the creation of the session, and
`settle` keeps them. Without a store, workers load from the repository itself.

All methods block, so call them in threads.
"""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from events.jobs import BYTES_GONE
from events.types import Contents, LoadedFile, contents_of
from runtime.errors import LoadRefused, RepositoryUnreadable, RuntimeProblem, UnknownModel, UnknownVersion
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import (
    FOREIGN_HEAD_BYTES,
    FileWindows,
    ModelSignature,
    describe_foreign_content,
    find_model_file,
    read_signature,
)
from runtime.repository import FoundFile, Repository, SizedFile, open_folder
from runtime.store.copying import IsCancelled, hash_descriptor, is_never
from runtime.store.manifest import StoredFile, digest_of
from runtime.store.store import FindNeeded, Store, TakenCopy


class BytesGone(RuntimeProblem):
    """Neither the store nor the repository has the bytes from which the model served."""

    code = BYTES_GONE


@dataclass(slots=True)
class VersionFiles:
    """The files of a version for one load, to be released by `release`.

    Attributes:
        root: what no file may leave.
        folder: where workers find the files; another one once the copy is settled.
        files: as the repository has them, or had them when they were loaded, in order of their paths.
        sha256s: their hashes, in the same order; None until they are known.
        copy: the private copy that is not settled.
        hashed: its files, once they are hashed.
        digest: of the stored version that is held; None without one.
        sources: the repository's files, if workers load those.
        copying_us: how long taking them into the store took; None if they were there.
        hashing_us: how long hashing took; 0 if the hashes were known.
    """

    model_id: str
    version: int
    root: Path
    folder: Path
    files: tuple[SizedFile, ...]
    sha256s: tuple[str, ...] | None = None
    copy: TakenCopy | None = None
    hashed: tuple[StoredFile, ...] = ()
    digest: str | None = None
    sources: tuple[FoundFile, ...] = ()
    copying_us: int | None = None
    hashing_us: int = 0

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def is_stored(self) -> bool:
        return self.copy is not None or self.digest is not None

    @property
    def loaded_files(self) -> tuple[LoadedFile, ...]:
        """The files as the ledger records them.

        Raises:
            RuntimeError: they have not been hashed.
        """
        if self.sha256s is None:
            raise RuntimeError(f"the files in {self.folder} have not been hashed")
        return tuple(
            LoadedFile(file.path, file.bytes, file.mtime_ns, sha256)
            for file, sha256 in zip(self.files, self.sha256s, strict=True)
        )

    @property
    def contents(self) -> Contents | None:
        """Path and hash of each file; None until they are known."""
        return None if self.sha256s is None else contents_of(self.loaded_files)


MAX_SIGNATURES = 256
"""Kept inputs and outputs of files, the latest read; each has at most 64 KiB."""


@dataclass(slots=True)
class ModelContents:
    """The contents of model versions.

    Args:
        repository: the source of versions.
        store: what workers load from; None lets them load from the repository, which then must not change.
        find_needed: returns the digests of versions that must not be swept for another.
    """

    repository: Repository
    store: Store | None
    find_needed: FindNeeded = frozenset
    _hashed: dict[tuple[str, int], dict[FoundFile, str]] = field(default_factory=dict)
    _signatures: dict[FoundFile, ModelSignature | str] = field(default_factory=dict)

    @property
    def folders(self) -> set[str]:
        """The folders of the server that messages about a model may name."""
        return {str(self.repository.root), *((str(self.store.path),) if self.store is not None else ())}

    def obtain(
        self,
        model_id: str,
        version: int,
        expected: Sequence[LoadedFile] | None = None,
        is_cancelled: IsCancelled = is_never,
    ) -> VersionFiles:
        """Return the files of a version: those of the repository, or those of a load before.

        Args:
            model_id: the model.
            version: its version.
            expected: the files that the version must have, as the ledger has them, if `find` has not found
                them; None takes the present ones.
            is_cancelled: asked between pieces.

        Raises:
            RuntimeProblem: `unknown_model`, `unknown_version`, or of the copy: see `Store.take`;
                `bytes_gone`.
        """
        if expected is not None:
            return self._obtain_same(model_id, version, tuple(expected), is_cancelled)
        return self._obtain_present(model_id, version, is_cancelled)

    def read_signature(self, model_id: str, version: int | None) -> tuple[int, ModelSignature]:
        """Return a version, by default the highest, and the inputs and outputs that its file declares.

        Raises:
            LoadRefused: `invalid_model`, it declares none that can be read; `unsafe_file`, `model_changed`.
            RuntimeProblem: `unknown_model`, `unknown_version`, `repository_unreadable`.
        """
        chosen = self.repository.versions(model_id)[-1] if version is None else version
        with self.repository.open_version(model_id, chosen) as (folder, found):
            name = find_model_file(each.path for each in found)
            file = next(each for each in found if each.path == name)  # without it, it would not open
            known = self._signatures.get(file)
            if known is None:
                with folder.open_file(file.path, file) as descriptor:
                    known = _read_signature(descriptor, file)
                self._signatures[file] = known
                with suppress(StopIteration, KeyError, RuntimeError):  # another thread did so meanwhile
                    while len(self._signatures) > MAX_SIGNATURES:
                        del self._signatures[next(iter(self._signatures))]
        if isinstance(known, str):
            raise LoadRefused("invalid_model", known)
        return chosen, known

    def hash(self, files: VersionFiles, is_cancelled: IsCancelled = is_never) -> None:
        """Hash the files, unless their hashes are known.

        Raises:
            LoadRefused: `model_changed`, files of the repository itself changed meanwhile.
            RuntimeProblem: `store_unavailable`, `repository_unreadable`, `copy_cancelled`.
        """
        if files.sha256s is not None:
            return
        began_ns = time.monotonic_ns()
        if self.store is not None and files.copy is not None:
            files.hashed = self.store.hash_copy(files.copy, is_cancelled)
            files.sha256s = tuple(file.sha256 for file in files.hashed)
        else:
            files.sha256s = _hash_sources(files, is_cancelled)
        files.hashing_us = (time.monotonic_ns() - began_ns) // 1000

    def settle(self, files: VersionFiles) -> None:
        """Keep hashed files for later loads: a copy gets its name in the store, and is held until `release`.

        Raises:
            StoreUnavailable: `store_unavailable`.
        """
        key = files.model_id, files.version
        if self.store is None:
            if files.sha256s is not None:
                self._hashed[key] = dict(zip(files.sources, files.sha256s, strict=True))
        elif files.copy is not None:
            copy, files.copy = files.copy, None
            stored = self.store.settle(copy, files.hashed)
            files.root = files.folder = self.store.folder_of(stored.digest)
            files.digest = stored.digest
            self.store.record_source(*key, copy.sources, stored.digest)

    def make_durable(self, files: VersionFiles) -> None:
        """Sync settled files to the disk.

        Raises:
            StoreUnavailable: `store_unavailable`; the next start does not find them.
        """
        if self.store is not None and files.digest is not None:
            self.store.make_durable(files.digest)

    def release(self, files: VersionFiles) -> None:
        """Give the files of a load back; a copy that was not settled is removed."""
        if self.store is None:
            return
        if files.copy is not None:
            copy, files.copy = files.copy, None
            self.store.discard(copy)
        if files.digest is not None:
            digest, files.digest = files.digest, None
            self.store.release(digest)

    def known_contents(self, model_id: str, version: int) -> Contents | None:
        """Return the contents of a version if the repository still has the files that were loaded from it.

        Raises:
            LoadRefused: `unsafe_file`, `model_changed`.
            RepositoryUnreadable: `repository_unreadable`.
        """
        if self.store is None:
            hashed = self._hashed.get((model_id, version))
            if hashed is None or tuple(hashed) != self.repository.stat_version(model_id, version):
                return None
            return tuple((file.path, sha256) for file, sha256 in hashed.items())
        record = self.store.read_source(model_id, version)
        if record is None or record.files != self.repository.stat_version(model_id, version):
            return None
        return self.store.contents(record.digest)

    def has_changed(self, model_id: str, version: int, loaded: Iterable[LoadedFile]) -> bool:
        """Whether the repository has other files than those that were loaded, as far as their identities say.

        A version that is not there, or cannot be looked at, is no newer one; nor is one of which nothing was
        recorded.
        """
        if self.store is None:
            is_recorded = (model_id, version) in self._hashed
        else:
            is_recorded = self.store.read_source(model_id, version) is not None
        try:
            return is_recorded and self.known_contents(model_id, version) != contents_of(loaded)
        except (LoadRefused, RepositoryUnreadable):
            return False

    def find(
        self,
        model_id: str,
        version: int,
        loaded: Sequence[LoadedFile],
        is_cancelled: IsCancelled = is_never,
    ) -> VersionFiles | None:
        """Return the files that were loaded, held, wherever workers loaded them from; None if they are gone.

        Raises:
            CopyCancelled: `copy_cancelled`.
        """
        if self.store is not None:
            digest = digest_of(contents_of(loaded))
            return _find_stored(self.store, model_id, version, digest, loaded, is_cancelled=is_cancelled)
        try:
            files = self._in_repository(model_id, version, self.repository.stat_version(model_id, version))
            self.hash(files, is_cancelled)
        except (LoadRefused, RepositoryUnreadable):
            return None
        return files if files.contents == contents_of(loaded) else None

    def _obtain_present(self, model_id: str, version: int, is_cancelled: IsCancelled) -> VersionFiles:
        with self.repository.open_version(model_id, version) as (folder, found):
            if self.store is None:
                return self._in_repository(model_id, version, found)
            digest = self.store.find_source(model_id, version, found)
            if digest is not None:
                stored = _find_stored(self.store, model_id, version, digest, found, is_cancelled=is_cancelled)
                if stored is not None:
                    return stored
            began_ns = time.monotonic_ns()
            copy = self.store.take(folder, found, self.find_needed, is_cancelled)
        return VersionFiles(
            model_id,
            version,
            root=copy.folder,
            folder=copy.folder,
            files=copy.sources,
            copy=copy,
            copying_us=(time.monotonic_ns() - began_ns) // 1000,
        )

    def _obtain_same(
        self, model_id: str, version: int, expected: Sequence[LoadedFile], is_cancelled: IsCancelled
    ) -> VersionFiles:
        try:
            files = self._obtain_present(model_id, version, is_cancelled)
        except (UnknownModel, UnknownVersion):
            self._check_mounted()
            raise _gone(model_id, version, "the repository has no such version any more") from None
        except LoadRefused as refused:
            if refused.code != "unsafe_file":
                raise
            raise _gone(model_id, version, f"of what the repository has, {refused}") from None
        try:
            self.hash(files, is_cancelled)
            _check_same(files, expected)
            self.settle(files)
        except BaseException:
            self.release(files)
            raise
        return files

    def _in_repository(self, model_id: str, version: int, sources: tuple[FoundFile, ...]) -> VersionFiles:
        hashed = self._hashed.get((model_id, version), {})
        return VersionFiles(
            model_id,
            version,
            root=self.repository.root,
            folder=self.repository.folder_of(model_id, version),
            files=sources,
            sha256s=tuple(hashed.values()) if tuple(hashed) == sources else None,
            sources=sources,
        )

    def _check_mounted(self) -> None:
        """Refuse to judge by a repository that is not mounted.

        Raises:
            RepositoryUnreadable: `repository_unreadable`.
        """
        try:
            with os.scandir(self.repository.root) as entries:
                is_empty = next(entries, None) is None
        except OSError as error:
            raise RepositoryUnreadable(f"the repository cannot be read: {error.strerror}") from None
        if is_empty:
            raise RepositoryUnreadable("the repository is empty: is it mounted?")


def _read_signature(descriptor: int, file: FoundFile) -> ModelSignature | str:
    """Return a file's inputs and outputs, or why there are none to read."""
    try:
        return read_signature(FileWindows(descriptor), file.bytes)
    except TooManyFields as problem:
        return f"{file.path}: {problem}"
    except Unparsable:
        head = os.pread(descriptor, FOREIGN_HEAD_BYTES, 0)
        return f"{file.path} {describe_foreign_content(head, file.bytes) or 'is not an ONNX file'}"
    except OSError as error:
        raise RepositoryUnreadable(f"{file.path!r} cannot be read: {error.strerror}") from None


def _find_stored(
    store: Store,
    model_id: str,
    version: int,
    digest: str,
    files: Sequence[SizedFile],
    *,
    is_cancelled: IsCancelled,
) -> VersionFiles | None:
    """Return stored files, held, with their times in the repository; None if the store has them no more."""
    stored = store.find(digest, is_cancelled)
    if stored is None:
        return None
    return VersionFiles(
        model_id,
        version,
        root=store.folder_of(digest),
        folder=store.folder_of(digest),
        files=tuple(sorted(files, key=lambda file: file.path)),
        sha256s=tuple(file.sha256 for file in stored.files),
        digest=digest,
    )


def _hash_sources(files: VersionFiles, is_cancelled: IsCancelled) -> tuple[str, ...]:
    with open_folder(files.root, files.folder) as folder:
        sha256s = []
        for file in files.sources:
            with folder.open_file(file.path, file) as descriptor:
                try:
                    sha256s.append(hash_descriptor(descriptor, is_cancelled))
                except OSError as error:
                    raise RepositoryUnreadable(f"{file.path!r} cannot be read: {error.strerror}") from None
        if folder.stat_files() != files.sources:
            raise LoadRefused("model_changed", "the model's files changed while they were loaded")
    return tuple(sha256s)


def _check_same(files: VersionFiles, expected: Sequence[LoadedFile]) -> None:
    if files.contents != contents_of(expected):
        reason = _describe_difference(files.loaded_files, expected)
        raise _gone(files.model_id, files.version, reason)


def _gone(model_id: str, version: int, reason: str) -> BytesGone:
    return BytesGone(
        f"version {version} of {model_id!r} served from bytes that the store does not have any more, and"
        f" {reason}: load the model again to use what the repository has now"
    )


def _describe_difference(present: Sequence[LoadedFile], expected: Sequence[LoadedFile]) -> str:
    now = {file.path: file.sha256 for file in present}
    for file in expected:
        if now.get(file.path) != file.sha256:
            is_now = now.get(file.path, "gone")
            return f"in the repository {file.path!r} with SHA-256 {file.sha256} is now {is_now}"
    return "the repository has more files now"
