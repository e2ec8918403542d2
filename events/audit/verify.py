"""Verification of a ledger: the chain, the events, the base, its loads, and the stored projections.

The log is read once, in order. The result names the first position that is wrong, as a `Finding`.
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

from events.audit.policy import PolicyAudit, Remark
from events.codec import GENESIS, CanonicalCheck, decode_event
from events.jobs import Job
from events.models import Model
from events.presence import Transition
from events.sqlite.bases import entities_of, read_stored_base, state_at_base
from events.sqlite.projections import StoredProjections
from events.sqlite.proof import KnownIds, ProofReader, open_proof_reader, storage_errors
from events.sqlite.queries import find_base
from events.sqlite.storage import is_current
from events.state import OF_NO_MODEL, Entities, State
from events.storage import RawRow, Row, StorageDamaged, StoredBase
from events.types import Anchor, Event

PAGE = 200
"""Events that take each step together: the processor's caches then hold the code of one step, not of all. It
takes a sixth less time than event by event (measured)."""

PAGE_BYTES = 2**22
"""Bytes of bodies and hashes after which a step takes fewer events: far more than 200 that a server
wrote have."""

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
    POLICY = "policy"


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
        hashes: of the watched positions.
        remarks: what an auditor should know of loads though it is no finding, up to `MAX_REMARKS`.
    """

    events: int
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
        raise ValueError("Must be POSITION:HASH, the hash in 64 hexadecimal digits.")
    return Anchor(int(match[1]), bytes.fromhex(match[2]))


class CheckedFold:
    """A fold of events that checks each one before it applies it.

    Args:
        start: the position and hash after which the events begin.
        state: there.
        watched: positions whose hashes are wanted.
        applies: whether events are applied, not only checked: those of a forged file might take any memory.

    Attributes:
        hashes: of the watched positions that the fold has passed.
        stored: the stored projections to compare with as the fold reaches them, or None.
        policy: checks loads against the rules of their day; not of events that are not applied.
    """

    def __init__(
        self, start: Anchor, state: State, watched: Iterable[int] = (), *, applies: bool = True
    ) -> None:
        self.position, self.hash, self.recorded_at = start.position, start.hash, ""
        self.stored: StoredProjections | None = None
        self.entities = Entities(state.models.values(), state.unended(), state.registers)
        self._apply = self.entities.apply if applies else _ignore
        self.policy = PolicyAudit(self.entities)
        self._checks = self.policy.checks if applies else {}
        self._behind = dict[str, list[Job]]()
        for job in state.jobs.values():
            if job.ended:
                self._keep_if_behind(job)
        self._canonical = CanonicalCheck()
        self._ids = KnownIds()
        self._changes = list[tuple[Event, Collection[Model], Iterable[Transition]]]()
        self.hashes = {start.position: start.hash}
        self._watched = sorted({each for each in watched if each > start.position}, reverse=True)

    def compare_with(self, stored: StoredProjections) -> None:
        """Compare from here on with stored projections, which begin at this position."""
        self.stored = stored
        stored.history.compare_base(self.position, self.entities)
        for job in self.state().jobs.values():
            if job.ended:
                stored.jobs.compare(job)

    def state(self) -> State:
        """Return the live state, with the ended loads that its models serve from or return to."""
        models = dict(self.entities.models)
        behind = {
            job.id: job
            for model in models.values()
            for job in self._behind.get(model.id, ())
            if job.id in model.loads_behind
        }
        jobs = sorted((behind | self.entities.jobs).values(), key=lambda job: job.created_position)
        return State(
            self.position,
            self.recorded_at,
            models,
            {job.id: job for job in jobs},
            registers=self.entities.registers,
        )

    def _keep_if_behind(self, job: Job) -> None:
        model = self.entities.models.get(job.model_id)
        if model is not None and job.id in model.loads_behind:
            kept = self._behind.get(model.id, ())
            self._behind[model.id] = [*(each for each in kept if each.id in model.loads_behind), job]

    def follow(self, rows: Iterable[RawRow]) -> Finding | None:
        """Read the rows of the log up to the first problem, and return it; raise what reading them raises."""
        for page in _pages(rows):
            hashed, finding = _take_until_problem(self._hash_rows(page), None)
            events, finding = _take_until_problem(self._read(hashed), finding)
            if (new := self._ids.add([event.id for event in events])) < len(events):
                problem = f"an event before has its id, {events[new].id!r:.100}"
                events, finding = events[:new], Finding(events[new].position, problem, FindingKind.EVENT)
            ended, finding = _take_until_problem(
                self._fold_events(zip(hashed, events, strict=False)), finding
            )
            for job in ended:
                self._keep_if_behind(job)
                if self.stored is not None:
                    self.stored.jobs.compare(job)
            if self.stored is not None:
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

    def result(self, base: Anchor, finding: Finding | None, *, compared: bool) -> Verification:
        """Return the result for a ledger with this base."""
        events = max(0, self.position - base.position)
        return Verification(
            events, self.position, self.hash, finding, compared, self.hashes, tuple(self.policy.remarks)
        )


def _ignore(_: Event) -> None:
    """Apply no event."""


def raw_rows(rows: Iterable[Row]) -> Iterator[RawRow]:
    return ((row.position, row.body.encode(), row.hash) for row in rows)


def _pages(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield the rows in pages; if reading fails, first yield the rows before that."""
    page, size = list[RawRow](), 0
    try:
        for row in rows:
            page.append(row)
            size += getsizeof(row[1]) + getsizeof(row[2])
            if len(page) == PAGE or size > PAGE_BYTES:
                yield page
                page, size = [], 0
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


def verify_ledger(
    ledger: ProofReader, fold: CheckedFold | None = None, watched: Iterable[int] = ()
) -> Verification:
    """Verify a ledger; `fold` and `watched` are those of `begin_at_base`."""
    base = find_base(ledger.connection)
    if base is None:
        return Verification(0, 0, GENESIS, Finding(0, "the base of the chain is missing", FindingKind.BASE))
    finding, compared = None, True
    try:
        with storage_errors():
            compared = is_current(ledger.connection)
            fold = begin_at_base(read_stored_base(ledger.connection), fold, watched)
            if compared:
                fold.compare_with(StoredProjections(ledger.connection))
            finding = fold.follow(ledger.rows())
            if finding is None:
                _check_projections(fold)
                _check_length(ledger, fold.position)
    except VerificationError as bad:
        finding = bad.finding
    except StorageDamaged as error:
        position = base.position if fold is None else fold.position
        finding = Finding(position + 1, f"the file is damaged: {error}", FindingKind.DAMAGED)
    fold = fold or CheckedFold(base, State(base.position))
    return fold.result(base, finding, compared=compared)


def begin_at_base(
    stored: StoredBase, fold: CheckedFold | None = None, watched: Iterable[int] = ()
) -> CheckedFold:
    """Return the fold at the base of a ledger, after a check of the state that is stored there.

    Args:
        stored: the base of the ledger.
        fold: of all events up to there, which has to give that state, or None: then the fold begins with it.
        watched: for a fold that begins.

    Raises:
        VerificationError: the stored state was changed, or is not what the events give.
    """
    position = stored.base.position
    if not stored.is_unchanged:
        raise VerificationError(position, "the stored state at the base was changed", FindingKind.BASE)
    if fold is None:
        try:
            return CheckedFold(stored.base, state_at_base(stored), watched)
        except Exception as error:  # noqa: BLE001 - a forged state may raise anything
            problem = f"the stored state at the base is damaged: {error!r}"
            raise VerificationError(position, problem, FindingKind.BASE) from None
    for each in sorted({*entities_of(fold.state())} ^ {*stored.entities}):
        problem = f"the state stored there is not what the archives give, at the {each.kind} {each.key!r}"
        raise VerificationError(position, problem, FindingKind.BASE)
    return fold


def _check_projections(fold: CheckedFold) -> None:
    stored = fold.stored
    if stored is not None and (difference := stored.find_difference(fold.position, fold.entities)):
        raise VerificationError(*difference, FindingKind.PROJECTIONS)


def _check_length(ledger: ProofReader, position: int) -> None:
    if ledger.is_cut_off():
        raise VerificationError(position, "the file is damaged: its end is missing", FindingKind.DAMAGED)
