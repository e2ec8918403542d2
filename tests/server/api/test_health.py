"""`/health` and `/v2/health`: public, and name the part that is not well."""

import asyncio
import os
import signal

from support import models
from support.http import ONE, LocalApi, when
from support.models import TEXT

from server.appkeys import CONSUMER_TASK, POOL, STOPPING, STREAMS

STOPS = "serving: the server is stopping: start it again, or ask another one"
LIVE = ("/health/live", "/v2/health/live")
READY = ("/health/ready", "/v2/health/ready")


async def status_of(api: LocalApi, path: str) -> str:
    """Return "ok", or the detail of the answer."""
    answer = await api.get(path, roles=())
    if answer.status == 200 and path.startswith("/v2"):
        assert answer.json == {path.rpartition("/")[2]: True}
        return "ok"
    if answer.status == 200:
        assert all(answer.json["checks"].values())
        return str(answer.json["status"])
    assert answer.refusal == (503, "unhealthy")
    if path.startswith("/v2"):  # else KServe's and Triton's clients do not read the error
        assert (answer.headers["Content-Type"], "error" in answer.json) == ("application/json", True)
    return str(answer.json["detail"])


async def test_started_server_is_well_for_everyone(shared: LocalApi) -> None:
    for path in (*LIVE, *READY):
        assert await status_of(shared, path) == "ok"
        answer = await shared.get(path, roles=(), headers={"Authorization": "Bearer nonsense"})
        assert answer.status == 200
        assert "RateLimit" not in answer.headers
        assert (await shared.send("HEAD", path, roles=())).status == 200


async def test_server_without_fork_server_is_not_ready(shared: LocalApi) -> None:
    fork_server = shared.app[POOL]._fork_server
    assert fork_server is not None
    os.kill(fork_server.pid, signal.SIGKILL)
    await when(lambda: status_of(shared, "/health/ready"), lambda seen: "the fork server is down" in seen)
    assert await status_of(shared, "/health/live") == "ok"
    await when(lambda: status_of(shared, "/health/ready"), lambda seen: seen == "ok")


async def test_loads_do_not_change_health(shared: LocalApi) -> None:
    """Triton #8958, #5940."""
    shared.save(TEXT, "bad")
    shared.save(models.add(1), "m")
    shared.save(models.endless_load(), "slow")
    await shared.failed_load("bad")
    await shared.load("m")
    job = await shared.accepted_load("slow")
    await shared.job_when(job["id"], stage="loading")
    for path in (*LIVE, *READY):
        assert await status_of(shared, path) == "ok"
    assert (await shared.infer("m", ONE)).status == 200
    await shared.unload("slow", force=True)


async def test_stopping_server_is_unready_and_a_dead_task_ends_liveness(api: LocalApi) -> None:
    api.app[STOPPING].set()
    for path in READY:
        assert await status_of(api, path) == f"not ready: {STOPS}"
    [failed] = (await api.get("/api/v1/resources")).json["not_ready"]
    assert ": ".join(failed.values()) == STOPS
    for path in LIVE:
        assert await status_of(api, path) == "ok"
    for name, task in {"consumer": api.app[CONSUMER_TASK], **api.app[STREAMS].tasks}.items():
        assert name not in await status_of(api, "/health/live")
        task.cancel()
        await asyncio.wait([task])
        for path in (*LIVE, *READY):
            assert name in await status_of(api, path)
