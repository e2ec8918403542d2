"""The log folded and checked, event by event: the chain, the order, the canonical form."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from events.bodies import from_body
from events.entities import Entities
from events.exact import Exactness
from events.findings import Bad, Kind
from events.jobs import Job
from events.models import Model
from events.snapshotcheck import NEVER, StoredSnapshots
from events.storedjobs import StoredJobs


class CheckedFold:
    """What the log says up to where it was read, and nothing that is not so.

    Args:
        position: where it begins: that of the event before the first one that is read.
        digest: the hash of that event.
        models: what the events up to there came to.
        jobs: likewise; those among them that have ended are compared at once.
        stored: what the jobs are compared with as they end, or None.
        snapshots: what is compared as the fold comes past, or None.
    """

    def __init__(
        self,
        position: int,
        digest: bytes,
        *,
        models: Iterable[Model] = (),
        jobs: Iterable[Job] = (),
        stored: StoredJobs | None = None,
        snapshots: StoredSnapshots | None = None,
    ) -> None:
        self.position, self.hash, self.recorded_at = position, digest, ""
        self.stored = stored
        known = sorted(jobs, key=lambda job: job.created_position)
        self.entities = Entities(models, (job for job in known if not job.ended))
        if stored is not None:
            for job in known:
                if job.ended:
                    stored.compare(job)
        self._exactness = Exactness()
        self.snapshots = snapshots
        self._touched = set[str | None]() if snapshots is None else snapshots.touched
        self._compare_at = NEVER if snapshots is None else snapshots.next
        if position == self._compare_at:
            self._compare_snapshots()

    def follow(self, rows: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Go on with the rows of the log, each its position, body and hash.

        Raises:
            Bad: the first of them that is not as it has to be; it ends where that one would begin.
            sqlite3.Error: they cannot be read on.
        """
        for position, body, digest in rows:
            if position != self.position + 1:
                raise Bad(
                    self.position + 1, f"missing: the next event is at position {position}", Kind.MISSING
                )
            if not (isinstance(body, bytes) and (body.isascii() or _is_utf_8(body))):
                raise Bad(position, "the body is not UTF-8", Kind.EVENT)
            if sha256(self.hash + body).digest() != digest:
                raise Bad(position, "the hash is not that of the previous hash and the body", Kind.HASH)
            ended = self._take(position, body)
            self.position, self.hash = position, digest
            if ended is not None and self.stored is not None:
                self.stored.compare(ended)
            if position == self._compare_at:
                self._compare_snapshots()

    def _compare_snapshots(self) -> None:
        assert self.snapshots is not None
        self.snapshots.compare(self.position, self.entities)
        self._compare_at = self.snapshots.next

    def _take(self, position: int, body: bytes) -> Job | None:
        try:
            event = from_body(body)
            is_late = event.recorded_at < self.recorded_at
            ended = self.entities.apply(event)
        except Exception as error:  # noqa: BLE001 - whatever a forged body does to us is a finding
            raise Bad(position, f"the body is not an event: {error!r}", Kind.EVENT) from None
        if event.position != position:
            raise Bad(position, f"the body says position {event.position}", Kind.EVENT)
        if not self._exactness.holds(event, body):
            raise Bad(position, "the body is not in the canonical form", Kind.EVENT)
        if is_late:
            raise Bad(position, "it was recorded before the one before it", Kind.ORDER)
        self.recorded_at = event.recorded_at
        self._touched.add(event.model_id)
        return ended


def _is_utf_8(body: bytes) -> bool:
    try:
        return bool(body.decode())
    except UnicodeDecodeError:
        return False
