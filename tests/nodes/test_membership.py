"""The membership of a node, over leases in PostgreSQL."""

import asyncio
from pathlib import Path

import asyncpg
from support.postgres import Database
from support.replicas import opened_replica, storage_of

from events.log import Log
from features.nodes.commands import JoinNode
from features.nodes.register import Lease, NodePhase
from nodes.membership import Membership
from nodes.placement import NodeHints
from nodes.postgres.leases import LeaseStore
from nodes.postgres.storage import Authority


class SlowLeases(LeaseStore):
    """Leases of which a renewal goes on when it is told to."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.began, self.goes_on = asyncio.Event(), asyncio.Event()

    async def renew(self, node_id: str, epoch: int, lease_s: float, hints: str, limit_s: float) -> bool:
        self.began.set()
        await self.goes_on.wait()
        return await super().renew(node_id, epoch, lease_s, hints, limit_s)


def membership_of(log: Log, leases: LeaseStore) -> Membership:
    """Return the membership of a node `a` that has not joined yet."""

    def set_epoch(node_id: str, epoch: int | None, lease_s: float) -> None:
        storage_of(log).authority = Authority(node_id, epoch, lease_s)

    return Membership(
        log,
        leases,
        "a",
        lease_s=3,
        away_limit_s=3,
        set_epoch=set_epoch,
        end_workers=lambda: None,
    )


async def start(membership: Membership) -> None:
    async def describe() -> NodeHints:
        return NodeHints(0)

    await membership.start(JoinNode("a", "http://a"), describe)


async def test_epoch_goes_on_where_the_lease_ended_though_the_log_forgot_it(
    ledger: Database, tmp_path: Path
) -> None:
    owner = await asyncpg.connect(ledger.owner_url)
    await owner.execute(
        "INSERT INTO loadledger.nodes (node_id, epoch, ended, lease_s, renewed_at, steady_since)"
        " VALUES ('a', 7, true, 3, now(), now())"
    )
    await owner.close()
    leases = LeaseStore(ledger.server_url)
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        membership = membership_of(log, leases)
        await start(membership)
        assert (membership.epoch, log.state.registers.nodes["a"].epoch) == (8, 8)
        await membership.leave()
        await leases.close()


async def test_node_that_has_left_during_a_renewal_joins_no_more(ledger: Database, tmp_path: Path) -> None:
    leases = SlowLeases(ledger.server_url)
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        membership = membership_of(log, leases)
        await start(membership)
        running = asyncio.create_task(membership.run())
        async with asyncio.timeout(60):
            await leases.began.wait()
            await membership.leave()
            leases.goes_on.set()
            await running
        assert (log.state.registers.nodes["a"].phase, log.head.position) == (NodePhase.LEFT, 2)
        await leases.close()


async def test_node_that_has_joined_anew_is_not_late(ledger: Database, tmp_path: Path) -> None:
    leases = LeaseStore(ledger.server_url)
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        membership = membership_of(log, leases)
        await start(membership)
        for epoch, late in ((1, ["a"]), (0, [])):  # 0: of before it has joined, and not read since
            membership.leases = [Lease("a", epoch, ended=False, is_late=True, renewed_at="", hints="")]
            assert membership.late == late
        await membership.leave()
        await leases.close()
