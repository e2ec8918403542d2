"""The manifest: the record of a cached model.

An invalid manifest counts as none, so that a damaged or foreign folder is never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from events.clock import format_timestamp
from runtime.onnxfile import MODEL_FILE
from runtime.store.manifest import MANIFEST, StoredFile, read_record
from runtime.wire import CachedCopy, Count, Form, Name, Sha256, Text, Time

LAYOUT: Literal[4] = 4
"""Version of these folders and of how forms are made; a new number invalidates the whole cache."""
WEIGHTS_FILE = "weights.bin"
"""Beside `MODEL_FILE`, the only file of a form."""
MAX_TIME_S = 250_000_000_000
"""In the year 9892: a file's time may be later, but has no timestamp then."""
Figures = dict[Name, int | float | str]


@dataclass(frozen=True, slots=True)
class CachedForm:
    """A form in the cache: its key and hash, and what the worker that loads it is told."""

    key: str
    sha256: str
    copy: CachedCopy

    @property
    def form(self) -> Form:
        return self.copy.form


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The stored record of a key: a form, or the reasons against all forms.

    Attributes:
        layout: `LAYOUT`.
        key: the folder's name, made by `make_key`.
        model_id: the model that it was made of, for people; models with the same files share it.
        version: the version of that model.
        made_at: timestamp of the preparation.
        took_ms: duration of preparation and trial.
        form: None if no form helps.
        sha256: hash of the form, made by `form_sha256`.
        files: the form's own files.
        figures: measurements of the trial.
        tried: why each other form was left out.
        known_until: timestamp after which reasons against all forms are ignored; None of a form.
        used_ns: last use in nanoseconds since 1970; when it is read, the time of the file.
    """

    layout: Literal[4] = LAYOUT
    key: Sha256
    model_id: Name
    version: Count
    made_at: Name = ""
    took_ms: Count = 0
    form: Form | None = None
    sha256: Sha256 | None = None
    files: tuple[StoredFile, ...] = ()
    figures: Annotated[Figures, msgspec.Meta(max_length=64)] = {}
    tried: dict[Form, Text] = {}
    known_until: Name | None = None
    used_ns: Time = 0

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def used_at(self) -> str:
        return timestamp_of(self.used_ns)

    def cached_form(self, folder: Path) -> CachedForm | None:
        """Return the form with files in this folder; None without a form."""
        if self.form is None or self.sha256 is None:
            return None
        return CachedForm(self.key, self.sha256, CachedCopy(str(folder), self.form, self.bytes))


def form_sha256(files: Iterable[StoredFile]) -> str:
    """Return the hash of a form: SHA-256 over a line "<sha256> <path>" per file, ordered by path."""
    lines = (f"{file.sha256} {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def timestamp_of(time_ns: int) -> str:
    """Return the timestamp of nanoseconds since 1970."""
    seconds = min(max(time_ns / 1e9, 0), MAX_TIME_S)
    return format_timestamp(datetime.fromtimestamp(seconds, UTC))


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of an entry's folder, but not its files; None if there is no valid one."""
    manifest = read_record(folder / MANIFEST, Manifest)
    if manifest is None or manifest.key != folder.name or not _is_sound(manifest):
        return None
    try:
        return msgspec.structs.replace(manifest, used_ns=(folder / MANIFEST).lstat().st_mtime_ns)
    except OSError:
        return None


def are_of_form(paths: Iterable[str]) -> bool:
    found = set(paths)
    return MODEL_FILE in found and found <= {MODEL_FILE, WEIGHTS_FILE}


def _is_sound(manifest: Manifest) -> bool:
    if manifest.form is None:
        return manifest.sha256 is None and not manifest.files
    paths = [file.path for file in manifest.files]
    return (
        are_of_form(paths) and paths == sorted(set(paths)) and form_sha256(manifest.files) == manifest.sha256
    )
