"""Nodes over HTTP: who is there, what runs where, and draining; a server alone has none."""

import asyncio
import time
from pathlib import Path

import pytest
from aiohttp import web
from support.cutting import cutting_proxy
from support.history import History, at, opened
from support.http import Json, LocalApi, local_server, when
from support.models import add
from support.nodes import list_nodes, local_node
from support.openvino import DEVICE, visible_devices
from support.postgres import Database
from support.reachable import reachable_node
from support.workers import until

from answers.nodes import NodeModel
from events.errors import LogUnavailable
from events.sqlite.datalock import LEDGER
from features.nodes.commands import EndNode, JoinNode
from features.nodes.facts import NodeDraining, NodeLeft
from features.nodes.members import make_node_infos
from features.nodes.register import Lease
from loadledger import Client
from server.app import create_app
from server.auth.keys import create_key, ensure_data_dir, keys_folder
from server.config import Config, ConfigError


def models_of(nodes: dict[str, Json]) -> dict[str, list[str]]:
    return {name: [model["id"] for model in node["models"]] for name, node in nodes.items()}


async def test_server_alone_has_no_nodes(shared: LocalApi) -> None:
    shared.save(add(), "m")
    job = await shared.load("m")
    assert (await shared.get("/api/v1/nodes", roles=("infer",))).json["nodes"] == []
    assert (await shared.post("/api/v1/nodes/a/drain")).refusal == (409, "no_nodes")
    past = (await shared.get(f"/api/v1/models/m?at={job['position']}")).json
    assert not any("node" in shown for shown in (job, past, await shared.model("m"), *await shared.jobs()))


async def test_server_alone_shows_the_nodes_that_its_ledger_had(tmp_path: Path) -> None:
    ledger = tmp_path / "data" / LEDGER
    ensure_data_dir(ledger.parent)
    async with opened(ledger) as log:
        await log.submit(JoinNode("a", "http://a"))
        await log.submit(EndNode(NodeLeft("a", 1)))
    async with local_server(tmp_path) as alone:
        listed = (await alone.get("/api/v1/nodes")).json["nodes"]
        assert [(node["id"], node["phase"], node["this"]) for node in listed] == [("a", "left", False)]
        assert (await alone.get("/api/v1/overview")).json["nodes"] == listed
        assert b"\nloadledger_nodes{" not in (await alone.get("/metrics")).body


async def test_node_has_attributes_of_devices(ledger: Database, tmp_path: Path) -> None:
    with visible_devices([DEVICE], tmp_path) as visible:
        async with local_node(ledger, tmp_path, "a", node_attributes="zone=eu", **visible) as a:
            attributes = (await list_nodes(a))["a"]["attributes"]
    assert attributes == ["device.openvino=cpu", "device=openvino", "zone=eu"]


async def test_drained_node_gives_its_models_away(ledger: Database, tmp_path: Path) -> None:
    async with (
        local_node(ledger, tmp_path, "a", node_attributes="zone=eu") as a,
        local_node(ledger, tmp_path, "b") as b,
    ):
        a.save(add(), "m")
        job = await a.load("m")
        home = job["node"]
        other = "b" if home == "a" else "a"
        assert (await b.model_when("m", state="loaded"))["node"] == home
        found = await when(
            lambda: list_nodes(b), lambda nodes: all(each["renewed_at"] for each in nodes.values())
        )
        assert found[home]["models"] == [{"id": "m", "version": 1, "state": "loaded"}]
        assert [found["a"][name] for name in ("attributes", "address", "epoch", "phase", "late")] == [
            ["zone=eu"],
            "http://a",
            1,
            "joined",
            False,
        ]
        assert [(each["this"], each["placer"]) for each in found.values()] == [(False, True), (True, False)]

        drain = f"/api/v1/nodes/{home}/drain"
        assert (await a.post(drain, roles=("infer",))).refusal == (403, "forbidden")
        asked = await b.post(drain, subject="carol")
        assert (asked.status, asked.json["phase"]) == (202, "draining")
        assert (await b.post(drain)).status == 200
        assert (await b.data_of(NodeDraining)) == [NodeDraining(home, 1)]
        moved = await when(lambda: list_nodes(b), lambda nodes: models_of(nodes) == {home: [], other: ["m"]})
        await when(lambda: list_nodes(b), lambda nodes: not any(each["jobs"] for each in nodes.values()))
        assert not moved[home]["placer"]
        assert (await b.model("m"))["node"] == other
        past = (await b.get(f"/api/v1/models/m?at={job['position']}")).json
        assert (past["node"], past["state"]) == (home, "loaded")

        with Client.of_data(a.config.data) as client:  # over its socket
            assert (await asyncio.to_thread(client.drain, other)).phase == "draining"
            shown = {each.id: each.phase for each in await asyncio.to_thread(client.nodes)}
        assert shown == {"a": "draining", "b": "draining"}


async def test_load_runs_at_node_with_its_attributes_and_device(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a:
        a.save(add(), "m")
        on_device = {"node_attributes": [], "devices": ["rocm:*"]}
        refused = await a.post("/api/v1/models/m/load", json=on_device)
        assert refused.refusal == (409, "device_unavailable")
        (tmp_path / "repository" / "m" / "loadledger.toml").write_text('node_attributes = ["gpu=a"]')
        assert (await a.load("m", node_attributes=[]))["node"] == "a"
        job = (await a.post("/api/v1/models/m/load", json={"node_attributes": ["gpu=a"]})).json
        waiting = await a.job_when(
            job["id"], waiting_for="a node that takes loads and has the attributes gpu=a"
        )
        assert waiting["parameters"]["node_attributes"] == ["gpu=a"]
        attributes = "device.rocm=0,gpu=a,zone=eu"  # as if it had one
        async with local_node(ledger, tmp_path, "b", node_attributes=attributes) as b:
            assert (await list_nodes(a))["b"]["attributes"] == attributes.split(",")
            await a.job_when(job["id"], status="completed", node="b")
            await b.unload("m")
            failed = await a.failed_load("m", **on_device)
            assert (failed["node"], failed["error"]["code"]) == ("b", "device_unavailable")
            assert (await a.load("m"))["node"] == "b"
            assert (await a.post("/api/v1/nodes/b/drain")).status == 202
        seen = await when(a.jobs, lambda jobs: jobs[0]["cause"] == "restart" and jobs[0]["waiting_for"])
        assert seen[0]["waiting_for"] == "a node that takes loads and has the attributes gpu=a"
        a.save(add(), "other")
        assert (await a.load("other", devices=["rocm:*", "cpu"]))["node"] == "a"


async def test_node_without_keys_does_not_start(ledger: Database, tmp_path: Path) -> None:
    config = Config(
        repository=tmp_path, data=tmp_path / "data", ledger=ledger.server_url, node_address="http://a"
    )
    runner = web.AppRunner(create_app(config))
    with pytest.raises(ConfigError, match="copy the folder from another node"):
        await runner.setup()
    await runner.cleanup()


async def test_node_goes_on_while_its_keys_are_replaced(ledger: Database, tmp_path: Path) -> None:
    async with reachable_node(ledger.server_url, tmp_path, "a") as a:
        peers, folder = a.node.peers, keys_folder(a.api.config.data)
        assert peers.untrusted() == set()
        folder.rename(folder.with_name("away"))
        await until(lambda: not peers._ring.list_keys(time.time()))
        assert peers.untrusted() == set()
        with pytest.raises(LogUnavailable, match=r"cannot join: .* has no key"):
            peers.open_signer()
        create_key(a.api.config.data)
        await until(lambda: len(peers._ring.list_keys(time.time())) == 1)
        assert peers.untrusted() == set()


async def test_nodes_without_common_keys_do_nothing_together(ledger: Database, tmp_path: Path) -> None:
    async with reachable_node(ledger.server_url, tmp_path, "b") as b:
        (tmp_path / "other").mkdir()
        async with reachable_node(ledger.server_url, tmp_path / "other", "a") as a:
            found = await when(lambda: list_nodes(b.api), lambda nodes: "a" in nodes)
            assert [(each["trusted"], each["placer"]) for each in found.values()] == [
                (False, False),
                (True, True),
            ]
            assert [each["trusted"] for each in (await list_nodes(a.api)).values()] == [True, False]
        b.api.save(add(), "m")
        assert (await b.api.load("m"))["node"] == "b"


async def test_node_starts_over_slow_connection_to_its_database(ledger: Database, tmp_path: Path) -> None:
    """To connect takes longer than a renewal may, which is a third of the lease."""
    async with cutting_proxy(ledger.server.address) as proxy:
        proxy.delay_s = 0.04
        url = ledger.url("ledger_server", proxy.address)
        async with reachable_node(url, tmp_path, "a", lease_s=1.0) as a:
            proxy.heal()
            assert (await list_nodes(a.api))["a"]["phase"] == "joined"


# What is shown of a node's lease


def lease(*, epoch: int = 1, ended: bool = False, is_late: bool = False) -> Lease:
    return Lease("a", epoch, ended, is_late, at(9), "{}")


@pytest.mark.parametrize(
    ("given", "late", "shown"),
    [
        ([], (), (None, None, None)),
        ([lease()], (), (at(9), False, 7)),
        ([lease(is_late=True)], (), (at(9), True, 7)),
        ([lease()], ("a",), (at(9), True, 7)),
        ([lease(epoch=2)], (), (None, None, None)),
    ],
)
def test_view_of_node_has_its_lease_of_this_epoch(
    given: list[Lease], late: tuple[str, ...], shown: tuple[str | None, bool | None, int | None]
) -> None:
    history = History()
    history.join("a")
    [view] = make_node_infos(history.state, given, "a", late, free_bytes={"a": 7})
    assert (view.renewed_at, view.late, view.free_bytes) == shown


def test_view_of_lost_node_is_not_late() -> None:
    history = History()
    history.join("a")
    history.lose("a")
    [view] = make_node_infos(history.state, [lease(is_late=True)])
    assert (view.phase, view.renewed_at, view.late, view.placer) == ("lost", at(9), None, False)


def test_view_of_node_has_its_models_and_unended_jobs() -> None:
    history = History()
    history.join("a")
    history.join("b")
    history.load_at("b", "L", of="m")
    history.ask_load("waits", of="other")
    history.place("waits", "b", of="other")
    first, second = make_node_infos(history.state)
    assert (first.models, first.jobs) == ([], [])
    assert second.models == [NodeModel(id="m", version=1, state="loaded")]
    [job] = second.jobs
    assert (job.id, job.kind, job.model_id, job.status) == ("waits", "load", "other", "pending")
