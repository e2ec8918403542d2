"""A connection to the database of a ledger: its address, limits and clock, and translated errors.

asyncpg raises more than `PostgresError` when a server dies (`InternalClientError`, `OSError`), so every
exception is translated, and no other package of the product knows the driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import asyncpg

from events.clock import utc_now
from events.errors import EpochOver, ForeignHead, LedgerProblem
from events.storage import StorageError

CONNECT_S = 5.0
"""Time limit of making a connection."""

COMMAND_S = 10.0
"""Time limit of a statement: a page of the log takes milliseconds, an append waits for other appends."""

NO_LIMIT_S = 3600.0
"""The driver's limit for a statement under the limit of `commit`, which is shorter."""

CLOSE_S = 2.0
"""Time limit of closing a connection in order; then it is cut."""

CLOCK_PROBES = 3
"""Readings of the database's clock, of which the one with the shortest round trip counts."""


class NodeAlive(LedgerProblem):
    """A node cannot be declared lost: it has renewed its lease, or the one that judges is late itself."""

    code = "node_alive"


REFUSALS: Mapping[str, type[LedgerProblem]] = {"LL001": EpochOver, "LL002": NodeAlive}
"""The refusals of `append`, by SQLSTATE (migrations/postgres)."""

_UNCERTAIN = ("08", "57P", "58", "XX")
"""Classes of SQLSTATE that end a session or PostgreSQL itself: a COMMIT may have taken effect. All other
errors mean that the transaction was rolled back."""

_NOTICE = "00000"
"""The SQLSTATE of a message that is no warning."""

_CURE = "check the ledger's database, and the network to it"

T = TypeVar("T")

_SETTINGS = {
    "application_name": "loadledger",
    "search_path": "loadledger",
    "client_encoding": "UTF8",
    # A server that stops within a transaction holds the head's lock, for which all others wait.
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "8s",
    "statement_timeout": "9s",
    # A server that is cut off keeps its session, and so its locks, for at most this time.
    "tcp_keepalives_idle": "3",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "9000",
}

Connection: TypeAlias = "asyncpg.Connection[Any]"


def describe_address(address: str, role: str | None = None) -> str:
    """Return an address for people and logs, without its password and options; `role` replaces its role."""
    parts = urlsplit(address)
    user = f"{role or parts.username}@" if role or parts.username else ""
    return f"postgresql://{user}{parts.netloc.rpartition('@')[2]}{parts.path}"


class HeadMoved(Exception):
    """Another server has appended meanwhile: the writer catches up, and decides again."""


@contextmanager
def translated_errors(what: str) -> Iterator[None]:
    """Translate the driver's exceptions; `what` completes "the ledger's database …".

    Raises:
        EpochOver: `log_unavailable`, the database refused the epoch of this node.
        NodeAlive: `node_alive`, the database refused the loss of another node.
        StorageError: any other exception that is not the ledger's own.
    """
    try:
        yield
    except (LedgerProblem, ForeignHead, StorageError, HeadMoved):
        raise
    except asyncpg.PostgresError as error:
        refusal = REFUSALS.get(error.sqlstate or "")
        if refusal is not None:
            raise refusal(str(error)) from error
        is_refusal = not (error.sqlstate or "XX").startswith(_UNCERTAIN)
        message = f"the ledger's database {what}: {error}"
        raise StorageError(message, is_refusal=is_refusal, cure=_CURE) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise StorageError(f"the ledger's database {what}: {reason}", cure=_CURE) from error


async def connect(address: str, *, command_s: float | None = COMMAND_S, **settings: str) -> Connection:
    """Connect to a database; commits are durable whatever its defaults, unless `settings` say otherwise.

    Args:
        address: in libpq's form; missing parts come from libpq's environment and password file.
        command_s: limit of a statement, including a copy of many rows; None is no limit.
        settings: further settings of the session, or other values of its usual settings.

    Raises:
        StorageError: there is no connection.
    """
    with translated_errors(f"{describe_address(address)} cannot be reached"):
        connection = await asyncpg.connect(
            address, timeout=CONNECT_S, command_timeout=command_s, server_settings={**_SETTINGS, **settings}
        )
        is_default = "synchronous_commit" not in settings
        if is_default and await connection.fetchval("SHOW synchronous_commit") in ("off", "local"):
            await connection.execute("SET synchronous_commit = on")
        return connection


async def commit(connection: Connection, statement: Coroutine[Any, Any, T]) -> T:
    """Run a statement that commits; its effect is durable, as the database promises it, when this returns.

    After its own limit, or when its task is cancelled, the driver has the database cancel a statement.
    PostgreSQL then no longer waits for a synchronous standby, and commits without it. So the connection is
    cut instead: its session goes on waiting.

    Args:
        connection: the statement's connection.
        statement: with `timeout=NO_LIMIT_S`.

    Raises:
        StorageError: an administrator cancelled the wait for the standby, which may lack the commit.
        TimeoutError: no answer within `COMMAND_S` seconds: whether it was committed is unknown.
    """
    warnings = list[str]()

    def note(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.sqlstate != _NOTICE:
            warnings.append(str(message))

    connection.add_log_listener(note)
    running = asyncio.ensure_future(statement)
    try:
        await asyncio.wait({running}, timeout=COMMAND_S)
        if not running.done():
            raise TimeoutError(f"it did not answer within {COMMAND_S:g} s")
        answer = running.result()
        if warnings:
            raise StorageError(f"the ledger's database committed with a warning: {warnings[0]}")
        return answer
    finally:
        if running.done():
            connection.remove_log_listener(note)
        else:
            connection.terminate()
            await asyncio.wait({running})
            running.exception()


async def close(connection: Connection) -> None:
    with suppress(Exception):
        await connection.close(timeout=CLOSE_S)
    connection.terminate()


async def measure_clock(connection: Connection) -> timedelta:
    """Return how far the database's clock is ahead of this machine's."""
    readings = []
    for _ in range(CLOCK_PROBES):
        before_s, began = time.monotonic(), utc_now()
        shown: datetime = await connection.fetchval("SELECT clock_timestamp()")
        took_s = time.monotonic() - before_s
        readings.append((took_s, shown - began - timedelta(seconds=took_s / 2)))
    return min(readings)[1]


class DatabaseClock:
    """The wall clock of the database, as this machine last measured it.

    Args:
        wall: this machine's wall clock.
    """

    def __init__(self, wall: Callable[[], datetime] = utc_now) -> None:
        self._wall = wall
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return self._wall() + self.offset
