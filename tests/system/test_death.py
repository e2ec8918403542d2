"""A server of which a part has died ends, says so, and is known not to have been stopped.

They die of what only a damaged ledger has: somebody else wrote into it, and the server reads it again after a
write that failed.
"""

import json
import sqlite3
from contextlib import AsyncExitStack, closing
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.models import save
from support.process import Server, events, serving, verified
from support.streams import following

from events.types import ServerStarted, ServerStopped
from server.app import LEDGER
from server.config import Config

NO_LOADS_OF_BREAKS = """
CREATE TRIGGER no_loads_of_breaks BEFORE INSERT ON events WHEN json_extract(NEW.body, '$.model_id') = 'breaks'
BEGIN
  SELECT RAISE(ABORT, 'a test wants this write to fail');
END
"""
A_LOAD_OF_NOTHING = {
    "id": "x", "kind": "load", "model_id": "m", "version": None, "status": "pending",
    "created_at": "2026-01-01T00:00:00.000000Z", "created_position": 1000, "position": 1000,
    "requested_by": "nobody", "cause": "request",
}  # fmt: skip
"""A job such as no event makes: the consumer has a load to begin, and nothing says of what."""
AN_EVENT_OF_NO_TIME = {
    "position": 2, "id": "x", "type": "ServerStopped", "schema": 1, "job_id": None, "model_id": None,
    "version": None, "worker_id": None, "actor": "system", "recorded_at": "never", "data": {},
}  # fmt: skip
"""An event such as no writer makes: nothing can be recorded after it."""
AN_EVENT_OF_ANOTHER_PLACE = {
    **AN_EVENT_OF_NO_TIME,
    "position": 7,
    "recorded_at": "2026-01-01T00:00:00.000000Z",
}
"""An event such as the schema refuses: what all streams share would have a gap before it."""
INSERT_EVENT = "INSERT INTO events (position, body, hash) VALUES (2, ?, zeroblob(32))"

DAMAGES = {
    "consumer": ("INSERT INTO jobs (created_position, id, body) VALUES (1000, 'x', ?)", A_LOAD_OF_NOTHING),
    "writer": (INSERT_EVENT, AN_EVENT_OF_NO_TIME),
    "tails": (INSERT_EVENT, AN_EVENT_OF_ANOTHER_PLACE),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for model_id in ("breaks", "m"):
        save(models.add(1), tmp_path / "repository", model_id)
    return Config(repository=tmp_path / "repository", data=tmp_path / "data")


def change(config: Config, *statements: tuple[str, tuple[object, ...]]) -> None:
    """Do to the ledger what its server would not."""
    with closing(sqlite3.connect(config.data / LEDGER, isolation_level=None, timeout=60)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement, values in statements:
            connection.execute(statement, values)


def repair(config: Config) -> None:
    """Take out of the ledger what was put in."""
    with closing(sqlite3.connect(config.data / LEDGER, isolation_level=None)) as connection:
        (guard,) = connection.execute(
            "SELECT sql FROM sqlite_schema WHERE name = 'events_never_go'"
        ).fetchone()
        connection.execute("DROP TRIGGER events_never_go")
        connection.execute("DELETE FROM events WHERE json_extract(body, '$.id') = 'x'")
        connection.execute(guard)
        connection.execute("DROP TRIGGER no_loads_of_breaks")
        connection.execute("DELETE FROM jobs")
        connection.execute("DELETE FROM models")


async def loads(server: Server, model_id: str) -> None:
    """Ask for a load, which is not to be: the server may end before it answers."""
    try:
        answer = await server.api.post(f"/api/v1/models/{model_id}/load")
    except aiohttp.ClientError:
        return
    assert answer.status == 503


@pytest.mark.parametrize("dies", DAMAGES)
async def test_a_server_of_which_a_part_has_died_ends_with_1_and_its_next_start_is_unclean(
    config: Config, dies: str
) -> None:
    statement, body = DAMAGES[dies]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(config))
        if dies == "tails":  # the ledger is followed for those who listen
            follower = await stack.enter_async_context(following(server.api))
            await follower.until("live")
        change(config, (NO_LOADS_OF_BREAKS, ()), (statement, (json.dumps(body),)))
        await loads(server, "breaks")
        if dies == "writer":
            await loads(server, "m")
        assert await server.ended() == 1
        assert f"{dies} ended; the server stops" in server.output.read_text()
    repair(config)
    log = await events(config)
    assert [event.data for event in log] == [ServerStarted(unclean=False)]
    async with serving(config) as server:
        await server.api.load("breaks")
        assert await server.stop() == 0
    log = await events(config)
    started = [event.data for event in log if isinstance(event.data, ServerStarted)]
    assert [data.unclean for data in started] == [False, True]
    assert log[-1].data == ServerStopped()
    verified(config)
