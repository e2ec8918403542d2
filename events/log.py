"""The log's one writer: group commit, the decision before the insert, and the live state that moves with it.

Everything that is waiting goes into one transaction, because a durable commit costs the same whatever is in
it. The connection, and what is done through it, is `events.sqlite.storage`; what is decided, `events.log`.

What waits for the writer, and what becomes of it: decided, encoded, and answered when it is durable.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from msgspec import Struct

from events.accept import Accepted, Existing, Refused, accept
from events.clock import SteadyClock, format_timestamp, parse_timestamp, utc_now, uuid7
from events.codec import encode_event, hash_body
from events.commands import Command, KnownKey, Record
from events.counters import Tally
from events.errors import LedgerProblem, LogClosed, LogUnavailable, NotEncodable, RequestRefused
from events.sqlite.queries import Head, Row, kind_of
from events.sqlite.storage import Database
from events.state import Attempt, State
from events.types import SYSTEM, Draft, Event, ServerStarted, ServerStopped, record_draft


class Receipt(Struct, frozen=True, gc=False):
    """What became of a command: the job behind it, whether it was there before, and the head after it."""

    job_id: str | None
    existing: bool
    position: int


@dataclass(slots=True)
class PendingCommand:
    """A command and who waits for it. A refusal, too, holds only once what it was decided on is durable."""

    command: Command
    done: asyncio.Future[Receipt]
    outcome: Receipt | LedgerProblem | None = None

    @property
    def key_hash(self) -> str | None:
        """The idempotency key that the command was given with."""
        given = None if isinstance(self.command, Record) else self.command.idempotency
        return given.key_hash if given is not None else None

    def settle(self) -> None:
        """Tell who waits, if still somebody does."""
        if self.done.done():
            return
        if isinstance(self.outcome, Receipt):
            self.done.set_result(self.outcome)
        elif self.outcome is not None:
            self.done.set_exception(self.outcome)


@dataclass(slots=True)
class PendingNote:
    """When models were last used, and who waits for that to be noted."""

    used: Mapping[str, str]
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class DecidedGroup:
    """What a group comes to: the events, also as rows, the state that they make, and the head after them."""

    attempt: Attempt
    events: Sequence[Event]
    rows: Sequence[Row]
    head: Head


def collect_keys(group: Iterable[PendingCommand]) -> set[str]:
    """Return the idempotency keys that the commands of a group were given with; most have none."""
    return {key_hash for waiting in group if (key_hash := waiting.key_hash) is not None}


def decide_group(
    group: Iterable[PendingCommand],
    state: State,
    head: Head,
    *,
    known: Mapping[str, KnownKey],
    now: str,
    new_id: Callable[[], str],
) -> DecidedGroup:
    """Decide the commands of a group one after the other, each on what those before it come to.

    Nothing but the outcomes of those who wait is changed; who gave up changes nothing.

    Args:
        group: who waits.
        state: what is durable.
        head: the log's.
        known: what the log knows of the group's idempotency keys.
        now: the ledger's time, as a stamp: one for the group, as it becomes durable at one moment.
        new_id: gives the ids of new events.
    """
    attempt, events, rows = Attempt(state, known), list[Event](), list[Row]()
    for waiting in group:
        if waiting.done.cancelled():
            continue
        try:
            decision = accept(attempt.state, waiting.command, new_id, now)
            if isinstance(decision, Accepted):
                new_events, new_rows, head = encode_drafts(decision.drafts, head, now)
                for event in new_events:
                    attempt.state.apply(event)
                events += new_events
                rows += new_rows
            waiting.outcome = make_receipt(decision, head)
        except LedgerProblem as error:
            waiting.outcome = error
    return DecidedGroup(attempt, events, rows, head)


def encode_drafts(drafts: Sequence[Draft], head: Head, now: str) -> tuple[list[Event], list[Row], Head]:
    """Return the drafts as events and rows after `head`: all or none of them, so one caller fails alone."""
    events, rows = [], []
    position, digest = head.position, head.hash
    recorded_at = max(now, head.recorded_at)
    for draft in drafts:
        position += 1
        event = record_draft(draft, position, recorded_at)
        body = encode_event(event)
        digest = hash_body(digest, body)
        events.append(event)
        rows.append(Row(position, body, digest))
    return events, rows, Head(position, digest, recorded_at, events[-1].type) if events else head


def make_receipt(decision: Accepted | Existing | Refused, head: Head) -> Receipt:
    """Return what a decision comes to, where `head` is the log's after it.

    Raises:
        RequestRefused: that is what it comes to.
    """
    if isinstance(decision, Refused):
        raise RequestRefused(decision.code, decision.message)
    return Receipt(decision.job_id, existing=isinstance(decision, Existing), position=head.position)


def fail_callers(group: Iterable[PendingCommand | PendingNote], error: Exception) -> None:
    """Tell all who wait that nothing came of it."""
    for waiting in group:
        if not waiting.done.done():
            waiting.done.set_exception(error)


T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue whose reader is woken once for whatever waits, which costs less than once for each."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._call = asyncio.Event()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add something at the end."""
        self._items.append(item)
        self._call.set()

    def call(self) -> None:
        """Wake the reader, though nothing may be there."""
        self._call.set()

    async def wait(self) -> None:
        """Return when something is there, or the reader was called."""
        await self._call.wait()

    def take(self, limit: int | None = None) -> list[T]:
        """Return what is there, in order: at most `limit`."""
        number = len(self._items) if limit is None else min(limit, len(self._items))
        taken = [self._items.popleft() for _ in range(number)]
        if not self._items:
            self._call.clear()
        return taken


__all__ = ["MAX_GROUP", "PROBE_S", "Log", "Receipt"]

_log = logging.getLogger(__name__)

PROBE_S = 1.0
"""Between tries to write again after a failure."""

MAX_GROUP = 512
"""Commands in one transaction: the commit's cost vanishes, and answers still take milliseconds."""


class Log:
    """The event log, opened for writing by this process alone (hold `events.datalock` before).

    Attributes:
        tally: what was recorded since this was made, counted.
    """

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
        self._inbox: Inbox[PendingCommand | PendingNote] = Inbox()
        self._database = Database(path)
        self._writer: asyncio.Task[None] | None = None
        self._wakeups: set[asyncio.Event] = set()
        self._closing = False
        self._whole = True
        self._can_write = True
        self.state = State()
        self.head = Head()
        self.last_used: Mapping[str, str] = {}
        self.tally = Tally()

    @property
    def path(self) -> Path:
        """Where the ledger is."""
        return self._path

    @property
    def healthy(self) -> bool:
        """Whether the last write, or the last try of one since it failed, went well."""
        return self._database.is_open and self._can_write and not self._closing

    @property
    def waiting(self) -> int:
        """How many commands wait to be written."""
        return len(self._inbox)

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
        return format_timestamp(self._clock())

    async def open(self) -> None:
        """Open the database and begin to write; `last_used` is what was noted until now.

        Projections that were made by other folds are made anew first.

        Raises:
            LedgerProblem: `future_schema` or `foreign_database`.
            LogUnavailable: `log_unavailable`, it cannot be opened.
        """
        await self._open()
        self._writer = asyncio.create_task(self._write_groups(), name="ledger-writer")

    async def close(self) -> None:
        """Write what is waiting, then close; what comes later is refused. The file is then complete alone."""
        self._closing = True
        if self._writer is not None:
            self._inbox.call()
            await asyncio.wait([self._writer])
        await self._database.close()
        self.notify()

    async def submit(self, command: Command) -> Receipt:
        """Decide `command` and make it durable; what is returned has been written to disk.

        Raises:
            RequestRefused: its code says why (`nothing_loaded`, `not_loaded`, `queue_full`,
                `already_finished`, `already_started`, `idempotency_mismatch`).
            NotEncodable: `not_encodable`, an event that the canonical form does not have.
            LogUnavailable: `log_unavailable`, nothing was accepted.
        """
        if self._closing or self.writer.done():
            raise LogClosed
        waiting = PendingCommand(command, asyncio.get_running_loop().create_future())
        began = time.monotonic()
        self._inbox.put(waiting)
        receipt = await waiting.done
        self.tally.append_s.observe(time.monotonic() - began)
        return receipt

    async def note_last_used(self, used: Mapping[str, str]) -> None:
        """Note when models, by id, were last used, as stamps; it never goes back.

        It is no event, and has a transaction of its own, so that it fails alone: what is lost is a hint.

        Raises:
            NotEncodable: `not_encodable`, an id that is no text.
            LogUnavailable: `log_unavailable`, nothing was noted.
        """
        if self._closing or self.writer.done():
            raise LogClosed
        noting = PendingNote(dict(used), asyncio.get_running_loop().create_future())
        self._inbox.put(noting)
        await noting.done

    async def server_started(self) -> Receipt:
        """Append `ServerStarted`, unclean unless the last event says that the server had stopped.

        From then on the file alone, copied without its write-ahead log, ends with an event that says so.
        """
        unclean = self.head.position > 0 and self.head.type != ServerStopped.TYPE
        data = ServerStarted(unclean, self.head.recorded_at or None)
        self._whole = False
        receipt = await self.submit(Record((Draft(self._new_id(), data, SYSTEM),)))
        self._whole = await self._database.make_whole()
        return receipt

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

    async def _open(self) -> None:
        """Open the database, at first or after an error, and go on from what it says.

        Raises:
            FutureSchema: `future_schema`.
            ForeignDatabase: `foreign_database`.
            LogUnavailable: `log_unavailable`.
        """
        stored = await self._database.open()
        self.head, self.state, self.last_used = stored.head, stored.state, stored.last_used
        if self.head.recorded_at:
            self._clock.start_after(parse_timestamp(self.head.recorded_at))
        self.notify()  # there may be events that nobody was told of, after an error in COMMIT

    async def _write_groups(self) -> None:
        group: list[PendingCommand | PendingNote] = []
        try:
            while self._inbox or not self._closing:
                await self._wait()
                group = self._inbox.take(MAX_GROUP)
                commands = [each for each in group if isinstance(each, PendingCommand)]
                if commands:
                    await self._write(commands)
                for each in group:
                    if isinstance(each, PendingNote):
                        await self._note(each)
                if not self._whole:
                    self._whole = await self._database.make_whole()
        finally:  # should the writer die, nobody waits for ever
            fail_callers([*group, *self._inbox.take()], LogClosed())

    async def _wait(self) -> None:
        """Wait for work; as long as the log cannot be written, or is not whole, try it meanwhile."""
        while not (self.healthy and self._whole) and not self._closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    return await self._inbox.wait()
            if not self.healthy:
                await self._probe()
            else:
                self._whole = await self._database.make_whole()
        return await self._inbox.wait()

    async def _probe(self) -> None:
        """Write nothing new, so that nobody has to make a request to learn that requests are taken again."""
        try:
            if not self._database.is_open:
                await self._open()
            await self._database.probe()
        except (sqlite3.Error, LedgerProblem):
            await self._database.give_up()
            return
        self._can_write = True

    async def _write(self, group: Sequence[PendingCommand]) -> None:
        try:
            if not self._database.is_open:
                await self._open()
            known = await self._database.read_keys(collect_keys(group))
            decided = decide_group(
                group, self.state, self.head, known=known, now=self.now(), new_id=self._new_id
            )
        except LedgerProblem as error:
            fail_callers(group, error)
            return
        except Exception as error:  # noqa: BLE001 - a defect fails its group, not the server
            _log.exception("a group of commands could not be decided; none of them was applied")
            fail_callers(group, error)
            return
        try:
            if decided.rows:
                await self._commit(decided)
        except LogUnavailable as error:
            fail_callers(group, error)
            return
        decided.attempt.commit()
        self.head = decided.head
        self.tally.count(decided.events, decided.attempt.changes.jobs.values())
        for waiting in group:
            waiting.settle()
        if decided.rows:
            self.notify()

    async def _commit(self, decided: DecidedGroup) -> None:
        """Make a group durable; an error in COMMIT may come after the commit, so the file is asked then.

        Raises:
            LogUnavailable: it was not written, or nobody can know at the moment.
        """
        entities = len(self.state.models) + decided.attempt.state.backlog
        began = time.monotonic()
        try:
            await self._database.write(decided.rows, decided.attempt.changes, entities)
            self.tally.commit_s.observe(time.monotonic() - began)
        except sqlite3.Error as error:
            _log.exception("the ledger could not be written")
            self.tally.write_failures += 1
            self._can_write = False
            await self._database.give_up(error)
            await self._find(decided.head)
        self._can_write = True

    async def _find(self, head: Head) -> None:
        """Reread the file, and return if this is its head.

        Raises:
            LogUnavailable: it is not, or the file cannot be read.
        """
        try:
            await self._open()
        except LedgerProblem as error:
            raise LogUnavailable(
                f"{error}; whether the last requests were recorded will be seen then"
            ) from error
        if (self.head.position, self.head.hash) != (head.position, head.hash):
            raise LogUnavailable

    async def _note(self, noting: PendingNote) -> None:
        try:
            if not self._database.is_open:
                await self._open()
            await self._database.note(noting.used)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a note, it fails alone
            await self._fail_to_note(noting, error)
            return
        if not noting.done.done():
            noting.done.set_result(None)

    async def _fail_to_note(self, noting: PendingNote, error: Exception) -> None:
        """Say so, and see whether it is the log that cannot be written."""
        _log.warning("when models were last used could not be noted: %s", error)
        if isinstance(error, sqlite3.Error) and kind_of(error) == sqlite3.SQLITE_IOERR:
            await self._database.give_up(error)
        await self._probe()
        fail_callers([noting], NotEncodable() if isinstance(error, UnicodeEncodeError) else LogUnavailable())
