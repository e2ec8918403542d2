"""Archiving: move the oldest events to a file that verifies by itself; the log goes on after them.

The file is complete, on the disk and verified before one transaction removes the events from the log. A
process that is killed in between leaves the log unchanged, and a file that repeats a part of it.

The ledger is verified three times: before, because ended jobs move as they are stored; the remaining ledger
before the commit, because archives cannot be put back; and the file that VACUUM has written.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from events.audit.archivechain import list_archives
from events.audit.audit import audit
from events.audit.export import JSONL, export_of
from events.audit.exportreader import FileAudit, audit_file, compress
from events.audit.files import make_durable, printable_name, refuse_irregular, remove_stale_drafts, write_file
from events.audit.signing import Sign
from events.audit.verify import Finding, verify_connection
from events.clock import add_seconds, format_timestamp
from events.commands import KEY_LIFETIME_S
from events.errors import LedgerDamaged, LogUnavailable, MustStay, NothingThere, WrongTarget
from events.sqlite import history, queries, storage
from events.sqlite.history import parse_time
from events.sqlite.queries import read_base
from events.sqlite.readonly import wants_wal
from events.sqlite.schema import connect, schema_difference, transaction
from events.sqlite.snapshots import base_state_digest, write_base_state
from events.sqlite.storage import leave_complete_file
from events.storage import LogHead
from events.types import LogBase

_LIFTED = ("events_never_go", "base_never_changes")
"""The triggers that archiving has to drop, and to create again."""


@dataclass(frozen=True, slots=True)
class ArchiveResult:
    """The positions of the events that moved, and the SHA-256 of the file.

    Attributes:
        jobs: the number of ended jobs that were removed with their events.
        alone: whether the ledger is one complete file; a reader can keep its write-ahead log beside it.
    """

    first_position: int
    last_position: int
    sha256: bytes
    jobs: int
    alone: bool


def archive(path: Path, before: str, target: Path, sign: Sign, now: datetime) -> ArchiveResult:
    """Move the events before a position or time to `target`; the caller holds the lock of the data directory.

    `before` is a position in digits, or an RFC 3339 time: the event at that position or time stays. If the
    file `target` exists, it must be that of an interrupted run.

    Raises:
        InvalidMoment: `invalid_parameter`.
        NothingThere: `nothing_there`, there are no events before that.
        MustStay: `must_stay`, the last event, or idempotency keys of the last 24 hours, would move.
        WrongTarget: `wrong_target`, the file exists with other content, or its name is not UTF-8.
        LedgerDamaged: `ledger_damaged`, the ledger or the file does not verify; nothing was moved, unless the
            message says so.
        IncompleteCopy: `incomplete_copy`.
        LogUnavailable: `log_unavailable`, the ledger cannot be read or written; nothing was moved.
        OSError: the file cannot be written; nothing was moved.
    """
    _refuse_name(target)
    refuse_irregular(target)
    remove_stale_drafts(target)
    _refuse_damaged(path)
    try:
        with _open_ledger(path) as connection:
            if not storage.is_current(connection):
                storage.rebuild(connection)
            base, last = read_base(connection), _find_last(connection, before, now)
            check = _write(connection, base, last, target, sign)
            with transaction(connection):
                jobs = _move(connection, base, check, target.name, format_timestamp(now))
                _refuse_invalid_rest(connection, path)
            _shrink(connection)
    except sqlite3.Error as error:
        raise LogUnavailable(f"the ledger {path.name} cannot be archived: {error}") from error
    _refuse_damaged(
        path, f"events up to position {last} were moved to {printable_name(target)}, and the remaining ledger"
    )
    return ArchiveResult(base.position + 1, last, check.sha256, jobs, alone=not wants_wal(path))


@contextmanager
def _open_ledger(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the ledger for writing; leave one complete file at the end."""
    with closing(connect(path)) as connection:
        try:
            yield connection
        finally:
            leave_complete_file(connection)


def _refuse_name(target: Path) -> None:
    """Refuse a name that is not UTF-8: the ledger stores it as text."""
    try:
        target.name.encode()
    except UnicodeEncodeError:
        raise WrongTarget(f"the name {target.name!r} is not UTF-8: choose another") from None


def _refuse_damaged(path: Path, what: str = "the ledger") -> None:
    _refuse(audit(path).finding, what)


def _refuse(found: Finding | None, what: str) -> None:
    if found is not None:
        raise LedgerDamaged(f"{what} does not verify: position {found.position}, {found.problem}")


def _refuse_invalid_rest(connection: sqlite3.Connection, path: Path) -> None:
    """Verify the remaining ledger before the commit, because archives cannot be put back."""
    connection.text_factory = bytes
    try:
        found = verify_connection(connection, path).finding
    finally:
        connection.text_factory = str
    _refuse(found, "nothing was moved: the remaining ledger")
    if difference := schema_difference(connection):
        raise LedgerDamaged(f"nothing was moved: the remaining schema would differ: {difference}")


def _find_last(connection: sqlite3.Connection, before: str, now: datetime) -> int:
    base, head = read_base(connection), queries.read_head(connection)
    if re.fullmatch(r"\d{1,18}", before, re.ASCII):
        last = int(before) - 1
    else:
        (last,) = connection.execute(
            "SELECT coalesce(max(position), 0) FROM events WHERE recorded_at < ?", (parse_time(before),)
        ).fetchone()
    if last <= base.position:
        raise NothingThere(f"there are no events before that: the log begins after position {base.position}")
    _refuse_what_must_stay(connection, last, head, now)
    return int(last)


def _refuse_what_must_stay(connection: sqlite3.Connection, last: int, head: LogHead, now: datetime) -> None:
    """Refuse to move the last events, which the next start needs, and valid idempotency keys."""
    if last >= head.position:
        raise MustStay(f"the log's last event must stay: archive --before {head.position} at most")
    run_end = queries.read_last_of_server(connection).position
    if last >= run_end > 0:
        raise MustStay(
            "the last event of the server must stay, since the next start needs it: archive --before "
            f"{run_end} at most"
        )
    since = add_seconds(max(format_timestamp(now), head.recorded_at), -KEY_LIFETIME_S)
    (kept,) = connection.execute(
        "SELECT min(position) FROM events WHERE idempotency_key IS NOT NULL AND position <= ?"
        " AND recorded_at > ?",
        (last, since),
    ).fetchone()
    if kept is not None:
        raise MustStay(
            f"idempotency keys are valid for 24 hours, and that of position {kept} still is: archive "
            f"--before {kept} at most, or later"
        )


def _write(connection: sqlite3.Connection, base: LogBase, last: int, target: Path, sign: Sign) -> FileAudit:
    """Write the file, unless an interrupted run has written it, and verify it."""
    was_there = target.exists()
    if not was_there:
        with write_file(target, replace=False) as file, compress(file) as packed:
            for line in export_of(connection, JSONL, sign, after=base.position, until=last):
                packed.write(line)
    else:  # an interrupted run may not have synced it
        make_durable(target)
    check = audit_file(target)
    if check.finding is not None and not was_there:
        raise LedgerDamaged(check.finding.problem)
    (digest,) = connection.execute("SELECT hash FROM events WHERE position = ?", (last,)).fetchone()
    if check.finding is not None or (check.after, check.proved) != (base, LogBase(last, digest)):
        raise WrongTarget(f"{target} exists with other content: choose another file")
    return check


def _move(connection: sqlite3.Connection, base: LogBase, check: FileAudit, file: str, now: str) -> int:
    """Remove the events from the log in the caller's transaction; return the number of removed ended jobs."""
    end = check.proved
    before = list_archives(connection)
    folds = storage.FOLDS if not before or before[-1].folds == storage.FOLDS else before[-1].folds
    state = history.state_at(connection, end.position, from_base=True)
    with _suspend_triggers(connection):
        jobs = write_base_state(connection, state)
        connection.execute("DELETE FROM events WHERE position <= ?", (end.position,))
        connection.execute("UPDATE base SET position = ?, hash = ?", (end.position, end.hash))
    state_sha256 = base_state_digest(connection, end.position)
    connection.execute(
        "INSERT INTO archives"
        " (last_position, first_position, hash, archived_at, file, sha256, state_sha256, folds)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (end.position, base.position + 1, end.hash, now, file, check.sha256, state_sha256, folds),
    )
    return jobs


@contextmanager
def _suspend_triggers(connection: sqlite3.Connection) -> Iterator[None]:
    """Drop the triggers within the caller's transaction, so that no reader sees the log without them."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name IN (?, ?)", _LIFTED
    ).fetchall()
    for name, _ in found:
        connection.execute(f"DROP TRIGGER {name}")
    yield
    for _, sql in found:
        connection.execute(sql)


def _shrink(connection: sqlite3.Connection) -> None:
    """Return the free space to the disk if there is room for that, and leave one complete file."""
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
