"""A version written into a repository's folder, for repositories that the server only reads.

A version appears at once: it is written under a hidden name, which no server lists, and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from answers.versions import AddedFileInfo, AddedVersionInfo
from events.files import sync
from loadledger.uploads import VersionSource, hash_files
from runtime.errors import RuntimeProblem
from runtime.repository import MODEL_ID
from runtime.uploads.receive import check_model, check_path

FILE_MODE, FOLDER_MODE = 0o644, 0o755
"""The server's user may differ from the writer's."""


def write_version(
    source: VersionSource, repository: Path, model_id: str, version: int | None = None
) -> AddedVersionInfo:
    """Write a version into a repository, and return it.

    Args:
        source: the version's files.
        repository: the folder of models.
        model_id: the model, which may be new.
        version: its number; default: the highest plus 1.

    Raises:
        ValueError: the model's name is invalid, the version exists, or a server would refuse the files.
        OSError: a file cannot be read or written.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise ValueError(f"{model_id[:100]!a} is no name for a model: letters, digits, '.', '_' and '-'")
    folder = repository / model_id
    found = [int(each.name) for each in folder.iterdir() if each.name.isdecimal()] if folder.is_dir() else []
    number = max(found, default=0) + 1 if version is None else version
    digests, target = hash_files(source), folder / str(number)
    if os.path.lexists(target):
        raise ValueError(f"{target} is there, and a version is never overwritten: choose another number")
    hidden = Path(tempfile.mkdtemp(prefix=".adding-", dir=repository))
    try:
        _write_files(source, hidden)
        check_model(hidden, list(digests))
        if not folder.is_dir():
            folder.mkdir()
            folder.chmod(FOLDER_MODE)
        hidden.rename(target)
    except RuntimeProblem as problem:
        raise ValueError(str(problem)) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    for each in (folder, repository):
        sync(each)
    files = [
        AddedFileInfo(path=file.path, bytes=file.bytes, sha256=digests[file.path]) for file in source.files
    ]
    return AddedVersionInfo(model_id=model_id, version=number, bytes=source.bytes, files=files)


def _write_files(source: VersionSource, folder: Path) -> None:
    for file in source.files:
        target = folder / check_path(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.source, target)
        target.chmod(FILE_MODE)
        with target.open("rb") as written:
            os.fsync(written.fileno())
    for within, _, _ in os.walk(folder):
        Path(within).chmod(FOLDER_MODE)
        sync(Path(within))
