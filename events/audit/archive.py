"""Archiving: move the oldest events to a file that verifies by itself; the log goes on after them.

An archive is a signed export, compressed, and a cut: the file is complete, on the disk and verified before
one transaction removes the events from the log. A process that is killed in between leaves the log unchanged,
and a file that the next run takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol

from events.audit.audit import audit
from events.audit.export import JSONL, export_rows
from events.audit.exportreader import FileAudit, audit_file, compress
from events.audit.signing import Sign, Statement
from events.audit.verify import CheckedFold, Finding, VerificationError, begin_at_base, raw_rows
from events.clock import add_seconds, format_timestamp
from events.codec import decode_event
from events.errors import LedgerDamaged, MustStay, NothingThere, WrongTarget
from events.files import make_durable, refuse_irregular, remove_stale_drafts, write_file
from events.sqlite.bases import entities_of
from events.sqlite.queries import LAST
from events.sqlite.storage import open_to_archive
from events.sqlite.timetravel import parse_time
from events.state import KEY_LIFETIME_S, read_key
from events.storage import ArchiveRecord, LogHead, Row, StoredBase, digest_state
from events.types import Anchor


class CutLedger(Protocol):
    """A ledger whose oldest events can be removed: in a file, or in a database."""

    def stored_base(self) -> StoredBase:
        """Return where the log begins."""

    def head(self) -> LogHead:
        """Return the last event."""

    def rows(self, after: int, until: int = LAST) -> Iterator[Row]:
        """Yield the events after one position up to and with another."""

    def cut(self, before: Anchor, stored: StoredBase) -> None:
        """Remove the events up to a new base, in one transaction.

        Args:
            before: the base by now.
            stored: the new one, with the archive.

        Raises:
            LedgerProblem: the ledger is not the one that was read; nothing was changed.
        """


def archive(path: Path, before: str, target: Path, sign: Sign, now: datetime) -> FileAudit:
    """Move the oldest events of a ledger's file to `target`; the caller holds the lock of the data directory.

    Raises:
        IncompleteCopy: `incomplete_copy`.
        LogUnavailable: `log_unavailable`, the ledger cannot be read or written; nothing was moved.
        LedgerProblem: as `move_events` says.
    """
    refuse_target(target)
    refuse_finding(audit(path).finding, "the ledger")
    with open_to_archive(path) as ledger:
        return move_events(ledger, before, target, sign, now)


def move_events(ledger: CutLedger, before: str, target: Path, sign: Sign, now: datetime) -> FileAudit:
    """Move the events before a position or time to `target`, and return what that file proves.

    Args:
        ledger: which verifies.
        before: a position in digits, or an RFC 3339 time: the event at that position or time stays.
        target: the archive; if it exists, it must be that of an interrupted run.
        sign: signs its head.
        now: the time.

    Raises:
        InvalidMoment: `invalid_parameter`.
        NothingThere: `nothing_there`, there are no events before that.
        MustStay: `must_stay`, the last event, or idempotency keys of the last 24 hours, would move.
        WrongTarget: `wrong_target`, the file exists with other content, or its name is not UTF-8.
        LedgerDamaged: `ledger_damaged`, the ledger or the file does not verify; nothing was moved.
        LogUnavailable: `log_unavailable`, the ledger cannot be read or written; nothing was moved.
        OSError: the file cannot be written; nothing was moved.
    """
    stored = ledger.stored_base()
    fold = _fold_moving(ledger, stored, before, now)
    entities = entities_of(fold.state())
    head = Statement(fold.position, fold.hash, fold.recorded_at, stored.base, digest_state(entities))
    file = _write(ledger, head, target, sign)
    record = ArchiveRecord(fold.position, fold.recorded_at, target.name)
    ledger.cut(stored.base, StoredBase(file.proved, head.state_sha256, entities, (*stored.archives, record)))
    return file


def refuse_target(target: Path) -> None:
    """Refuse what is no regular file, and a name that is not UTF-8: the ledger stores it as text.

    Raises:
        WrongTarget: `wrong_target`.
    """
    try:
        target.name.encode()
    except UnicodeEncodeError:
        raise WrongTarget(f"the name {target.name!r} is not UTF-8: choose another") from None
    refuse_irregular(target)
    remove_stale_drafts(target)


def refuse_finding(found: Finding | None, what: str) -> None:
    """Raise LedgerDamaged, `ledger_damaged`, if a verification has found something."""
    if found is not None:
        raise LedgerDamaged(f"{what} does not verify: position {found.position}, {found.problem}")


def _fold_moving(ledger: CutLedger, stored: StoredBase, before: str, now: datetime) -> CheckedFold:
    """Fold the events that move: not the last one, which the next start needs, nor valid idempotency keys."""
    head, base = ledger.head(), stored.base.position
    is_position = re.fullmatch(r"\d{1,18}", before, re.ASCII) is not None
    until, time = (int(before), None) if is_position else (LAST, parse_time(before))
    since = add_seconds(max(format_timestamp(now), head.recorded_at), -KEY_LIFETIME_S)

    def rows() -> Iterator[Row]:
        for row in ledger.rows(base):
            event = decode_event(row.body)
            if row.position >= until or (time is not None and event.recorded_at >= time):
                return
            if row.position == head.position:
                raise MustStay(f"the log's last event must stay: archive --before {row.position} at most")
            if event.recorded_at > since and read_key(event) is not None:
                raise MustStay(
                    f"idempotency keys are valid for 24 hours, and that of position {row.position} still is: "
                    f"archive --before {row.position} at most, or later"
                )
            yield row

    try:
        fold = begin_at_base(stored)
    except VerificationError as error:
        raise LedgerDamaged(f"the ledger does not verify: {error}") from None
    refuse_finding(fold.follow(raw_rows(rows())), "the ledger")
    if fold.position == base:
        raise NothingThere(f"there are no events before that: the log begins after position {base}")
    return fold


def _write(ledger: CutLedger, head: Statement, target: Path, sign: Sign) -> FileAudit:
    """Write the file, unless an interrupted run has written it, and verify it."""
    was_there = target.exists()
    if not was_there:
        rows = ledger.rows(head.base.position, head.position)
        with write_file(target, replace=False) as file, compress(file) as packed:
            packed.writelines(export_rows(rows, JSONL, sign, after=head.base, head=head))
    else:  # an interrupted run may not have synced it
        make_durable(target)
    check = audit_file(target)
    if check.finding is not None and not was_there:
        raise LedgerDamaged(check.finding.problem)
    is_same = check.head is not None and (check.after, check.head.statement) == (head.base, head)
    if not is_same or check.finding is not None:
        raise WrongTarget(f"{target} exists with other content: choose another file")
    return check
