"""Ends that nobody ordered: kill -9 of the server, and the death of one of its parts."""

import asyncio
import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.fleet import settled
from support.http import ENDLESS, LIMIT_S, ONE, Api, LocalApi
from support.models import save, save_bytes
from support.servers import events, limited, serving, verified
from support.streams import following
from support.workers import computing, until

from events.sqlite.datalock import LEDGER
from events.types import Event, ServerStarted
from server.config import Config
from server.serve import _wait_for_end


def types(log: list[Event], job_id: str) -> list[str]:
    return [event.type for event in log if event.job_id == job_id]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_kill_9_ends_all_processes_and_next_start_finishes_jobs(config: Config) -> None:
    for model_id, constant in (("loaded", 1), ("pending", 2)):
        save(models.add(constant), config.repository, model_id)
    save_bytes(models.endless_load(), config.repository, "slow")
    save(models.counting_loop(), config.repository, "draining")
    async with serving(config, command=limited(loads_at_once=1)) as server:
        first = await server.api.load("loaded")
        await server.api.load("draining")
        is_computing = computing(server.worker())
        inference = asyncio.create_task(server.api.infer("draining", ENDLESS))
        await until(is_computing)
        unload = (await server.api.post("/api/v1/models/draining/unload")).json
        await server.api.job_when(unload["id"], stage="draining")
        slow = await server.api.accepted_load("slow")
        pending = await server.api.accepted_load("pending")
        await server.api.job_when(slow["id"], stage="loading")
        assert (await server.api.job(pending["id"]))["status"] == "pending"
        before = set(server.children())
        assert len(before) == 4
        await server.kill()
        with pytest.raises(aiohttp.ClientError):
            await inference
    assert not [pid for pid in before if is_running(pid)]

    save(models.add(3), config.repository, "slow")
    async with serving(config, command=limited(loads_at_once=1)) as server:
        assert before.isdisjoint(server.children())
        jobs = await settled(server)
        assert {job["status"] for job in jobs.values()} == {"completed"}
        assert (jobs[slow["id"]]["attempt"], jobs[pending["id"]]["attempt"]) == (2, 1)
        assert (await server.api.model("draining"))["state"] == "unloaded"
        model = await server.api.model_when("loaded", state="loaded")
        assert model["job_id"] != first["id"]
        reload = jobs[model["job_id"]]
        assert (reload["cause"], reload["requested_by"]) == ("restart", "system")
        for model_id, answer in (("loaded", 2), ("pending", 3), ("slow", 4)):
            assert (await server.api.infer(model_id, ONE)).json["outputs"][0]["data"] == [answer]
        assert await server.stop() == 0
    verified(config)
    log = await events(config)
    started = [event.data for event in log if isinstance(event.data, ServerStarted)]
    assert [data.unclean for data in started] == [False, True]
    assert started[1].last_seen_at is not None
    assert types(log, slow["id"]) == ["LoadRequested", "LoadStarted", "LoadStarted", "ModelLoaded"]
    assert types(log, pending["id"]) == ["LoadRequested", "LoadStarted", "ModelLoaded"]


# A part of the server dies of what only a damaged ledger has: another process wrote into it, and the server
# reads it again after a failed write.

FAIL_LOADS = """
CREATE TRIGGER fail_loads BEFORE INSERT ON events WHEN json_extract(NEW.body, '$.model_id') = 'breaks'
BEGIN
  SELECT RAISE(ABORT, 'a test wants this write to fail');
END
"""
JOB_WITHOUT_EVENT: dict[str, object] = {
    "id": "x", "kind": "load", "model_id": "m", "version": None, "status": "pending",
    "created_at": "2026-01-01T00:00:00.000000Z", "created_position": 1000, "position": 1000,
    "requested_by": "nobody", "cause": "request", "load": {}, "deadline_at": "then",
}  # fmt: skip
EVENT_WITHOUT_TIME: dict[str, object] = {
    "position": 2, "id": "x", "type": "ServerStopped", "schema": 1, "job_id": None, "model_id": None,
    "version": None, "worker_id": None, "actor": "system", "recorded_at": "never", "data": {},
}  # fmt: skip
INSERT_JOB = "INSERT INTO jobs (created_position, id, body) VALUES (1000, 'x', ?)"
INSERT_EVENT = "INSERT INTO events (position, body, hash) VALUES (2, ?, zeroblob(32))"


def recorded(ledger: Path) -> list[str]:
    """Return the types of the events that the server itself recorded."""
    with closing(sqlite3.connect(ledger)) as connection:
        query = "SELECT json_extract(body, '$.type') FROM events WHERE json_extract(body, '$.id') != 'x'"
        return [kind for (kind,) in connection.execute(query)]


async def request_load(api: Api, model_id: str) -> None:
    """Request a load that cannot be recorded; the server may end before it answers."""
    with suppress(aiohttp.ClientError):
        assert (await api.post(f"/api/v1/models/{model_id}/load")).status == 503


def damage(ledger: Path, statement: str, body: dict[str, object]) -> None:
    """Have the next load of `breaks` fail, and add what cannot be read then."""
    with closing(sqlite3.connect(ledger, isolation_level=None, timeout=60)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(FAIL_LOADS)
        connection.execute(statement, (json.dumps(body),))


async def test_death_of_the_writer_ends_the_process_uncleanly(config: Config) -> None:
    for model_id in ("breaks", "m"):
        save(models.add(1), config.repository, model_id)
    ledger = config.data / LEDGER
    async with serving(config) as server:
        damage(ledger, INSERT_EVENT, EVENT_WITHOUT_TIME)
        for model_id in ("breaks", "m"):
            await request_load(server.api, model_id)
        assert await server.ended() == 1
        assert "writer ended; the server stops" in server.output.read_text()
    assert recorded(ledger) == ["ServerStarted"]  # no ServerStopped: the next start is unclean


LEAVE_GAP = """
DROP TRIGGER events_never_go;
CREATE TRIGGER leave_gap AFTER INSERT ON events WHEN NEW.type = 'ModelSettingsChanged'
BEGIN
  DELETE FROM events WHERE position = NEW.position - 1;
END
"""


async def exit_code(api: LocalApi) -> int:
    """Wait for the end of a part, and return the code with which the process would exit."""
    async with asyncio.timeout(LIMIT_S):
        return await _wait_for_end(api.app, asyncio.Event())


@pytest.mark.parametrize("part", ["consumer", "tails"])
async def test_death_of_consumer_or_tails_ends_serving(
    api: LocalApi, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    api.save(models.add(1), "breaks")
    if part == "consumer":
        damage(api.ledger, INSERT_JOB, JOB_WITHOUT_EVENT)
        await request_load(api, "breaks")
        code = await exit_code(api)
    else:
        async with following(api) as stream:
            await api.load("breaks")
            await stream.until("live")
            with closing(sqlite3.connect(api.ledger, isolation_level=None, timeout=60)) as connection:
                connection.executescript(LEAVE_GAP)
            await api.post("/api/v1/models/breaks/load", json={"pinned": True})
            code = await exit_code(api)
    assert code == 1
    assert f"{part} ended; the server stops" in caplog.text
    await api.client.close()
    assert "ServerStopped" not in recorded(api.ledger)
