"""Archives of a ledger: proof that they lead to its base, and replay of their events before the log.

Archives are read twice: the first reading proves by hashes that they lead to the base, and only the second
one folds them. So a forged file is never folded, whose models and jobs might take any memory.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from events.audit.exportreader import ExportReader, FileAudit, audit_file, read_lines
from events.audit.verify import Finding, FindingKind
from events.clock import format_timestamp, utc_now
from events.codec import decode_event
from events.errors import Archived, ArchiveMissing, LedgerDamaged, LogUnavailable, NothingThere
from events.files import printable_name
from events.jobs import Job
from events.sqlite.liveness import (
    Liveness,
    add_nodes,
    find_server_event,
    liveness_between,
    read_node_events,
)
from events.sqlite.queries import as_bytes, list_archives, read_base
from events.sqlite.schema import Connection, begin_reading
from events.sqlite.snapshots import jobs_behind
from events.sqlite.storage import FOLDS
from events.sqlite.timetravel import Moment, find_moment, fold_onto, parse_time, state_at
from events.state import Entities, State
from events.storage import ArchiveRecord, Row
from events.types import OF_NODES, OF_SERVER, Anchor, Event


class InvalidArchive(LedgerDamaged):
    """An archive does not verify."""

    def __init__(self, finding: Finding, at: Path) -> None:
        super().__init__(
            f"{printable_name(at)} does not verify: position {finding.position}: {finding.problem}"
        )
        self.finding = finding
        self.at = at


@dataclass(frozen=True, slots=True)
class ArchiveProof:
    """What archives prove of the events up to a base.

    Attributes:
        files: in the order of their positions; after a finding, as they were given, up to the invalid one.
        is_folded: whether they are complete, and fold to the state that the ledger has at its base.
        is_outdated: whether they are complete, and the state at the base is another one, made by other folds.
        finding: the first problem, if any.
        at: the file with the problem.
    """

    files: tuple[FileAudit, ...]
    is_folded: bool = False
    is_outdated: bool = False
    finding: Finding | None = None
    at: Path | None = None

    @property
    def after(self) -> Anchor:
        return self.files[0].after


def check_archives(
    paths: Sequence[Path],
    base: Anchor,
    listed: Sequence[ArchiveRecord] = (),
    *,
    key: str | None = None,
    expected: Anchor | None = None,
) -> ArchiveProof:
    """Verify archives, and check that together they lead to the base of a log.

    The paths may have any order; `listed` are the archives that the ledger lists, to name those that are
    missing. `key` and `expected` are those of `audit_file`.

    Raises:
        ArchiveMissing: `archive_missing`, the archives do not follow one another, or do not end at the base.
        LogUnavailable: `log_unavailable`, one is not a regular file.
    """
    files = [audit_file(path, key=key, expected=expected) for path in paths]
    for number, file in enumerate(files, 1):
        if file.finding is not None:
            return ArchiveProof(tuple(files[:number]), finding=file.finding, at=file.path)
    files.sort(key=lambda file: (file.after.position, file.proved.position))
    for earlier, later in pairwise(files):
        _refuse_gap(earlier, later.after.position, printable_name(later.path), listed)
    _refuse_gap(files[-1], base.position, "the log", listed)
    return _check_seams(files, base)


def _refuse_gap(file: FileAudit, goes_on_after: int, what: str, listed: Sequence[ArchiveRecord]) -> None:
    end, name = file.proved.position, printable_name(file.path)
    if end < goes_on_after:
        known = next((f", listed as: {each}" for each in listed if each.last_position > end), "")
        raise ArchiveMissing(
            f"positions {end + 1} to {goes_on_after} are missing: {name} ends at {end}, and {what} begins "
            f"after {goes_on_after}; give the archive that has them, too{known}"
        )
    if end > goes_on_after:
        raise ArchiveMissing(
            f"{name} goes on to position {end}, and {what} begins after {goes_on_after} already: give only "
            "archives that follow one another, each once"
        )


def _check_seams(files: list[FileAudit], base: Anchor) -> ArchiveProof:
    found = ArchiveProof(tuple(files))
    for earlier, later in pairwise(files):
        if earlier.proved != later.after:
            problem = f"its hash there is not the last one of {printable_name(earlier.path)}"
            return replace(
                found, finding=Finding(later.after.position, problem, FindingKind.BASE), at=later.path
            )
    if files[-1].proved != base:
        finding = Finding(
            base.position, "its last hash is not the one after which the log begins", FindingKind.BASE
        )
        return replace(found, finding=finding, at=files[-1].path)
    return found


def compare_with_base(behind: ArchiveProof, stored: State, folds: int) -> ArchiveProof:
    """Fold archives that lead to the base, and compare with the state that is stored there, made by `folds`.

    Archives that do not begin with the first event cannot be folded, and are not compared.

    Raises:
        LogUnavailable: `log_unavailable`, a file was changed meanwhile.
    """
    if behind.finding is not None or behind.after.position != 0:
        return behind
    try:
        problem = _find_difference(behind.files, stored)
    except InvalidArchive as bad:
        return replace(behind, finding=bad.finding, at=bad.at)
    if problem is None:
        return replace(behind, is_folded=True)
    if folds != FOLDS:  # it stays as it was archived
        return replace(behind, is_outdated=True)
    position = behind.files[-1].proved.position
    return replace(behind, finding=Finding(position, problem, FindingKind.BASE))


def _find_difference(files: Sequence[FileAudit], stored: State) -> str | None:
    ended_there = {job.id for job in stored.jobs.values() if job.ended}
    state, ended = fold_archives(files, wanted=ended_there)
    behind = jobs_behind(state)
    jobs = {job.id: job for job in state.unended()}
    jobs |= {job_id: job for job_id, job in ended.items() if job_id in behind}
    if unknown := behind - jobs.keys():  # an event may name a job that was never requested
        jobs |= fold_archives(files, wanted=unknown)[1]
    for kind, given, there in (
        ("model", state.models, stored.models),
        ("job", jobs, stored.jobs),
        ("token", state.tokens, stored.tokens),
        ("node", state.nodes, stored.nodes),
    ):
        for key in sorted(given.keys() | there.keys()):
            one, other = given.get(key), there.get(key)
            if (one and as_bytes(one)) != (other and as_bytes(other)):
                return f"the state stored there is not what the archives give, at the {kind} {key!r}"
    return None


def fold_archives(
    files: Sequence[FileAudit],
    *,
    wanted: Container[str] = (),
    ends: Callable[[Event], bool] = lambda _: False,
) -> tuple[State, dict[str, Job]]:
    """Fold archives that begin with the first event.

    Args:
        files: proved to follow one another.
        wanted: the ids of ended jobs to return.
        ends: whether an event is beyond the end of the fold.

    Returns:
        The live state after the last event before the end, and the wanted jobs.
    """
    entities, ended, position, recorded_at = Entities(), dict[str, Job](), 0, ""
    last: Path | None = None
    for file, row in _rows(files):
        if last is not None:  # read on to the end of the file, to see whether it is the one that was proved
            if file != last:
                break
            continue
        try:
            event = decode_event(row.body)
            if ends(event):
                last = file
                continue
            job = entities.apply(event)
        except Exception as error:  # noqa: BLE001 - a forged body may raise anything
            problem = f"the body is not an event: {error!r}"
            raise InvalidArchive(Finding(row.position, problem, FindingKind.EVENT), file) from None
        if event.recorded_at < recorded_at:
            problem = "it was recorded before the one before it"
            raise InvalidArchive(Finding(row.position, problem, FindingKind.ORDER), file)
        position, recorded_at = row.position, event.recorded_at
        if job is not None and job.id in wanted:
            ended[job.id] = job
    state = State(
        position,
        recorded_at,
        entities.models,
        entities.jobs,
        tokens=entities.tokens,
        nodes=entities.nodes,
    )
    return state, ended


def find_archived_hash(files: Sequence[FileAudit], position: int) -> bytes | None:
    """Return the hash at a position of proved archives, or None if no archive has it.

    Raises:
        LogUnavailable: `log_unavailable`, a file was changed meanwhile.
    """
    for file in files:
        if file.after.position == position:
            return file.after.hash
        if file.after.position < position <= file.proved.position:
            (digest,) = [row.hash for _, row in _rows([file]) if row.position == position]
            return digest
    return None


def _rows(files: Sequence[FileAudit]) -> Iterator[tuple[Path, Row]]:
    """Yield the events again, each with its file; refuse a file that changed since its proof."""
    for file in files:
        changed = LogUnavailable(f"{printable_name(file.path)} was changed while it was read: try again")
        try:
            reader = ExportReader(read_lines(file.path), known=True)
            yield from ((file.path, row) for row in reader)
        except LedgerDamaged:
            raise changed from None
        if (reader.after, Anchor(reader.position, reader.hash)) != (file.after, file.proved):
            raise changed


def replay(ledger: Connection, until: str | None, archives: Sequence[Path] = ()) -> tuple[Moment, State]:
    """Fold the log anew, and return the live state at a moment, with the moment.

    Without archives the fold begins at the base, and a moment before that is refused.

    Args:
        ledger: a transaction begins in it.
        until: a position in digits, a time, or None for the head.
        archives: of the ledger, all of them, in any order.

    Raises:
        InvalidMoment: `invalid_parameter`.
        BeyondHead: `beyond_head`.
        Archived: `archived`, the moment is before the base, and no archives were given.
        ArchiveMissing: `archive_missing`, the archives do not lead from the first event to the base.
        LedgerDamaged: `ledger_damaged`, an archive does not verify.
        NothingThere: `nothing_there`, archives were given for a ledger without archived events.
        LogUnavailable: `log_unavailable`, a file cannot be read, or an event cannot be folded.
    """
    if not archives:
        begin_reading(ledger)
        moment = find_moment(ledger, until, format_timestamp(utc_now()))
        return moment, state_at(ledger, moment.position, from_base=True)
    proof = _prove_archives(ledger, archives)
    begin_reading(ledger)  # not earlier: it keeps the writer from beginning its write-ahead log anew
    if read_base(ledger) != proof.files[-1].proved:
        raise LogUnavailable("events were archived meanwhile: give that archive, too")
    try:
        moment = find_moment(ledger, until, format_timestamp(utc_now()))
    except Archived:
        return _replay_archives(ledger, proof, until or "")
    if moment.position == 0:
        return moment, State()
    state, _ = fold_archives(proof.files)
    if moment.recorded_at is None:
        moment = replace(moment, recorded_at=state.recorded_at)
    fold_onto(ledger, state, moment.position)
    return moment, state


def _prove_archives(ledger: Connection, archives: Sequence[Path]) -> ArchiveProof:
    base = read_base(ledger)
    if base.position == 0:
        raise NothingThere("this ledger has no archived events: leave --archive out")
    proof = check_archives(archives, base, list_archives(ledger))
    if proof.finding is not None:
        raise InvalidArchive(proof.finding, proof.at or proof.files[-1].path)
    if proof.after.position:
        raise ArchiveMissing(
            f"positions 1 to {proof.after.position} are missing: replay needs the archive that has them"
        )
    return proof


def _replay_archives(ledger: Connection, proof: ArchiveProof, until: str) -> tuple[Moment, State]:
    """Return the state at a moment before the base, or at the base itself."""
    time = None
    if until.isdigit():
        last = int(until)
        state, _ = fold_archives(proof.files, ends=lambda event: event.position > last)
    else:
        time = parse_time(until)
        state, _ = fold_archives(proof.files, ends=lambda event: event.recorded_at > time)
    server = _archived_liveness(ledger, proof.files, state.position, time)
    return Moment(state.position, state.recorded_at or None, time, server), state


def _archived_liveness(
    ledger: Connection, files: Sequence[FileAudit], position: int, time: str | None
) -> Liveness:
    """Return the liveness of the server, or of nodes, at a moment before the base."""
    before, after, of_nodes = None, find_server_event(ledger, 0, after=True), list[Event]()
    for _, row in _rows(files):
        if '"type":"Server' in row.body and isinstance((event := decode_event(row.body)).data, OF_SERVER):
            if row.position <= position:
                before = event
            elif after is None or row.position < after.position:
                after = event
        elif '"type":"Node' in row.body and isinstance((event := decode_event(row.body)).data, OF_NODES):
            of_nodes.append(event)
    server = liveness_between(before, after, time, is_first=position == 0)
    return add_nodes(server, (), [*of_nodes, *read_node_events(ledger)], position, time)
