"""What can be proved of a ledger's file: SQLite's own check, chain, projections, an expected head.

What was so at a moment, folded from archives and the log: nothing else is believed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from events.audit.archivechain import (
    ArchivedRange,
    ArchiveProof,
    InvalidArchive,
    check_archives,
    compare_with_base,
    find_archived_hash,
    fold_archives,
    list_archives,
)
from events.audit.exportreader import FileAudit
from events.audit.files import printable_name
from events.audit.verify import Expected, Finding, FindingKind, Verification, verify_connection
from events.errors import Archived, ArchiveMissing, LogUnavailable, NothingThere
from events.sqlite import history, queries
from events.sqlite.history import Moment, head_moment, moment_at, parse_time, state_at_moment
from events.sqlite.queries import LogBase, hash_at, read_base
from events.sqlite.readonly import lacks_wal, open_read_only, refuse_incomplete
from events.sqlite.schema import schema_difference
from events.sqlite.snapshots import read_base_state
from events.state import State

_NOBODYS_FAULT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}
"""Errors that say nothing of what is in the file."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found: SQLite's complaint about the file, if any, and what the chain and projections gave.

    What is before the base is proved by the archives alone; they are named where all else is as it should be.

    Attributes:
        archives: where the ledger says that its archived events went.
        behind: what the archives that were given prove; null where none were.
        compared: the files that were given beside the ledger, each with how it differs, if at all.
        schema: how the database's schema is not the one that its migrations make; null if it is.
    """

    base: LogBase
    verification: Verification
    damage: str | None
    unexpected: Finding | None
    archives: tuple[ArchivedRange, ...] = ()
    behind: ArchiveProof | None = None
    compared: tuple[tuple[Path, Finding | None], ...] = ()
    schema: str | None = None

    @property
    def finding(self) -> Finding | None:
        """The first problem; one of the file itself is named at the last position that was proved."""
        return self._first[0]

    @property
    def at(self) -> Path | None:
        """The file that the first problem is about, where it is not the ledger."""
        return self._first[1]

    @property
    def _first(self) -> tuple[Finding | None, Path | None]:
        own = self.verification.finding or self._damaged or self.unexpected
        if own is not None:
            return own, None
        if self.behind is not None and self.behind.finding is not None:
            return self.behind.finding, self.behind.at
        differing = ((finding, path) for path, finding in self.compared if finding is not None)
        return next(differing, (self._reshaped, None))

    @property
    def _damaged(self) -> Finding | None:
        if self.damage is None:
            return None
        problem = f"SQLite's integrity check says: {self.damage}"
        return Finding(self.verification.position, problem, FindingKind.DAMAGED)

    @property
    def _reshaped(self) -> Finding | None:
        if self.schema is None:
            return None
        return Finding(
            self.verification.position, f"the database's schema: {self.schema}", FindingKind.SCHEMA
        )


def audit(
    path: Path,
    expected: Expected | None = None,
    *,
    archives: Sequence[Path] = (),
    key: str | None = None,
    files: Sequence[FileAudit] = (),
) -> Audit:
    """Check the ledger at `path`, reading only, in one snapshot; works beside a running server.

    Args:
        path: of the ledger.
        expected: what it, or one of `archives`, must have.
        archives: of the ledger, in any order: they are verified, have to lead to its base, and are folded to
            what it has stored there. Memory grows with neither.
        key: the id of the key that has to have signed the archives, where that is known.
        files: that were verified by themselves, to be compared with the ledger.

    Raises:
        IncompleteCopy: `incomplete_copy`, the newest events may be missing, and nothing was expected.
        Archived: `archived`, the expected position is before what the log, and the archives, have.
        ArchiveMissing: `archive_missing`, the archives do not follow one another up to the base, or do not
            have what one of `files` ends with.
        NothingThere: `nothing_there`, archives were given, and nothing was archived.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, a file cannot be read, or is no database.
        OSError: an archive cannot be read.
    """
    found, stored = _audited(path, expected, files, with_archives=bool(archives))
    if stored is None:
        return found
    if archives:
        behind = check_archives(archives, found.base, found.archives, key=key, expected=expected)
        if expected is not None and expected.position < behind.after.position and behind.finding is None:
            raise _archived(behind.after, found)
        found = replace(found, behind=compare_with_base(behind, stored))
    if found.finding is not None:
        return found
    archived = tuple((each.path, _differs_behind(found, each)) for each in files if _is_behind(each, found))
    return replace(found, compared=(*found.compared, *archived))


def _audited(
    path: Path, expected: Expected | None, files: Sequence[FileAudit], *, with_archives: bool
) -> tuple[Audit, State | None]:
    """Return what the ledger's own file proves and, where that is all sound, the state at its base.

    Archives are read later, since a snapshot that lasts keeps the write-ahead log from being shortened.
    """
    without_wal = lacks_wal(path)
    with open_read_only(path) as connection:
        connection.text_factory = bytes
        connection.execute("BEGIN")
        damage = _damage(connection)
        verification = verify_connection(connection, path)
        found = Audit(read_base(connection), verification, damage, None, schema=schema_difference(connection))
        if verification.verified and found.schema is None and without_wal and expected is None:
            refuse_incomplete(connection, path)
        if not verification.verified:
            return found, None
        found = replace(found, archives=list_archives(connection) if found.base.position else ())
        if with_archives and found.base.position == 0:
            raise NothingThere(
                "nothing was archived from this ledger, its log begins with the first event: verify files by "
                "themselves, with `loadledger verify FILE`"
            )
        found = replace(
            found,
            unexpected=_unexpected(connection, found, expected, with_archives=with_archives),
            compared=_compared(connection, found, files),
        )
        return found, read_base_state(connection, found.base.position) if found.finding is None else None


def _damage(connection: sqlite3.Connection) -> str | None:
    """Return the first thing that SQLite's integrity check has to say, or None."""
    try:
        (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.Error) and queries.kind_of(error) in _NOBODYS_FAULT:
            raise
        return str(error)
    text = str(said, "utf-8", "replace")
    return None if text == "ok" else text


def _unexpected(
    connection: sqlite3.Connection, found: Audit, expected: Expected | None, *, with_archives: bool
) -> Finding | None:
    """Compare with what was expected; what is before the base is left to the archives."""
    if expected is None:
        return None
    if expected.position >= found.base.position:
        return _differs(connection, found, expected)
    if with_archives:
        return None
    raise _archived(found.base, found)


def _archived(after: LogBase, found: Audit) -> Archived:
    problem = (
        f"events up to position {after.position} were archived: expect a later position here, or verify the "
        "archive"
    )
    return Archived(problem, after.position, found.verification.position)


def _compared(
    connection: sqlite3.Connection, found: Audit, files: Sequence[FileAudit]
) -> tuple[tuple[Path, Finding | None], ...]:
    """Compare the ends of files with the chain here: with them, all that is before is the same."""
    return tuple(
        (each.path, _differs(connection, found, Expected(each.proved.position, each.proved.hash)))
        for each in files
        if not _is_behind(each, found)
    )


def _is_behind(file: FileAudit, found: Audit) -> bool:
    return file.proved.position < found.base.position


def _differs_behind(found: Audit, file: FileAudit) -> Finding | None:
    """Compare the end of a file that is before the base with what the archives have there.

    Raises:
        ArchiveMissing: `archive_missing`, none of them has it.
        LogUnavailable: `log_unavailable`, an archive was changed meanwhile.
        OSError: likewise.
    """
    end = file.proved
    digest = None if found.behind is None else find_archived_hash(found.behind.files, end.position)
    if digest is None:
        known = next(
            (f", the ledger says: {each}" for each in found.archives if each.last_position >= end.position),
            "",
        )
        raise ArchiveMissing(
            f"{printable_name(file.path)} ends at position {end.position}, and the log begins after "
            f"{found.base.position}: whether its events were this ledger's, only the archive that has that "
            f"position can say: name it with --archive{known}"
        )
    return _unlike(end.position, digest, end.hash)


def _differs(connection: sqlite3.Connection, found: Audit, expected: Expected) -> Finding | None:
    """Compare with a hash here; the chain has proved that the stored ones are the right ones."""
    head = found.verification.position
    if expected.position > head:
        problem = f"the log ends at position {head}, {expected.position} was expected"
        return Finding(head + 1, problem, FindingKind.EXPECTATION)
    return _unlike(expected.position, hash_at(connection, found.base, expected.position), expected.hash)


def _unlike(position: int, digest: bytes, expected: bytes) -> Finding | None:
    if digest == expected:
        return None
    problem = f"the hash is {digest.hex()}, {expected.hex()} was expected"
    return Finding(position, problem, FindingKind.EXPECTATION)


def replay(
    connection: sqlite3.Connection, until: str | None, archives: Sequence[Path] = ()
) -> tuple[Moment, State]:
    """Return the live state at a moment, or at the head, and which moment that is.

    Without archives it is folded from the base: a moment before that cannot be asked for.

    Args:
        connection: that reads the ledger; it begins a transaction.
        until: a position in digits, a time, or None for the head.
        archives: of the ledger, all of them, in any order.

    Raises:
        BadMoment: `invalid_parameter`.
        BeyondHead: `beyond_head`.
        Archived: `archived`, it is before the base, and there are no archives.
        ArchiveMissing: `archive_missing`, the archives do not lead from the first event to the base.
        LedgerDamaged: `ledger_damaged`, an archive does not verify.
        NothingThere: `nothing_there`, nothing was archived.
        LogUnavailable: `log_unavailable`, a file cannot be read, or an event cannot be folded.
        OSError: an archive cannot be read.
    """
    if not archives:
        connection.execute("BEGIN")
        moment = head_moment(connection) if until is None else moment_at(connection, until)
        return moment, state_at_moment(connection, moment, from_base=True)
    behind = _proved(connection, archives)
    connection.execute("BEGIN")  # not before, since it keeps the write-ahead log from being shortened
    if read_base(connection) != behind.files[-1].proved:
        raise LogUnavailable("events were archived meanwhile: name that archive, too")
    try:
        moment = head_moment(connection) if until is None else moment_at(connection, until)
    except Archived:
        assert until is not None
        return _in_archives(behind, until)
    if moment.position == 0:
        return moment, State()
    state, _ = fold_archives(behind.files)
    if moment.recorded_at is None:
        moment = Moment(state.position, state.recorded_at)
    for page in queries.read_pages(connection, state.position, moment.position):
        history.fold_page(state, page)
    return moment, state


def _proved(connection: sqlite3.Connection, archives: Sequence[Path]) -> ArchiveProof:
    base = read_base(connection)
    if base.position == 0:
        raise NothingThere("nothing was archived from this ledger: leave --archive out")
    behind = check_archives(archives, base, list_archives(connection))
    if behind.finding is not None:
        raise InvalidArchive(behind.finding, behind.at or behind.files[-1].path)
    if behind.after.position:
        raise ArchiveMissing(
            f"positions 1 to {behind.after.position} are missing: without the archive that has them, nobody "
            "can say what they came to"
        )
    return behind


def _in_archives(behind: ArchiveProof, until: str) -> tuple[Moment, State]:
    """Return what was so at a moment before the base, or at the base itself."""
    if until.isdigit():
        last = int(until)
        state, _ = fold_archives(behind.files, ends=lambda event: event.position > last)
    else:
        time = parse_time(until)
        state, _ = fold_archives(behind.files, ends=lambda event: event.recorded_at > time)
    return Moment(state.position, state.recorded_at or None), state
