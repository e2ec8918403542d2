"""The log's one writer: group commit, the decision before the insert, and the live state that moves with it.

Everything that is waiting goes into one transaction, because a durable commit costs the same whatever is in
it. The connection lives in a thread of its own and is handed a whole group at a time: one hop, not one for
each statement. Readers have connections of their own (`events.reader`).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from events import store
from events.accept import Accepted, Command, Existing, Record, Refused, accept
from events.bodies import to_body
from events.canonical import chain
from events.clock import SteadyClock, moment, stamp, utc_now, uuid7
from events.errors import LedgerProblem, LogClosed, LogUnavailable, RequestRefused
from events.schema import connect
from events.state import Attempt, State
from events.store import Head, Row
from events.types import SYSTEM, Draft, Event, ServerStarted, ServerStopped, recorded

_log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_S = 1.0
"""Between tries to write again after a failure."""

MAX_GROUP = 512
"""Commands in one transaction: the commit's cost vanishes, and answers still take milliseconds."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a command: the job behind it, whether it was there before, and the head after it."""

    job_id: str | None
    existing: bool
    position: int


@dataclass(slots=True)
class _Waiting:
    """A command and who waits for it. A refusal, too, holds only once what it was decided on is durable."""

    command: Command
    done: asyncio.Future[Receipt]
    outcome: Receipt | LedgerProblem | None = None

    def settle(self) -> None:
        if self.done.done():
            return
        if isinstance(self.outcome, Receipt):
            self.done.set_result(self.outcome)
        elif self.outcome is not None:
            self.done.set_exception(self.outcome)


class Log:
    """The event log, opened for writing by this process alone (hold `events.lock` before)."""

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = uuid7,
    ) -> None:
        self._path = path
        self._clock = SteadyClock(now, monotonic)
        self._new_id = new_id
        self._queue: asyncio.Queue[_Waiting | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._connection: sqlite3.Connection | None = None
        self._writer: asyncio.Task[None] | None = None
        self._wakeups: set[asyncio.Event] = set()
        self._closing = False
        self._unsynced = False
        self._can_write = True
        self.state = State()
        self.head = Head()

    @property
    def path(self) -> Path:
        """Where the ledger is."""
        return self._path

    @property
    def healthy(self) -> bool:
        """Whether the last write, or the last try of one since it failed, went well."""
        return self._connection is not None and self._can_write and not self._closing

    @property
    def closed(self) -> bool:
        """Whether `close` has written what was waiting: nothing more will be appended."""
        return self._closing and (self._writer is None or self._writer.done())

    @property
    def writer(self) -> asyncio.Task[None]:
        """The writer coroutine; that it ends before `close` is a defect worth dying for."""
        assert self._writer is not None
        return self._writer

    def now(self) -> str:
        """Return the ledger's time as a stamp: it is never before anything recorded, and always goes on."""
        return stamp(self._clock())

    async def open(self) -> None:
        """Open the database and begin to write.

        Raises:
            LedgerProblem: `future_schema` or `foreign_database`.
            LogUnavailable: `log_unavailable`, it cannot be opened.
        """
        await self._reopen()
        self._writer = asyncio.create_task(self._write_groups(), name="ledger-writer")

    async def close(self) -> None:
        """Write what is waiting, then close; what comes later is refused."""
        self._closing = True
        if self._writer is not None:
            self._queue.put_nowait(None)
            await asyncio.wait([self._writer])
        await self._in_thread(self._drop_connection)  # the last connection to close runs a checkpoint
        self._thread.shutdown()
        self.notify()

    async def submit(self, command: Command) -> Receipt:
        """Decide `command` and make it durable; what is returned has been written to disk.

        Raises:
            RequestRefused: its code says why (`nothing_loaded`, `not_loaded`, `queue_full`).
            NotEncodable: `not_encodable`, an event that the canonical form does not have.
            LogUnavailable: `log_unavailable`, nothing was accepted.
        """
        if self._closing or self.writer.done():
            raise LogClosed
        waiting = _Waiting(command, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.done

    async def server_started(self) -> Receipt:
        """Append `ServerStarted`, unclean unless the last event says that the server had stopped."""
        unclean = self.head.position > 0 and self.head.type != ServerStopped.TYPE
        data = ServerStarted(unclean, self.head.recorded_at or None)
        return await self.submit(Record((Draft(self._new_id(), data, SYSTEM),)))

    async def server_stopped(self) -> Receipt:
        """Append `ServerStopped`."""
        return await self.submit(Record((Draft(self._new_id(), ServerStopped(), SYSTEM),)))

    def subscribe(self) -> asyncio.Event:
        """Return an event that is set after each commit; the subscriber clears it before it reads."""
        wakeup = asyncio.Event()
        self._wakeups.add(wakeup)
        return wakeup

    def unsubscribe(self, wakeup: asyncio.Event) -> None:
        """Forget what `subscribe` returned."""
        self._wakeups.discard(wakeup)

    def notify(self) -> None:
        """Wake every subscriber; carries no data, so that a lost one loses nothing."""
        for wakeup in self._wakeups:
            wakeup.set()

    async def _write_groups(self) -> None:
        group: list[_Waiting] = []
        try:
            last = False
            while not last:
                group, last = await self._next_group()
                if group:
                    await self._write(group)
        finally:  # should the writer die, nobody waits for ever
            while not self._queue.empty():
                group += filter(None, [self._queue.get_nowait()])
            _fail(group, LogClosed())

    async def _next_group(self) -> tuple[list[_Waiting], bool]:
        group: list[_Waiting] = []
        waiting = await self._first()
        while waiting is not None:
            group.append(waiting)
            if len(group) >= MAX_GROUP or self._queue.empty():
                return group, False
            waiting = self._queue.get_nowait()
        return group, True

    async def _first(self) -> _Waiting | None:
        """Wait for a command; as long as the log cannot be written, try it meanwhile."""
        while not self.healthy and not self._closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    return await self._queue.get()
            await self._probe()
        return await self._queue.get()

    async def _probe(self) -> None:
        """Write nothing new, so that nobody has to make a request to learn that requests are taken again."""
        try:
            if self._connection is None:
                await self._reopen()
            connection = self._connection
            assert connection is not None
            await self._in_thread(lambda: store.probe(connection))
        except (sqlite3.Error, LedgerProblem):
            await self._in_thread(self._drop_connection)
            return
        self._can_write = True

    async def _write(self, group: Sequence[_Waiting]) -> None:
        try:
            if self._connection is None:
                await self._reopen()
        except LedgerProblem as error:
            _fail(group, error)
            return
        try:
            attempt, rows, head = self._decide(group)
        except Exception as error:  # noqa: BLE001 - a defect fails its group, not the server
            _log.exception("a group of commands could not be decided; none of them was applied")
            _fail(group, error)
            return
        try:
            if rows:
                await self._commit(rows, attempt)
        except LogUnavailable as error:
            _fail(group, error)
            return
        attempt.commit()
        self.head = head
        for waiting in group:
            waiting.settle()
        if rows:
            self.notify()

    def _decide(self, group: Sequence[_Waiting]) -> tuple[Attempt, list[Row], Head]:
        attempt, rows, head = Attempt(self.state), list[Row](), self.head
        for waiting in group:
            if waiting.done.cancelled():
                continue
            try:
                decision = accept(attempt.state, waiting.command, self._new_id)
                drafts = decision.drafts if isinstance(decision, Accepted) else ()
                events, new_rows, head = _encode(drafts, head, self.now())
                for event in events:
                    attempt.state.apply(event)
                rows += new_rows
                waiting.outcome = _receipt(decision, head)
            except LedgerProblem as error:
                waiting.outcome = error
        return attempt, rows, head

    async def _commit(self, rows: Sequence[Row], attempt: Attempt) -> None:
        """Make a group durable; an error in COMMIT may come after the commit, so the file is asked then.

        Raises:
            LogUnavailable: it was not written, or nobody can know at the moment.
        """
        connection = self._connection
        assert connection is not None
        try:
            await self._in_thread(lambda: store.write_group(connection, rows, attempt.changes))
        except sqlite3.Error as error:
            _log.exception("the ledger could not be written")
            self._can_write = False
            self._unsynced = self._unsynced or store.kind_of(error) == sqlite3.SQLITE_IOERR
            await self._in_thread(self._drop_connection)
            await self._find(rows[-1])
        self._can_write = True

    async def _find(self, last: Row) -> None:
        """Reread the file, and return if `last` is its head.

        Raises:
            LogUnavailable: it is not, or the file cannot be read.
        """
        try:
            await self._reopen()
        except LedgerProblem as error:
            raise LogUnavailable(
                f"{error}; whether the last requests were recorded will be seen then"
            ) from error
        if (self.head.position, self.head.hash) != (last.position, last.hash):
            raise LogUnavailable

    async def _reopen(self) -> None:
        def read() -> tuple[sqlite3.Connection, Head, State]:
            connection = connect(self._path)
            try:
                if self._unsynced:
                    store.sync(connection)
                return connection, store.read_head(connection), store.read_state(connection)
            except BaseException:
                connection.close()
                raise

        try:
            self._connection, self.head, self.state = await self._in_thread(read)
        except (sqlite3.Error, ValueError) as error:  # what is stored may be damaged
            raise LogUnavailable(f"the ledger {self._path.name} cannot be opened: {error}") from error
        self._unsynced = False
        if self.head.recorded_at:
            self._clock.start_after(moment(self.head.recorded_at))
        self.notify()  # there may be events that nobody was told of, after an error in COMMIT

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _encode(drafts: Sequence[Draft], head: Head, now: str) -> tuple[list[Event], list[Row], Head]:
    """Return the drafts as events and rows after `head`: all or none of them, so one caller fails alone."""
    events, rows = [], []
    recorded_at = max(now, head.recorded_at)
    for draft in drafts:
        event = recorded(draft, head.position + 1, recorded_at)
        body = to_body(event)
        head = Head(event.position, chain(head.hash, body), recorded_at, event.type)
        events.append(event)
        rows.append(Row(event.position, body, head.hash))
    return events, rows, head


def _receipt(decision: Accepted | Existing | Refused, head: Head) -> Receipt:
    match decision:
        case Accepted(_, job_id):
            return Receipt(job_id, existing=False, position=head.position)
        case Existing(job_id):
            return Receipt(job_id, existing=True, position=head.position)
        case Refused(code, message):
            raise RequestRefused(code, message)


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.done.done():
            waiting.done.set_exception(error)
