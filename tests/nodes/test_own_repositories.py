"""Nodes whose repositories are their own: what is added at one is loaded there."""

import asyncio
from pathlib import Path
from typing import Any

from support import models
from support.http import LocalApi, when
from support.nodes import local_node
from support.postgres import Database
from support.uploads import opened_uploads

from events.commands import RequestAdd
from events.sqlite.listing import open_reader
from events.types import AddFailed, AddParameters, VersionAdded, VersionRemoved
from runtime.consumer.loads import Recorder
from runtime.fetch.adds import Adds
from runtime.repository import Repository
from runtime.scheduler.placement import ALONE
from runtime.uploads.stage import UploadPolicy

MODEL, OTHER = (models.add(amount).SerializeToString() for amount in (1, 2))
OWN: dict[str, Any] = {"repository_writable": "own"}


async def put(api: LocalApi, model_id: str, data: bytes = MODEL) -> Any:
    headers = {"Content-Type": "application/octet-stream"}
    return await api.send("PUT", f"/api/v1/models/{model_id}/versions/1", data=data, headers=headers)


async def test_version_loads_where_it_was_added(ledger: Database, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "repository").mkdir(parents=True)
    async with local_node(ledger, tmp_path, "a", **OWN) as a, local_node(ledger, tmp_path, "b", **OWN) as b:
        for model_id in ("first", "second"):
            assert (await put(a, model_id)).status == 201
            assert (await a.load(model_id))["node"] == "a"  # `b` has more room for the second
        await when(lambda: b.data_of(VersionAdded), lambda added: len(added) == 2)
        refused = await b.post("/api/v1/models/second/load", json={"version": 1})
        assert refused.refusal == (404, "unknown_model")
        assert "version 1 was added at a: ask there" in refused.json["detail"]
        refused = await put(b, "second", OTHER)
        assert refused.refusal == (409, "version_exists")
        assert "other files at a" in refused.json["detail"]

        await a.unload("second")
        assert (await a.post("/api/v1/nodes/a/drain")).status == 202
        job = (await a.post("/api/v1/models/second/load")).json
        await b.job_when(job["id"], waiting_for="a node that takes loads, of a, where version 1 was added")
        await b.post(f"/api/v1/jobs/{job['id']}/cancel")
        await b.ended(job["id"])
        assert (await put(b, "second")).status == 201
        assert (await b.load("second"))["node"] == "b"
        assert (await a.model("first"))["node"] == "a"

        await b.unload("second")
        gone = await a.send("DELETE", "/api/v1/models/second/versions/1")
        assert gone.status == 204
        assert (await b.load("second"))["node"] == "b"
        assert [each.node_id for each in await b.data_of(VersionAdded)] == ["a", "a", "b"]
        assert await b.data_of(VersionRemoved) == [VersionRemoved(node_id="a")]


async def find_nothing(_: object) -> dict[str, list[tuple[str, int, str]]]:
    """No file was added before."""
    return {}


async def test_add_of_an_ended_node_is_not_fetched_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    policy = UploadPolicy("own", is_of_node=True)
    async with opened_uploads(tmp_path, policy=policy, node_id="a") as (uploads, log):
        adds = Adds(
            log,
            Recorder(log, (), ALONE),
            uploads,
            Repository(tmp_path / "repository"),
            share=lambda state: state,
            find_added=find_nothing,
            allowed="all",
            environment={},
        )
        running = asyncio.create_task(adds.run())
        parameters = AddParameters("hf://org/repo@main", 1)
        asked = await log.submit(RequestAdd("m", 1, parameters, "alice", holder="b"))
        await log.wait_until(lambda: asked.job_id not in log.state.jobs, 10)
        running.cancel()
        await asyncio.wait([running])
        async with open_reader(log.path) as reader:
            ends = [event.data for event in await reader.events(0) if isinstance(event.data, AddFailed)]
    message = "not added within 1 s; it was waiting for its turn, or for its node"
    assert ends == [AddFailed("timeout", message)]
