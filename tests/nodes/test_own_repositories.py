"""Nodes whose repositories are their own: what is added at one is loaded there."""

from pathlib import Path
from typing import Any

from support import models
from support.http import LocalApi, when
from support.nodes import local_node
from support.postgres import Database

from events.types import VersionAdded, VersionRemoved

MODEL, OTHER = (models.add(amount).SerializeToString() for amount in (1, 2))
OWN: dict[str, Any] = {"repository_writable": "own"}


async def put(api: LocalApi, model_id: str, data: bytes = MODEL) -> Any:
    headers = {"Content-Type": "application/octet-stream"}
    return await api.send("PUT", f"/api/v1/models/{model_id}/versions/1", data=data, headers=headers)


async def test_version_loads_where_it_was_added(ledger: Database, tmp_path: Path) -> None:
    own = {name: tmp_path / f"repository-{name}" for name in ("a", "b")}
    async with (
        local_node(ledger, tmp_path, "a", repository=own["a"], **OWN) as a,
        local_node(ledger, tmp_path, "b", repository=own["b"], **OWN) as b,
    ):
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
        assert [each.server for each in await b.data_of(VersionAdded)] == ["a", "a", "b"]
        assert await b.data_of(VersionRemoved) == [VersionRemoved(server="a")]
