"""What is behind a ledger's base: its archives, proved to lead there, and folded to what they came to.

They are read twice where they are folded: first it is proved that they lead to the base, so that what
somebody made up is never folded, whose models and jobs might need any memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from events.audit.exportreader import ExportReader, FileAudit, audit_files, read_lines
from events.audit.files import printable_name
from events.audit.verify import Expected, Finding, FindingKind
from events.codec import decode_event
from events.errors import ArchiveMissing, LedgerDamaged, LogUnavailable
from events.jobs import Job
from events.models import Model
from events.sqlite.queries import LogBase, Row, as_bytes
from events.sqlite.snapshots import jobs_behind
from events.state import Entities, State
from events.types import Event


@dataclass(frozen=True, slots=True)
class ArchivedRange:
    """Where events went that the log no longer has: their positions, and the name the file had then."""

    first_position: int
    last_position: int
    file: str

    def __str__(self) -> str:
        """Say it to people."""
        return f"positions {self.first_position} to {self.last_position}, {self.file!r}"


def list_archives(connection: sqlite3.Connection) -> tuple[ArchivedRange, ...]:
    """Return what a ledger that has a base says of its archives, the first one first."""
    found = connection.execute(
        "SELECT first_position, last_position, CAST(file AS BLOB) FROM archives ORDER BY last_position"
    )
    return tuple(
        ArchivedRange(first, last, (file or b"").decode(errors="replace")) for first, last, file in found
    )


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
    """What archives prove of what is behind a base.

    Attributes:
        files: in the order of their positions; up to the first that does not verify as they were given.
        is_folded: whether they are all there are, and what they came to is what the ledger has.
        finding: the first problem, if any.
        at: the file that it is about.
    """

    files: tuple[FileAudit, ...]
    is_folded: bool = False
    finding: Finding | None = None
    at: Path | None = None

    @property
    def after(self) -> LogBase:
        """From where on the events are proved."""
        return self.files[0].after


def check_archives(
    paths: Sequence[Path],
    base: LogBase,
    told: Sequence[ArchivedRange] = (),
    *,
    key: str | None = None,
    expected: Expected | None = None,
) -> ArchiveProof:
    """Verify archives, in whatever order they are given, and that together they lead to the base of a log.

    Args:
        paths: of the archives.
        base: with which the log begins.
        told: what the ledger says of its archives, to name those that are missing.
        key: the id of the key that has to have signed them, where that is known.
        expected: what somebody kept, if it is in one of them.

    Raises:
        ArchiveMissing: `archive_missing`, they do not follow one another, or do not end with the base.
        LogUnavailable: `log_unavailable`, one is no regular file.
        OSError: one cannot be read.
    """
    files = audit_files(paths, key=key, expected=expected)
    for number, file in enumerate(files, 1):
        if file.finding is not None:
            return ArchiveProof(tuple(files[:number]), finding=file.finding, at=file.path)
    files.sort(key=lambda file: (file.after.position, file.proved.position))
    for earlier, later in pairwise(files):
        _refuse_gap(earlier, later.after.position, printable_name(later.path), told)
    _refuse_gap(files[-1], base.position, "the log", told)
    return _seams(files, base)


def _refuse_gap(file: FileAudit, goes_on_after: int, what: str, told: Sequence[ArchivedRange]) -> None:
    end, name = file.proved.position, printable_name(file.path)
    if end < goes_on_after:
        known = next((f", the ledger says: {each}" for each in told if each.last_position > end), "")
        raise ArchiveMissing(
            f"positions {end + 1} to {goes_on_after} are missing: {name} ends at {end}, and {what} begins "
            f"after {goes_on_after}; name the archive that has them, too{known}"
        )
    if end > goes_on_after:
        raise ArchiveMissing(
            f"{name} goes on to position {end}, and {what} begins after {goes_on_after} already: name only "
            "archives that follow one another, each once"
        )


def _seams(files: list[FileAudit], base: LogBase) -> ArchiveProof:
    found = ArchiveProof(tuple(files))
    for earlier, later in pairwise(files):
        if earlier.proved != later.after:
            problem = f"its hash there is not that with which {printable_name(earlier.path)} ends"
            return replace(
                found, finding=Finding(later.after.position, problem, FindingKind.BASE), at=later.path
            )
    if files[-1].proved != base:
        finding = Finding(
            base.position, "its last hash is not that with which the log begins", FindingKind.BASE
        )
        return replace(found, finding=finding, at=files[-1].path)
    return found


def compare_with_base(behind: ArchiveProof, stored: State) -> ArchiveProof:
    """Fold archives that lead to the base and compare with the state that is stored there.

    Those that do not begin with the first event are left as they are: nobody can say what was before.

    Raises:
        LogUnavailable: `log_unavailable`, a file was changed meanwhile.
        OSError: likewise.
    """
    if behind.finding is not None or behind.after.position != 0:
        return behind
    try:
        problem = _difference(behind.files, stored)
    except InvalidArchive as bad:
        return replace(behind, finding=bad.finding, at=bad.at)
    if problem is None:
        return replace(behind, is_folded=True)
    position = behind.files[-1].proved.position
    return replace(behind, finding=Finding(position, problem, FindingKind.BASE))


def _difference(files: Sequence[FileAudit], stored: State) -> str | None:
    """Return in words what is stored otherwise than the archives give."""
    ended_there = {job.id for job in stored.jobs.values() if job.ended}
    state, ended = fold_archives(files, wanted=ended_there)
    for model_id in sorted(state.models.keys() | stored.models.keys()):
        if _text(state.models.get(model_id)) != _text(stored.models.get(model_id)):
            return f"the state stored there is not what the archives give, at the model {model_id!r}"
    behind = jobs_behind(state)
    jobs = {job.id: job for job in state.unended()}
    jobs |= {job_id: job for job_id, job in ended.items() if job_id in behind}
    if unknown := behind - jobs.keys():  # an event may name a job that nobody requested: that is none
        jobs |= fold_archives(files, wanted=unknown)[1]
    for job_id in sorted(jobs.keys() | stored.jobs.keys()):
        if _text(jobs.get(job_id)) != _text(stored.jobs.get(job_id)):
            return f"the state stored there is not what the archives give, at the job {job_id!r}"
    return None


def _text(entity: Job | Model | None) -> bytes | None:
    return None if entity is None else as_bytes(entity)


def fold_archives(
    files: Sequence[FileAudit],
    *,
    wanted: Container[str] = (),
    ends: Callable[[Event], bool] = lambda _: False,
) -> tuple[State, dict[str, Job]]:
    """Fold archives that begin with the first event.

    Args:
        files: that were proved to follow one another.
        wanted: the ids of jobs that are returned where they have ended.
        ends: whether an event is beyond what is asked for.

    Returns:
        The live state after the last event before the end, and the wanted jobs.
    """
    entities, ended, position, recorded_at = Entities(), dict[str, Job](), 0, ""
    last: Path | None = None
    for file, row in _rows(files):
        if last is not None:  # read to its end all the same, to see whether it is the file that was proved
            if file != last:
                break
            continue
        try:
            event = decode_event(row.body)
            if ends(event):
                last = file
                continue
            job = entities.apply(event)
        except Exception as error:  # noqa: BLE001 - whatever a forged body does to us is a finding
            problem = f"the body is not an event: {error!r}"
            raise InvalidArchive(Finding(row.position, problem, FindingKind.EVENT), file) from None
        if event.recorded_at < recorded_at:
            problem = "it was recorded before the one before it"
            raise InvalidArchive(Finding(row.position, problem, FindingKind.ORDER), file)
        position, recorded_at = row.position, event.recorded_at
        if job is not None and job.id in wanted:
            ended[job.id] = job
    return State(position, recorded_at, entities.models, entities.jobs), ended


def find_archived_hash(files: Sequence[FileAudit], position: int) -> bytes | None:
    """Return the hash at a position as archives have it that were proved, or None where none has it.

    Raises:
        LogUnavailable: `log_unavailable`, one was changed meanwhile.
        OSError: likewise.
    """
    for file in files:
        if file.after.position == position:
            return file.after.hash
        if file.after.position < position <= file.proved.position:
            (digest,) = [row.hash for _, row in _rows([file]) if row.position == position]
            return digest
    return None


def _rows(files: Sequence[FileAudit]) -> Iterator[tuple[Path, Row]]:
    """Yield the events again, each with its file; at the end of a file it is seen whether it changed."""
    for file in files:
        changed = LogUnavailable(f"{printable_name(file.path)} was changed while it was read: try again")
        try:
            reader = ExportReader(read_lines(file.path), known=True)
            yield from ((file.path, row) for row in reader)
        except LedgerDamaged:
            raise changed from None
        if (reader.after, LogBase(reader.position, reader.hash)) != (file.after, file.proved):
            raise changed
