"""The schema of a ledger in PostgreSQL: migrations by its owner, and a server's checks before use."""

from __future__ import annotations

import re
from functools import partial

from events.errors import DEVELOPMENT, ForeignDatabase, FutureSchema, LedgerProblem
from migrations import read_migrations
from nodes.postgres.connection import Connection, translated_errors

SCHEMA = "loadledger"
"""The database's schema that has the tables and functions."""

_migrations = partial(read_migrations, "postgres")

_LOCK = 0x4C4C6467
"""The key of the advisory lock for migrations: "LLdg"."""

_STANDBYS = re.compile(r"\s*(?:(?:FIRST|ANY)\s+)?(\d+)\s*\(", re.ASCII | re.IGNORECASE)

_ROLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}", re.ASCII)


class SchemaMissing(LedgerProblem):
    """The database has no ledger: create it with `loadledger migrate`, as the role that is to own it."""

    code = "schema_missing"


class SchemaOutdated(LedgerProblem):
    """An earlier release made the database's schema: run `loadledger migrate` as its owner."""

    code = "schema_outdated"


class UnsafeRole(LedgerProblem):
    """The role may change or delete events: a server must not be able to."""

    code = "unsafe_role"


class NotOwner(LedgerProblem):
    """Only the role that owns the ledger may do this: connect as that one."""

    code = "not_owner"


async def migrate(connection: Connection, server_role: str | None = None) -> int:
    """Create or update the schema in one transaction, and return how many migrations were applied.

    Args:
        connection: with the role that owns the schema, or is to own it.
        server_role: the role that gets a server's rights: reading, and the functions.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`, another program has a schema of this name.
        ValueError: the role's name is invalid.
    """
    if server_role is not None and _ROLE_NAME.fullmatch(server_role) is None:
        raise ValueError(f"{server_role!r} is no name of a role")
    with translated_errors("cannot be migrated"):
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            done = await _count_applied(connection)
            if done is None:
                await connection.execute(
                    f"CREATE SCHEMA {SCHEMA}; REVOKE ALL ON SCHEMA {SCHEMA} FROM PUBLIC;"
                    f"CREATE TABLE {SCHEMA}.applied_migrations"
                    " (number integer PRIMARY KEY, applied_at timestamptz NOT NULL)"
                )
            await connection.execute(f"SET LOCAL search_path = {SCHEMA}")
            for number, script in _migrations()[done or 0 :]:
                await connection.execute(script)
                await connection.execute("INSERT INTO applied_migrations VALUES ($1, now())", number)
            if server_role is not None:
                await _grant(connection, server_role)
    return len(_migrations()) - (done or 0)


async def _grant(connection: Connection, role: str) -> None:
    """Grant a role a server's rights: no INSERT, UPDATE, DELETE or TRUNCATE on any table."""
    await connection.execute(
        f'GRANT USAGE ON SCHEMA {SCHEMA} TO "{role}";'
        f'GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO "{role}";'
        f'GRANT EXECUTE ON FUNCTION append, renew, lock_head, probe TO "{role}"'
    )


async def _count_applied(connection: Connection) -> int | None:
    """Return the number of migrations that the database has, or None without the schema."""
    if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", SCHEMA):
        return None
    if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{SCHEMA}.migrations"):
        raise ForeignDatabase(DEVELOPMENT)
    applied = f"{SCHEMA}.applied_migrations"
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", applied):
        raise ForeignDatabase(
            f"the database has a schema {SCHEMA} that is no ledger; nothing in it was touched"
        )
    done = int(await connection.fetchval(f"SELECT coalesce(max(number), 0) FROM {applied}"))  # noqa: S608
    if done > len(_migrations()):
        raise FutureSchema(
            f"the database has schema {done}, this loadledger knows {len(_migrations())}: use the release "
            "that wrote it, or a later one"
        )
    return done


async def check_schema(connection: Connection) -> None:
    """Check that this release can use the database.

    Raises:
        SchemaMissing: `schema_missing`.
        SchemaOutdated: `schema_outdated`.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
    """
    with translated_errors("cannot be read"):
        done = await _count_applied(connection)
        if done is None:
            raise SchemaMissing
        if done < len(_migrations()):
            raise SchemaOutdated


async def check_role(connection: Connection) -> None:
    """Check that the session's role cannot change events, so that a stolen credential cannot either.

    Raises:
        UnsafeRole: `unsafe_role`.
    """
    with translated_errors("cannot be read"):
        found = await connection.fetchrow(
            "SELECT session_user, rolsuper"
            " OR pg_has_role(session_user,"
            "  (SELECT relowner FROM pg_class WHERE oid = 'events'::regclass), 'MEMBER')"
            " OR has_table_privilege(session_user, 'events', 'INSERT, UPDATE, DELETE, TRUNCATE')"
            " FROM pg_roles WHERE rolname = session_user"
        )
    role, is_unsafe = found or ("", True)
    if is_unsafe:
        raise UnsafeRole(
            f"the role {role!r} may change or delete events: connect as another role, which the owner lets "
            "in with `loadledger migrate --server-role NAME`"
        )


async def check_owner(connection: Connection) -> None:
    """Check that the session's role may move events out of the database.

    Raises:
        NotOwner: `not_owner`.
    """
    with translated_errors("cannot be read"):
        role, is_owner = await connection.fetchrow(
            "SELECT session_user, pg_has_role(session_user,"
            " (SELECT relowner FROM pg_class WHERE oid = 'events'::regclass), 'MEMBER')"
        ) or ("", False)
    if not is_owner:
        raise NotOwner(
            f"the role {role!r} does not own the ledger, and may not delete events: connect as the role that "
            "ran `loadledger migrate`"
        )


async def describe_durability(connection: Connection) -> str:
    """Return in words how durable a commit of this session is."""
    with translated_errors("cannot be read"):
        names, fsync = await connection.fetchrow(
            "SELECT current_setting('synchronous_standby_names'), current_setting('fsync')"
        ) or ("", "off")
    count = count_standbys(names)
    if count:
        return f"commits wait for {count} synchronous standby{'' if count == 1 else 's'}"
    if fsync == "off":
        return "commits wait for no disk: fsync is off, so a crash of the database's machine loses some"
    return "commits wait for the database's own disk only"


def count_standbys(names: str) -> int:
    """Return how many standbys a commit waits for, by PostgreSQL's setting `synchronous_standby_names`."""
    counted = _STANDBYS.match(names)
    return int(counted[1]) if counted else int(bool(names.strip()))
