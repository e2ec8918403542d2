"""How long a loaded model stays can change while it is loaded: workers, and who asks them, do not notice."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi
from support.models import save
from support.workers import until

from events.types import LoadRequested, ModelLoaded
from server.app import LEDGER

ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
FULL_DISK = """CREATE TRIGGER full BEFORE INSERT ON events
WHEN json_extract(NEW.body, '$.type') = 'ModelLoaded' BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"""


async def test_a_loaded_model_is_pinned_by_a_load_that_keeps_its_worker(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    loaded = await api.load("m", instances=2, memory_limit_bytes=2**30)
    pid, before = api.worker("m").pid, await api.model("m")
    pinned = await api.load("m", pinned=True)
    assert pinned["id"] != loaded["id"]
    assert pinned["parameters"] == loaded["parameters"] | {"pinned": True}
    assert api.worker("m").pid == pid
    after = await api.model("m")
    assert after["job_id"] == pinned["id"]
    assert after["position"] > before["position"]
    assert {**after, "job_id": "", "position": 0, "loaded_at": ""} == {
        **before,
        "job_id": "",
        "position": 0,
        "loaded_at": "",
    }
    first, second = await api.data_of(ModelLoaded)
    assert (second.worker_ids, second.files) == (first.worker_ids, first.files)
    assert [asked.keeps_load_job_id for asked in await api.data_of(LoadRequested)] == [None, loaded["id"]]
    assert await api.types("m") == ["LoadRequested", "LoadStarted", "ModelLoaded"] * 2


async def test_what_is_as_asked_is_answered_with_the_job_behind_it(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    pinned = await api.load("m", pinned=True, keep_alive_s=60)
    for asked in ({}, {"pinned": True}, {"keep_alive_s": 60}, {"priority": "high"}):
        assert (await api.load("m", **asked))["id"] == pinned["id"]
    unpinned = await api.load("m", pinned=False, keep_alive_s=-1)
    assert unpinned["id"] != pinned["id"]
    assert (await api.load("m", keep_alive_s=-1))["id"] == unpinned["id"]


async def test_a_load_for_other_reasons_is_a_swap_that_keeps_nothing(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    pid = api.worker("m").pid
    await api.load("m", pinned=True, instances=2)
    assert api.worker("m").pid != pid


async def test_requests_under_way_and_to_come_do_not_notice(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    done = asyncio.Event()
    statuses: list[int] = []

    async def ask() -> None:
        while not done.is_set():
            statuses.append((await api.infer("m", ONE)).status)

    clients = [asyncio.create_task(ask()) for _ in range(4)]
    for turn in range(20):
        await api.load("m", pinned=turn % 2 == 0)
    done.set()
    await asyncio.gather(*clients)
    assert set(statuses) == {200}


async def test_a_change_that_cannot_be_recorded_is_made_when_it_can(
    api: LocalApi, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(models.add(1), repository, "m")
    loaded = await api.load("m")
    pid = api.worker("m").pid
    with closing(sqlite3.connect(api.config.data / LEDGER)) as ledger:
        ledger.execute(FULL_DISK)
        job = await api.accepted_load("m", pinned=True)
        await until(lambda: "cannot be written" in caplog.text)
        assert (await api.infer("m", ONE)).status == 200
        assert (await api.model("m"))["job_id"] == loaded["id"]
        ledger.execute("DROP TRIGGER full")
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert api.worker("m").pid == pid
    assert (await api.infer("m", ONE)).status == 200


async def test_a_model_that_lost_its_worker_meanwhile_is_loaded_anew_as_asked(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    worker = api.worker("m")
    worker.kill()
    await asyncio.shield(worker.ended)
    job = await api.accepted_load("m", pinned=True)
    assert (await api.ended(job["id"]))["status"] == "completed"
    assert api.worker("m").pid != worker.pid
    assert (await api.infer("m", ONE)).status == 200
