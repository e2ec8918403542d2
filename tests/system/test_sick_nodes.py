"""Nodes with settings of their own: twins, short outages, a stop, unanswered commits, and what is staged."""

import asyncio
import random
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import cluster as nodes
from support import models
from support.cluster import Cluster, ClusterNode, are_elsewhere, clustered, find_places, has_joined, is_lost
from support.fleet import UNLIMITED, new_dice, question
from support.http import Answer, when
from support.postgres import PostgresServer, postgres_server
from support.replicas import owned, rows_in
from support.servers import events, refused_start, serving
from support.uploads import files_in, staged
from support.workers import until

from events.types import WorkerExited
from features.nodes.register import NodePhase
from server.auth.keys import ensure_data_dir, keys_folder
from server.config import Config

KEPT = 6


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[PostgresServer]:
    async with postgres_server() as found:
        yield found


async def in_flight(node: ClusterNode, model_id: str) -> int:
    uses = (await node.api.get("/api/v1/resources")).json["models"]
    return int(next(use["in_flight"] for use in uses if use["model_id"] == model_id))


async def loaded(cluster: Cluster, name: str) -> tuple[ClusterNode, list[str], int]:
    """Load models everywhere; return a node with its models and its epoch."""
    state = await cluster.load(*cluster.fleet.ids[:KEPT])
    return cluster.nodes[name], find_places(state, name), state.registers.nodes[name].epoch


async def test_twin_of_a_node_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    async with clustered(tmp_path, server, names=("n1",)) as cluster:
        node, own, epoch = await loaded(cluster, "n1")
        twin = Config(repository=node.config.repository, data=tmp_path / "twin")
        ensure_data_dir(twin.data)
        shutil.rmtree(keys_folder(twin.data))
        shutil.copytree(keys_folder(node.config.data), keys_folder(twin.data))
        host, port = node._address
        flags = (
            f"--ledger={cluster.database.server_url}",
            "--node-name=n1",
            f"--node-address=http://{host}:{port}",
            *nodes.SETTINGS,
        )
        assert "node 'n1' is there" in await refused_start(twin, *flags)
        assert find_places(await cluster.settled(), "n1") == own
        node.freeze()
        await asyncio.sleep(nodes.LEASE_S)  # as a machine that is restored from a snapshot: nobody renews
        async with serving(twin, *flags) as second:
            await when(lambda: second.api.get("/health/ready"), lambda answer: answer.status == 200)
            node.thaw()
            assert await node.server.ended() == 2
            assert "node 'n1' is there" in node.output
            assert await second.stop() == 0
        state = node.read_state()
        assert state.registers.nodes["n1"].epoch <= epoch + 1


async def test_short_outages_are_no_incidents(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SETTINGS", (*nodes.SETTINGS, "--when-away=stop"))
    async with clustered(tmp_path, server, names=("n1",)) as cluster:
        node, own, epoch = await loaded(cluster, "n1")
        for turn in range(1, 3):
            node.proxy.swallow()
            await when(node.list_live, lambda live: not live)
            answer = await node.api.infer(own[0], question(new_dice()))
            assert answer.status == 503
            node.proxy.heal()
            await cluster.until(has_joined("n1", epoch + turn))
            assert find_places(await cluster.settled(), "n1") == own
        assert not [event for event in await events(node.config) if event.type == WorkerExited.TYPE]


async def test_stopping_node_hands_models_over_while_one_computes(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"--lease-s={nodes.LEASE_S}", "--drain-timeout-s=30", "--inference-timeout-s=60")
    monkeypatch.setattr(nodes, "SETTINGS", (*settings, *UNLIMITED))
    async with clustered(tmp_path, server) as cluster:
        models.save(models.counting_loop(), tmp_path / "repository", "slow", 1)
        state = await cluster.load(*cluster.fleet.ids[:KEPT], "slow")
        node = cluster.nodes[state.models["slow"].serving.server]  # type: ignore[union-attr,index]
        other = next(each for each in cluster.nodes.values() if each is not node)
        own = [model_id for model_id in find_places(state, node.name) if model_id != "slow"]
        trips = {"name": "trips", "shape": [], "datatype": "INT64", "data": [2**40]}
        computing = asyncio.create_task(node.api.infer("slow", trips))
        await when(lambda: in_flight(node, "slow"), lambda count: count == 1)
        node.server.send(signal.SIGTERM)
        await cluster.until(are_elsewhere(own, node.name), at=other)
        assert not computing.done()
        assert other.read_state().registers.nodes[node.name].phase is NodePhase.LEFT
        await other.catch_up()
        for model_id in own:
            await cluster.infer(other, model_id, random.Random(1))
        computing.cancel()
        await asyncio.wait([computing])


async def test_store_has_room_for_what_others_serve_no_more(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SETTINGS", (*nodes.SETTINGS, "--store-size=10MB"))  # two of the models
    async with clustered(tmp_path, server, names=("n1", "n2")) as cluster:
        for index in range(4):
            state = await cluster.load(cluster.fleet.ids[index])
            first = find_places(state, "n1")
            if index < 3:
                await cluster.nodes["n1"].stop()  # its models load at n2
                await cluster.until(are_elsewhere(first, "n1"), at=cluster.nodes["n2"])
                await cluster.nodes["n1"].start()
            if index == 1:  # of the first, n1 has no copy
                await cluster.nodes["n2"].api.post(f"/api/v1/models/{cluster.fleet.ids[0]}/unload", wait=60)
        assert len(find_places(await cluster.settled(), "n2")) == 2


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


async def test_changes_whose_commit_went_unanswered_are_finished(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SETTINGS", (*nodes.SETTINGS, "--repository-writable=on"))
    repository = tmp_path / "repository"
    async with clustered(tmp_path, server, names=("n1", "n2")) as cluster:
        node, other = cluster.nodes.values()
        model = (repository / "m00/1/model.onnx").read_bytes()
        path = "/api/v1/models/{}/versions/{}"
        for request in (
            node.api.send("PUT", path.format("m00", 2), data=BytesIO(model), headers=UPLOAD),
            node.api.send("DELETE", path.format("m01", 1)),
        ):
            answer = await cut_amid(cluster, node, request)
            assert answer.refusal == (503, "log_unavailable")
            assert "unknown" in answer.json["detail"]
        refused = await other.api.post("/api/v1/models/m01/load", wait=60)
        assert refused.refusal[0] == 404
        await until(lambda: not staged(repository))
        assert (repository / "m00/2/model.onnx").read_bytes() == model
        assert not (repository / "m01").exists()
        assert (await other.api.post("/api/v1/models/m00/load", json={"version": 2}, wait=60)).json[
            "status"
        ] == "completed"


async def test_what_a_killed_node_staged_is_taken_by_another(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SETTINGS", (*nodes.SETTINGS, "--repository-writable=on"))
    repository = tmp_path / "repository"
    async with clustered(tmp_path, server, names=("n1", "n2")) as cluster:
        node, other = cluster.nodes.values()
        begun = asyncio.Event()

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
        await cluster.until(is_lost("n1", 1), at=other)
        await until(lambda: not staged(repository))
        assert files_in(repository) == before
        begun.set()
