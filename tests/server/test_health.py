"""Health answers without a token, and says which part of the server is not well."""

import os
import signal
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi, when
from support.models import TEXT, save, save_bytes

from runtime.memory import descendants
from server.appkeys import CONSUMER_TASK, STOPPING, STREAMS

LIVE = ("/health/live", "/v2/health/live")
READY = ("/health/ready", "/v2/health/ready")


async def told(api: LocalApi, path: str) -> str:
    """Return "ok", or what is not well."""
    answer = await api.get(path, roles=())
    if answer.status == 200 and path.startswith("/v2"):
        assert answer.json == {path.rpartition("/")[2]: True}  # what KServe's client reads
        return "ok"
    if answer.status == 200:
        assert all(answer.json["checks"].values())
        return str(answer.json["status"])
    assert answer.refusal == (503, "unhealthy")
    if path.startswith("/v2"):  # else KServe's and Triton's clients do not read the error
        assert (answer.headers["Content-Type"], "error" in answer.json) == ("application/json", True)
    return str(answer.json["detail"])


async def test_a_server_that_has_started_is_well_and_says_so_to_everyone_without_counting(
    api: LocalApi,
) -> None:
    for path in (*LIVE, *READY):
        assert await told(api, path) == "ok"
        answer = await api.get(path, roles=(), headers={"Authorization": "Bearer nonsense"})
        assert answer.status == 200
        assert "RateLimit" not in answer.headers
        assert (await api.send("HEAD", path, roles=())).status == 200


async def test_loads_and_failed_models_change_nothing(api: LocalApi, repository: Path) -> None:
    save_bytes(TEXT, repository, "bad")
    save(models.slow_model(depth=500), repository, "slow")
    await api.failed_load("bad")
    job = await api.accepted_load("slow")
    await api.job_when(job["id"], stage="loading")
    for path in (*LIVE, *READY):
        assert await told(api, path) == "ok"
    await api.unload("slow", force=True)


async def test_a_server_without_a_fork_server_is_alive_and_not_ready_until_it_has_another(
    api: LocalApi,
) -> None:
    [fork_server] = descendants(os.getpid())
    os.kill(fork_server, signal.SIGKILL)
    await when(lambda: told(api, "/health/ready"), lambda seen: seen == "not well: fork_server")
    assert await told(api, "/health/live") == "ok"
    await when(lambda: told(api, "/health/ready"), lambda seen: seen == "ok")


async def test_a_server_that_stops_is_alive_and_not_ready(api: LocalApi) -> None:
    api.app[STOPPING].set()
    for path in READY:
        assert await told(api, path) == "not well: serving"
    for path in LIVE:
        assert await told(api, path) == "ok"


async def test_a_server_whose_consumer_has_ended_is_not_alive(api: LocalApi) -> None:
    api.app[CONSUMER_TASK].cancel()
    await when(lambda: told(api, "/health/live"), lambda seen: seen == "not well: consumer")
    for path in (*LIVE, *READY):
        assert await told(api, path) == "not well: consumer"


@pytest.mark.parametrize("name", ["tails", "streams"])
async def test_a_server_whose_streams_all_end_is_not_alive(api: LocalApi, name: str) -> None:
    api.app[STREAMS].tasks[name].cancel()
    await when(lambda: told(api, "/health/live"), lambda seen: seen != "ok")
    for path in (*LIVE, *READY):
        assert name in await told(api, path)
