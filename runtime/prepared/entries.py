"""What the store of prepared forms is told, and what it tells."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from events.clock import stamp
from runtime.prepared.files import Figure, Manifest
from runtime.wire import Form, LoadedFile, SourceHash, Tensor

MAX_TIME_S = 250_000_000_000
"""In the year 9892: a file's time can be later, but then no date can be written."""


@dataclass(frozen=True, slots=True)
class Made:
    """A form that was made and found to be of use.

    Attributes:
        form: which.
        files: what the worker said that it wrote, directly in the draft.
        sources: what it was made of.
        model_id: whose files those were.
        version: of that model.
        took_ms: what making and trying it took.
        figures: what was measured, for people.
        tried: why each form that was tried before it was left out.
    """

    form: Form
    files: tuple[LoadedFile, ...]
    sources: tuple[SourceHash, ...]
    model_id: str
    version: int
    took_ms: int
    figures: Mapping[str, Figure] = field(default_factory=dict)
    tried: Mapping[Form, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known for a key.

    Attributes:
        key: as `key_of` makes it.
        model_id: what it was made of; other models with the same files use it too.
        version: of that model.
        form: None if no form is of use.
        sha256: of the form.
        bytes: what its files take.
        made_at: when, as the ledger writes times.
        used_at: when it was used last.
        took_ms: what making and trying it took.
        figures: what was measured.
        tried: why each other form was left out.
        untried_on: if nothing could be tried, the SHA-256 of the inputs that there were for it.
    """

    key: str
    model_id: str
    version: int
    form: Form | None
    sha256: str | None
    bytes: int
    made_at: str
    used_at: str
    took_ms: int
    figures: Mapping[str, Figure]
    tried: Mapping[Form, str]
    untried_on: str | None = None


@dataclass(frozen=True, slots=True)
class Cleared:
    """How many entries were removed, and what their forms took."""

    entries: int
    bytes: int


def entry_of(manifest: Manifest, used_ns: int) -> Entry:
    """Return what a manifest says, and when it was used."""
    return Entry(
        manifest.key,
        manifest.model_id,
        manifest.version,
        manifest.form,
        manifest.sha256,
        manifest.bytes,
        manifest.made_at,
        stamp_of(used_ns),
        manifest.took_ms,
        manifest.figures,
        manifest.tried,
        manifest.untried_on,
    )


def stamp_of(time_ns: int) -> str:
    """Return a time as the ledger writes it, from nanoseconds since 1970."""
    seconds = min(max(time_ns / 1e9, 0), MAX_TIME_S)
    return stamp(datetime.fromtimestamp(seconds, UTC))


def hash_of(given: Iterable[Tensor]) -> str:
    """Return the SHA-256 of inputs, in 64 hex digits."""
    told = repr([(each.name, each.datatype, each.shape, bytes(each.data)) for each in given])
    return hashlib.sha256(told.encode()).hexdigest()


def is_open(entry: Entry | None, given: Iterable[Tensor]) -> bool:
    """Tell whether something is to be found out: nothing is known, or nothing but with other inputs."""
    return entry is None or (entry.untried_on is not None and entry.untried_on != hash_of(given))
