"""Archiving: move the oldest events to a file that verifies by itself; the log goes on after them.

The file is complete, on the disk and verified before one transaction removes the events from the log. A
process that is killed in between leaves the log unchanged, and a file that repeats a part of it.

The ledger is verified three times: before, because ended jobs move as they are stored; the remaining ledger
before the commit, because archives cannot be put back; and the file that VACUUM has written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from events.audit.audit import audit
from events.audit.export import JSONL, export_of
from events.audit.exportreader import FileAudit, audit_file, compress
from events.audit.signing import Sign
from events.audit.verify import Finding, verify_ledger
from events.clock import add_seconds, format_timestamp
from events.errors import LedgerDamaged, MustStay, NothingThere, WrongTarget
from events.files import make_durable, printable_name, refuse_irregular, remove_stale_drafts, write_file
from events.sqlite import bases
from events.sqlite.proof import prove
from events.sqlite.queries import hash_at, read_base, read_head, transaction
from events.sqlite.readonly import wants_wal
from events.sqlite.schema import Connection, schema_difference
from events.sqlite.storage import FOLDS, open_to_archive
from events.sqlite.timetravel import parse_time
from events.state import KEY_LIFETIME_S
from events.storage import LogHead
from events.types import Anchor


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
    with open_to_archive(path) as ledger:
        base, last = read_base(ledger), _find_last(ledger, before, now)
        check = _write(ledger, base, last, target, sign)
        with transaction(ledger):
            jobs = bases.remove_events(
                ledger, check.proved, target.name, check.sha256, format_timestamp(now), folds=FOLDS
            )
            _refuse_invalid_rest(ledger, path)
        bases.shrink(ledger)
    _refuse_damaged(
        path, f"events up to position {last} were moved to {printable_name(target)}, and the remaining ledger"
    )
    return ArchiveResult(base.position + 1, last, check.sha256, jobs, alone=not wants_wal(path))


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


def _refuse_invalid_rest(ledger: Connection, path: Path) -> None:
    """Verify the remaining ledger before the commit, because archives cannot be put back."""
    with prove(ledger, path) as rest:
        found, difference = verify_ledger(rest).finding, schema_difference(rest.connection)
    _refuse(found, "nothing was moved: the remaining ledger")
    if difference:
        raise LedgerDamaged(f"nothing was moved: the remaining schema would differ: {difference}")


def _find_last(ledger: Connection, before: str, now: datetime) -> int:
    base, head = read_base(ledger), read_head(ledger)
    is_position = re.fullmatch(r"\d{1,18}", before, re.ASCII)
    last = int(before) - 1 if is_position else bases.last_before(ledger, parse_time(before))
    if last <= base.position:
        raise NothingThere(f"there are no events before that: the log begins after position {base.position}")
    _refuse_what_must_stay(ledger, last, head, now)
    return last


def _refuse_what_must_stay(ledger: Connection, last: int, head: LogHead, now: datetime) -> None:
    """Refuse to move the last event, which the next start needs, and valid idempotency keys."""
    if last >= head.position:
        raise MustStay(f"the log's last event must stay: archive --before {head.position} at most")
    since = add_seconds(max(format_timestamp(now), head.recorded_at), -KEY_LIFETIME_S)
    kept = bases.first_key(ledger, last, since)
    if kept is not None:
        raise MustStay(
            f"idempotency keys are valid for 24 hours, and that of position {kept} still is: archive "
            f"--before {kept} at most, or later"
        )


def _write(ledger: Connection, base: Anchor, last: int, target: Path, sign: Sign) -> FileAudit:
    """Write the file, unless an interrupted run has written it, and verify it."""
    was_there = target.exists()
    if not was_there:
        with write_file(target, replace=False) as file, compress(file) as packed:
            for line in export_of(ledger, JSONL, sign, after=base.position, until=last):
                packed.write(line)
    else:  # an interrupted run may not have synced it
        make_durable(target)
    check = audit_file(target)
    if check.finding is not None and not was_there:
        raise LedgerDamaged(check.finding.problem)
    end = Anchor(last, hash_at(ledger, base, last))
    if check.finding is not None or (check.after, check.proved) != (base, end):
        raise WrongTarget(f"{target} exists with other content: choose another file")
    return check
