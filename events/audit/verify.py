"""Proof by recomputation: the chain, the gaps, and the stored projections against a fold of the log.

What verification says of a ledger or a file, and what somebody kept of a head, to be found again there.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from events.audit.projections import NEVER, StoredJobs, StoredSnapshots
from events.codec import GENESIS, CanonicalCheck, decode_event
from events.jobs import Job
from events.models import Model
from events.sqlite import queries, storage
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import check_readable
from events.sqlite.snapshots import is_base_state_whole, read_base_state
from events.state import Entities
from events.types import Event


class FindingKind(StrEnum):
    """What kind of thing is wrong."""

    MISSING = "missing"
    HASH = "hash"
    ORDER = "order"
    EVENT = "event"
    BASE = "base"
    PROJECTIONS = "projections"
    SCHEMA = "schema"
    DAMAGED = "damaged"
    EXPECTATION = "expectation"
    SIGNATURE = "signature"


@dataclass(frozen=True, slots=True)
class Finding:
    """The first thing that is wrong: at which position, and what."""

    position: int
    problem: str
    kind: FindingKind = field(default=FindingKind.HASH, compare=False)


class VerificationError(Exception):
    """Something is wrong, and nothing after it is looked at."""

    def __init__(self, position: int, problem: str, kind: FindingKind) -> None:
        super().__init__(problem)
        self.finding = Finding(position, problem, kind)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: how many events, the head as recomputed, and the first problem, if any.

    `compared` is False where the stored projections were made by other folds than this release's. They are
    made anew before anything uses them, so they prove nothing, and were not looked at.
    """

    events: int
    position: int
    hash: bytes
    finding: Finding | None
    compared: bool = True

    @property
    def verified(self) -> bool:
        """Whether nothing is wrong."""
        return self.finding is None


_EXPECTED = re.compile(r"(\d{1,19}):([0-9a-fA-F]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Expected:
    """The event at this position has this hash."""

    position: int
    hash: bytes


def parse_expected(text: str) -> Expected:
    """Return what `POSITION:HASH` says.

    Raises:
        ValueError: it is not of that form.
    """
    match = _EXPECTED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:100]!r} is not POSITION:HASH, the hash in 64 hexadecimal digits")
    return Expected(int(match[1]), bytes.fromhex(match[2]))


PAGE = 200
"""Events that take each step together: the processor's caches then hold the code of one step, not of all. It
takes a sixth less time than event by event (measured)."""

_ARCHIVES_SINCE = 4
"""The schema from which on archives are told of."""

Row = tuple[int, bytes, bytes]
"""The position, body and hash of an event, as they are stored."""

T = TypeVar("T")


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
        self.position, self.hash, self._recorded_at = position, digest, ""
        self.stored = stored
        known = sorted(jobs, key=lambda job: job.created_position)
        self.entities = Entities(models, (job for job in known if not job.ended))
        if stored is not None:
            for job in known:
                if job.ended:
                    stored.compare(job)
        self._exactness = CanonicalCheck()
        self.snapshots = snapshots
        self._touched = set[str | None]() if snapshots is None else snapshots.touched
        self._compare_at = NEVER if snapshots is None else snapshots.next
        if position == self._compare_at:
            self._compare_snapshots()

    def follow(self, rows: Iterable[Row]) -> Finding | None:
        """Go on with the rows of the log, up to the first that is not as it has to be, and return what it is.

        Raises:
            sqlite3.Error: they cannot be read on.
        """
        for page in _pages(rows):
            hashed, finding = _taken(self._hashed(page), None)
            events, finding = _taken(self._read(hashed), finding)
            ended, finding = _taken(self._folded(zip(hashed, events, strict=False)), finding)
            if self.stored is not None:
                for job in ended:
                    self.stored.compare(job)
            if finding is not None:
                return finding
        return None

    def _hashed(self, page: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that follow one another, and whose hash is that of the previous one and the body."""
        before, previous = self.position, self.hash
        for row in page:
            position, body, digest = row
            if position != before + 1:
                raise VerificationError(
                    before + 1, f"missing: the next event is at position {position}", FindingKind.MISSING
                )
            if not (isinstance(body, bytes) and (body.isascii() or _is_utf_8(body))):
                raise VerificationError(position, "the body is not UTF-8", FindingKind.EVENT)
            if sha256(previous + body).digest() != digest:
                raise VerificationError(
                    position, "the hash is not that of the previous hash and the body", FindingKind.HASH
                )
            yield row
            before, previous = position, digest

    def _read(self, rows: Iterable[Row]) -> Iterator[Event]:
        """Yield the events that are in the canonical form."""
        holds = self._exactness.holds
        for position, body, _ in rows:
            try:
                event = decode_event(body)
            except Exception as error:  # noqa: BLE001 - whatever a forged body does to us is a finding
                raise VerificationError(
                    position, f"the body is not an event: {error!r}", FindingKind.EVENT
                ) from None
            if event.position != position:
                raise VerificationError(
                    position, f"the body says position {event.position}", FindingKind.EVENT
                )
            if not holds(event, body):
                raise VerificationError(position, "the body is not in the canonical form", FindingKind.EVENT)
            yield event

    def _folded(self, found: Iterable[tuple[Row, Event]]) -> Iterator[Job]:
        """Fold events in, and yield the jobs that ended with them."""
        apply, touch = self.entities.apply, self._touched.add
        for (position, _, digest), event in found:
            if event.recorded_at < self._recorded_at:
                raise VerificationError(
                    position, "it was recorded before the one before it", FindingKind.ORDER
                )
            try:
                ended = apply(event)
            except Exception as error:  # noqa: BLE001 - as above
                raise VerificationError(
                    position, f"the body is not an event: {error!r}", FindingKind.EVENT
                ) from None
            self.position, self.hash, self._recorded_at = position, digest, event.recorded_at
            touch(event.model_id)
            if position == self._compare_at:
                self._compare_snapshots()
            if ended is not None:
                yield ended

    def _compare_snapshots(self) -> None:
        assert self.snapshots is not None
        self.snapshots.compare(self.position, self.entities)
        self._compare_at = self.snapshots.next


def _pages(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the rows in pages; where they cannot be read on, those before that first."""
    page = list[Row]()
    try:
        for row in rows:
            page.append(row)
            if len(page) == PAGE:
                yield page
                page = []
    except sqlite3.Error:
        yield page
        raise
    yield page


def _taken(step: Iterator[T], later: Finding | None) -> tuple[list[T], Finding | None]:
    """Return what a step yields up to the first that is bad; `later` is of what comes after it, if any."""
    done = list[T]()
    try:
        for item in step:
            done.append(item)
    except VerificationError as bad:
        return done, bad.finding
    return done, later


def _is_utf_8(body: bytes) -> bool:
    try:
        return bool(body.decode())
    except UnicodeDecodeError:
        return False


def verify(path: Path) -> Verification:
    """Verify the ledger at `path`, reading only; works beside a running server.

    All reads are one snapshot. Memory grows with the models and unended jobs, not with the log.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, the file cannot be read, or is no database.
    """
    with open_read_only(path) as connection:
        connection.text_factory = bytes
        connection.execute("BEGIN")
        return verify_connection(connection, path)


def verify_connection(connection: sqlite3.Connection, path: Path) -> Verification:
    """Verify as `verify` does, in the transaction of a connection that gives text as bytes.

    Args:
        connection: what it sees is verified.
        path: of the same file.
    """
    base = connection.execute("SELECT position, hash FROM base").fetchone()
    if base is None or not (isinstance(base[0], int) and isinstance(base[1], bytes)):
        return Verification(0, 0, GENESIS, Finding(0, "the base of the chain is missing", FindingKind.BASE))
    fold = CheckedFold(*base)
    finding, compared = None, True
    try:
        compared = storage.is_current(connection)
        fold = _fold_at_base(connection, *base, compared=compared)
        rows = connection.execute("SELECT position, body, hash FROM events ORDER BY position")
        finding = fold.follow(rows)
        if finding is None:
            _check_archives(connection, *base)
            _check_base_state(connection, base[0])
            if compared:
                _compare(connection, fold)
                _compare_snapshots(fold)
            _check_length(connection, path, fold.position)
    except VerificationError as bad:
        finding = bad.finding
    except sqlite3.DatabaseError as error:
        if queries.kind_of(error) != sqlite3.SQLITE_CORRUPT:
            raise
        finding = Finding(fold.position + 1, f"the file is damaged: {error}", FindingKind.DAMAGED)
    return Verification(fold.position - base[0], fold.position, fold.hash, finding, compared)


def _fold_at_base(connection: sqlite3.Connection, base: int, digest: bytes, *, compared: bool) -> CheckedFold:
    """Return the fold in which the log begins; `compared` says whether with what is stored beside it."""
    try:
        state = read_base_state(connection, base)
        return CheckedFold(
            base,
            digest,
            models=state.models.values(),
            jobs=state.jobs.values(),
            stored=StoredJobs(connection) if compared else None,
            snapshots=StoredSnapshots(connection, base) if compared else None,
        )
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001 - whatever somebody made of it is a finding
        problem = f"the state that archived events came to is damaged: {error!r}"
        raise VerificationError(base, problem, FindingKind.BASE) from None


def _check_archives(connection: sqlite3.Connection, base: int, digest: bytes) -> None:
    """Everything before the base must be in archives that follow one another, from the first event on."""
    last, last_hash = 0, GENESIS
    if base or check_readable(connection) >= _ARCHIVES_SINCE:
        for first, *end in connection.execute(
            "SELECT first_position, last_position, hash FROM archives ORDER BY last_position"
        ):
            if first != last + 1:
                problem = f"the archives that are told of do not have position {last + 1} to go on with"
                raise VerificationError(base, problem, FindingKind.BASE)
            last, last_hash = end
            if not isinstance(last, int):
                raise VerificationError(
                    base, "the archives that are told of end with no position", FindingKind.BASE
                )
    if (last, last_hash) != (base, digest):
        problem = f"the archives that are told of end with position {last}, the log begins after {base}"
        raise VerificationError(base, f"{problem}, or has another hash there", FindingKind.BASE)


def _check_base_state(connection: sqlite3.Connection, base: int) -> None:
    if not is_base_state_whole(connection, base):
        raise VerificationError(
            base, "what is stored of archived events is not what they came to", FindingKind.BASE
        )


def _check_length(connection: sqlite3.Connection, path: Path, position: int) -> None:
    """SQLite takes the missing end of the last page for zeros, and misses whole pages by itself."""
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    if path.stat().st_size % page_size:
        raise VerificationError(position, "the file is damaged: its end was cut off", FindingKind.DAMAGED)


def _compare(connection: sqlite3.Connection, fold: CheckedFold) -> None:
    """The stored projections must be what the log gives; a difference is named at the head."""
    position = connection.execute("SELECT position FROM projected").fetchone()
    if position != (fold.position,):
        problem = f"the stored projections are at position {position and position[0]}"
        raise VerificationError(fold.position, problem, FindingKind.PROJECTIONS)
    _compare_models(connection, fold)
    assert fold.stored is not None
    difference = fold.stored.difference(fold.entities.jobs.values())
    if difference is not None:
        raise VerificationError(fold.position, difference, FindingKind.PROJECTIONS)


def _compare_snapshots(fold: CheckedFold) -> None:
    """The stored snapshots must be what the log gives; a difference is named where it is."""
    assert fold.snapshots is not None
    difference = fold.snapshots.end(fold.position)
    if difference is not None:
        raise VerificationError(*difference, FindingKind.PROJECTIONS)


def _compare_models(connection: sqlite3.Connection, fold: CheckedFold) -> None:
    expected = {key.encode(): model for key, model in fold.entities.models.items()}
    for key, body, is_text in connection.execute(
        "SELECT id, body, typeof(id) = 'text' AND typeof(body) = 'text' FROM models"
    ):
        model = expected.pop(key, None)
        if model is None or not is_text or queries.as_bytes(model) != body:
            shown = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
            raise VerificationError(
                fold.position,
                f"the stored models differ from the log's at {shown!r}",
                FindingKind.PROJECTIONS,
            )
    if expected:
        problem = f"the stored models lack {next(iter(expected)).decode()!r}"
        raise VerificationError(fold.position, problem, FindingKind.PROJECTIONS)
