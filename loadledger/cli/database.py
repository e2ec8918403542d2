"""A ledger in PostgreSQL for the commands: migrate it, copy a stopped server's into it, verify, archive."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from events.audit.archive import move_events, refuse_finding, refuse_target
from events.audit.audit import (
    Audit,
    audit,
    audit_of_invalid,
    compare_heads,
    fold_archives,
    list_expected,
)
from events.audit.exportreader import FileAudit, InvalidArchive, prove_archives
from events.audit.signing import Sign
from events.audit.verify import CheckedFold, Finding, FindingKind, VerificationError, begin_at_base
from events.codec import decode_event
from events.errors import LedgerDamaged, LogUnavailable
from events.sqlite.bases import read_stored_base, state_at_base
from events.sqlite.datalock import (
    LEDGER,
    is_replica_of,
    lock_data,
    lock_ledger,
    mark_replica,
    refuse_replica,
)
from events.sqlite.queries import find_hash, read_head, read_nodes, read_rows
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import begin_reading
from events.state import Entities, State
from events.storage import LogHead, Row
from events.types import Anchor, EventsDiscarded
from nodes.postgres.connection import describe_address
from nodes.postgres.schema import migrate
from nodes.postgres.transfer import (
    DatabaseLedger,
    LedgerNotEmpty,
    copy_ledger_in,
    discard_end,
    open_database,
)
from server.auth.subjects import local_actor


def migrate_database(address: str, server_role: str | None, data: Path | None) -> dict[str, Any]:
    """Create or update the schema of a ledger, and copy the ledger of a data directory into it.

    Raises:
        LedgerProblem: the database or the ledger cannot be used; nothing was copied.
    """
    with open_database(address) as database:
        try:
            applied = database.run(migrate(database.connection, server_role))
        except ValueError as error:
            raise LogUnavailable(str(error)) from None
        if data is None:
            return {"migrations": applied, "server_role": server_role}
        with lock_data(data), lock_ledger(data / LEDGER):
            head = _copy(database, data, describe_address(address, server_role))
            found = verify_address(address, Anchor(head.position, head.hash))
            refuse_finding(found.finding, "the copy in the database")
    proved = found.verification
    return {
        "migrations": applied,
        "server_role": server_role,
        "events": proved.events,
        "position": proved.position,
        "hash": proved.hash.hex(),
    }


def _copy(database: DatabaseLedger, data: Path, shown: str) -> LogHead:
    """Copy a ledger that verifies into the empty database at the address `shown`, and return its head.

    The ledger is marked as a replica before the COMMIT: if the process ends after it, no server alone goes on
    with the file. After an end before it, the next call copies; after a later one, the next call verifies.
    """
    path, is_marked = data / LEDGER, is_replica_of(data, shown)
    if not is_marked:
        refuse_replica(data)
    refuse_finding(audit(path).finding, f"the ledger {path.name}")
    with open_read_only(path) as source:
        begin_reading(source)
        stored, head = read_stored_base(source), read_head(source)
        rows, nodes = read_rows(source, stored.base.position, head.position), read_nodes(source)
        mark = partial(mark_replica, data, shown)
        try:
            database.run(copy_ledger_in(database.connection, stored, rows, head, nodes, before_commit=mark))
        except LedgerNotEmpty:
            if not is_marked:
                raise
    return head


def archive_database(address: str, data: Path, before: str, target: Path, sign: Sign) -> FileAudit:
    """Move the events before a position or time out of a database to `target`; servers may be running.

    Args:
        address: of the database, as the role that owns the ledger.
        data: a server's data directory: if it has a replica, the database must agree with it.
        before: as for `move_events`.
        target: the archive's file.
        sign: signs the archive.

    Raises:
        LedgerProblem: as `move_events` does, or the database cannot be used, or contradicts the replica.
        OSError: the file cannot be written.
    """
    refuse_target(target)
    with open_database(address) as database:
        database.refuse_other_role()
        _refuse_other_history(data / LEDGER, database)
        refuse_finding(verify_address(address, None).finding, "the ledger in the database")
        return move_events(database, before, target, sign, datetime.now(UTC))


def discard_unreadable(address: str, file: Path) -> EventsDiscarded:
    """Remove the end of a ledger in a database, from the first event on that this release cannot read.

    Args:
        address: of the database, as the role that owns the ledger.
        file: takes what is removed, one line of JSON for each event; it must not exist.

    Raises:
        LedgerProblem: the database cannot be used, or all its events can be read.
        OSError: the file cannot be written.
    """

    def keep(rows: Sequence[Row]) -> None:
        with file.open("x", encoding="utf-8") as target:
            for row in rows:
                line = {"position": row.position, "hash": row.hash.hex(), "body": row.body}
                target.write(json.dumps(line) + "\n")
            target.flush()
            os.fsync(target.fileno())

    with open_database(address) as database:
        database.refuse_other_role()
        first = _find_unreadable(database)
        if first is None:
            raise LogUnavailable(
                "this release can read all events of the ledger: there is nothing to discard"
            )
        return database.run(discard_end(database.connection, first, local_actor(os.geteuid()), keep))


def _find_unreadable(database: DatabaseLedger) -> int | None:
    """Return the position of the first event that this release cannot fold, or None.

    Raises:
        LedgerDamaged: `ledger_damaged`, the state at the base is not what archiving stored.
    """
    stored = database.stored_base()
    if not stored.is_unchanged:
        raise LedgerDamaged(
            "the stored state at the base of the ledger was changed: see `loadledger verify --ledger`"
        )
    state = state_at_base(stored)
    entities = Entities(state.models.values(), state.unended(), state.registers)
    for position, body, _ in database.raw_rows():
        try:
            entities.apply(decode_event(body))
        except Exception:  # noqa: BLE001 - a forged body may raise anything
            return position
    return None


def _refuse_other_history(ledger: Path, database: DatabaseLedger) -> None:
    """Refuse to archive events which are not those that a server has read from the database.

    Raises:
        LedgerDamaged: `ledger_damaged`, there are two histories.
    """
    if not ledger.is_file():
        return
    with open_read_only(ledger) as own:
        position = min(read_head(own).position, database.head().position)
        one, another = find_hash(own, position), database.hash_at(position)
    if one is not None and another is not None and one != another:
        raise LedgerDamaged(
            f"nothing was moved: at position {position} the database has the hash {another.hex()}, and "
            f"{ledger} has {one.hex()}: one of them was changed, or they are two ledgers"
        )


def verify_address(
    address: str, expected: Anchor | None, archives: Sequence[Path] = (), key: str | None = None
) -> Audit:
    """Verify all events of a ledger in a database, in one snapshot; it has no stored projections.

    Args:
        address: of the database.
        expected: a head that the ledger, or one of `archives`, must have.
        archives: of the ledger, as for `audit`.
        key: the id of the archives' expected signer's key; None accepts any.

    Raises:
        LedgerProblem: it cannot be read, or is no ledger.
        OSError: an archive cannot be read.
    """
    heads, fold, behind = list_expected(expected), None, list[FileAudit]()
    watched = [head.position for head, _ in heads]
    with open_database(address) as database:
        database.begin_snapshot()
        stored, head = database.stored_base(), database.head()
        base, listed = stored.base, stored.archives
        try:
            if archives:
                behind = prove_archives(archives, base, listed, key=key)
                fold = fold_archives(behind, watched)
            fold = begin_at_base(stored, fold, watched)
            finding = fold.follow(database.raw_rows())
        except InvalidArchive as invalid:
            return audit_of_invalid(invalid, base, listed)
        except VerificationError as error:
            fold, finding = fold or CheckedFold(base, State(base.position)), error.finding
    if finding is None and (head.position, head.hash) != (fold.position, fold.hash):
        problem = f"the stored head is {head.position}:{head.hash.hex()}"
        finding = Finding(fold.position, problem, FindingKind.ORDER)
    verification = fold.result(base, finding, compared=True)
    if finding is None and (difference := compare_heads(heads, verification, listed)):
        finding, _ = difference
    return Audit(base, verification, finding, archives=listed, behind=tuple(behind))
