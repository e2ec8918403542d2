"""Verification of a ledger: the chain, the events, its loads, and the stored projections.

The log is read once, in order. The result names the first wrong position, as a `Finding`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from sys import getsizeof
from typing import TypeVar

from events.codec import CanonicalCheck, decode_event
from events.jobs import Job
from events.models import Model
from events.presence import Transition
from events.sqlite.projections import StoredProjections
from events.sqlite.proof import KnownIds, ProofReader, open_proof_reader, storage_errors
from events.sqlite.storage import is_current
from events.state import OF_NO_MODEL, Entities
from events.storage import RawRow, StorageDamaged
from events.types import Anchor, Event
from features.audit import PolicyAudit, Remark

EVENTS_PER_STEP = 200
"""Events that take each step together: the processor's caches then hold the code of one step, not of all. It
takes a sixth less time than event by event (measured)."""

PAGE_BYTES = 2**22
"""Bytes of bodies and hashes after which a page ends early; far more than 200 events of a server have."""

_EXPECTED = re.compile(r"(\d{1,19}):([0-9a-fA-F]{64})", re.ASCII)

T = TypeVar("T")


class FindingKind(StrEnum):
    """What kind of problem a finding is."""

    MISSING = "missing"
    HASH = "hash"
    ORDER = "order"
    EVENT = "event"
    PROJECTIONS = "projections"
    SCHEMA = "schema"
    DAMAGED = "damaged"
    EXPECTATION = "expectation"
    SIGNATURE = "signature"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Finding:
    """The first problem of a ledger or file: its position and description."""

    position: int
    problem: str
    kind: FindingKind = field(default=FindingKind.HASH, compare=False)


class VerificationError(Exception):
    """Ends a verification with its finding."""

    def __init__(self, position: int, problem: str, kind: FindingKind) -> None:
        super().__init__(problem)
        self.finding = Finding(position, problem, kind)


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying a ledger: the last proved event's position and hash.

    Attributes:
        finding: the first problem, or None.
        compared: False without stored projections, or if another release's folds made them: then they are
            rebuilt before use.
        hashes: the hashes at the watched positions.
        remarks: facts about loads for an auditor that are no findings, at most `MAX_REMARKS`.
    """

    position: int
    hash: bytes
    finding: Finding | None
    compared: bool = True
    hashes: Mapping[int, bytes] = field(default_factory=dict, compare=False)
    remarks: Sequence[Remark] = ()

    @property
    def verified(self) -> bool:
        return self.finding is None


def compare_hash(expected: Anchor, found: bytes) -> Finding | None:
    """Return a finding if the hash at the expected position differs."""
    if found == expected.hash:
        return None
    problem = f"the hash is {found.hex()}, {expected.hash.hex()} was expected"
    return Finding(expected.position, problem, FindingKind.EXPECTATION)


def parse_expected(text: str) -> Anchor:
    """Parse `POSITION:HASH`.

    Raises:
        ValueError: the text is not of that form.
    """
    match = _EXPECTED.fullmatch(text)
    if match is None:
        raise ValueError("Must be POSITION:HASH, the hash in 64 hexadecimal digits.")
    return Anchor(int(match[1]), bytes.fromhex(match[2]))


class CheckedFold:
    """A fold of events that checks each one before it applies it.

    Args:
        start: the position and hash after which the events begin.
        watched: positions whose hashes are returned.
        applies: whether events are also applied: those of a forged file might take any amount of memory.

    Attributes:
        hashes: the hashes at the watched positions so far.
        stored: the stored projections, compared during the fold, or None; set it before `follow`.
        policy: checks loads against the rules of their time, if events are applied.
    """

    def __init__(self, start: Anchor, watched: Iterable[int] = (), *, applies: bool = True) -> None:
        self.position, self.hash, self.recorded_at = start.position, start.hash, ""
        self.stored: StoredProjections | None = None
        self.entities = Entities()
        self._apply = self.entities.apply if applies else lambda _: None
        self.policy = PolicyAudit(self.entities)
        self._checks = self.policy.checks if applies else {}
        self._canonical = CanonicalCheck()
        self._ids = KnownIds()
        self._changes = list[tuple[Event, Collection[Model], Iterable[Transition]]]()
        self.hashes = {start.position: start.hash}
        self._watched = sorted({each for each in watched if each > start.position}, reverse=True)

    def follow(self, rows: Iterable[RawRow]) -> Finding | None:
        """Read the rows of the log and return the first problem, or None; raise errors of reading."""
        for page in _pages(rows):
            hashed, finding = _take_until_problem(self._hash_rows(page), None)
            events, finding = _take_until_problem(self._read(hashed), finding)
            if (new := self._ids.add([event.id for event in events])) < len(events):
                problem = f"an event before has its id, {events[new].id!r:.100}"
                events, finding = events[:new], Finding(events[new].position, problem, FindingKind.EVENT)
            ended, finding = _take_until_problem(
                self._fold_events(zip(hashed, events, strict=False)), finding
            )
            if self.stored is not None:
                for job in ended:
                    self.stored.jobs.compare(job)
                for change in self._changes:
                    self.stored.history.compare(*change)
            self._changes.clear()
            while self._watched and self._watched[-1] <= self.position:
                row = hashed[self._watched[-1] - hashed[0][0]]
                self.hashes[self._watched.pop()] = row[2]
            if finding is not None:
                return finding
        return None

    def _hash_rows(self, page: Iterable[RawRow]) -> Iterator[RawRow]:
        """Yield rows that follow one another, with the hash of the previous hash and the body."""
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

    def _read(self, rows: Iterable[RawRow]) -> Iterator[Event]:
        """Yield the events that are in the canonical form."""
        holds = self._canonical.holds
        for position, body, _ in rows:
            try:
                event = decode_event(body)
            except Exception as error:  # noqa: BLE001 - a forged body may raise anything
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

    def _fold_events(self, found: Iterable[tuple[RawRow, Event]]) -> Iterator[Job]:
        apply, models, checks = self._apply, self.entities.models, self._checks
        for (position, _, digest), event in found:
            if event.recorded_at < self.recorded_at:
                raise VerificationError(
                    position, "it was recorded before the one before it", FindingKind.ORDER
                )
            before, check = models.get(event.model_id or ""), checks.get(type(event.data))
            try:
                problem = None if check is None else check(event, event.data)
                ended = apply(event) if problem is None else None
            except Exception as error:  # noqa: BLE001 - as above
                raise VerificationError(
                    position, f"the body is not an event: {error!r}", FindingKind.EVENT
                ) from None
            if problem is not None:
                raise VerificationError(position, problem, FindingKind.POLICY)
            self.position, self.hash, self.recorded_at = position, digest, event.recorded_at
            if type(event.data) in OF_NO_MODEL:
                common = self.entities.common
                self._changes.append((event, common.models.values(), common.transitions))
            elif (after := models.get(event.model_id or "")) is not before and after is not None:
                self._changes.append((event, (after,), ()))
            if ended is not None:
                yield ended

    def result(self, finding: Finding | None, *, compared: bool) -> Verification:
        remarks = tuple(self.policy.remarks)
        return Verification(self.position, self.hash, finding, compared, self.hashes, remarks)


def _pages(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield the rows in pages; if reading fails, first yield the rows read before."""
    page, size = list[RawRow](), 0
    try:
        for row in rows:
            page.append(row)
            size += getsizeof(row[1]) + getsizeof(row[2])
            if len(page) == EVENTS_PER_STEP or size > PAGE_BYTES:
                yield page
                page, size = [], 0
    except Exception:
        yield page
        raise
    yield page


def _take_until_problem(step: Iterator[T], later: Finding | None) -> tuple[list[T], Finding | None]:
    """Return a step's results up to its first problem, and that problem or else that of the step before."""
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
    """Verify the ledger at `path`, read-only and in one snapshot; works beside a running server.

    Memory grows with the models and unended jobs, not with the log. Raises as `open_proof_reader` does.
    """
    with open_proof_reader(path) as ledger:
        return verify_ledger(ledger)


def verify_ledger(ledger: ProofReader, watched: Iterable[int] = ()) -> Verification:
    """Verify a ledger; for `watched` see `CheckedFold`."""
    fold, finding, compared = CheckedFold(Anchor(), watched), None, True
    try:
        with storage_errors():
            compared = is_current(ledger.connection)
            if compared:
                fold.stored = StoredProjections(ledger.connection)
            finding = fold.follow(ledger.rows())
            if finding is None:
                _check_projections(fold)
                if ledger.is_cut_off():
                    problem = "the file is damaged: its end is missing"
                    finding = Finding(fold.position, problem, FindingKind.DAMAGED)
    except VerificationError as bad:
        finding = bad.finding
    except StorageDamaged as error:
        finding = Finding(fold.position + 1, f"the file is damaged: {error}", FindingKind.DAMAGED)
    return fold.result(finding, compared=compared)


def _check_projections(fold: CheckedFold) -> None:
    stored = fold.stored
    if stored is not None and (difference := stored.find_difference(fold.position, fold.entities)):
        raise VerificationError(*difference, FindingKind.PROJECTIONS)
