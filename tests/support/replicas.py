"""Servers' logs over one ledger in PostgreSQL, each with a replica in a folder of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from events.log import Log
from events.sqlite.queries import read_head, read_register, read_rows
from events.sqlite.readonly import open_read_only
from nodes.postgres.connection import Connection, DatabaseClock, close, connect
from nodes.postgres.log import SharedLog
from nodes.postgres.schema import migrate
from nodes.postgres.storage import ReplicatedStorage
from nodes.postgres.transfer import copy_ledger_in
from support.postgres import Database

Row = tuple[int, str, bytes]


async def make_ledger(database: Database) -> None:
    connection = await connect(database.owner_url)
    await migrate(connection, "ledger_server")
    await close(connection)


def replica_log(address: str, folder: Path, **options: Any) -> Log:
    folder.mkdir(exist_ok=True)
    return SharedLog(address, folder, DatabaseClock(), **options)


@asynccontextmanager
async def opened_replica(address: str, folder: Path, **options: Any) -> AsyncIterator[Log]:
    log = replica_log(address, folder, **options)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


def storage_of(log: Log) -> ReplicatedStorage:
    assert isinstance(log._storage, ReplicatedStorage)
    return log._storage


async def rows_in(database: Database) -> list[Row]:
    connection = await asyncpg.connect(database.owner_url)
    found = await connection.fetch("SELECT position, body, hash FROM loadledger.events ORDER BY position")
    await connection.close()
    return [(position, body, digest) for position, body, digest in found]


@asynccontextmanager
async def owned(database: Database) -> AsyncIterator[Connection]:
    connection = await connect(database.owner_url)
    try:
        yield connection
    finally:
        await close(connection)


async def copy_ledger(database: Database, path: Path) -> None:
    with open_read_only(path) as source:
        head = read_head(source)
        rows = read_rows(source, 0, head.position)
        async with owned(database) as connection:
            await copy_ledger_in(connection, rows, head, read_register(source, "nodes").values())


async def change(database: Database, *statements: str) -> None:
    """Change a ledger as only its owner can who means to: with the triggers off."""
    connection = await asyncpg.connect(database.owner_url)
    await connection.execute("SET search_path = loadledger")
    await connection.execute("SET loadledger.discarding = on")
    for statement in statements:
        await connection.execute(statement)
    await connection.close()
