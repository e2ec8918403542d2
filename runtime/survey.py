"""What is wrong with a model repository, as far as its files show it: nothing of them is loaded.

The server itself is silent about most of this: what is no complete version is as if it were not there, and
what cannot be loaded says so only when somebody asks for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from runtime.errors import LoadRefused, RuntimeProblem
from runtime.onnxfile import check_external_data
from runtime.repository import (
    MAX_VERSION,
    MODEL_FILE,
    MODEL_ID,
    VERSION,
    ModelVersion,
    Repository,
    identify,
    inside,
)

NO_ONNX = "no_onnx"
"""The code of a file that is no ONNX as far as it was read; only a load can say for sure."""


class Severity(StrEnum):
    """Whether something is wrong, or may be meant so."""

    PROBLEM = "problem"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found.

    Attributes:
        place: where: an option, or a path in the repository.
        code: what it is, for programs.
        text: what it is and what to do, for people.
    """

    place: str
    code: str
    text: str
    severity: Severity = Severity.PROBLEM


def survey_model(repository: Repository, name: str) -> Iterator[Finding]:
    """Yield what is wrong with one of the names beneath the root, before its versions are looked at."""
    path = repository.root / name
    if MODEL_ID.fullmatch(name) and (reason := _hidden(path)):
        yield Finding(name, "unreadable", f"cannot be looked at: {reason}")
    elif name.startswith(".") or not is_folder(path):
        if name.endswith(".onnx"):
            text = f"is not looked at here: put it into MODEL/VERSION/{MODEL_FILE}"
            yield Finding(name, "misplaced_file", text, Severity.NOTE)
    elif not MODEL_ID.fullmatch(name):
        text = "cannot be a model's name (A-Z a-z 0-9 . _ - and a letter or digit first): it is not served"
        yield Finding(name, "invalid_model_id", text, Severity.NOTE)
    elif not inside(path, repository.root):
        yield Finding(name, "unsafe_file", "leads out of the repository: copy the model into it")
    else:
        yield from _versions(repository, name)


def survey_version(repository: Repository, found: ModelVersion) -> Iterator[Finding]:
    """Yield what is wrong with the files of a complete version."""
    place = f"{found.model_id}/{found.version}"
    try:
        identify(found.folder, repository.root)
        model = found.folder / MODEL_FILE
        is_whole = check_external_data(model, found.folder, repository.root)
    except LoadRefused as refused:
        yield Finding(place, refused.code, str(refused))
        return
    except OSError as error:
        yield Finding(place, "unreadable", f"{MODEL_FILE} cannot be read: {error.strerror}")
        return
    if not is_whole:
        text = "is no ONNX file, as far as it can be read: was it copied completely?"
        yield Finding(f"{place}/{MODEL_FILE}", NO_ONNX, text)
    for file in found.files:
        if not os.access(found.folder / file.path, os.R_OK):
            text = "may not be read by the user that this runs as: correct its mode or owner"
            yield Finding(f"{place}/{file.path}", "unreadable", text)


def names_in(root: Path) -> list[str]:
    """Return the names beneath a folder, sorted.

    Raises:
        OSError: it cannot be listed.
    """
    return sorted(entry.name for entry in os.scandir(root))


def is_there(path: Path) -> bool:
    """Whether something can be looked at; pathlib's own raises for a name that is too long, say."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether something is known to be a folder."""
    return is_there(path) and path.is_dir()


def _versions(repository: Repository, model_id: str) -> Iterator[Finding]:
    """Yield the folders that look like versions and are none, and whether that leaves any."""
    try:
        names = names_in(repository.root / model_id)
    except OSError as error:
        yield Finding(model_id, "unreadable", f"cannot be listed: {error.strerror}")
        return
    found = [finding for name in names for finding in _version(repository, model_id, name)]
    yield from found
    if any(finding.severity is Severity.PROBLEM for finding in found):
        return  # which is why there may be no version
    try:
        repository.versions(model_id)
    except RuntimeProblem:
        text = f"has no version, so it is not served: add a folder {model_id}/1 with a {MODEL_FILE}"
        yield Finding(model_id, "no_version", text)


def _version(repository: Repository, model_id: str, name: str) -> Iterator[Finding]:
    folder, place = repository.root / model_id / name, f"{model_id}/{name}"
    is_number = VERSION.fullmatch(name) is not None and int(name) <= MAX_VERSION
    if is_number and (reason := _hidden(folder)):
        yield Finding(place, "unreadable", f"cannot be looked at: {reason}")
    elif not is_folder(folder):
        return
    elif is_number:
        if not inside(folder, repository.root):
            yield Finding(place, "unsafe_file", "leads out of the repository: copy the version into it")
        else:
            yield from _model_file(repository, folder, place)
    elif name.isdecimal() or is_there(folder / MODEL_FILE):
        text = f"is no version, which is a whole number from 1 to {MAX_VERSION} without zeros before it"
        yield Finding(place, "invalid_version", text, Severity.NOTE)


def _model_file(repository: Repository, folder: Path, place: str) -> Iterator[Finding]:
    path = folder / MODEL_FILE
    try:
        names = names_in(folder)
    except OSError as error:
        yield Finding(place, "unreadable", f"cannot be listed: {error.strerror}")
        return
    if MODEL_FILE not in names:
        others = [name for name in names if name.endswith(".onnx")]
        advice = f"rename {others[0]}" if len(others) == 1 else "add it, or remove the folder"
        yield Finding(place, "no_model_file", f"has no {MODEL_FILE}, so it is no version: {advice}")
    elif reason := _hidden(path):
        yield Finding(place, "unreadable", f"{MODEL_FILE} cannot be looked at: {reason}")
    elif not is_there(path):
        yield Finding(place, "no_model_file", f"{MODEL_FILE} is a link that leads nowhere")
    elif not inside(path, repository.root):
        yield Finding(place, "unsafe_file", f"{MODEL_FILE} leads out of the repository: copy it here")
    elif not stat.S_ISREG(path.stat().st_mode):
        yield Finding(place, "unsafe_file", f"{MODEL_FILE} is not a regular file")


def _hidden(path: Path) -> str | None:
    """Return why nobody can say what a path is; None if that can be said, or there is nothing."""
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    return None
