"""A ledger in PostgreSQL for commands: migrate, copy a stopped server's ledger, verify, discard."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from events.audit.audit import Audit, audit, compare_heads, list_expected
from events.audit.verify import CheckedFold, Finding, FindingKind
from events.codec import decode_event
from events.errors import LedgerDamaged, LogUnavailable
from events.sqlite.datalock import LEDGER, is_replica_of, lock_data, lock_ledger, mark_replica, refuse_replica
from events.sqlite.queries import read_head, read_register, read_rows
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import begin_reading
from events.state import Entities
from events.storage import LogHead, Row
from events.types import Anchor, EventsDiscarded
from nodes.postgres.connection import describe_address
from nodes.postgres.schema import migrate
from nodes.postgres.transfer import DatabaseLedger, LedgerNotEmpty, copy_ledger_in, discard_end, open_database
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
            _refuse_finding(found.finding, "the copy in the database")
    proved = found.verification
    return {
        "migrations": applied,
        "server_role": server_role,
        "events": proved.position,
        "position": proved.position,
        "hash": proved.hash.hex(),
    }


def _refuse_finding(found: Finding | None, what: str) -> None:
    """Raise LedgerDamaged, `ledger_damaged`, for a finding of a verification."""
    if found is not None:
        raise LedgerDamaged(f"{what} does not verify: position {found.position}, {found.problem}")


def _copy(database: DatabaseLedger, data: Path, shown: str) -> LogHead:
    """Copy a ledger that verifies into the empty database at the address `shown`, and return its head.

    The ledger is marked as a replica before the COMMIT: if the process ends after it, no server alone goes on
    with the file. If it ends before the COMMIT, the next call copies, otherwise the next call verifies.
    """
    path, is_marked = data / LEDGER, is_replica_of(data, shown)
    if not is_marked:
        refuse_replica(data)
    _refuse_finding(audit(path).finding, f"the ledger {path.name}")
    with open_read_only(path) as source:
        begin_reading(source)
        head = read_head(source)
        rows, nodes = read_rows(source, 0, head.position), read_register(source, "nodes").values()
        mark = partial(mark_replica, data, shown)
        try:
            database.run(copy_ledger_in(database.connection, rows, head, nodes, before_commit=mark))
        except LedgerNotEmpty:
            if not is_marked:
                raise
    return head


def discard_unreadable(address: str, file: Path) -> EventsDiscarded:
    """Remove the end of a ledger in a database, beginning with an event that this release cannot read.

    Args:
        address: the database's address, with the role that owns the ledger.
        file: gets the removed events, one line of JSON for each; it must not exist.

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
    """Return the position of the first event that this release cannot fold, or None."""
    entities = Entities()
    for position, body, _ in database.raw_rows():
        try:
            entities.apply(decode_event(body))
        except Exception:  # noqa: BLE001 - a forged body may raise anything
            return position
    return None


def verify_address(address: str, expected: Anchor | None) -> Audit:
    """Verify all events of a ledger in a database, in one snapshot; it has no stored projections.

    Args:
        address: of the database.
        expected: a head that the ledger must have.

    Raises:
        LedgerProblem: the database cannot be read, or has no ledger.
    """
    heads = list_expected(expected)
    fold = CheckedFold(Anchor(), [head.position for head, _ in heads])
    with open_database(address) as database:
        database.begin_snapshot()
        head = database.head()
        finding = fold.follow(database.raw_rows())
    if finding is None and (head.position, head.hash) != (fold.position, fold.hash):
        problem = f"the stored head is {head.position}:{head.hash.hex()}"
        finding = Finding(fold.position, problem, FindingKind.ORDER)
    verification = fold.result(finding, compared=True)
    if finding is None and (difference := compare_heads(heads, verification)):
        finding, _ = difference
    return Audit(verification, finding)
