"""Stalls: of folders of the repository, and of the whole server for longer than all limits."""

import asyncio
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

from support import models
from support.clients import run_command
from support.disks import small_disk
from support.http import ENDLESS, ONE, when
from support.models import save
from support.mounts import hanging_mounts
from support.servers import MODULE, Server, events, serving
from support.workers import freeze, resume

from events.types import LoadFailed, WorkerExited
from runtime.timeouts import FORK_LIMIT_S, INFERENCE_GRACE_S
from server.config import Config

HANGING = [f"h{number}" for number in range(6)]
STALL_S = max(FORK_LIMIT_S, INFERENCE_GRACE_S) + 1


async def send_until(stop: asyncio.Event, server: Server) -> None:
    """Ask a model, again and again."""
    while not stop.is_set():
        assert (await server.api.infer("kept", ONE)).status == 200


async def test_stopped_server_accuses_no_process_when_it_goes_on(config: Config) -> None:
    for model_id in ("kept", "later"):
        save(models.add(1), config.repository, model_id)
    save(models.counting_loop(), config.repository, "loop")
    async with serving(config, "--limit-inference=off", "--limit-management=off") as server:
        await server.api.load("kept")
        await server.api.load("loop")
        loop, stop = server.worker(), asyncio.Event()
        clients = [asyncio.create_task(send_until(stop, server)) for _ in range(3)]
        processes = server.children()
        asked = [loop, processes[0]]
        # What was asked of these is answered while the server is stopped, and so read after its limit.
        for pid in asked:
            await freeze(pid)
        assert (await server.api.infer("loop", ENDLESS, parameters={"timeout": 1000})).status == 504
        job = await server.api.accepted_load("later")
        await server.api.job_when(job["id"], stage="starting")
        await freeze(server.pid)
        for pid in asked:
            resume(pid)
        await asyncio.sleep(STALL_S)
        os.kill(server.pid, signal.SIGCONT)
        await server.api.job_when(job["id"], status="completed")
        assert (await server.api.infer("loop", {**ENDLESS, "data": [5]})).json["outputs"][0]["data"] == [5]
        stop.set()
        await asyncio.gather(*clients)
        assert set(processes) <= set(server.children())
    log = await events(config)
    assert not [event for event in log if isinstance(event.data, WorkerExited | LoadFailed)]


async def test_full_disk_is_the_first_thing_that_commands_say(config: Config, tmp_path: Path) -> None:
    save(models.add(1), config.repository, "m")
    full = "database or disk is full"
    cure = "free space on the disk of the data directory"
    with small_disk(tmp_path / "small", 16 * 2**20) as disk:
        config = replace(config, data=disk.folder)
        async with serving(config, command=(*disk.prefix, *MODULE)) as server:
            token, url = server.api.token("admin"), server.url

            async def say(*words: str) -> str:
                result = await asyncio.to_thread(
                    run_command, *words, LOADLEDGER_URL=url, LOADLEDGER_TOKEN=token
                )
                return str(result.output)

            disk.fill()
            seconds, said = 0, ""
            while "accepted" not in said:  # the write-ahead log has some room left
                seconds += 1
                said = await say("load", "m", f"--keep-alive-s={seconds}")
            assert f"so nothing was accepted: {full}; {cure} (log_unavailable)" in said
            for command in ("ps", "models", "resources", "top"):
                said = await when(partial(say, command), lambda said: "NOT READY" in said)
                assert f"the ledger cannot be written: {full}: {cure}" in "\n".join(said.splitlines()[:4])
            refused = await server.api.get("/health/ready", roles=())
            assert refused.json["detail"] == f"not ready: log: the ledger cannot be written: {full}: {cure}"
            disk.drain()
            await when(partial(say, "ps"), lambda said: "NOT READY" not in said)
            await server.api.load("m")


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
