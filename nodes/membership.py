"""The membership of this node: it joins, renews its lease, declares late nodes lost, and leaves.

A lease says that the node works: before each renewal the writer has read the database's head, and written to
the replica's disk. The database's clock alone judges the lease. A node that cannot renew answers inferences
for a while, but records and starts nothing. When its epoch is over, its workers end, and it joins again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import msgspec

from events.clock import boottime
from events.commands import Receipt
from events.errors import LedgerProblem, LogUnavailable, NameInUse
from events.log import Log
from events.storage import StorageError
from features.nodes.commands import EndNode, JoinNode
from features.nodes.facts import NodeLeft, NodeLost
from features.nodes.register import Lease
from nodes.placement import NodeHints

_log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
"""A renewal also has a third of the lease to answer: after a timeout, the next one is still in time."""

START_LIMIT_S = 10.0
"""Time limit of reading the leases at the start: a node has no lease yet that could run out meanwhile."""

HINTS_SHARE = 1 / 3
"""Share of a renewal's limit for the node to describe itself; after that it repeats the last description."""

WATCH_S = 1.0
"""Longest pause between checks of the time to serve: the loop's clock stops during a suspend."""

RETRY_S = 0.5
"""Pause after a renewal that failed, and before a lost node tries to join again."""


class LeaseTable(Protocol):
    """The storage of leases (`nodes.postgres.leases`); its methods raise StorageError."""

    async def renew(self, node_id: str, epoch: int, lease_s: float, hints: str, limit_s: float) -> bool:
        """Renew the lease of an epoch; return False if the epoch is over."""

    async def read(self, limit_s: float) -> Sequence[Lease]:
        """Return all leases."""


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(NodeHints)


def _decode_hints(text: str) -> NodeHints:
    """Return a node's hints; empty for a release with another form."""
    try:
        return _DECODER.decode(text)
    except ValueError:
        return NodeHints(0)


class Membership:
    """This node as one of the ledger's nodes.

    Args:
        log: open.
        table: the leases.
        node_id: the name with which it joins.
        lease_s: seconds without a renewal after which it may be declared lost.
        away_limit_s: seconds for which it serves without a renewal.
        serves_sick: whether a node that cannot renew, but reads in its lease that its epoch goes on, serves.
        set_epoch: tells the log's storage as whom it appends: node, epoch (None before it joins), and lease.
        end_workers: called when this node may not serve any longer.
        open_signer: reads the key, which may have changed, and returns what signs a join; None signs none.

    Attributes:
        epoch: the present epoch; None before it has joined.
        leases: the leases of all nodes, as last read.
        peers: the hints of all nodes, as last read.
        problem: why the last renewal failed; None after a success.

    Its reads and changes wake the subscribers of the log.
    """

    def __init__(
        self,
        log: Log,
        table: LeaseTable,
        node_id: str,
        *,
        lease_s: float,
        away_limit_s: float,
        serves_sick: bool = False,
        set_epoch: Callable[[str, int | None, float], None],
        end_workers: Callable[[], None],
        open_signer: Callable[[], Callable[[bytes], str]] | None = None,
    ) -> None:
        self._log = log
        self._table = table
        self._instance = secrets.token_hex(8)
        self._lease_s = lease_s
        self._away_limit_s = away_limit_s
        self._serves_sick = serves_sick
        self._set_epoch = set_epoch
        self._end_workers = end_workers
        self._open_signer = open_signer
        self._limit_s = lease_s / RENEWALS_PER_LEASE
        self._renewed_s = self._confirmed_s = boottime()
        self._leaves = False
        self._described = ""
        self._describing: asyncio.Task[NodeHints] | None = None
        self._judging: asyncio.Task[None] | None = None
        self.node_id = node_id
        self.epoch: int | None = None
        self.leases: Sequence[Lease] = ()
        self.problem: str | None = None
        self.peers: Mapping[str, NodeHints] = {}

    @property
    def is_late(self) -> bool:
        """Whether the other nodes may declare this one lost."""
        return boottime() - self._renewed_s > self._lease_s

    @property
    def may_serve(self) -> bool:
        """Whether this node may answer inferences, with or without the database."""
        return self.epoch is not None and boottime() - self._confirmed_s <= self._away_limit_s

    @property
    def late(self) -> Collection[str]:
        """The nodes that did not renew their leases in time, as last read, and have not joined again."""
        late = (each for each in self.leases if each.is_late and not each.ended)
        return [each.node_id for each in late if self._is_present(each)]

    @property
    def is_outdated(self) -> bool:
        """Whether an epoch has ended since the leases were read, so that its last hints are not known yet."""
        return any(not each.ended and not self._is_present(each) for each in self.leases)

    @property
    def is_sick(self) -> bool:
        """Whether the lease is over although the database answers, or this node ended its workers."""
        is_over = self.epoch is None or self._confirmed_s > self._renewed_s
        return is_over and self.is_late and self.problem is not None

    async def start(self, command: JoinNode, describe: Callable[[], Awaitable[NodeHints]]) -> Receipt:
        """Join, before any other event is appended.

        Args:
            command: what this node says of itself when it joins, now or again.
            describe: returns the hints of this node.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`, the database or the replica cannot be written.
        """
        self._command, self._describe_node = replace(command, instance=self._instance), describe
        return await self._join(self._log.begin, START_LIMIT_S)

    async def run(self) -> None:
        """Renew the lease, and declare late nodes lost, until this node leaves.

        Raises:
            NameInUse: `node_name_in_use`, another server has joined with this node's name.
        """
        watching = asyncio.create_task(self._watch(), name="lease")
        try:
            while not self._leaves:
                pause_s = await self._renew_or_note()
                await asyncio.sleep(pause_s)
        finally:
            for task in (watching, self._describing, self._judging):
                if task is not None:
                    task.cancel()

    async def leave(self) -> None:
        """End the epoch in order; no later event is appended, and a concurrent renewal does not join again.

        Raises:
            LedgerProblem: the end could not be recorded: the other nodes will find this one late.
        """
        self._leaves = True
        if self.epoch is not None:
            await self._log.submit(EndNode(NodeLeft(self.node_id, self.epoch)))

    async def _watch(self) -> None:
        """End the epoch when the time to serve without a renewal is over, even during a renewal."""
        while True:
            left_s = self._confirmed_s + self._away_limit_s - boottime()
            if left_s <= 0 and self.epoch is not None and not self._leaves:
                _log.warning(
                    "node %s has not renewed its lease for too long: it ends its workers", self.node_id
                )
                self._end_epoch()
            await asyncio.sleep(min(max(left_s, 0.0) + 0.01, WATCH_S))

    async def _renew_or_note(self) -> float:
        try:
            await self._renew()
        except NameInUse:
            raise
        except (StorageError, LedgerProblem) as error:
            if self.problem is None:
                _log.warning("the lease of node %s could not be renewed: %s", self.node_id, error)
            self.problem = str(error)
            return min(RETRY_S, self._limit_s)
        if self.problem is not None:
            _log.warning("the lease of node %s is renewed again", self.node_id)
        self.problem = None
        return self._limit_s

    async def _join(self, submit: Callable[[JoinNode], Awaitable[Receipt]], limit_s: float) -> Receipt:
        try:
            leases = await self._table.read(limit_s)
            own = await self._watch_other(self._find_own(leases), limit_s)
        except StorageError as error:
            raise LogUnavailable(str(error)) from error
        await self._check_work(limit_s)
        # The time in which no node was present does not count for jobs.
        there = any(not lease.ended and not lease.is_late for lease in leases)
        command = replace(
            self._command,
            last_seen_at=own.renewed_at if own is not None else None,
            last_epoch=own.epoch if own is not None else 0,
            no_node_since=None if there or not leases else max(lease.renewed_at for lease in leases),
            sign=None if self._open_signer is None else self._open_signer(),
        )
        self._set_epoch(self.node_id, None, self._lease_s)
        began_s = boottime()  # before the append, so that this node counts itself late before the others do
        receipt = await submit(command)
        node = self._log.state.registers.nodes[self.node_id]
        if node.position != receipt.position:  # another server of this name joined later
            raise self._name_in_use()
        self._set_epoch(self.node_id, node.epoch, self._lease_s)
        self._renewed_s, self._confirmed_s, self.epoch = began_s, began_s, node.epoch
        self._log.notify()
        return receipt

    def _find_own(self, leases: Sequence[Lease]) -> Lease | None:
        return next((lease for lease in leases if lease.node_id == self.node_id), None)

    async def _watch_other(self, own: Lease | None, limit_s: float) -> Lease | None:
        """Return this node's lease once it is certain that no other process renews it.

        The previous process may have been killed, so the lease of a joined one is watched for as long as a
        renewal and its limit take.

        Raises:
            NameInUse: `node_name_in_use`, another process renewed the lease meanwhile.
            StorageError: the database does not answer.
        """
        if own is None or own.ended or own.is_late or own.instance == self._instance:
            return own
        _log.info("node %s joined before, and its lease goes on: is it there?", self.node_id)
        await asyncio.sleep(2 * self._limit_s)
        now = self._find_own(await self._table.read(limit_s))
        if now is None or (now.epoch, now.renewed_at) != (own.epoch, own.renewed_at):
            raise self._name_in_use()
        return now

    def _name_in_use(self) -> NameInUse:
        known = self._log.state.registers.nodes.get(self.node_id)
        where = f", at {known.address}" if known is not None else ""
        return NameInUse(
            f"node {self.node_id!r} is there{where}, and renews its lease: "
            "give this server another --node-name, or stop that one"
        )

    async def _check_work(self, limit_s: float) -> None:
        """Check that this node works: its writer reads the database's head, and writes to the replica's disk.

        Raises:
            LogUnavailable: a check fails, or takes longer than `limit_s` seconds.
        """
        try:
            async with asyncio.timeout(limit_s):
                if not await self._log.catch_up():
                    raise LogUnavailable("the ledger's database cannot be read")
                await self._log.note_last_use({})
        except TimeoutError:
            reason = f"the replica's disk, or the database, did not answer within {limit_s:g} s"
            raise LogUnavailable(reason) from None

    async def _renew(self) -> None:
        """Renew the lease if this node works, and read all leases.

        Raises:
            LedgerProblem: the node does not work.
            StorageError: the database does not answer.
            NameInUse: `node_name_in_use`, another server has joined with this node's name.
        """
        if self.epoch is None:
            await self._join(self._log.submit, self._limit_s)
            return
        began_s, epoch, problem = boottime(), self.epoch, None
        try:
            await self._check_work(self._limit_s)
            await self._table.renew(self.node_id, epoch, self._lease_s, await self._describe(), self._limit_s)
        except LedgerProblem as error:
            problem = error
        self.leases = await self._table.read(self._limit_s)
        self.peers = {lease.node_id: _decode_hints(lease.hints) for lease in self.leases}
        own = self._find_own(self.leases)
        if self._leaves:
            return
        if self.epoch == epoch and (own is None or own.ended or own.epoch != epoch):
            _log.warning("the epoch of node %s is over; it ends its workers, and joins again", self.node_id)
            self._end_epoch()
            if own is not None and not own.ended and own.instance != self._instance:
                raise self._name_in_use()
            await self._join(self._log.submit, self._limit_s)
            return
        if problem is not None:
            self._confirmed_s = began_s if self._serves_sick else self._confirmed_s
            raise problem
        if self.epoch != epoch:  # the time to serve ended meanwhile
            return
        self._renewed_s = self._confirmed_s = began_s
        self._log.notify()
        late = [each for each in self.leases if each.is_late and not each.ended and each is not own]
        if late and (self._judging is None or self._judging.done()):
            self._judging = asyncio.create_task(self._judge(late), name="late nodes")

    def _end_epoch(self) -> None:
        """End the workers, and stop appending; the consumer may be stuck behind the log."""
        self.epoch = None
        self._end_workers()
        self._log.notify()

    async def _describe(self) -> str:
        """Return this node's hints, encoded; a disk that hangs does not delay a renewal."""
        if self._describing is None:
            self._describing = asyncio.ensure_future(self._describe_node())
        done, _ = await asyncio.wait({self._describing}, timeout=self._limit_s * HINTS_SHARE)
        if done:
            self._described = _ENCODER.encode(self._describing.result()).decode()
            self._describing = None
        return self._described

    def _is_present(self, lease: Lease) -> bool:
        """Whether a node is present in the epoch of a lease."""
        node = self._log.state.registers.nodes.get(lease.node_id)
        return node is not None and node.is_present and node.epoch == lease.epoch

    async def _judge(self, late: Sequence[Lease]) -> None:
        """Declare nodes lost; the database refuses if such a node has renewed, or this one has not."""
        for lease in late:
            if self._is_present(lease):
                with suppress(LedgerProblem):  # the next renewal sees whether the node is still late
                    await self._log.submit(EndNode(NodeLost(lease.node_id, lease.epoch, lease.renewed_at)))
                    _log.warning(
                        "node %s is lost: it renewed its lease last at %s", lease.node_id, lease.renewed_at
                    )
