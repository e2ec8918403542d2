"""The log's writer: its inbox, group commit, the decisions right before the insert, the live state.

`Log.submit` queues a command. The writer takes all pending commands as one group, decides them one after the
other on the state, encodes the accepted events, and commits them in one transaction, because a durable commit
costs the same for any number of commands. Then it updates the state, answers callers and wakes subscribers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from msgspec import UNSET, UnsetType

from events.accept import accept
from events.clock import ClockStep, LedgerClock, Timestamp, boottime, format_timestamp, utc_now, uuid7
from events.codec import encode_event, hash_body
from events.commands import Accepted, Command, Existing, Receipt, Record, Refused
from events.counters import Tally
from events.errors import (
    ForeignHead,
    LedgerProblem,
    LogClosed,
    LogUnavailable,
    NotEncodable,
    OutcomeUnknown,
    RequestRefused,
)
from events.sqlite.storage import Database
from events.state import Changes, KnownRequests, State, Transaction
from events.storage import LogHead, Row, Storage, StorageError
from events.types import (
    SYSTEM,
    ClockStepped,
    Draft,
    Event,
    RollbackAccepted,
    ServerStarted,
    ServerStopped,
    record_draft,
)
from events.values import Confinement, PlannedMemory

_log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_S = 1.0
"""Pause between attempts to write again after a failure."""

MAX_GROUP = 512
"""Commands in one transaction: the cost of the commit vanishes, and answers still take milliseconds."""


@dataclass(slots=True)
class PendingCommand:
    """A command, its caller's future, and the outcome, which is answered once the group is durable."""

    command: Command
    done: asyncio.Future[Receipt]
    outcome: Receipt | LedgerProblem | None = None

    @property
    def key_hash(self) -> str | None:
        given = self.command.idempotency
        return given.key_hash if given is not None else None


@dataclass(slots=True)
class PendingNote:
    """Times of last use by model id, and the caller's future; a note also says that the server is alive."""

    used: Mapping[str, str]
    done: asyncio.Future[None]


def answer(done: asyncio.Future[T], outcome: T | Exception) -> None:
    if done.done():
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def refusal_of(error: StorageError) -> LogUnavailable:
    """Return the answer to commands of which none was written."""
    return LogUnavailable(f"the ledger cannot be written, so nothing was accepted: {error}; {error.cure}")


def fail_callers(group: Iterable[PendingCommand | PendingNote], error: Exception) -> None:
    for pending in group:
        done: asyncio.Future[Any] = pending.done
        answer(done, error)


class Inbox(Generic[T]):
    """A queue whose reader is woken once for all items, which costs less than a wakeup for each."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wakeup.set()

    def wake(self) -> None:
        """Wake the reader, even without an item."""
        self._wakeup.set()

    async def wait(self) -> None:
        await self._wakeup.wait()

    def take(self, limit: int | None = None) -> list[T]:
        """Return the items in order, at most `limit`."""
        number = len(self._items) if limit is None else min(limit, len(self._items))
        taken = [self._items.popleft() for _ in range(number)]
        if not self._items:
            self._wakeup.clear()
        return taken


class Log:
    """The event log, written by this process alone (take the locks of `events.sqlite.datalock` before).

    Args:
        path: the ledger's file, which readers open.
        storage: the storage that the ledger is written to; None is the file itself.
        now: the wall clock.
        boottime: CLOCK_BOOTTIME in seconds.
        new_id: returns the id of a new event.

    Attributes:
        state: the live state, at the head; read only.
        head: the last durable event.
        last_used: times of last use by model id, as read at the start.
        last_seen: the server's latest earlier note that it was alive; empty without one.
        tally: counters of the events since the start.
        clock: the ledger's times, and the monotonic time by which deadlines run.
        problem: why the last write, or the last probe, failed; None after a success.
    """

    def __init__(
        self,
        path: Path,
        *,
        storage: Storage | None = None,
        now: Callable[[], datetime] = utc_now,
        boottime: Callable[[], float] = boottime,
        new_id: Callable[[], str] = uuid7,
    ) -> None:
        self.path = path
        self._new_id = new_id
        self._inbox: Inbox[PendingCommand | PendingNote] = Inbox()
        self._storage: Storage = Database(path) if storage is None else storage
        self._writer: asyncio.Task[None] | None = None
        self._wakeups: set[asyncio.Event] = set()
        self._closing = False
        self._is_complete = True
        self.problem: StorageError | None = None
        self.state = State()
        self.head = LogHead()
        self.last_used: Mapping[str, str] = {}
        self.last_seen = ""
        self.tally = Tally()
        self.clock = LedgerClock(now, boottime)
        self._is_started = False
        self._poll_s: float | None = None
        self._uncertain_head: LogHead | None = None

    @property
    def healthy(self) -> bool:
        """Whether the last write, or the last probe after a failed one, succeeded."""
        return self._storage.is_open and self.problem is None and not self._closing

    @property
    def waiting(self) -> int:
        """The number of pending commands and notes."""
        return len(self._inbox)

    @property
    def closed(self) -> bool:
        """Whether `close` has written all pending commands: nothing more will be appended."""
        return self._closing and (self._writer is None or self._writer.done())

    @property
    def writer(self) -> asyncio.Task[None]:
        """The task of the writer; if it ends before `close`, the server must stop.

        Raises:
            LogClosed: `shutting_down`, the log is not open.
        """
        if self._writer is None:
            raise LogClosed
        return self._writer

    def now(self) -> str:
        """Return the ledger's time: never before the last event, even while the wall clock is behind."""
        now = max(self.head.recorded_at, format_timestamp(self.clock.now()))
        while self._is_started and self.clock.steps:
            self._record_step(self.clock.steps.pop(0))
        return now

    def _record_step(self, step: ClockStep) -> None:
        """Append `ClockStepped` with the next group; if the group fails, the step is lost."""
        data = ClockStepped(step.begin, step.end, step.is_taken)
        done: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._inbox.put(PendingCommand(Record((Draft(self._new_id(), data, SYSTEM),)), done))

    def is_removed(self, model_id: str, version: int) -> bool:
        """Whether the ledger has a version of a model as removed."""
        return self.state.is_removed(model_id, version)

    async def open(self) -> None:
        """Open the database and start the writer. Projections of other folds are rebuilt first.

        Raises:
            LedgerProblem: `future_schema` or `foreign_database`.
            LogUnavailable: `log_unavailable`, the database cannot be opened.
        """
        await self._open()
        self.clock.start_monotonic(self.now())
        self._writer = asyncio.create_task(self._write_groups(), name="ledger-writer")

    async def close(self) -> None:
        """Write pending commands, refuse later ones, and close; the file is then complete without its WAL."""
        self._closing = True
        if self._writer is not None:
            self._inbox.wake()
            await asyncio.wait([self._writer])
        await self._storage.close()
        self.notify()

    async def submit(self, command: Command) -> Receipt:
        """Decide a command; when this returns, its events are on disk.

        Raises:
            RequestRefused: `nothing_loaded`, `not_loaded`, `queue_full`, `already_finished`,
                `already_started`, `idempotency_mismatch`.
            NotEncodable: `not_encodable`, an event has no canonical form.
            LogUnavailable: `log_unavailable`, nothing was accepted.
        """
        if self._closing or self.writer.done():
            raise LogClosed
        pending = PendingCommand(command, asyncio.get_running_loop().create_future())
        began = time.monotonic()
        self._inbox.put(pending)
        receipt = await pending.done
        self.tally.append_s.observe(time.monotonic() - began)
        return receipt

    async def catch_up(self) -> bool:
        """Wait until the state has all events that other servers appended before this call.

        Returns:
            False if the database does not answer, so that newer events may be missing.
        """
        return True

    async def reach(self, position: int) -> None:
        """Catch up if this position, which a client read at another server, is beyond the head.

        Raises:
            LogUnavailable: `log_unavailable`, the database does not answer.
        """

    async def note_last_use(self, used: Mapping[str, str]) -> None:
        """Store times of last use by model id, and that the server is alive; a stored time never goes back.

        A note is no event and has a transaction of its own, so it fails alone.

        Raises:
            NotEncodable: `not_encodable`, an id is no valid text.
            LogUnavailable: `log_unavailable`, nothing was stored.
        """
        if self._closing or self.writer.done():
            raise LogClosed
        note = PendingNote(dict(used), asyncio.get_running_loop().create_future())
        self._inbox.put(note)
        await note.done

    async def server_started(
        self, confinement: Confinement | None = None, memory: PlannedMemory | UnsetType = UNSET
    ) -> Receipt:
        """Append `ServerStarted`; unclean unless the last event is `ServerStopped`."""
        last = self.head
        unclean = last.position > 0 and last.type != ServerStopped.TYPE
        last_event_at = last.recorded_at or None
        last_seen_at = max(last.recorded_at, self.last_seen if unclean else "") or None
        data = ServerStarted(
            unclean,
            last_event_at=last_event_at,
            last_seen_at=last_seen_at,
            confinement=confinement,
            memory=memory,
        )
        return await self.begin(Record((Draft(self._new_id(), data, SYSTEM),)))

    async def begin(self, command: Command) -> Receipt:
        """Append the start of this server before any other event.

        Then copy the WAL into the file, so that a copy of the file alone shows that the server runs.
        """
        self._is_complete = False
        receipt = await self.submit(command)
        self._is_complete = await self._storage.checkpoint()
        self._is_started = True
        return receipt

    async def rollback_accepted(self, accepted: RollbackAccepted) -> None:
        await self.submit(Record((Draft(self._new_id(), accepted, SYSTEM),)))

    async def server_stopped(self) -> Receipt:
        """Append `ServerStopped`, after which nothing is appended."""
        self._is_started = False
        return await self.submit(Record((Draft(self._new_id(), ServerStopped(), SYSTEM),)))

    @contextmanager
    def subscribed(self, wakeup: asyncio.Event | None = None) -> Iterator[asyncio.Event]:
        """Yield an asyncio event, the caller's or a new one, which each commit sets; clear it, then read."""
        wakeup = wakeup or asyncio.Event()
        self._wakeups.add(wakeup)
        try:
            yield wakeup
        finally:
            self._wakeups.discard(wakeup)

    async def wait_until(self, holds: Callable[[], bool], limit_s: float | None) -> bool:
        """Wait until a condition holds after a commit; return False when the time is up."""
        with self.subscribed() as wakeup, suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not holds():
                    wakeup.clear()
                    await wakeup.wait()
                return True
        return False

    async def wait_for(self, position: int, limit_s: float) -> None:
        """Wait, for a limited time, until the state includes the event at a position."""
        await self.wait_until(lambda: self.state.position >= position, limit_s)

    def notify(self) -> None:
        """Wake all subscribers; a wakeup carries no data, so a lost one loses nothing."""
        for wakeup in self._wakeups:
            wakeup.set()

    # The writer's way: take a group, decide it, commit it, answer its callers and wake the subscribers.

    async def _write_groups(self) -> None:
        group: list[PendingCommand | PendingNote] = []
        try:
            while self._inbox or not self._closing:
                await self._wait()
                group = self._inbox.take(MAX_GROUP)
                await self._prepare()
                commands = [each for each in group if isinstance(each, PendingCommand)]
                if commands:
                    await self._write(commands)
                for each in group:
                    if isinstance(each, PendingNote) and not each.done.done():
                        await self._note(each)
                if not self._is_complete:
                    self._is_complete = await self._storage.checkpoint()
        finally:  # if the writer dies, no caller waits for ever
            fail_callers([*group, *self._inbox.take()], LogClosed())

    async def _wait(self) -> None:
        """Wait for work; while writing fails, or the file needs its WAL, retry from time to time."""
        while not (self.healthy and self._is_complete) and not self._closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    return await self._inbox.wait()
            if not self.healthy:
                await self._probe()
            else:
                self._is_complete = await self._storage.checkpoint()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._inbox.wait()
        return None

    async def _prepare(self) -> None:
        """Hook before a group; here without effect, since no other server appends."""

    async def _write(self, group: Sequence[PendingCommand]) -> None:
        """Decide and append a group, and answer its callers."""
        before = self.head
        try:
            if not self._storage.is_open:
                await self._open()
            await self._append(group)
        except ForeignHead:
            raise
        except LedgerProblem as error:
            fail_callers(group, error)
            return
        except Exception as error:  # noqa: BLE001 - a defect fails its group, not the server
            _log.exception("a group of commands could not be decided; none was applied")
            fail_callers(group, error)
            return
        for pending in group:
            if pending.outcome is not None:  # None if the caller was cancelled
                answer(pending.done, pending.outcome)
        if self.head != before:
            self.notify()

    async def _append(self, group: Sequence[PendingCommand]) -> None:
        """Decide a group on the present state, and make it durable. COMMIT may fail after it took effect.

        Raises:
            LedgerProblem: the error of the whole group.
        """
        hashes = {key_hash for pending in group if (key_hash := pending.key_hash) is not None}
        joinable = {each for pending in group for each in pending.command.list_joinable(self.state)}
        known = await self._storage.read_requests(hashes, joinable)
        decided = decide_group(group, self.state, self.head, known=known, now=self.now(), new_id=self._new_id)
        if not decided.rows:
            self._advance(decided)
            return
        began = time.monotonic()
        try:
            await self._storage.append(decided.rows, decided.changes, self.head)
        except StorageError as error:
            await self._close_after(error)
            if error.is_refusal:
                raise refusal_of(error) from error
            self._uncertain_head = decided.head
            await self._check_written(decided, error)
        else:
            self.tally.commit_s.observe(time.monotonic() - began)
            self._advance(decided)
        self._note_success()

    def _advance(self, decided: DecidedGroup) -> None:
        """Update the state with durable events, and count those since the start."""
        decided.transaction.commit()
        self.head = decided.head
        self._count(decided)

    def _count(self, decided: DecidedGroup) -> None:
        if self._writer is None:
            return
        self.tally.count(decided.events, decided.changes.jobs.values())
        if decided.rows:
            self.clock.note(decided.rows[0].position, decided.head.recorded_at)

    # Opening, at the start and after an error.

    async def _open(self) -> None:
        """Open the database, and continue from what it holds.

        Raises:
            ForeignHead: after an error, another process has written.
        """
        stored = await self._storage.open()
        if self._writer is not None and stored.head not in (self.head, self._uncertain_head):
            raise ForeignHead(f"the ledger's head at {stored.head.position} was not written by this server")
        self._uncertain_head = None
        self.head, self.state = stored.head, stored.state
        self.last_used, self.last_seen = stored.last_used, stored.last_seen
        self.notify()  # after an error in COMMIT the file may have new events

    async def _check_written(self, decided: DecidedGroup, error: StorageError) -> None:
        """Read the log again after an error; without the group's head in it, the group was not written."""
        if not await self._is_written(decided.head):
            raise refusal_of(error) from error
        self._count(decided)

    async def _is_written(self, head: LogHead) -> bool:
        try:
            await self._open()
            return await self._storage.contains(head)
        except (LedgerProblem, StorageError) as error:
            if self._storage.is_open:
                await self._storage.close_after_error()
            raise OutcomeUnknown(
                f"it is unknown whether the last requests were recorded: {error.__cause__ or error}"
            ) from error

    async def _probe(self) -> None:
        """Try an empty write, so that the log becomes healthy again without a request."""
        try:
            if not self._storage.is_open:
                await self._open()
            await self._storage.probe()
        except LedgerProblem:
            await self._storage.close_after_error()
            return
        except StorageError as error:
            self.problem = error
            await self._storage.close_after_error()
            return
        self._note_success()

    async def _close_after(self, error: StorageError) -> None:
        """Count a failed write and close the storage; the next command or probe opens it anew."""
        self._note_failure(error)
        await self._storage.close_after_error(error)

    def _note_failure(self, error: StorageError) -> None:
        """Count a failed write; only the first is logged, since every request on a full disk causes one."""
        if self.problem is None:
            _log.error("the ledger cannot be written, and requests that need it are refused: %s", error)
        self.tally.write_failures += 1
        self.problem = error

    def _note_success(self) -> None:
        if self.problem is not None:
            _log.warning("the ledger can be written again")
        self.problem = None

    async def _note(self, note: PendingNote) -> None:
        try:
            if not self._storage.is_open:
                await self._open()
            await self._storage.note_last_use(note.used, self.now())
        except ForeignHead:
            raise
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a note, it fails alone
            await self._fail_note(note, error)
            return
        answer(note.done, None)

    async def _fail_note(self, note: PendingNote, error: Exception) -> None:
        """Log a failed note, and probe whether the log itself can be written."""
        if self.problem is None:
            _log.warning(
                "the last uses of models, and that the server is there, could not be noted: %s", error
            )
        if isinstance(error, StorageError):
            self._note_failure(error)
            if error.is_disk_error:
                await self._storage.close_after_error(error)
        await self._probe()
        fail_callers([note], NotEncodable() if isinstance(error, UnicodeEncodeError) else LogUnavailable())


# A group of commands, decided. Pure.


@dataclass(frozen=True, slots=True)
class DecidedGroup:
    """The outcome of a group: its events, their rows, the resulting state and head."""

    transaction: Transaction
    events: Sequence[Event]
    rows: Sequence[Row]
    head: LogHead

    @property
    def changes(self) -> Changes:
        return self.transaction.changes


def decide_group(
    group: Iterable[PendingCommand],
    state: State,
    head: LogHead,
    *,
    known: KnownRequests,
    now: Timestamp,
    new_id: Callable[[], str],
) -> DecidedGroup:
    """Decide the commands of a group one after the other, each on the state that the earlier ones result in.

    Only the outcomes in `group` change. Commands of cancelled callers are skipped.

    Args:
        group: the pending commands.
        state: the durable state.
        head: the durable head.
        known: the log's idempotency keys and joins that concern the group's commands.
        now: the ledger's time, one for the group, because it becomes durable at one moment.
        new_id: returns the id of a new event.
    """
    transaction, events, rows = Transaction(state, known), list[Event](), list[Row]()
    for pending in group:
        if pending.done.cancelled():
            continue
        try:
            decision = accept(transaction.state, pending.command, new_id, now, head.hash)
            if isinstance(decision, Accepted):
                new_events, new_rows, head = encode_drafts(decision.drafts, head, now)
                for event in new_events:
                    transaction.apply(event)
                events += new_events
                rows += new_rows
            pending.outcome = make_receipt(decision, head)
        except LedgerProblem as error:
            pending.outcome = error
    return DecidedGroup(transaction, events, rows, head)


def encode_drafts(
    drafts: Sequence[Draft], head: LogHead, now: Timestamp
) -> tuple[list[Event], list[Row], LogHead]:
    """Return the drafts as events and rows after `head`.

    Raises:
        NotEncodable: `not_encodable`; no draft is encoded then, and only this caller fails.
    """
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
    return events, rows, LogHead(position, digest, recorded_at, events[-1].type) if events else head


def make_receipt(decision: Accepted | Existing | Refused, head: LogHead) -> Receipt:
    """Return the receipt of a decision; `head` is the resulting head.

    Raises:
        RequestRefused: the command was refused.
    """
    if isinstance(decision, Refused):
        raise RequestRefused(decision.code, decision.message)
    return Receipt(
        decision.job_id,
        existing=not isinstance(decision, Accepted) or decision.is_join,
        position=head.position,
    )
