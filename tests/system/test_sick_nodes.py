"""Nodes with settings of their own: twins, short outages, a stop, unanswered commits, and what is staged."""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import models
from support.cluster import (
    SETTINGS,
    Cluster,
    ClusterNode,
    are_elsewhere,
    clustered,
    find_places,
    has_joined,
    list_places,
)
from support.fleet import new_dice, question
from support.http import ENDLESS, Answer, when
from support.nodes import share_keys
from support.postgres import PostgresServer, postgres_server
from support.replicas import owned, rows_in
from support.servers import events, refused_start, serving
from support.uploads import files_in, staged
from support.workers import until

from events.types import WorkerExited
from features.nodes.register import NodePhase
from server.config import Config

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALONE = ("--lease-s=3", "--when-away=stop")
"""Of a node that no other one declares lost when it is late."""
PAIR = (
    *("--repository-writable=on", "--drain-timeout-s=30", "--inference-timeout-s=60"),
    "--store-size=10MB",  # two of the models
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[PostgresServer]:
    async with postgres_server() as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One node, with two models."""
    folder = tmp_path_factory.mktemp("alone")
    async with clustered(folder, server, names=("n1",), settings=ALONE) as cluster:
        await cluster.load(*cluster.fleet.ids[:2])
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pair(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("pair")
    async with clustered(folder, server, names=("n1", "n2"), settings=PAIR) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def pair(shared_pair: Cluster) -> Cluster:
    """Two nodes at work, without models."""
    await shared_pair.restore()
    for _, model_id, _ in list_places(await shared_pair.settled()):
        await shared_pair.nodes["n1"].api.unload(model_id)
    return shared_pair


async def in_flight(node: ClusterNode, model_id: str) -> int:
    uses = (await node.api.get("/api/v1/resources")).json["models"]
    return int(next(use["in_flight"] for use in uses if use["model_id"] == model_id))


def epoch_of(node: ClusterNode) -> int:
    return node.read_state().registers.nodes[node.name].epoch


async def test_short_outages_are_no_incidents(alone: Cluster) -> None:
    node, own, epoch = alone.nodes["n1"], alone.fleet.ids[:2], epoch_of(alone.nodes["n1"])
    for turn in range(1, 3):
        node.proxy.swallow()
        await when(node.list_live, lambda live: not live)
        answer = await node.api.infer(own[0], question(new_dice()))
        assert answer.status == 503
        node.proxy.heal()
        await alone.until(has_joined("n1", epoch + turn))
        assert find_places(await alone.settled(), "n1") == own
    assert not [event for event in await events(node.config) if event.type == WorkerExited.TYPE]


async def test_killed_node_joins_again_at_once(alone: Cluster) -> None:
    node, epoch = alone.nodes["n1"], epoch_of(alone.nodes["n1"])
    await node.kill()
    await node.start()
    assert epoch_of(node) == epoch + 1


async def test_twin_of_a_node_is_refused(alone: Cluster, tmp_path: Path) -> None:
    node, epoch = alone.nodes["n1"], epoch_of(alone.nodes["n1"])
    twin = Config(repository=node.config.repository, data=tmp_path / "twin")
    share_keys(node.config.data.parent, twin.data)
    host, port = node._address
    flags = (
        f"--ledger={alone.database.server_url}",
        "--node-name=n1",
        f"--node-address=http://{host}:{port}",
        *SETTINGS,
        *ALONE,
    )
    told = f"node 'n1' is there, at http://{host}:{port}, and renews its lease: give this server another"
    assert told in await refused_start(twin, *flags)
    assert epoch_of(node) == epoch
    assert find_places(await alone.settled(), "n1") == alone.fleet.ids[:2]
    node.freeze()
    await alone.pass_lease(node)  # as a machine that is restored from a snapshot: nobody renews
    async with serving(twin, *flags) as second:
        await when(lambda: second.api.get("/health/ready"), lambda answer: answer.status == 200)
        node.thaw()
        assert await node.server.ended() == 2
        assert told in node.output
        assert await second.stop() == 0
    assert epoch_of(node) <= epoch + 1


async def test_store_has_room_for_what_others_serve_no_more(pair: Cluster) -> None:
    first, second, third = pair.fleet.ids[:3]
    await pair.load(first, second, copies=2)
    state = await pair.load(first, second, copies=1)
    assert sorted(find_places(state, "n1") + find_places(state, "n2")) == [first, second]
    await pair.load(third)  # both stores are full, with a file that only the other one serves


async def test_stopping_node_hands_models_over_while_one_computes(pair: Cluster) -> None:
    models.save(models.counting_loop(), pair.fleet.root, "slow", 1)
    state = await pair.load("slow")
    node = pair.nodes[state.models["slow"].serving.server]  # type: ignore[union-attr,index]
    other = next(each for each in pair.nodes.values() if each is not node)
    own, rest = list[str](), iter(pair.fleet.ids)
    while not own:  # which node takes a model depends on how busy they are
        state = await pair.load(next(rest))
        own = [model_id for model_id in find_places(state, node.name) if model_id != "slow"]
    computing = asyncio.create_task(node.api.infer("slow", ENDLESS))
    await when(lambda: in_flight(node, "slow"), lambda count: count == 1)
    stopping = asyncio.create_task(node.stop())
    await pair.until(are_elsewhere(own, node.name), at=other)
    assert not computing.done()
    assert other.read_state().registers.nodes[node.name].phase is NodePhase.LEFT
    await other.catch_up()
    for model_id in own:
        await pair.infer(other, model_id, random.Random(1))
    computing.cancel()
    await stopping
    await asyncio.wait([computing])


UPLOAD = {"Content-Type": "application/octet-stream"}


async def cut_amid(cluster: Cluster, node: ClusterNode, request: Coroutine[Any, Any, Answer]) -> Answer:
    """Send a request whose event is committed, but whose node does not learn that, and loses its database."""
    await when(lambda: node.api.post("/api/v1/models/m02/load", wait=60), lambda ended: ended.status == 200)
    head = (await rows_in(cluster.database))[-1][0]
    async with owned(cluster.database) as connection:
        async with connection.transaction():
            await connection.execute("SELECT * FROM head FOR UPDATE")
            asked = asyncio.create_task(request)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            await when(partial(connection.fetchval, waiting), bool)
            node.proxy.swallow("answers")
        await when(lambda: rows_in(cluster.database), lambda rows: rows[-1][0] > head)
    await node.proxy.cut()
    answer = await asked
    node.proxy.heal()
    return answer


async def test_changes_whose_commit_went_unanswered_are_finished(pair: Cluster) -> None:
    node, other = pair.nodes.values()
    repository = pair.fleet.root
    model = (repository / "m03/1/model.onnx").read_bytes()
    path = "/api/v1/models/{}/versions/{}"
    for request in (
        node.api.send("PUT", path.format("m03", 2), data=BytesIO(model), headers=UPLOAD),
        node.api.send("DELETE", path.format("m04", 1)),
    ):
        answer = await cut_amid(pair, node, request)
        assert answer.refusal == (503, "log_unavailable")
        assert "unknown" in answer.json["detail"]
    refused = await other.api.post("/api/v1/models/m04/load", wait=60)
    assert refused.refusal[0] == 404
    await until(lambda: not staged(repository))
    assert (repository / "m03/2/model.onnx").read_bytes() == model
    assert not (repository / "m04").exists()
    loaded = await other.api.post("/api/v1/models/m03/load", json={"version": 2}, wait=60)
    assert loaded.json["status"] == "completed"


async def test_what_a_killed_node_staged_is_taken_by_another(pair: Cluster) -> None:
    node = pair.nodes["n1"]
    repository, begun, epoch = pair.fleet.root, asyncio.Event(), epoch_of(node)

    async def body() -> AsyncIterator[bytes]:
        yield (repository / "m00/1/model.onnx").read_bytes()[:-1]
        await begun.wait()

    before = files_in(repository)
    request = asyncio.create_task(
        node.api.send("PUT", "/api/v1/models/m00/versions/2", data=body(), headers=UPLOAD)
    )
    await until(lambda: files_in(repository).keys() > before.keys())
    await node.kill()
    await asyncio.wait([request])
    await pair.until_lost(node, epoch)
    await until(lambda: not staged(repository))
    assert files_in(repository) == before
    begun.set()
