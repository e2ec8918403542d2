"""Footprints: the peak memory of a model's loads, from which later loads are estimated."""

from __future__ import annotations

from msgspec import Struct

from events.types import LoadedFile, ModelLoaded

MAX_FOOTPRINTS = 8
"""Footprints kept of a model: the version that serves, the next, and two to go back to, each as it is and
from a prepared form. A model that is loaded with several numbers of threads has fewer versions among them."""


class Footprint(Struct, frozen=True, gc=False):
    """The peak memory of one worker that loaded these files, or a prepared form of them.

    `threads` is how many it computed with; None in events of earlier releases.
    """

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    form: str | None = None
    threads: int | None = None


def footprint_of(version: int, loaded: ModelLoaded) -> Footprint:
    """Return the footprint of one worker of a load: its share of the peak, rounded up."""
    peak_bytes = -(-loaded.peak_memory_bytes // max(1, len(loaded.worker_ids)))
    form = loaded.prepared.form if loaded.prepared is not None else None
    return Footprint(version, loaded.files, peak_bytes, form, loaded.threads)


def add_footprint(footprints: tuple[Footprint, ...], latest: Footprint) -> tuple[Footprint, ...]:
    """Return the footprints with the latest one added.

    Of the same files, form and threads the highest counts, because peaks are sampled. Footprints of other
    files of the same version are dropped.
    """
    others = []
    for known in footprints:
        is_same_files = known.files == latest.files
        is_same_load = is_same_files and (known.form, known.threads) == (latest.form, latest.threads)
        if known.version != latest.version or (is_same_files and not is_same_load):
            others.append(known)
        elif is_same_load and known.peak_memory_bytes > latest.peak_memory_bytes:
            latest = known
    return (*others, latest)[-MAX_FOOTPRINTS:]
