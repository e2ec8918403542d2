"""A server in a container of 1 GiB: what models and clients take together never ends the container."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from support import models
from support.cgroups import container
from support.http import Answer, Api, Json
from support.servers import MODULE, NO_DEVICES, serving, verified
from support.workers import LIMIT_S, until

from server.config import Config

GIB = 2**30
BODY_BYTES = 64 * 2**20
BODIES = 8
SUBJECTS = ("alice", "bob")
BALLAST = 10_000_000
"""Floats that a loaded model holds: 40 MB."""


async def infer(api: Api, model_id: str, *shape: int) -> Answer:
    tensor: Json = {"name": "shape", "shape": [len(shape)], "datatype": "INT64", "data": list(shape)}
    return await api.post(f"/v2/models/{model_id}/infer", json={"inputs": [tensor]})


async def send_slowly(api: Api, subject: str, until: asyncio.Event) -> Answer | None:
    """Send a long body up to its last byte, and wait; returns the answer, or None of a closed connection."""

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        for _ in range(BODY_BYTES // 2**20 - 1):
            yield b" " * 2**20
        await until.wait()
        yield b"}"

    try:
        return await api.post("/v2/models/bomb/infer", data=body(), subject=subject)
    except (OSError, aiohttp.ClientError):  # refused before its end
        return None


async def test_model_ends_before_its_container_does(tmp_path: Path) -> None:
    config = Config(repository=tmp_path / "models", data=tmp_path / "data")
    for number in range(20):
        models.save(models.grown(BALLAST), config.repository, f"ballast-{number}")
    models.save(models.memory_bomb_on_run(), config.repository, "bomb")
    models.save(models.memory_bomb_on_load(), config.repository, "burst")
    with container(GIB) as box:
        async with serving(config, command=(*box.entering, *MODULE), environment=NO_DEVICES) as server:
            api, release = server.api, asyncio.Event()
            await api.load("bomb")
            full = 0
            while (job := await load(api, f"ballast-{full}"))["status"] == "completed":
                full += 1
            assert job["error"]["code"] in ("insufficient_memory", "out_of_memory", "timeout"), job
            async with asyncio.timeout(LIMIT_S):
                bodies = [
                    asyncio.create_task(send_slowly(api, subject, release))
                    for subject in SUBJECTS
                    for _ in range(BODIES)
                ]
                await until(lambda: sum(each.done() for each in bodies) >= len(bodies) - len(SUBJECTS))
                lost, burst = await asyncio.gather(infer(api, "bomb", 130_000_000), load(api, "burst"))
                release.set()
                await asyncio.gather(*bodies)
            assert lost.refusal == (400, "inference_failed"), lost.body
            assert burst["status"] == "failed", burst
            for number in range(full):
                assert (await api.get(f"/v2/models/ballast-{number}/ready")).status == 200
            assert (await infer(api, "bomb", 10)).status == 200
            assert box.kills == 0
    verified(config)


async def load(api: Api, model_id: str) -> Json:
    answer = await api.post(f"/api/v1/models/{model_id}/load", json={"threads": 1, "timeout_s": 20}, wait=30)
    assert answer.status in (200, 202), answer.body
    return answer.json
