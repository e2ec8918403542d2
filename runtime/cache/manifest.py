"""What the cache records of a cached model: its manifest, and the entry that others read.

An invalid manifest counts as none, so that a damaged or foreign folder is never used.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from events.audit.files import write_file
from events.clock import format_timestamp
from events.types import LoadedFile as RecordedFile
from runtime.cache.files import open_file
from runtime.wire import CachedCopy, Count, Form, HashedFile, Name, Sha256, SourceHash, Text

LAYOUT: Literal[2] = 2
"""Version of these folders and of how forms are made; a new number invalidates the whole cache."""


MANIFEST = "manifest.json"


MAX_MANIFEST_BYTES = 64 * 2**20
"""The longest allowed list of sources with the longest paths fits."""


MAX_TIME_S = 250_000_000_000
"""In the year 9892: a file's time may be later, but has no timestamp then."""


_NO_FILE = frozenset({"", ".", "..", MANIFEST})


Figure = int | float | str


Figures = dict[Name, Figure]


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
        files: the form's own files, directly in the folder.
        sources: the repository's files that it was made of.
        figures: measurements of the trial.
        tried: why each other form was left out.
        known_until: timestamp after which reasons against all forms are ignored; None of a form.
    """

    layout: Literal[2]
    key: Sha256
    model_id: Name
    version: Count
    made_at: Name
    took_ms: Count = 0
    form: Form | None = None
    sha256: Sha256 | None = None
    files: tuple[HashedFile, ...] = ()
    sources: tuple[SourceHash, ...] = ()
    figures: Annotated[Figures, msgspec.Meta(max_length=64)] = {}
    tried: dict[Form, Text] = {}
    known_until: Name | None = None

    @property
    def bytes(self) -> int:
        """Size of the form's files."""
        return sum(file.bytes for file in self.files)

    @property
    def form_bytes(self) -> int | None:
        """Size of the form; None if there is none."""
        return None if self.form is None else self.bytes


@dataclass(frozen=True, slots=True)
class FinishedForm:
    """A form that passed its trial; `Manifest` describes the shared fields.

    Attributes:
        files: the files that the worker reported, directly in the draft.
        tried: why each form that was tried before it was left out.
    """

    form: Form
    files: tuple[HashedFile, ...]
    sources: tuple[SourceHash, ...]
    model_id: str
    version: int
    took_ms: int
    figures: Mapping[str, Figure] = field(default_factory=dict)
    tried: Mapping[Form, str] = field(default_factory=dict)


class Entry(Manifest, frozen=True, kw_only=True):
    """A manifest and the timestamp of its last use."""

    used_at: str


@dataclass(frozen=True, slots=True)
class Cleared:
    """The number of removed entries, and the size of their forms."""

    entries: int
    bytes: int


def make_entry(manifest: Manifest, used_ns: int) -> Entry:
    """Return the entry of a manifest and its last use."""
    return Entry(**msgspec.structs.asdict(manifest), used_at=timestamp_of(used_ns))


def describe_cached(
    folder: Path, form: Form, files: Sequence[HashedFile], sources: Sequence[SourceHash]
) -> CachedCopy:
    """Describe a form, or its draft, to the worker that loads it."""
    own = tuple(sorted(files, key=lambda file: file.path))
    of = tuple(sorted(sources, key=lambda file: file.path))
    return CachedCopy(str(folder), form, form_sha256(own), own, of)


def source_hashes(files: Iterable[HashedFile | RecordedFile]) -> tuple[SourceHash, ...]:
    """Return the hashes of files, ordered by path."""
    return tuple(SourceHash(file.path, file.sha256) for file in sorted(files, key=lambda file: file.path))


def form_sha256(files: Iterable[HashedFile]) -> str:
    """Return the hash of a form: SHA-256 over a line "<sha256> <path>" per file, ordered by path."""
    lines = (f"{file.sha256} {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def are_plain_names(files: Sequence[HashedFile]) -> bool:
    """Return whether all files have different, plain names, so that they can lie beside a manifest."""
    names = {file.path for file in files}
    return len(names) == len(files) and not any(
        name in _NO_FILE or "/" in name or "\0" in name or name.startswith(f".{MANIFEST}") for name in names
    )


def timestamp_of(time_ns: int) -> str:
    """Return the timestamp of nanoseconds since 1970."""
    seconds = min(max(time_ns / 1e9, 0), MAX_TIME_S)
    return format_timestamp(datetime.fromtimestamp(seconds, UTC))


def read_manifest(folder: Path) -> tuple[Manifest, int] | None:
    """Read the manifest of an entry's folder, but not its files.

    Returns:
        The manifest and its last use in nanoseconds since 1970; None if there is no valid one.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return None
        with open_file(folder / MANIFEST) as file:
            seen = os.fstat(file.fileno())
            if seen.st_size > MAX_MANIFEST_BYTES:
                return None
            manifest = msgspec.json.decode(file.read(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return (manifest, seen.st_mtime_ns) if manifest.key == folder.name and _is_sound(manifest) else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, durably, together with the names of all files in the folder.

    Raises:
        OSError: it could not be written.
        WrongTarget: its path is no regular file.
    """
    with write_file(folder / MANIFEST, replace=True) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def _is_sound(manifest: Manifest) -> bool:
    if manifest.form is None:
        return manifest.sha256 is None and not manifest.files
    return (
        bool(manifest.files)
        and are_plain_names(manifest.files)
        and form_sha256(manifest.files) == manifest.sha256
    )
