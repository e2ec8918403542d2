"""`/health` and `/v2/health`: public, and name the part that is not well."""

import os
import signal
from pathlib import Path

import pytest
from support import models
from support.http import ONE, LocalApi, when
from support.models import TEXT, save, save_bytes

from runtime.memory import list_descendants
from server.appkeys import CONSUMER_TASK, STOPPING, STREAMS

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


async def test_started_server_is_well_for_everyone(
    api: LocalApi,
) -> None:
    for path in (*LIVE, *READY):
        assert await status_of(api, path) == "ok"
        answer = await api.get(path, roles=(), headers={"Authorization": "Bearer nonsense"})
        assert answer.status == 200
        assert "RateLimit" not in answer.headers
        assert (await api.send("HEAD", path, roles=())).status == 200


async def test_loads_do_not_change_health(api: LocalApi, repository: Path) -> None:
    """Triton #8958, #5940."""
    save_bytes(TEXT, repository, "bad")
    save(models.add(1), repository, "m")
    save_bytes(models.endless_load(), repository, "slow")
    await api.failed_load("bad")
    await api.load("m")
    job = await api.accepted_load("slow")
    await api.job_when(job["id"], stage="loading")
    for path in (*LIVE, *READY):
        assert await status_of(api, path) == "ok"
    assert (await api.infer("m", ONE)).status == 200
    await api.unload("slow", force=True)


async def test_server_without_fork_server_is_not_ready(
    api: LocalApi,
) -> None:
    [fork_server] = list_descendants(os.getpid())
    os.kill(fork_server, signal.SIGKILL)
    await when(lambda: status_of(api, "/health/ready"), lambda seen: seen == "not well: fork_server")
    assert await status_of(api, "/health/live") == "ok"
    await when(lambda: status_of(api, "/health/ready"), lambda seen: seen == "ok")


async def test_stopping_server_is_alive_and_not_ready(api: LocalApi) -> None:
    api.app[STOPPING].set()
    for path in READY:
        assert await status_of(api, path) == "not well: serving"
    for path in LIVE:
        assert await status_of(api, path) == "ok"


@pytest.mark.parametrize("name", ["consumer", "tails", "streams"])
async def test_server_without_a_vital_task_is_not_alive(api: LocalApi, name: str) -> None:
    task = api.app[CONSUMER_TASK] if name == "consumer" else api.app[STREAMS].tasks[name]
    task.cancel()
    await when(lambda: status_of(api, "/health/live"), lambda seen: seen != "ok")
    for path in (*LIVE, *READY):
        assert name in await status_of(api, path)
