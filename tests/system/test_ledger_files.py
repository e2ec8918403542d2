"""A ledger that cannot be written: loads are refused, nothing is lost, inference goes on."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

from support import models
from support.http import ONE, when
from support.models import save
from support.servers import Server, events, refused_start, serving, verified

from events.audit.kepthead import KEPT_HEAD
from events.sqlite.datalock import LEDGER
from events.types import RollbackAccepted
from server.auth.keys import LEDGER_KEY
from server.config import Config


@asynccontextmanager
async def loaded(config: Config) -> AsyncIterator[Server]:
    """A server of two models, one of which is loaded."""
    save(models.add(1), config.repository, "m")
    save(models.add(2), config.repository, "n")
    async with serving(config) as server:
        await server.api.load("m")
        yield server


async def is_ready(server: Server) -> bool:
    return (await server.api.get("/health/ready", roles=())).status == 200


async def check_load_refused_and_inference_works(server: Server) -> None:
    refused = await server.api.post("/api/v1/models/n/load")
    assert refused.refusal == (503, "log_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    answer = await server.api.infer("m", ONE)
    assert answer.json["outputs"][0]["data"] == [2]
    assert (await server.api.get("/health/live", roles=())).status == 200


@contextmanager
def damaged_schema(data: Path) -> Iterator[None]:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None, timeout=60)) as other:
        other.execute("PRAGMA writable_schema = ON")
        (sql,) = other.execute("SELECT sql FROM sqlite_schema WHERE name = 'events_by_time'").fetchone()
        _define_index(other, "no SQL")
        yield
        _define_index(other, sql)


def _define_index(connection: sqlite3.Connection, sql: str) -> None:
    connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'events_by_time'", (sql,))
    (version,) = connection.execute("PRAGMA schema_version").fetchone()
    connection.execute(f"PRAGMA schema_version = {version + 1}")  # so that every connection reads it


async def test_server_recovers_when_the_ledger_can_be_written_again(config: Config) -> None:
    async with loaded(config) as server:
        acknowledged = [event.id for event in await events(config) if event.type == "LoadRequested"]
        with damaged_schema(config.data):
            await check_load_refused_and_inference_works(server)
            assert not await is_ready(server)
        await when(lambda: is_ready(server), bool)
        acknowledged.append((await server.api.load("n"))["id"])
        assert await server.stop() == 0
    verified(config)
    asked = [event for event in await events(config) if event.type == "LoadRequested"]
    assert [(event.model_id, event.id) for event in asked] == [*zip(("m", "n"), acknowledged, strict=True)]


async def test_start_without_key_or_kept_head_is_refused_until_accepted(config: Config) -> None:
    async with loaded(config) as server:
        await server.kill()
    before = (config.data / LEDGER).read_bytes()
    key = (config.data / LEDGER_KEY).read_text()
    (config.data / LEDGER_KEY).write_text("no key")
    assert "ledger.key is not a readable private key" in await refused_start(config)
    (config.data / LEDGER_KEY).write_text(key)
    (config.data / KEPT_HEAD).unlink()
    assert "is missing" in await refused_start(config)
    assert (config.data / LEDGER).read_bytes() == before
    async with serving(config, "--accept-rollback") as server:
        assert await server.stop() == 0
    assert RollbackAccepted.TYPE in [event.type for event in await events(config)]
