"""Ledgers in files, for what is proved of them: one with something of most things, and keys to sign with."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from events.commands import Record
from events.signing import HeadSigner
from events.types import Draft, Event, Idempotency, LoadRequested, Unknown
from support.events import START, History, opened

SIGN = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
"""A key that is the same in each run."""


def told_history(rounds: int = 1) -> list[Event]:
    """Return a history that has something of most things, so many times over."""
    history = History()
    history.restart()
    for number in range(rounds):
        history.load(f"L{number}")
        history.ask_load(f"F{number}", version=2)
        history.start_load(f"F{number}", version=2)
        history.fail_load(f"F{number}", version=2)
        history.kill_worker(f"w-L{number}")
        history.restart()
        history.load(f"O{number}", of="other")
        history.unload(f"U{number}", f"O{number}", of="other")
        history.ask_load(f"C{number}", of="third")
        history.ask_cancel(f"C{number}", of="third")
        history.end_cancelled(f"C{number}", of="third")
    history.ask_unload("last", "O0", of="other")
    return history.facts


async def write_ledger(
    path: Path,
    rounds: int = 1,
    *,
    stopped: bool = True,
    key_at: int | None = None,
    now: Callable[[], datetime] = lambda: START,
) -> None:
    """Write such a ledger, ended in order unless told otherwise; `key_at` has an idempotency key."""
    async with opened(path, now=now, monotonic=float) as log:
        for fact in told_history(rounds):
            data = fact.data
            assert not isinstance(data, Unknown)
            if fact.position == key_at and isinstance(data, LoadRequested):
                data = replace(data, idempotency=Idempotency("ab" * 32, "cd" * 32))
            draft = Draft(fact.id, data, fact.actor, fact.job_id, fact.model_id, fact.version, fact.worker_id)
            await log.submit(Record((draft,)))
        if stopped:
            await log.server_stopped()


def rows_of(path: Path) -> list[tuple[int, str, bytes]]:
    """Return positions, bodies and hashes of a ledger."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT position, body, hash FROM events ORDER BY position").fetchall()


def stored(path: Path, *tables: str) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of some tables, in an order of their own."""
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in tables
        }
