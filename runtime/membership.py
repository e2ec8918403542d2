"""The membership of this node: it joins, renews its lease, declares late nodes lost, and leaves.

A lease is judged by the database's clock alone. A node that cannot renew is away: it answers inferences, and
records and begins nothing, since its appends need the database too. When it is back and was declared lost
meanwhile, its part of the state is empty, so its workers end, and it joins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import msgspec

from events.clock import boottime
from events.commands import JoinNode, LeaveNode, LoseNode, Receipt
from events.errors import LedgerProblem, LogUnavailable, NodeAlive, RequestRefused
from events.log import Log
from events.nodes import Lease
from events.storage import StorageError
from runtime.scheduler.view import NodeHints

_log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
"""A renewal also has a third of the lease to answer: if one times out, the next one is still in time."""

START_LIMIT_S = 10.0
"""Time limit of reading the leases at the start: a node has no lease yet that could run out meanwhile."""

RETRY_S = 0.5
"""Pause after a renewal that failed, and before a node that was lost tries to join again."""


class LeaseTable(Protocol):
    """Where leases are kept (`events.postgres.leases`); its methods raise StorageError."""

    async def renew(self, node_id: str, epoch: int, lease_s: float, hints: str, limit_s: float) -> bool:
        """Renew the lease of an epoch; return False if the epoch is over."""

    async def read(self, limit_s: float) -> Sequence[Lease]:
        """Return all leases."""


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(NodeHints)


async def _no_hints() -> NodeHints:
    return NodeHints(0)


def _decode_hints(text: str) -> NodeHints:
    """Return a node's hints; none of a release that says something else."""
    try:
        return _DECODER.decode(text)
    except ValueError:
        return NodeHints(0)


Authorise = Callable[[str, int | None, float], None]
"""Called with the node, its epoch (None before it joins) and its lease, with which it appends from now on."""


OpenSigner = Callable[[], Callable[[bytes], str]]
"""Returns what signs the statement of a join; it reads the key, which may be another one by now."""


class NameInUse(LedgerProblem):
    """Another server has this node's name, and renews its lease."""

    code = "node_name_in_use"


class Membership:
    """This node among those of the ledger.

    Args:
        log: open.
        table: the leases.
        command: with which it joins.
        lease_s: seconds without a renewal after which it may be declared lost.
        away_limit_s: seconds without a renewal after which it ends its workers.
        authorise: tells the log's storage as whom it appends.
        open_signer: returns what signs a join; without one they are not signed.

    Attributes:
        epoch: the present one; None before it has joined.
        leases: of all nodes, as last read.
        peers: the hints of all nodes, as last read.
        hints: returns what this node says of itself.
        on_change: called when the epoch or the leases have changed.
        end_workers: called when this node may not serve any longer without the database.
    """

    def __init__(
        self,
        log: Log,
        table: LeaseTable,
        command: JoinNode,
        *,
        lease_s: float,
        away_limit_s: float,
        authorise: Authorise,
        open_signer: OpenSigner | None = None,
    ) -> None:
        self._log = log
        self._table = table
        self._command = command
        self._lease_s = lease_s
        self._away_limit_s = away_limit_s
        self._authorise = authorise
        self._open_signer = open_signer
        self._limit_s = lease_s / RENEWALS_PER_LEASE
        self._renewed_s = boottime()
        self._is_noted = False
        self._leaves = False
        self.node_id = command.node_id
        self.epoch: int | None = None
        self.leases: Sequence[Lease] = ()
        self.hints: Callable[[], Awaitable[NodeHints]] = _no_hints
        self.peers: Mapping[str, NodeHints] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.end_workers: Callable[[], None] = lambda: None

    @property
    def away_s(self) -> float:
        """Seconds since the last renewal; beyond the lease the other nodes may give this one up."""
        return boottime() - self._renewed_s

    @property
    def may_serve(self) -> bool:
        """Whether this node may answer inferences, with the database or without."""
        return self.away_s <= self._away_limit_s

    async def start(self) -> Receipt:
        """Join, before anything else is appended.

        Raises:
            NameInUse: `node_name_in_use`.
            LogUnavailable: `log_unavailable`, the database cannot be written.
        """
        return await self._join(self._log.begin, START_LIMIT_S)

    async def run(self) -> None:
        """Renew the lease, and declare late nodes lost, until this node leaves."""
        while not self._leaves:
            try:
                await self._renew()
                pause_s = self._limit_s
                if self._is_noted:
                    _log.warning("the lease of node %s is renewed again", self.node_id)
                self._is_noted = False
            except (StorageError, LedgerProblem) as error:
                self._note_failure(error)
                pause_s = min(RETRY_S, self._limit_s)
                if not self.may_serve:
                    self.end_workers()
            await asyncio.sleep(pause_s)

    async def leave(self) -> None:
        """End the epoch in order; nothing is appended after it, and a renewal meanwhile does not join again.

        Raises:
            LedgerProblem: it could not be recorded: the other nodes will find this one late.
        """
        self._leaves = True
        if self.epoch is not None:
            await self._log.submit(LeaveNode(self.node_id, self.epoch))

    async def _join(self, submit: Callable[[JoinNode], Awaitable[Receipt]], limit_s: float) -> Receipt:
        try:
            leases = await self._table.read(limit_s)
        except StorageError as error:
            raise LogUnavailable(str(error)) from error
        own = next((lease for lease in leases if lease.node_id == self.node_id), None)
        self._refuse_other(own)
        there = any(not lease.ended and not lease.is_late for lease in leases)
        command = replace(
            self._command,
            last_seen_at=own.renewed_at if own is not None else None,
            no_node_since=None if there or not leases else max(lease.renewed_at for lease in leases),
            sign=None if self._open_signer is None else self._open_signer(),
        )
        self._authorise(self.node_id, None, self._lease_s)
        receipt = await submit(command)
        node = self._log.state.nodes[self.node_id]
        if node.position != receipt.position:
            raise NameInUse(
                f"another server has joined as node {self.node_id!r} just now: name each differently"
            )
        self._authorise(self.node_id, node.epoch, self._lease_s)
        self._renewed_s, self.epoch = boottime(), node.epoch
        self.on_change()
        return receipt

    def _refuse_other(self, own: Lease | None) -> None:
        """Refuse a name with which another server renews: its address is another one."""
        known = self._log.state.nodes.get(self.node_id)
        if own is None or own.ended or own.is_late or known is None or known.address == self._command.address:
            return
        raise NameInUse(
            f"node {self.node_id!r} is there, at {known.address}: give this server another --node-name, or "
            f"wait until that one has left or its lease of {self._lease_s:g} s is over"
        )

    async def _renew(self) -> None:
        if self.epoch is None:
            await self._join(self._log.submit, self._limit_s)
            return
        began_s = boottime()
        hints = _ENCODER.encode(await self.hints()).decode()
        is_renewed = await self._table.renew(self.node_id, self.epoch, self._lease_s, hints, self._limit_s)
        if self._leaves:
            return
        if not is_renewed:
            _log.warning("node %s was declared lost; it ends its workers, and joins again", self.node_id)
            self.epoch = None
            self.on_change()
            await self._join(self._log.submit, self._limit_s)
            return
        self._renewed_s = began_s
        self.leases = await self._table.read(self._limit_s)
        self.peers = {lease.node_id: _decode_hints(lease.hints) for lease in self.leases}
        self.on_change()
        for lease in self.leases:
            if lease.is_late and not lease.ended and lease.node_id != self.node_id:
                await self._lose(lease)

    async def _lose(self, lease: Lease) -> None:
        """Declare a node lost; the database refuses that if it has renewed, or this node has not for long."""
        node = self._log.state.nodes.get(lease.node_id)
        if node is not None and node.is_present and node.epoch == lease.epoch:
            with suppress(RequestRefused, NodeAlive):
                await self._log.submit(LoseNode(lease.node_id, lease.epoch, lease.renewed_at))
                _log.warning(
                    "node %s is lost: it renewed its lease last at %s", lease.node_id, lease.renewed_at
                )

    def _note_failure(self, error: Exception) -> None:
        if not self._is_noted:
            _log.warning("the lease of node %s could not be renewed: %s", self.node_id, error)
        self._is_noted = True
