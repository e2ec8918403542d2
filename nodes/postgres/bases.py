"""The base of a ledger in a database: read it, store it in an empty database, move it after archiving.

Only the owner's role can do the latter two. Servers append meanwhile: they lock the head, this the base.
"""

from __future__ import annotations

from events.errors import LedgerDamaged, LogUnavailable
from events.storage import ArchiveRecord, BaseEntity, StoredBase
from events.types import Anchor
from nodes.postgres.connection import Connection, translated_errors

LIFT_TRIGGERS = "SELECT set_config('loadledger.archiving', 'on', true)"
"""Until the transaction ends, in this session alone (migrations/postgres)."""


async def read_stored_base(connection: Connection) -> StoredBase:
    """Return the base, its archives and the state there; the caller holds one snapshot of the database."""
    with translated_errors("could not be read"):
        row = await connection.fetchrow("SELECT position, hash, state_sha256 FROM base")
        archives = await connection.fetch(
            "SELECT last_position, recorded_at, file FROM archives ORDER BY last_position"
        )
        entities = await connection.fetch("SELECT kind, key, body FROM base_state")
    position, digest, state_sha256 = row or (0, b"", b"")
    return StoredBase(
        Anchor(position, digest),
        state_sha256,
        tuple(BaseEntity(*entity) for entity in entities),
        tuple(ArchiveRecord(*archive) for archive in archives),
    )


async def write_stored_base(connection: Connection, stored: StoredBase) -> None:
    """Replace the base, the state there and the listed archives; the caller holds the transaction."""
    await connection.execute(LIFT_TRIGGERS)
    await connection.execute(
        "UPDATE base SET position = $1, hash = $2, state_sha256 = $3",
        stored.base.position,
        stored.base.hash,
        stored.state_sha256,
    )
    for table, records, columns in (
        ("archives", stored.archives, ArchiveRecord._fields),
        ("base_state", stored.entities, BaseEntity._fields),
    ):
        await connection.execute(f"DELETE FROM {table}")  # noqa: S608 - literals above
        await connection.copy_records_to_table(
            table, records=records, columns=columns, schema_name="loadledger"
        )


async def move_base(connection: Connection, before: Anchor, stored: StoredBase) -> None:
    """Delete the archived events, and begin the log after them, in one transaction.

    Args:
        connection: of the schema's owner.
        before: the base after which the archived events begin.
        stored: the new base, with their archive.

    Raises:
        LogUnavailable: `log_unavailable`, the base was moved meanwhile; nothing was changed.
        LedgerDamaged: `ledger_damaged`, the database has other events; nothing was changed.
    """
    end = stored.base
    with translated_errors("could not be archived"):
        async with connection.transaction():
            found = await connection.fetchrow("SELECT position, hash FROM base FOR UPDATE")
            if found is None or Anchor(*found) != before:
                raise LogUnavailable("nothing was moved: events of this ledger were archived meanwhile")
            digest = await connection.fetchval("SELECT hash FROM events WHERE position = $1", end.position)
            if digest != end.hash:
                raise LedgerDamaged(
                    f"nothing was moved: the database does not have the archived event at {end.position}, "
                    f"with the hash {end.hash.hex()}; compare with `loadledger verify`"
                )
            await write_stored_base(connection, stored)
            removed = await connection.execute("DELETE FROM events WHERE position <= $1", end.position)
            if removed != f"DELETE {end.position - before.position}":
                raise LedgerDamaged(
                    f"nothing was moved: of positions {before.position + 1} to {end.position} the database "
                    f"would have deleted another number: {removed}"
                )
