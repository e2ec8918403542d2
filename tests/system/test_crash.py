"""The death of a part of the server ends it uncleanly."""

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.models import save
from support.servers import Server, serving

from events.sqlite.datalock import LEDGER
from events.types import Event
from server.config import Config


def types(log: list[Event], job_id: str) -> list[str]:
    return [event.type for event in log if event.job_id == job_id]


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
EVENT_WITHOUT_TIME = {
    "position": 2, "id": "x", "type": "ServerStopped", "schema": 1, "job_id": None, "model_id": None,
    "version": None, "worker_id": None, "actor": "system", "recorded_at": "never", "data": {},
}  # fmt: skip
INSERT_JOB = "INSERT INTO jobs (created_position, id, body) VALUES (1000, 'x', ?)"
INSERT_EVENT = "INSERT INTO events (position, body, hash) VALUES (2, ?, zeroblob(32))"
DAMAGE = {"consumer": (INSERT_JOB, JOB_WITHOUT_EVENT), "writer": (INSERT_EVENT, EVENT_WITHOUT_TIME)}


def recorded(ledger: Path) -> list[str]:
    """Return the types of the events that the server itself recorded."""
    with closing(sqlite3.connect(ledger)) as connection:
        query = "SELECT json_extract(body, '$.type') FROM events WHERE json_extract(body, '$.id') != 'x'"
        return [kind for (kind,) in connection.execute(query)]


async def request_load(server: Server, model_id: str) -> None:
    """Request a load that cannot be recorded; the server may end before it answers."""
    with suppress(aiohttp.ClientError):
        assert (await server.api.post(f"/api/v1/models/{model_id}/load")).status == 503


@pytest.mark.parametrize("part", DAMAGE)
async def test_death_of_a_part_ends_the_server_uncleanly(config: Config, part: str) -> None:
    for model_id in ("breaks", "m"):
        save(models.add(1), config.repository, model_id)
    ledger, (statement, body) = config.data / LEDGER, DAMAGE[part]
    async with serving(config) as server:
        with closing(sqlite3.connect(ledger, isolation_level=None, timeout=60)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute(FAIL_LOADS)
            connection.execute(statement, (json.dumps(body),))
        await request_load(server, "breaks")
        if part == "writer":
            await request_load(server, "m")
        assert await server.ended() == 1
        assert f"{part} ended; the server stops" in server.output.read_text()
    assert recorded(ledger) == ["ServerStarted"]  # no ServerStopped: the next start is unclean
