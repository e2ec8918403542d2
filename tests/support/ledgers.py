"""Ledgers in files: a sample ledger, copies of it, damage to it, and keys to sign it with."""

import asyncio
import hashlib
import os
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import aiosqlite
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from events.audit.signing import HeadSigner
from events.audit.verify import Finding, FindingKind
from events.codec import GENESIS, encode_event, hash_body
from events.commands import Record
from events.log import Log
from events.sqlite.schema import connect
from events.sqlite.storage import Database
from events.sqlite.writing import WRITE_GROUP, group_of
from events.state import State, Transaction
from events.storage import LogHead, Row
from events.types import Draft, Event, Unknown
from support import leaks
from support.history import START, History, opened, steady, write


def body_of(line: bytes) -> bytes:
    """Return the body of an event in a line that ends with its hash, exactly as it is hashed."""
    return line[: -len(',"hash":""}') - 64] + b"}"


SIGN = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
"""A key that is the same in each run."""

OTHER_SIGN = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
"""The key of somebody else, likewise."""

FAST_FOLDER = leaks.fast_folder()
"""Properties write hundreds of ledgers: in memory, an fsync takes 0.01 ms instead of 4 ms."""


def database_of(log: Log) -> Database:
    assert isinstance(log._storage, Database)
    return log._storage


def connection_of(log: Log) -> aiosqlite.Connection:
    return database_of(log)._connection


async def lose_connection(log: Log) -> None:
    """Let each statement of the writer's connection fail, until it is opened anew."""
    await connection_of(log).set_progress_handler(lambda: 1, 1)


@contextmanager
def unwritable(path: Path, event_type: str) -> Iterator[None]:
    """Let a ledger refuse events of a type, as a full disk does."""
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events"
            f" WHEN json_extract(NEW.body, '$.type') = '{event_type}'"
            " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
        try:
            yield
        finally:
            connection.execute("DROP TRIGGER full")


DATA_ROUNDS = 2
"""Rounds of the history in the data directory of the commands' tests."""


def sample_history(rounds: int = 1) -> list[Event]:
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


async def append_events(log: Log, events: Iterable[Event]) -> None:
    for event in events:
        data = event.data
        assert not isinstance(data, Unknown)
        draft = Draft(
            event.id, data, event.actor, event.job_id, event.model_id, event.version, event.worker_id
        )
        await log.submit(Record((draft,)))


async def write_ledger(path: Path, rounds: int = 1, *, stopped: bool = True) -> None:
    """Write such a ledger, ended in order unless told otherwise."""
    async with opened(path, **steady(lambda: START)) as log:
        await append_events(log, sample_history(rounds))
        if stopped:
            await log.server_stopped()


@cache
def sound_ledger(rounds: int = 1, *, seconds: float = 0) -> bytes:
    """Return the file of such a ledger, ended in order.

    Args:
        rounds: of its history.
        seconds: between two events.
    """
    ticks = count()

    async def write(path: Path) -> None:
        now = lambda: datetime.fromtimestamp(START.timestamp() + int(next(ticks) * seconds), START.tzinfo)  # noqa: E731
        async with opened(path, **steady(now)) as log:
            await append_events(log, sample_history(rounds))
            await log.server_stopped()

    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        asyncio.run(write(Path(folder) / "ledger.db"))
        return (Path(folder) / "ledger.db").read_bytes()


def store_events(connection: sqlite3.Connection, events: Iterable[Event]) -> State:
    """Write events to an empty ledger; return the state after them."""
    state, digest = State(), GENESIS
    connection.execute("PRAGMA synchronous = OFF")
    for event in events:
        head, attempt = LogHead(state.position, digest), Transaction(state)
        digest = hash_body(digest, body := encode_event(event))
        attempt.apply(event)
        connection.execute(WRITE_GROUP, group_of([Row(event.position, body, digest)], attempt.changes, head))
        attempt.commit()
    return state


@contextmanager
def ledger_of(events: Iterable[Event]) -> Iterator[sqlite3.Connection]:
    """Open a new ledger with these events."""
    with copy_of(b"") as path, closing(connect(path)) as connection:
        store_events(connection, events)
        yield connection


@contextmanager
def copy_of(ledger: bytes) -> Iterator[Path]:
    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(ledger)
        yield path


def change_ledger(path: Path, *statements: str, keeps_triggers: bool = False) -> int:
    """Change a ledger behind the writer's back; return how many rows the last statement changed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA writable_schema = ON")
        if not keeps_triggers:
            triggers = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            for (name,) in triggers:
                connection.execute(f"DROP TRIGGER {name}")
        changed = 0
        for statement in statements:
            changed = connection.execute(statement).rowcount
        return changed


def forge_bodies(path: Path, change_body: Callable[[int, str], str]) -> None:
    """Change the bodies of a ledger's events, and make all hashes anew."""
    digest, forged = bytes(32), list[tuple[str, bytes, int]]()
    for position, body, _ in rows_of(path):
        changed = change_body(position, body)
        digest = hashlib.sha256(digest + changed.encode()).digest()
        forged.append((changed, digest, position))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.executemany("UPDATE events SET body = ?, hash = ? WHERE position = ?", forged)
        connection.commit()


def flip_byte(data: bytes, index: int, bits: int) -> bytes:
    index %= len(data)
    return data[:index] + bytes([data[index] ^ bits]) + data[index + 1 :]


LIMIT_S = 60
"""Nothing in a forked process takes this long; a bug ends it by SIGALRM instead of hanging the test."""


def run_forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        try:
            work()
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_and_be_killed(path: Path, events: int) -> None:
    async def write_events() -> None:
        async with opened(path) as log:
            await log.server_started()
            await write(log, events)
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(lambda: asyncio.run(write_events())) == -signal.SIGKILL


def place_of(finding: Finding | None) -> tuple[int, FindingKind]:
    """Return where a ledger or file is wrong, and how; something has to be."""
    assert finding is not None
    return finding.position, finding.kind


def rows_of(path: Path) -> list[tuple[int, str, bytes]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT position, body, hash FROM events ORDER BY position").fetchall()


def stored(path: Path, *tables: str) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in tables
        }
