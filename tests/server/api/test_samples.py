"""Charts and the last lines of workers over HTTP."""

import pytest
from support import models
from support.http import ONE, Json, LocalApi, when

from server.appkeys import CONSUMER, LIMIT, LOG, TIME_SERIES
from server.observability.timeseries import measure

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_samples_have_latencies_and_memory(shared: LocalApi) -> None:
    shared.save(models.add(), "m")
    shared.save(models.add(), "idle")
    await shared.load("m")
    for _ in range(3):
        assert (await shared.infer("m", ONE)).status == 200
    app = shared.app
    app[TIME_SERIES].sample(app[LOG].now(), measure(app[CONSUMER], app[LIMIT]), app[CONSUMER].loads)
    server = (await shared.get("/api/v1/resources/samples", roles=("infer",))).json
    assert (server["range"], server["interval_s"], server["whole"]["requests"]) == ("1h", 10, 3)
    last = server["points"][-1]
    assert 0 < last["p50_s"] <= last["p95_s"] <= last["p99_s"]
    assert last["server_bytes"] > 10_000_000
    assert last["budget_bytes"] > last["used_bytes"] > 0
    model = (await shared.get("/api/v1/models/m/samples?range=24h", roles=("audit",))).json
    assert (model["interval_s"], model["whole"], len(model["points"])) == (300, server["whole"], 1)
    assert model["points"][0]["memory_bytes"] == last["used_bytes"]
    assert (await shared.get("/api/v1/models/idle/samples")).json["points"] == []


REFUSED = {
    "/api/v1/resources/samples?range=7d": (400, "invalid_parameter"),
    "/api/v1/models/none/samples": (404, "unknown_model"),
    "/api/v1/models/none/stderr": (404, "unknown_model"),
}


@pytest.mark.parametrize("path", REFUSED)
async def test_history_refuses_what_is_not_there(shared: LocalApi, path: str) -> None:
    assert (await shared.get(path)).refusal == REFUSED[path]


async def test_stderr_shows_running_and_last_exited_worker(shared: LocalApi) -> None:
    shared.save(models.crash_on_run(), "divide")
    await shared.load("divide")
    worker = shared.worker("divide")
    inputs = {"a": models.LOWEST, "b": -1}
    tensors = [{"name": name, "datatype": "INT64", "shape": [1], "data": [n]} for name, n in inputs.items()]
    assert (await shared.infer("divide", *tensors)).status == 503

    async def printed() -> Json:
        return (await shared.get("/api/v1/models/divide/stderr")).json

    seen = await when(printed, lambda seen: seen["last_exited"] is not None and len(seen["workers"]) > 0)
    assert seen["recorded"] is True
    assert [(each["version"], each["lines"]) for each in seen["workers"]] == [(1, [])]
    assert (seen["last_exited"]["worker_id"], seen["last_exited"]["version"]) == (worker.worker_id, 1)
    assert any("point exception" in line for line in seen["last_exited"]["lines"])
    denied = await shared.get("/api/v1/models/divide/stderr", roles=("audit", "infer"))
    assert denied.refusal == (403, "forbidden")
