"""Footprints: the peak memory of a model's loads, from which later loads are estimated."""

from __future__ import annotations

from msgspec import Struct

from events.types import LoadedFile

MAX_FOOTPRINTS = 8
"""Footprints kept of a model: the version that serves, the next, and two to go back to, each as it is and
from a prepared form."""


class Footprint(Struct, frozen=True, gc=False):
    """The peak memory of one worker that loaded these files, or a prepared form of them."""

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    form: str | None = None


def add_footprint(footprints: tuple[Footprint, ...], latest: Footprint) -> tuple[Footprint, ...]:
    """Return the footprints with the latest one added.

    Of the same files the highest counts, because peaks are sampled. Footprints of other files of the same
    version are dropped.
    """
    others = []
    for known in footprints:
        is_other_version = known.version != latest.version
        if is_other_version or (known.files == latest.files and known.form != latest.form):
            others.append(known)
        elif known.files == latest.files and known.peak_memory_bytes > latest.peak_memory_bytes:
            latest = known
    return (*others, latest)[-MAX_FOOTPRINTS:]
