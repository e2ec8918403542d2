"""Whoever has the nodes' role in the database, and no key: it appends what it likes."""

from collections.abc import Callable

import asyncpg

from events.clock import format_timestamp, utc_now, uuid7
from events.codec import encode_event, hash_body
from events.types import SYSTEM, Draft, NodeJoined, record_draft
from support.postgres import Database

MakeBody = Callable[[int, str], str]
"""Makes the body of an event of its position and time."""


async def append_as_role(database: Database, *bodies: MakeBody) -> None:
    """Append events to a ledger as the nodes' role, in one transaction, as soon as nobody else is first."""
    connection = await asyncpg.connect(database.server_url)
    try:
        await connection.execute("SET search_path = loadledger")
        while True:
            head = await connection.fetchrow("SELECT position, hash, recorded_at FROM head")
            assert head is not None
            position, digest, before = head
            at, after = max(before, format_timestamp(utc_now())), digest
            made = [make(position + number, at) for number, make in enumerate(bodies, start=1)]
            hashes = [digest := hash_body(digest, body) for body in made]
            said = await connection.fetchval(
                "SELECT append($1, $2, $3, $4, NULL, NULL, 3600)", position, after, made, hashes
            )
            if said == "appended":
                return
    finally:
        await connection.close()


def joins(data: NodeJoined) -> MakeBody:
    """Return what makes the event of a join."""
    draft = Draft(uuid7(), data, SYSTEM)
    return lambda position, at: encode_event(record_draft(draft, position, at))


def rogue_join(name: str, address: str, epoch: int = 1) -> NodeJoined:
    """Return the join of a node that has no key of the others."""
    return NodeJoined(name, epoch, address, (), None, "1", None, unclean=False)
