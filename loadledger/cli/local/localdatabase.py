"""A ledger in PostgreSQL for the commands: migrate it, copy a stopped server's ledger into it, verify it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from events.audit.audit import Audit, audit
from events.audit.verify import CheckedFold, Expected, Finding, FindingKind, Verification
from events.errors import LedgerDamaged, LogUnavailable, MustStay
from events.postgres.connection import Connection, close, connect, describe_address
from events.postgres.schema import migrate
from events.postgres.transfer import DatabaseReader, copy_events, open_database_reader
from events.sqlite.datalock import LEDGER, lock_data, lock_ledger, mark_replica, refuse_replica
from events.sqlite.proof import open_log_reader
from events.state import State
from events.storage import StorageError


async def migrate_database(address: str, server_role: str | None, data: Path | None) -> dict[str, Any]:
    """Create or update the schema of a ledger, and copy the ledger of a data directory into it.

    Raises:
        LedgerProblem: the database or the ledger cannot be used; nothing was copied.
    """
    async with _owned(address) as connection:
        try:
            applied = await migrate(connection, server_role)
        except ValueError as error:
            raise LogUnavailable(str(error)) from None
        if data is None:
            return {"migrations": applied, "server_role": server_role}
        with lock_data(data), lock_ledger(data / LEDGER):
            refuse_replica(data)
            await _copy(connection, data / LEDGER)
            found = await verify_address(address, None)
            _refuse_finding(found.finding, "the copy in the database")
            mark_replica(data, describe_address(address))
    proved = found.verification
    return {
        "migrations": applied,
        "server_role": server_role,
        "events": proved.events,
        "position": proved.position,
        "hash": proved.hash.hex(),
    }


@asynccontextmanager
async def _owned(address: str) -> AsyncIterator[Connection]:
    try:
        connection = await connect(address, statement_timeout="0", lock_timeout="10s")
        try:
            yield connection
        finally:
            await close(connection)
    except StorageError as error:
        raise LogUnavailable(str(error)) from error


async def _copy(connection: Connection, path: Path) -> None:
    """Copy a ledger that verifies into the empty database."""
    _refuse_finding(audit(path).finding, f"the ledger {path.name}")
    with open_log_reader(path) as source:
        source.begin()
        if base := source.base().position:
            raise MustStay(f"events up to position {base} are archived: such a ledger cannot be copied yet")
        head = source.head()
        await copy_events(connection, source.rows(0, head.position), head)


def _refuse_finding(finding: Finding | None, what: str) -> None:
    if finding is not None:
        raise LedgerDamaged(f"{what} does not verify: position {finding.position}, {finding.problem}")


async def verify_address(address: str, expected: Expected | None) -> Audit:
    """Verify all events of a ledger in a database, in one snapshot; it has no stored projections.

    Raises:
        LedgerProblem: it cannot be read, or is no ledger.
    """
    try:
        async with open_database_reader(address) as reader:
            return await _verify(reader, expected)
    except StorageError as error:
        raise LogUnavailable(str(error)) from error


async def _verify(reader: DatabaseReader, expected: Expected | None) -> Audit:
    base = reader.base
    fold, finding, unexpected = CheckedFold(base, State(base.position)), None, None
    found = base.hash if expected is not None and expected.position == base.position else None
    async for page in reader.pages():
        finding = fold.follow(page)
        if finding is not None:
            break
        if expected is not None and page[0][0] <= expected.position <= page[-1][0]:
            found = page[expected.position - page[0][0]][2]
    if finding is None and (reader.head.position, reader.head.hash) != (fold.position, fold.hash):
        problem = f"the stored head is {reader.head.position}:{reader.head.hash.hex()}"
        finding = Finding(fold.position, problem, FindingKind.ORDER)
    if expected is not None and finding is None:
        unexpected = (
            Finding(expected.position, "the ledger has no such event", FindingKind.EXPECTATION)
            if found is None
            else expected.compare(found)
        )
    events = fold.position - base.position
    return Audit(base, Verification(events, fold.position, fold.hash, finding), None, unexpected)
