"""The log of one of several servers: folds events of the others, and decides commands on the common head.

A group is decided on this server's state, and appended if the database still has the head of that state.
Otherwise the server catches up, and decides the group again while the others cannot append.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from events.clock import boottime, uuid7
from events.codec import decode_event
from events.commands import OUTDATED, Receipt
from events.errors import LogUnavailable, OutcomeUnknown, RequestRefused, UnreadableEvent
from events.log import DecidedGroup, Log, PendingCommand, answer, refusal_of
from events.sqlite.datalock import LEDGER
from events.state import State, Transaction
from events.storage import LogHead, Row, StorageError
from events.types import Event
from nodes.postgres.connection import DatabaseClock, HeadMoved, NodeAlive
from nodes.postgres.storage import POLL_S, Authority, ReplicatedStorage


class SharedLog(Log):
    """A log in a database, with a replica in the data directory.

    Args:
        address: the database's address.
        data: this server's data directory, whose ledger no other process writes.
        clock: set to the database's time at each connection.
        now: the wall clock; None is the database's.
    """

    def __init__(
        self,
        address: str,
        data: Path,
        clock: DatabaseClock,
        *,
        now: Callable[[], datetime] | None = None,
        boottime: Callable[[], float] = boottime,
        new_id: Callable[[], str] = uuid7,
    ) -> None:
        self._database = ReplicatedStorage(address, data, clock, on_change=self._wake_writer)
        super().__init__(
            data / LEDGER, storage=self._database, now=now or clock, boottime=boottime, new_id=new_id
        )
        self._poll_s = POLL_S
        self._pending_catch_ups = list[asyncio.Future[bool]]()

    def set_epoch(self, node_id: str, epoch: int | None, lease_s: float) -> None:
        """Set the node, epoch and lease of this server's appends."""
        self._database.authority = Authority(node_id, epoch, lease_s)

    async def catch_up(self) -> bool:
        if self._closing or self.writer.done():
            return False
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pending_catch_ups.append(done)
        self._wake_writer()
        return await done

    async def reach(self, position: int) -> None:
        if position > self.head.position and not await self.catch_up() and position > self.head.position:
            raise LogUnavailable(
                f"this server has the ledger up to position {self.head.position}, and its database does not "
                "answer: try again shortly, or ask another node"
            )

    def _wake_writer(self) -> None:
        self._inbox.wake()

    async def _write_groups(self) -> None:
        try:
            await super()._write_groups()
        finally:
            for done in self._pending_catch_ups:
                answer(done, False)

    async def _prepare(self) -> None:
        """Catch up if another server may have appended, or callers wait for that, and answer the callers."""
        callers, self._pending_catch_ups = self._pending_catch_ups, []
        is_done = False
        if callers and not self._storage.is_open:
            await self._probe()
        if (callers or self._database.has_news) and self._storage.is_open:
            with suppress(LogUnavailable):  # the next probe, or command, opens the storage anew
                await self._catch_up()
                is_done = True
        for done in callers:
            answer(done, is_done)

    async def _open(self) -> None:
        await super()._open()
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Fold and store the events that other servers have appended.

        Raises:
            LogUnavailable: `log_unavailable`, the events cannot be read, stored or folded.
            LedgerForked: the database has another history.
        """
        try:
            while rows := await self._database.read_after(self.head):
                followed = fold_rows(rows, self.state)
                self._uncertain_head = followed.head
                await self._database.store(rows, followed.changes, self.head)
                self._advance(followed)
                self.notify()
        except StorageError as error:
            await self._close_after(error)
            raise refusal_of(error) from error

    async def _append(self, group: Sequence[PendingCommand]) -> None:
        """Decide and commit a group; if another server was first, repeat that while others cannot append.

        Trying without the lock first is as fast as a ledger with one writer; locking the second time keeps a
        server from being too late again and again. A refusal, or an answer from the existing state, rests on
        a state that another server may have changed, so it is decided again on the common head.
        """
        before = self.head
        try:
            await self._append_at_head(group)
            if self.head != before:  # groups are appended only at the common head
                return
            if unsure := [each for each in group if rests_on_state(each)]:
                await self._catch_up()
                await self._append_at_head(unsure)
        except NodeAlive:  # concerns one command of the group
            if len(group) == 1:
                raise
            for pending in group:
                await self._write([pending])

    async def _append_at_head(self, group: Sequence[PendingCommand]) -> None:
        try:
            await super()._append(group)
        except HeadMoved:
            await self._catch_up()  # the long part, before the others have to wait
            try:
                async with self._database.locked():
                    await self._catch_up()
                    await super()._append(group)
            except StorageError as error:
                await self._close_after(error)
                raise refusal_of(error) from error

    async def _check_written(self, decided: DecidedGroup, error: StorageError) -> None:
        """Read the log again; without the group's head in it, the group was not written.

        An append on its way to the database may still arrive there until another one is appended. A group
        that was written is counted when it is read.
        """
        before = self.head
        is_written = await self._is_written(decided.head)
        try:
            await self._catch_up()  # events that waited for a standby when the log was opened are there now
        except LogUnavailable as unread:
            raise OutcomeUnknown(
                f"it is unknown whether the last requests were recorded: {unread.__cause__ or unread}"
            ) from unread
        if not is_written:
            raise refusal_of(error) if self.head != before else OutcomeUnknown


def fold_rows(rows: Sequence[Row], state: State) -> DecidedGroup:
    """Fold events of other servers on top of a state, which does not change.

    Raises:
        UnreadableEvent: `log_unavailable`, an event cannot be folded.
    """
    transaction, events = Transaction(state), list[Event]()
    for row in rows:
        try:
            event = decode_event(row.body)
            transaction.apply(event)
        except Exception as error:  # a forged body may raise anything
            raise UnreadableEvent(row.position, error) from error
        events.append(event)
    last, head = events[-1], rows[-1]
    return DecidedGroup(
        transaction, events, rows, LogHead(head.position, head.hash, last.recorded_at, last.type)
    )


def rests_on_state(pending: PendingCommand) -> bool:
    """Whether a command was refused, or answered from the existing state.

    Outdated commands do not count: the system decides again by itself.
    """
    match pending.outcome:
        case RequestRefused(code=code):
            return code != OUTDATED
        case Receipt(existing=existing):
            return existing
    return False
