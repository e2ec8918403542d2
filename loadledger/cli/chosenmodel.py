"""The model that `loadledger run` serves: a file, a folder, a source or a model, and its name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

import click

from loadledger.cli.options import parse_version_name
from loadledger.cli.output import exit_with_error, to_printable
from loadledger.uploads import LocalVersion

_GENERIC = """
    model models onnx best last final weights checkpoint checkpoints export exported saved snapshots runs
    train detect quantized quant int8 uint8 fp16 fp32 bf16 q4 q8 q4f16 bnb4 static dynamic simplified sim opt
    optimized downloads desktop documents files data home root tmp decoder encoder merged with past
"""
GENERIC_NAMES = frozenset(_GENERIC.split())
"""Words in names of files and folders in common layouts that name no model: the parent folder does."""
COMMIT = re.compile(r"[0-9a-f]{12,64}")
HUB_CACHE = "models--"
"""Beginning of a folder's name in Hugging Face's cache: models--ORGANISATION--REPOSITORY."""

MAX_NAME = 128
"""Characters of a model's name."""


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """The model of `run`: its name, and its files if they may have to be added first.

    Attributes:
        path: a file or folder on this machine.
        source: the name of a source, which has `://`, to download the files from.
        digest: the required digest of the source.
        local: the files of the source, once downloaded.
        version: the model's version, if known.
        is_named: whether a person chose the name.
        is_guessed: whether it is only part of a name, or the name of a parent folder.
    """

    name: str
    path: Path | None = None
    source: str | None = None
    digest: str | None = None
    local: LocalVersion | None = None
    version: int | None = None
    is_named: bool = False
    is_guessed: bool = False


def choose_model(given: str, name: str | None, digest: str | None = None) -> ChosenModel:
    """Return the subject of an argument: a source, a file or folder if it exists, else a model."""
    if "://" in given:
        return ChosenModel(name or name_source(given), source=given, digest=digest)
    if digest is not None:
        raise click.UsageError("--digest is for a SOURCE, which has ://")
    path = Path(given)
    if path.exists():
        guess = name_model(Path(os.path.abspath(path)))  # noqa: PTH100 - as typed: `resolve` follows links
        is_guessed = guess != _own_name(path)
        return ChosenModel(name or guess, path, is_named=name is not None, is_guessed=is_guessed)
    if name is None and re.fullmatch(r"[^/]+/[1-9][0-9]*", given):
        model_id, version = parse_version_name(given)
        return ChosenModel(model_id, version=version)
    if name is not None or "/" in given or path.suffix:
        exit_with_error(f"there is no file or folder {to_printable(given)}")
    return ChosenModel(given)


def name_source(source: str) -> str:
    """Return the name for a source's model: the repository's, or the file's.

    Raises:
        SourceProblem: the text names no source.
    """
    from loadledger.sources.names import parse_source

    parsed = parse_source(source)
    ends = {"hf": "[@/]", "oci": "[:@]"}.get(parsed.scheme, "$")  # end of the repository's name
    path = PurePosixPath(re.split(ends, unquote(parsed.path))[0])
    return _choose_name(path, path.stem if path.suffix == ".onnx" else path.name)


def place_of(path: Path) -> tuple[str, str]:
    """Return the names of the model and the version of a path that lies in a repository."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return folder.parent.name, folder.name


def _own_name(path: Path) -> str:
    """Return the name of a file or folder itself, or of the model's folder in the layout MODEL/VERSION."""
    model, version = place_of(path)
    if version.isdecimal():
        return _to_name(model)
    name = path.stem if path.is_file() else path.name
    return _to_name(name) if name.isascii() else ""


def name_model(path: Path) -> str:
    return _choose_name(path, path.stem if path.is_file() else path.name)


def _choose_name(path: PurePath, last: str) -> str:
    for part in (last, *(parent.name for parent in path.parents)):
        name = _to_name(part.rpartition("--")[2] if part.startswith(HUB_CACHE) else part)
        words = [word for word in re.split(r"[._-]", name.lower()) if word and not word.isdecimal()]
        if not GENERIC_NAMES.issuperset(words) and not COMMIT.fullmatch(name):
            return name
    raise click.UsageError(f"{to_printable(str(path))} has no name for a model: give one with --name")


def _to_name(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("._-")[:MAX_NAME]
