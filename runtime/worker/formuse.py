"""A load's prepared form: whether it is still what was prepared, and of the files that are to be loaded."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import LoadRefused
from runtime.repository import MODEL_FILE, FileIdentity
from runtime.wire import LoadedFile, Prepared, SourceHash
from runtime.worker.beside import Beside, Hashing


class FormUnusable(Exception):
    """A prepared form is of no use here; says why, and nothing of the model itself."""


class GivenForm:
    """The form that a load was given, for the files that it is to load.

    Files that have the identity that they had are taken for what they were; the others are hashed.

    Args:
        prepared: the form.
        sources: the repository's files and, as soon as they are there, their hashes.

    Raises:
        FormUnusable: it is of other files, or its own are not there as they were.
    """

    def __init__(self, prepared: Prepared, sources: Hashing) -> None:
        self.hashing = Hashing(Path(prepared.folder), _look(prepared), prepared.files)
        self.model_file = str(self.hashing.folder / MODEL_FILE)
        self.sha256 = prepared.sha256
        self.bytes = sum(file.bytes for file in prepared.files)
        self._prepared = prepared
        self._sources = sources
        if sources.known is not None:
            self._check_sources(sources.known)

    def check(self, beside: Beside) -> None:
        """Wait for the hashes, and compare them.

        Raises:
            FormUnusable: it is of other files, or its own have changed.
            LoadRefused: `model_changed`, of the repository's files.
        """
        self._check_sources(beside.result(self._sources))
        try:
            own = beside.result(self.hashing)
        except (LoadRefused, OSError) as problem:
            raise FormUnusable(str(problem)) from None
        for file, is_ in zip(self._prepared.files, own, strict=True):
            if file.sha256 != is_.sha256:
                raise FormUnusable(f"{file.path!r} is not what was prepared")

    def _check_sources(self, found: Sequence[LoadedFile]) -> None:
        if tuple(SourceHash(file.path, file.sha256) for file in found) != self._prepared.sources:
            raise FormUnusable("it was made of other files than are to be loaded")


def _look(prepared: Prepared) -> list[FileIdentity]:
    folder = Path(prepared.folder)
    if not any(file.path == MODEL_FILE for file in prepared.files):
        raise FormUnusable(f"it has no {MODEL_FILE}")
    return [_look_at(folder, file) for file in prepared.files]


def _look_at(folder: Path, file: LoadedFile) -> FileIdentity:
    try:
        seen = os.lstat(folder / file.path)
    except (OSError, ValueError) as error:
        raise FormUnusable(f"{file.path!r} cannot be looked at: {error}") from None
    if not stat.S_ISREG(seen.st_mode) or seen.st_size != file.bytes:
        raise FormUnusable(f"{file.path!r} is not the file that was prepared")
    return FileIdentity(file.path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
