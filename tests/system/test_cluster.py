"""Nodes that are killed, frozen and cut off, and databases that fail, under load; then the ledger is audited.

The tests share three nodes and their PostgreSQL server, and each leaves them at work but the last.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from support.cluster import (
    LEASE_S,
    Cluster,
    ClusterNode,
    are_elsewhere,
    clustered,
    find_places,
    has_joined,
    is_lost,
    list_places,
)
from support.clusteraudit import audit_cluster
from support.disks import FreezableDisk, freezable_disk
from support.fleet import as_text, new_dice, of_both, question, tell
from support.http import when
from support.postgres import PostgresServer, postgres_server
from support.servers import events

from events.clock import format_timestamp, utc_now
from events.state import State
from events.types import Event
from features.nodes.facts import NodeDraining, NodeJoined, NodeLeft, NodeLost

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Three nodes, one on a disk that can be frozen if that is allowed, and a server that tests may kill."""
    folder, disks = tmp_path_factory.mktemp("nodes"), dict[str, FreezableDisk]()
    with ExitStack() as stack:
        try:
            disks["n1"] = stack.enter_context(freezable_disk(folder / "n1"))
        except pytest.skip.Exception as reason:
            tell(f"no disk hangs in this run: {reason}")
        async with (
            postgres_server() as server,
            clustered(folder, server, disks=disks, versions=(1, 2)) as cluster,
        ):
            yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(shared_cluster: Cluster) -> AsyncIterator[Cluster]:
    """The module's nodes, all at work, with half of the models loaded; audited after the test.

    One of these models has two copies.
    """
    await shared_cluster.restore()
    alone, copied = kept(shared_cluster)[:-1], kept(shared_cluster)[-1]
    await shared_cluster.load(*alone, copies=1)
    await shared_cluster.load(copied, copies=2)
    yield shared_cluster
    await shared_cluster.restore()
    await shared_cluster.settled()
    await audit_cluster(shared_cluster, FAILURES)


@pytest.fixture
def dice() -> random.Random:
    """The source of random decisions."""
    return new_dice()


def kept(cluster: Cluster) -> list[str]:
    """Return the models that stay loaded."""
    return cluster.fleet.ids[:4]


def changing(cluster: Cluster) -> list[str]:
    """Return the models that clients load and unload all the time."""
    return cluster.fleet.ids[4:]


def pick(cluster: Cluster) -> tuple[ClusterNode, list[str], int]:
    """Return a node that has some of the models that stay loaded, with those and its epoch."""
    state = cluster.answering[0].read_state()
    models = {name: sorted({*find_places(state, name)} & {*kept(cluster)}) for name in cluster.nodes}
    name = max(models, key=lambda each: len(models[each]))
    return cluster.nodes[name], models[name], state.registers.nodes[name].epoch


async def lost_since(cluster: Cluster, before: State, moment: datetime) -> list[Event]:
    """Return the ends of epochs after a state, but not of nodes lost after they renewed since a moment.

    A busy machine may lose those at any time.
    """
    await cluster.settled()
    found = (await events(cluster.answering[0].config))[before.position :]
    until = format_timestamp(moment)
    return [
        event
        for event in found
        if (isinstance(event.data, NodeLost) and event.data.last_renewed_at < until)
        or isinstance(event.data, NodeDraining | NodeLeft)
        or (isinstance(event.data, NodeJoined) and (event.data.last_seen_at or until) < until)
    ]


async def test_killed_node_leaves_models_and_accepted_load(cluster: Cluster, dice: random.Random) -> None:
    node, models, epoch = pick(cluster)
    free = changing(cluster)[0]
    await node.api.post(f"/api/v1/models/{free}/unload", wait=60)
    async with cluster.traffic(dice, changing(cluster)[1:]):
        job = await node.api.accepted_load(free)
        await node.kill()
        await cluster.until(is_lost(node.name, epoch))
        await cluster.until(are_elsewhere([*models, free], node.name))
    cluster.accepted.add(job["id"])  # not earlier: the traffic cancels some of these jobs


async def test_frozen_node_leaves_its_models_and_joins_again(cluster: Cluster, dice: random.Random) -> None:
    node, models, epoch = pick(cluster)
    copied = kept(cluster)[-1]
    others = [(name, copied) for name in cluster.nodes if name != node.name]
    async with cluster.traffic(dice, changing(cluster)):
        worker = node.server.worker()
        async with cluster.inferring(others, dice):
            node.freeze()
            os.kill(worker, signal.SIGKILL)  # which it will want to record
            await cluster.until_lost(node, epoch)
            await cluster.until(are_elsewhere(models, node.name))
            state = await cluster.until(lambda state: len(state.models[copied].servings) == 2)
        assert [(name, copied) for name in cluster.nodes if copied in find_places(state, name)] == others
        node.thaw()
        await cluster.until(has_joined(node.name, epoch + 1))


async def test_node_cut_off_serves_until_it_is_back(cluster: Cluster, dice: random.Random) -> None:
    node, models, epoch = pick(cluster)
    async with cluster.traffic(dice, changing(cluster)):
        async with cluster.inferring([(node.name, model_id) for model_id in models], dice):
            node.proxy.swallow()
            await cluster.until_lost(node, epoch)
            await cluster.until(are_elsewhere(models, node.name))
        node.proxy.heal()
        await cluster.until(has_joined(node.name, epoch + 1))


async def test_node_cut_off_for_a_moment_stays(cluster: Cluster, dice: random.Random) -> None:
    node, models, _ = pick(cluster)
    before = node.read_state()
    async with cluster.traffic(dice, changing(cluster)):
        node.proxy.swallow()
        at = node.read_head()
        for _ in range(20):
            await cluster.infer(node, dice.choice(models), dice)
        assert node.read_head() == at
        node.proxy.heal()
        healed_at = utc_now()
        await cluster.until(lambda state: state.position > at.position, at=node)
    assert not await lost_since(cluster, before, healed_at)


async def await_readiness(node: ClusterNode, status: int) -> str:
    """Wait until a node answers `/health/ready` with this status; return the reason that it gives."""
    answer = await when(lambda: node.api.get("/health/ready"), lambda answer: answer.status == status)
    return str(answer.json.get("detail"))


async def test_node_with_full_disk_is_lost_and_comes_back(cluster: Cluster, dice: random.Random) -> None:
    node, models, epoch = pick(cluster)
    async with cluster.traffic(dice, changing(cluster)):
        node.fill_disk()
        await cluster.until_lost(node, epoch)
        await cluster.until(are_elsewhere(models, node.name))
        await when(node.list_live, lambda live: not live)
        node.mend_disk()
        await cluster.until(has_joined(node.name, epoch + 1))
    await await_readiness(node, 200)


async def test_node_whose_disk_hangs_is_lost_and_answers_nothing(
    cluster: Cluster, dice: random.Random, tmp_path: Path
) -> None:
    node = cluster.nodes["n1"]
    if node.disk is None:
        with freezable_disk(tmp_path / "n1"):  # says why not
            pytest.fail("there is a disk that can be frozen, but n1 is not on it")
    state = node.read_state()
    models, epoch = find_places(state, node.name), state.registers.nodes[node.name].epoch
    node.freeze_disk()
    await cluster.until_lost(node, epoch)
    await cluster.until(are_elsewhere(models, node.name))
    await when(lambda: node.api.infer(models[0], question(dice)), lambda answer: answer.status == 503)
    await await_readiness(node, 503)
    node.mend_disk()
    await cluster.until(has_joined(node.name, epoch + 1))


async def test_models_stay_when_all_disks_are_full(cluster: Cluster, dice: random.Random) -> None:
    places = {*list_places(await cluster.settled())}
    async with cluster.inferring([(name, model_id) for name, model_id, _ in places], dice):
        for node in cluster.nodes.values():
            node.fill_disk()
        for node in cluster.nodes.values():
            assert "the lease is not renewed" in await await_readiness(node, 503)
        await cluster.pass_lease(*cluster.nodes.values())
        for name, model_id, _ in places:
            await cluster.infer(cluster.nodes[name], model_id, dice)
    for node in cluster.nodes.values():  # the first that is back may not say that the others are lost
        node.mend_disk()
        await await_readiness(node, 200)
    assert {*list_places(await cluster.settled())} == places


async def test_killed_database_loses_no_node_and_no_inference(cluster: Cluster, dice: random.Random) -> None:
    node, server, free = cluster.answering[0], cluster.database.server, changing(cluster)[0]
    before = node.read_state()
    places = [(name, model_id) for name in cluster.nodes for model_id in kept(cluster)]
    async with cluster.traffic(dice, changing(cluster)[1:]), cluster.inferring(places, dice):
        for each in cluster.nodes.values():
            each.proxy.swallow()
        await cluster.pass_lease(*cluster.nodes.values())  # the outage is longer than all leases
        await server.kill()
        await server.start()
        started_at = utc_now()
        for each in cluster.nodes.values():
            await each.proxy.reset()
            each.proxy.heal()
        answer = await node.api.post(f"/api/v1/models/{free}/load", wait=60)
        assert answer.json["status"] == "completed", answer
    cluster.accepted.add(answer.json["id"])  # not earlier: the traffic cancels some of these jobs
    assert not await lost_since(cluster, before, started_at)


ROUNDS = of_both(short=2, long=200)
FAULT_S = of_both(short=2.0, long=LEASE_S)
AUDIT_EVERY = 20
FAILURES = {"crash_loop", "worker_died"}
"""Codes that loads of good models may fail with while nodes and workers are killed again and again."""


async def _drain_and_stop(node: ClusterNode, dice: random.Random) -> None:
    answer = await node.api.post(f"/api/v1/nodes/{node.name}/drain")
    assert answer.status in (200, 202, 409, 503), answer  # 409: lost just now, and joins again
    await asyncio.sleep(dice.uniform(0, FAULT_S))  # it stops drained, or while it drains
    await node.stop()


def _kill_worker(node: ClusterNode, dice: random.Random) -> None:
    if workers := node.server.children()[1:]:
        os.kill(dice.choice(workers), signal.SIGKILL)


def _delay(node: ClusterNode, dice: random.Random) -> None:
    node.proxy.delay_s = dice.uniform(0.01, 0.1)


FAULTS: dict[str, Callable[[ClusterNode, random.Random], Awaitable[None] | None]] = {
    "kill": lambda node, _: node.kill(),
    "stop": lambda node, _: node.stop(),
    "drain": _drain_and_stop,
    "freeze": lambda node, _: node.freeze(),
    "kill worker": _kill_worker,
    "fill disk": lambda node, _: node.fill_disk(),
    "freeze disk": lambda node, _: node.freeze_disk(),
    "cut off": lambda node, _: node.proxy.swallow(),
    "lose answers": lambda node, _: node.proxy.swallow("answers"),
    "disconnect": lambda node, _: node.proxy.cut(),
    "delay": _delay,
    "kill database": lambda node, _: node.database.server.kill(),
}


async def disturb(cluster: Cluster, dice: random.Random) -> None:
    """Do one or two random things to different nodes under load, for some time, and undo them."""
    nodes = dice.sample(list(cluster.nodes.values()), dice.choice((1, 1, 2)))
    faults = dice.sample(sorted(FAULTS), len(nodes))
    tell(", ".join(f"{fault} {node.name}" for node, fault in zip(nodes, faults, strict=True)))
    async with cluster.traffic(dice, cluster.fleet.ids, clients=3):
        await asyncio.sleep(dice.uniform(0, 0.3))  # a random moment
        begun = [FAULTS[fault](node, dice) for node, fault in zip(nodes, faults, strict=True)]
        await asyncio.gather(*filter(None, begun))
        await asyncio.sleep(dice.uniform(0, FAULT_S))
        if cluster.database.server.is_running and dice.random() < 0.5:
            await cluster.pass_lease(*nodes)
        await asyncio.sleep(dice.uniform(0, FAULT_S))
        await cluster.restore()
    await cluster.settled()
    cluster.counts.update(faults)


async def test_random_faults_leave_the_ledger_sound(cluster: Cluster, dice: random.Random) -> None:
    for number in range(1, ROUNDS + 1):
        await disturb(cluster, dice)
        if number % AUDIT_EVERY == 0:
            await audit_cluster(cluster, FAILURES)
    audit = await audit_cluster(cluster, FAILURES)
    ends = Counter(audit.ends.values())
    tell(f"{len(audit.lost)} nodes lost; {as_text(cluster.counts + ends)}; {audit.failures}")
    known = sum(answer.known > 0 for answer in cluster.answers)
    tell(f"{len(cluster.answers)} answers, {known} of nodes that were asked before what they know")
    tell(f"{len(audit.swaps)} swaps of models with copies, of {max(audit.swaps, default=0)} events at most")


async def replace_database(cluster: Cluster, successor: PostgresServer) -> None:
    """Kill the database's server, and let the nodes reach its successor."""
    await cluster.database.server.kill()
    if not successor.is_running:
        await successor.start()
    await successor.promote()
    await cluster.follow(successor)


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def test_failover_loses_nothing_or_stops_the_nodes(
    shared_cluster: Cluster, dice: random.Random
) -> None:
    cluster = shared_cluster  # of which nothing is left: this is the last test
    await cluster.restore()
    older = await cluster.database.server.standby("older", synchronous=False)
    await older.kill()
    standby = await cluster.database.server.standby()
    async with cluster.traffic(dice, cluster.fleet.ids, clients=4):
        at = cluster.answering[0].read_head().position
        before = await cluster.until(lambda state: state.position > at + 50)
        await standby.kill()
        async with cluster.database.server.connection() as superuser:
            await when(partial(superuser.fetchval, WAITING), bool)
        await replace_database(cluster, standby)
        replaced_at = utc_now()
        at = cluster.answering[0].read_head().position
        await cluster.until(lambda state: state.position > at + 50)
    assert not await lost_since(cluster, before, replaced_at)
    await audit_cluster(cluster, FAILURES)
    await replace_database(cluster, older)
    for node in cluster.nodes.values():
        assert await node.server.ended() == 2
        *_, line = node.output.splitlines()
        assert line.startswith("loadledger: postgresql://")
        assert "does not have the event at position" in line
        assert "Traceback" not in node.output
