"""A server whose repository has folders that hang: requests, the list of models, and its stop."""

import asyncio

from support import models
from support.http import ONE
from support.models import save
from support.mounts import hanging_mounts
from support.servers import serving

from server.config import Config

HANGING = [f"h{number}" for number in range(6)]


async def test_folders_that_hang_hold_up_their_models_only(config: Config) -> None:
    for model_id in (*HANGING, "well", "other"):
        save(models.add(1), config.repository, model_id)
    async with serving(config) as server:
        api = server.api
        await api.load(HANGING[0])
        with hanging_mounts(*(config.repository / model_id for model_id in HANGING)):
            refused = await asyncio.gather(*(api.post(f"/api/v1/models/{each}/load") for each in HANGING[1:]))
            assert {answer.refusal for answer in refused} == {(503, "repository_busy")}
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
            await api.load("well")
            listed = (await api.get("/api/v1/models")).json["models"]
            assert [(model["id"], model["versions"]) for model in listed] == [
                (HANGING[0], []),  # as recorded
                ("other", [1]),
                ("well", [1]),
            ]
            index = (await api.post("/v2/repository/index")).json
            assert [entry["name"] for entry in index] == [HANGING[0], "other", "well"]
            assert (await api.get(f"/api/v1/models/{HANGING[1]}")).refusal == (503, "repository_busy")
            assert (await api.infer(HANGING[0], ONE)).status == 200
            await api.unload(HANGING[0])
            assert (await api.infer(HANGING[0], ONE)).refusal == (503, "model_not_loaded")
            assert await server.stop() == 0
