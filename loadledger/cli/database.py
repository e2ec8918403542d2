"""A ledger in PostgreSQL for the commands: migrate it, copy a stopped server's into it, verify, archive."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from events.audit.archive import ArchiveResult, archive
from events.audit.audit import Audit, archived_error, audit, prove_base
from events.audit.signing import Sign
from events.audit.verify import (
    CheckedFold,
    Finding,
    FindingKind,
    Verification,
    VerificationError,
    check_listed,
    compare_hash,
)
from events.errors import LedgerDamaged, LogUnavailable, UnreadableEvent
from events.files import open_draft
from events.postgres.bases import move_base
from events.postgres.connection import Connection, close, connect, describe_address
from events.postgres.schema import check_owner, check_schema, migrate
from events.postgres.transfer import (
    DatabaseReader,
    LedgerNotEmpty,
    copy_ledger_in,
    discard_end,
    make_replica,
    open_database_reader,
)
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
from events.state import State
from events.storage import LogHead, Row, StorageError, StoredBase
from events.types import Anchor, EventsDiscarded
from server.auth.subjects import local_actor


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
            head = await _copy(connection, data, describe_address(address, server_role))
            found = await verify_address(address, Anchor(head.position, head.hash))
            _refuse_finding(found.finding, "the copy in the database")
    proved = found.verification
    return {
        "migrations": applied,
        "server_role": server_role,
        "events": proved.events,
        "position": proved.position,
        "hash": proved.hash.hex(),
    }


@contextmanager
def _unavailable() -> Iterator[None]:
    """Raise what a database refuses, or does not answer, as a problem of the ledger."""
    try:
        yield
    except StorageError as error:
        raise LogUnavailable(str(error)) from error


@asynccontextmanager
async def _owned(address: str) -> AsyncIterator[Connection]:
    """Connect for statements that copy or delete a whole ledger."""
    with _unavailable():
        connection = await connect(address, command_s=None, statement_timeout="0", lock_timeout="10s")
        try:
            yield connection
        finally:
            await close(connection)


async def _copy(connection: Connection, data: Path, shown: str) -> LogHead:
    """Copy a ledger that verifies into the empty database at the address `shown`, and return its head.

    The ledger is marked as a replica before the COMMIT: if the process ends after it, no server alone goes on
    with the file. After an end before it, the next call copies; after a later one, the next call verifies.
    """
    path, is_marked = data / LEDGER, is_replica_of(data, shown)
    if not is_marked:
        refuse_replica(data)
    _refuse_finding(audit(path).finding, f"the ledger {path.name}")
    with open_read_only(path) as source:
        begin_reading(source)
        stored, head = read_stored_base(source), read_head(source)
        rows = read_rows(source, stored.base.position, head.position)
        mark = partial(mark_replica, data, shown)
        try:
            await copy_ledger_in(connection, stored, rows, head, read_nodes(source), before_commit=mark)
        except LedgerNotEmpty:
            if not is_marked:
                raise
    return head


def _refuse_finding(finding: Finding | None, what: str) -> None:
    if finding is not None:
        raise LedgerDamaged(f"{what} does not verify: position {finding.position}, {finding.problem}")


async def archive_database(address: str, data: Path, before: str, target: Path, sign: Sign) -> ArchiveResult:
    """Move the events before a position or time out of a database to `target`; servers may be running.

    A copy of the whole ledger, beside `target` while this runs, is archived as a file is; then one
    transaction in the database does the same there. A process that is killed in between leaves the database
    unchanged, and a file that the next one uses.

    Args:
        address: of the database, as the role that owns the ledger.
        data: a server's data directory: if it has a replica, the database must agree with it.
        before: as for `archive`.
        target: the archive's file.
        sign: signs the archive.

    Raises:
        LedgerProblem: as `archive` does, or the database cannot be used, or contradicts the replica.
        OSError: the file cannot be written.
    """
    await _check_owner(address)
    with open_draft(target) as replica, _unavailable():
        base = (await make_replica(address, replica)).base
        _refuse_other_history(data / LEDGER, replica)
        done = archive(replica, before, target, sign, datetime.now(UTC))
        with open_read_only(replica) as copied:
            stored = read_stored_base(copied)
    async with _owned(address) as connection:
        await move_base(connection, base, stored)
    return done


async def _check_owner(address: str) -> None:
    async with _owned(address) as connection:
        await check_schema(connection)
        await check_owner(connection)


async def discard_unreadable(address: str, file: Path) -> EventsDiscarded:
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

    await _check_owner(address)
    with open_draft(file) as replica, _unavailable():
        try:
            await make_replica(address, replica)
        except UnreadableEvent as unreadable:
            async with _owned(address) as connection:
                return await discard_end(connection, unreadable.position, local_actor(os.geteuid()), keep)
    raise LogUnavailable("this release can read all events of the ledger: there is nothing to discard")


def _refuse_other_history(ledger: Path, replica: Path) -> None:
    """Refuse to archive events which are not those that a server has read from the database.

    Raises:
        LedgerDamaged: `ledger_damaged`, there are two histories.
    """
    if not ledger.is_file():
        return
    with open_read_only(ledger) as own, open_read_only(replica) as other:
        position = min(read_head(own).position, read_head(other).position)
        one, another = find_hash(own, position), find_hash(other, position)
    if one is not None and another is not None and one != another:
        raise LedgerDamaged(
            f"nothing was moved: at position {position} the database has the hash {another.hex()}, and "
            f"{ledger} has {one.hex()}: one of them was changed, or they are two ledgers"
        )


async def verify_address(
    address: str, expected: Anchor | None, archives: Sequence[Path] = (), key: str | None = None
) -> Audit:
    """Verify all events of a ledger in a database, in one snapshot; it has no stored projections.

    Args:
        address: of the database.
        expected: a head that the ledger, or one of `archives`, must have.
        archives: of the ledger, in any order: they must verify and lead to its base and the state there.
        key: the id of the archives' expected signer's key; None accepts any.

    Raises:
        LedgerProblem: it cannot be read, or is no ledger.
        OSError: an archive cannot be read.
    """
    with _unavailable():
        async with open_database_reader(address) as reader:
            found = await _verify(reader, expected)
    if found.finding is not None:
        return found
    if archives:
        return prove_base(found, state_at_base(reader.stored), archives, key=key, expected=expected)
    if expected is not None and expected.position < found.base.position:
        raise archived_error(found.base, found)
    return found


async def _verify(reader: DatabaseReader, expected: Anchor | None) -> Audit:
    base = reader.stored.base
    listed = reader.stored.archives
    try:
        fold, finding = CheckedFold(base, _checked_state(reader.stored)), None
    except VerificationError as error:
        return Audit(base, Verification(0, base.position, base.hash, error.finding), None, None, listed)
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
    verification = Verification(fold.position - base.position, fold.position, fold.hash, finding)
    return Audit(base, verification, None, _compare(expected, found, base, verification), listed)


def _checked_state(stored: StoredBase) -> State:
    """Return the state at the base, of which the archives that are listed lead to the first event of the log.

    Raises:
        VerificationError: they do not, or the state was changed.
    """
    position = stored.base.position
    check_listed(stored.archives, stored.base)
    if not stored.is_unchanged:
        problem = "the stored state at the base was changed"
        raise VerificationError(position, problem, FindingKind.BASE)
    try:
        return state_at_base(stored)
    except ValueError as error:
        problem = f"the stored state at the base is damaged: {error}"
        raise VerificationError(position, problem, FindingKind.BASE) from None


def _compare(
    expected: Anchor | None, found: bytes | None, base: Anchor, verification: Verification
) -> Finding | None:
    """Compare an expected event with the hash that was found; those before the base are in archives."""
    if expected is None or verification.finding is not None or expected.position < base.position:
        return None
    if found is None:
        return Finding(expected.position, "the ledger has no such event", FindingKind.EXPECTATION)
    return compare_hash(expected, found)
