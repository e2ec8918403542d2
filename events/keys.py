"""Idempotency keys: which request was made with a key, and which job answers it. Pure.

The log itself is where keys are kept: those of a request's event are its, and an index finds them
(`docs/decisions/0014-idempotency-keys.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

from events.clock import later
from events.types import CancelRequested, Event, LoadRequested, UnloadRequested

KEPT_S = 24 * 3_600
"""How long a key stands for its first request."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that was used: the fingerprint of the request, the job that answers it, and when that was."""

    fingerprint: str
    job_id: str
    recorded_at: str

    def holds(self, now: str) -> bool:
        """Whether the key still stands for its request at the stamp `now`."""
        return now < later(self.recorded_at, KEPT_S)


def key_of(event: Event) -> tuple[str, KnownKey] | None:
    """Return the key that the event was requested with, hashed, and what is to be known of it."""
    data = event.data
    if not isinstance(data, _REQUESTS) or data.idempotency is None or event.job_id is None:
        return None
    given = data.idempotency
    return given.key_hash, KnownKey(given.fingerprint, event.job_id, event.recorded_at)


_REQUESTS = (LoadRequested, UnloadRequested, CancelRequested)
"""The events that a key can be given with."""
