"""Verification of a ledger: the hash chain, the events, the base, and the stored projections against a fold.

The log is read once, in order. The result names the first position that is wrong, as a `Finding`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from events.codec import GENESIS, CanonicalCheck, decode_event
from events.jobs import Job
from events.sqlite.projections import NEVER, StoredProjections
from events.sqlite.proof import ProofReader, open_proof_reader, storage_errors
from events.sqlite.queries import list_archives
from events.sqlite.snapshots import is_base_state_unchanged, read_base_state
from events.sqlite.storage import is_current
from events.state import Entities, State
from events.storage import ArchiveRecord, RawRow, StorageDamaged, StorageError
from events.types import Anchor, Event

PAGE = 200
"""Events that take each step together: the processor's caches then hold the code of one step, not of all. It
takes a sixth less time than event by event (measured)."""

_EXPECTED = re.compile(r"(\d{1,19}):([0-9a-fA-F]{64})", re.ASCII)

T = TypeVar("T")


class FindingKind(StrEnum):
    """What kind of problem a finding is."""

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
    """The first problem of a ledger or file: its position, and what is wrong there."""

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
    """The result of verifying a ledger: the number of proved events, and the last one's position and hash.

    Attributes:
        finding: the first problem; None if there is none.
        compared: False if there are no stored projections to compare, or if another release's folds made
            them: then they are rebuilt before anything uses them.
    """

    events: int
    position: int
    hash: bytes
    finding: Finding | None
    compared: bool = True

    @property
    def verified(self) -> bool:
        return self.finding is None


def compare_hash(expected: Anchor, found: bytes) -> Finding | None:
    """Return a finding if the hash at the expected position is another."""
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
        raise ValueError(f"{text[:100]!r} is not POSITION:HASH, the hash in 64 hexadecimal digits")
    return Anchor(int(match[1]), bytes.fromhex(match[2]))


class CheckedFold:
    """A fold of the log that checks each event before it applies it.

    Args:
        base: of the log.
        state: at the base; its ended jobs are compared at once.
        stored: the stored projections to compare with as the fold reaches them, or None.
    """

    def __init__(self, base: Anchor, state: State, stored: StoredProjections | None = None) -> None:
        self._base = base
        self.position, self.hash, self._recorded_at = base.position, base.hash, ""
        self.stored = stored
        known = sorted(state.jobs.values(), key=lambda job: job.created_position)
        unended = (job for job in known if not job.ended)
        self.entities = Entities(state.models.values(), unended, state.tokens.values(), state.nodes.values())
        self._canonical = CanonicalCheck()
        self._touched = set[str | None]() if stored is None else stored.snapshots.touched
        self._compare_at = NEVER if stored is None else stored.snapshots.next
        if stored is not None:
            for job in known:
                if job.ended:
                    stored.jobs.compare(job)
            if base.position == self._compare_at:
                self._compare_snapshot(stored)

    def follow(self, rows: Iterable[RawRow]) -> Finding | None:
        """Read the rows of the log up to the first problem, and return it; raise what reading them raises."""
        for page in _pages(rows):
            hashed, finding = _take_until_problem(self._hash_rows(page), None)
            events, finding = _take_until_problem(self._read(hashed), finding)
            ended, finding = _take_until_problem(
                self._fold_events(zip(hashed, events, strict=False)), finding
            )
            if self.stored is not None:
                for job in ended:
                    self.stored.jobs.compare(job)
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
            if position == self._compare_at and self.stored is not None:
                self._compare_snapshot(self.stored)
            if ended is not None:
                yield ended

    def result(self, finding: Finding | None, *, compared: bool) -> Verification:
        events = self.position - self._base.position
        return Verification(events, self.position, self.hash, finding, compared)

    def _compare_snapshot(self, stored: StoredProjections) -> None:
        stored.snapshots.compare(self.position, self.entities)
        self._compare_at = stored.snapshots.next


def _pages(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield the rows in pages; if reading fails, first yield the rows before that."""
    page = list[RawRow]()
    try:
        for row in rows:
            page.append(row)
            if len(page) == PAGE:
                yield page
                page = []
    except Exception:
        yield page
        raise
    yield page


def _take_until_problem(step: Iterator[T], later: Finding | None) -> tuple[list[T], Finding | None]:
    """Return what a step yields up to its first problem, and that problem, else that of the step before."""
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


def verify_ledger(ledger: ProofReader) -> Verification:
    base = ledger.base()
    if base is None:
        return Verification(0, 0, GENESIS, Finding(0, "the base of the chain is missing", FindingKind.BASE))
    fold = CheckedFold(base, State(base.position))
    finding, compared = None, True
    try:
        with storage_errors():
            compared = is_current(ledger.connection)
            fold = _fold_at_base(ledger, base, compared=compared)
            finding = fold.follow(ledger.rows())
            if finding is None:
                _check_base(ledger, base)
                _check_projections(fold)
                _check_length(ledger, fold.position)
    except VerificationError as bad:
        finding = bad.finding
    except StorageDamaged as error:
        finding = Finding(fold.position + 1, f"the file is damaged: {error}", FindingKind.DAMAGED)
    return fold.result(finding, compared=compared)


def _fold_at_base(ledger: ProofReader, base: Anchor, *, compared: bool) -> CheckedFold:
    """Return the fold at the base; `compared` says whether it compares the stored projections."""
    try:
        with storage_errors():
            state = read_base_state(ledger.connection, base.position)
            stored = StoredProjections(ledger.connection, base.position) if compared else None
            return CheckedFold(base, state, stored)
    except StorageError:
        raise
    except Exception as error:  # noqa: BLE001 - a forged state may raise anything
        problem = f"the stored state at the base is damaged: {error!r}"
        raise VerificationError(base.position, problem, FindingKind.BASE) from None


def _check_base(ledger: ProofReader, base: Anchor) -> None:
    """Check that the listed archives lead from the first event to the base, and the stored state there."""
    check_listed(list_archives(ledger.connection), base)
    if not is_base_state_unchanged(ledger.connection, base.position):
        problem = "the stored state at the base was changed"
        raise VerificationError(base.position, problem, FindingKind.BASE)


def check_listed(archives: Iterable[ArchiveRecord], base: Anchor) -> None:
    """Check that archives, in order, lead from the first event to the base.

    Raises:
        VerificationError: they do not.
    """
    end = Anchor()
    for each in archives:
        if each.first_position != end.position + 1:
            problem = f"the listed archives do not have position {end.position + 1}"
            raise VerificationError(base.position, problem, FindingKind.BASE)
        if type(each.last_position) is not int:  # a forged ledger may have any type
            problem = "the listed archives do not end with a position"
            raise VerificationError(base.position, problem, FindingKind.BASE)
        end = Anchor(each.last_position, each.hash)
    if end != base:
        problem = f"the listed archives end at position {end.position}, the log begins after {base.position}"
        raise VerificationError(base.position, f"{problem}, or with another hash", FindingKind.BASE)


def _check_projections(fold: CheckedFold) -> None:
    stored = fold.stored
    if stored is not None and (difference := stored.find_difference(fold.position, fold.entities)):
        raise VerificationError(*difference, FindingKind.PROJECTIONS)


def _check_length(ledger: ProofReader, position: int) -> None:
    if ledger.is_cut_off():
        raise VerificationError(position, "the file is damaged: its end is missing", FindingKind.DAMAGED)
