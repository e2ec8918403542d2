"""`--restore`: models reloaded after a restart, the most recently used first, or none."""

from pathlib import Path

import pytest
from support import models
from support.fleet import Fleet, agreed, check_inference, new_dice, question, settled
from support.http import local_server, when
from support.models import save, save_bytes
from support.servers import Server, events, serving, verified

from events.types import Cause, ModelLoaded, UnloadRequested
from server.config import Config

USED = ("m01", "m04", "m00", "m03")
"""In this order; `m02` is loaded before them and not used."""
ENDLESS_WARM_UP = f"""
[[warm_up.inputs]]
name = "trips"
datatype = "INT64"
shape = []
data = [{2**62}]
"""
TABLE_MB = 24
"""Large beside the differences between two measurements of one load, which are some 2 MB of a worker."""


@pytest.fixture
def fleet(repository: Path) -> Fleet:
    return Fleet(repository, 5, versions=(1,), table_mb=TABLE_MB)


async def load_and_use(server: Server, fleet: Fleet) -> None:
    """Load all models in the order of their names, and use all but one in another order."""
    for model_id in fleet.ids:
        await server.api.load(model_id)
    dice = new_dice()
    for model_id in USED:
        asked = question(dice)
        check_inference(model_id, asked, await server.api.infer(model_id, asked))


async def budget_for_two(config: Config) -> int:
    """Return a budget with room for two models, but neither for a third load nor for two loads at once.

    Two loads at once are one too many, since the one that takes a little less could overtake the other.
    """
    loaded = [event.data for event in await events(config) if isinstance(event.data, ModelLoaded)]
    memory = [data.memory_bytes for data in loaded]
    peaks = [data.peak_memory_bytes for data in loaded]
    enough = max(memory) + max(peaks)
    too_much = min(peaks) + min(2 * min(memory), *peaks)
    assert enough < too_much
    return (enough + too_much) // 2


async def test_restart_with_smaller_budget_reloads_most_recently_used(config: Config, fleet: Fleet) -> None:
    async with serving(config) as server:
        await load_and_use(server, fleet)
        assert await server.stop() == 0
    budget = await budget_for_two(config)
    async with serving(config, f"--memory-budget={budget}") as server:
        await settled(server)
        assert set(await agreed(server)) == {"m03", "m00"}
        for model_id in ("m01", "m02", "m04"):
            model = await server.api.model(model_id)
            assert (model["state"], model["error"]["code"]) == ("failed", "insufficient_memory")
            assert (await server.api.get("/v2/health/ready", roles=())).status == 200
            for number in (f"of {budget / 1e6:.0f} MB are free", "start"):
                assert number in model["error"]["message"]
        asked = [job["model_id"] for job in await server.api.jobs("?limit=5")]
        assert asked == ["m02", "m01", "m04", "m00", "m03"]  # newest first
        await server.api.unload("m00")
        await server.api.load("m02")
        assert set(await agreed(server)) == {"m03", "m02"}
        assert await server.stop() == 0
    verified(config)


async def test_restore_none_unloads_models_and_continues_jobs(config: Config, fleet: Fleet) -> None:
    save_bytes(models.endless_load(), config.repository, "slow")
    async with serving(config) as server:
        for model_id in fleet.ids[:2]:
            await server.api.load(model_id)
        job = await server.api.accepted_load("slow")
        await server.api.job_when(job["id"], stage="loading")
        await server.kill()
    save(models.add(1), config.repository, "slow")
    async with serving(config, "--restore=none") as server:
        ended = await settled(server)
        assert (ended[job["id"]]["status"], ended[job["id"]]["attempt"]) == ("completed", 2)
        assert set(await agreed(server)) == {"slow"}
        for model_id in fleet.ids[:2]:
            assert (await server.api.model(model_id))["state"] == "unloaded"
        assert await server.stop() == 0
    verified(config)
    asked = [event for event in await events(config) if isinstance(event.data, UnloadRequested)]
    assert [event.model_id for event in asked] == fleet.ids[:2]
    assert {(event.data.cause, event.actor) for event in asked} == {(Cause.RESTART, "system")}  # type: ignore[union-attr]


async def test_protocol_readiness_waits_for_reloads_after_a_start(tmp_path: Path) -> None:
    """As Triton's does by default; `/health/ready` says whether requests are answered at all."""

    async def is_ready(path: str) -> tuple[int, str]:
        answer = await api.get(path, roles=())
        return answer.status, answer.json.get("detail", "")

    async with local_server(tmp_path) as api:
        api.save(models.add(1), "m")
        api.save(models.counting_loop(), "slow")
        for model_id in ("m", "slow"):
            await api.load(model_id)
    (api.config.repository / "slow" / "loadledger.toml").write_text(ENDLESS_WARM_UP)
    async with local_server(tmp_path) as api:
        await api.model_when("m", state="loaded")
        [job] = await api.jobs("?model=slow&limit=1")
        await api.job_when(job["id"], stage="warming_up")
        status, detail = await is_ready("/v2/health/ready")
        assert (status, detail[:11]) == (503, "not ready: ")
        assert "models from before the start that are not back yet: 1" in detail
        assert (await is_ready("/health/ready"))[0] == (await is_ready("/v2/health/live"))[0] == 200
        assert (await api.post(f"/api/v1/jobs/{job['id']}/cancel")).status == 202
        await when(lambda: is_ready("/v2/health/ready"), lambda seen: seen[0] == 200)
        assert (await api.model("slow"))["state"] == "unloaded"
