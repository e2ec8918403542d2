"""The ledger's database as its one writer has it: a connection in a thread, opened anew after errors.

The thread is handed a whole group at a time: one hop, not one for each statement. Readers have connections
of their own (`events.reader`).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from events import rebuild, store
from events.commands import KnownKey
from events.copies import checkpoint, lacks_wal, leave_alone_complete
from events.errors import LogUnavailable
from events.schema import connect, readable
from events.state import Changes, State
from events.store import Head, Row

_log = logging.getLogger(__name__)

T = TypeVar("T")

STATEMENTS_IN_MEMORY = "PRAGMA temp_store = MEMORY"
"""What a statement changes is kept until it is done, some pages for each event of a group: not in a file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a ledger says when it is opened: where it ends, what is so there, when models were last used."""

    head: Head
    state: State
    last_used: Mapping[str, str]


class Database:
    """The writer's connection. What it cannot do raises sqlite3.Error, where nothing else is said.

    After such an error nobody knows what the connection would still do: `give_up` it, and `open` it anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._connection: sqlite3.Connection | None = None
        self._was_open = False
        self._lacked_wal = False
        self._unsynced = False

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    async def open(self) -> Stored:
        """Connect, and read what is stored; projections that other folds made are made anew first.

        Raises:
            FutureSchema: `future_schema`.
            ForeignDatabase: `foreign_database`.
            LogUnavailable: `log_unavailable`, it cannot be opened, or what is stored is damaged.
        """
        try:
            self._connection, stored = await self.run(self._opened)
        except (sqlite3.Error, OSError, ValueError) as error:  # what is stored may be damaged
            raise LogUnavailable(f"the ledger {self._path.name} cannot be opened: {error}") from error
        self._was_open, self._unsynced = True, False
        return stored

    async def write(self, rows: Sequence[Row], changes: Changes, entities: int) -> None:
        """Append a group of events and store what they changed; durable on return."""
        connection = self._connected()
        await self.run(lambda: store.write_group(connection, rows, changes, entities))

    async def read_keys(self, hashes: AbstractSet[str]) -> Mapping[str, KnownKey]:
        """Return what the log knows of these idempotency keys; most groups have none.

        Raises:
            LogUnavailable: `log_unavailable`, they cannot be read; the connection is given up.
        """
        if not hashes:
            return {}
        connection = self._connected()
        try:
            return await self.run(lambda: store.read_keys(connection, hashes))
        except sqlite3.Error as error:
            _log.exception("the idempotency keys of a group could not be looked up")
            await self.give_up()
            raise LogUnavailable from error

    async def note(self, used: Mapping[str, str]) -> None:
        """Note when models were last used.

        Raises:
            UnicodeEncodeError: an id that is no text.
        """
        connection = self._connected()
        await self.run(lambda: store.write_last_used(connection, used))

    async def probe(self) -> None:
        """Write nothing new, durably: so it can be written again."""
        connection = self._connected()
        await self.run(lambda: store.probe(connection))

    async def make_whole(self) -> bool:
        """Bring the file up to its write-ahead log; return False where that cannot be done yet."""
        connection = self._connection
        if connection is None:
            return False
        try:
            return await self.run(lambda: checkpoint(connection))  # not as long as a reader is in the way
        except sqlite3.Error as error:
            _log.warning("the ledger's file could not be brought up to date yet: %s", error)
            return False

    async def give_up(self, error: sqlite3.Error | None = None) -> None:
        """Close the connection after an error; after one of the disk, all is synced when opened anew."""
        if error is not None and store.kind_of(error) == sqlite3.SQLITE_IOERR:
            self._unsynced = True
        await self.run(self._drop)

    async def close(self) -> None:
        """Leave one file that is complete alone, and end the thread."""
        await self.run(self._leave)
        self._thread.shutdown()

    async def run(self, work: Callable[[], T]) -> T:
        """Do some work in the thread that has the connection."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _connected(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _opened(self) -> tuple[sqlite3.Connection, Stored]:
        if not self._was_open and self._path.exists():
            self._lacked_wal = lacks_wal(self._path)
            _look_at(self._path)
        connection = connect(self._path)
        try:
            if self._unsynced:
                store.sync(connection)
            stored = _stored(connection)
            connection.execute(STATEMENTS_IN_MEMORY)
        except BaseException:
            if not self._was_open:
                leave_alone_complete(connection, lacked_wal=self._lacked_wal)
            connection.close()
            raise
        return connection, stored

    def _leave(self) -> None:
        if self._connection is not None:
            leave_alone_complete(self._connection, lacked_wal=self._lacked_wal)
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _look_at(path: Path) -> None:
    """Read what is stored before anything is written, so that a file that cannot be used stays as it is.

    Raises:
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        sqlite3.Error, ValueError: it is damaged, or no database.
    """
    with readable(path) as connection:
        if rebuild.is_current(connection):
            store.read_state(connection)


def _stored(connection: sqlite3.Connection) -> Stored:
    head = store.read_head(connection)
    if not rebuild.is_current(connection):
        if head.position:
            _log.info("%d events are folded anew, since another release did it last", head.position)
        rebuild.rebuild(connection)
    return Stored(head, store.read_state(connection), store.read_last_used(connection))
