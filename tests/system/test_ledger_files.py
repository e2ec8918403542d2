"""The ledger's file in trouble under a running server: a code, nothing lost, and inference goes on."""

import asyncio
import resource
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
from support import models
from support.http import Json, when
from support.models import save
from support.process import MODULE, Server, clean_environment, events, serving, verified

from events.audit import audit
from events.errors import IncompleteCopy
from server.app import LEDGER
from server.config import Config

ONE: Json = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "repository").mkdir()
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    save(models.add(1), config.repository, "m")
    save(models.add(2), config.repository, "n")
    return config


@asynccontextmanager
async def loaded(config: Config) -> AsyncIterator[Server]:
    """A server that has a model loaded."""
    async with serving(config) as server:
        await server.api.load("m")
        yield server


async def is_ready(server: Server) -> bool:
    return (await server.api.get("/health/ready", roles=())).status == 200


async def refused_but_inferring(server: Server) -> None:
    """A load is refused with a code, and inference does not notice."""
    refused = await server.api.post("/api/v1/models/n/load")
    assert refused.refusal == (503, "log_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    answer = await server.api.infer("m", ONE)
    assert answer.json["outputs"][0]["data"] == [2]
    assert (await server.api.get("/health/live", roles=())).status == 200


async def recovered(server: Server, config: Config, acknowledged: list[str]) -> None:
    """It is ready by itself, takes requests again, and all that was ever acknowledged is there."""
    await when(lambda: is_ready(server), bool)
    acknowledged.append((await server.api.load("n"))["id"])
    assert await server.stop() == 0
    verified(config)
    told = [event.id for event in await events(config)]
    assert [event_id for event_id in told if event_id in acknowledged] == acknowledged
    assert len(set(told)) == len(told)
    assert [event.model_id for event in await events(config) if event.type == "LoadRequested"] == ["m", "n"]


async def requests_of(config: Config) -> list[str]:
    return [event.id for event in await events(config) if event.type == "LoadRequested"]


async def test_a_full_disk(config: Config) -> None:
    async with loaded(config) as server:
        acknowledged = await requests_of(config)
        wal = config.data / f"{LEDGER}-wal"
        before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (wal.stat().st_size, before[1]))
        await refused_but_inferring(server)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)
        await recovered(server, config, acknowledged)


@contextmanager
def other_process(data: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else's to the ledger."""
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None, timeout=60)) as connection:
        yield connection


async def test_a_ledger_that_another_process_has_locked(config: Config) -> None:
    async with loaded(config) as server:
        acknowledged = await requests_of(config)
        with other_process(config.data) as other:
            other.execute("BEGIN IMMEDIATE")
            await refused_but_inferring(server)
            other.execute("ROLLBACK")
        await recovered(server, config, acknowledged)


async def test_a_ledger_whose_schema_is_damaged(config: Config) -> None:
    async with loaded(config) as server:
        acknowledged = await requests_of(config)
        with other_process(config.data) as other:
            other.execute("PRAGMA writable_schema = ON")
            (sql,) = other.execute("SELECT sql FROM sqlite_schema WHERE name = 'events_by_time'").fetchone()
            _damage(other, "no SQL")
            await refused_but_inferring(server)
            assert not await is_ready(server)
            _damage(other, sql)
        await recovered(server, config, acknowledged)


def _damage(connection: sqlite3.Connection, sql: str) -> None:
    """Write this as an index's definition, and have everybody read it."""
    connection.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'events_by_time'", (sql,))
    (version,) = connection.execute("PRAGMA schema_version").fetchone()
    connection.execute(f"PRAGMA schema_version = {version + 1}")


async def test_the_file_of_a_running_server_copied_alone_is_refused_and_a_backup_is_not(
    config: Config, tmp_path: Path
) -> None:
    copied = tmp_path / "copied.db"
    async with loaded(config) as server:
        copied.write_bytes((config.data / LEDGER).read_bytes())
        with pytest.raises(IncompleteCopy):
            audit(copied)
        process = await asyncio.create_subprocess_exec(
            *(*MODULE, "backup", f"--data={config.data}", tmp_path / "backup.db"),
            env=clean_environment(),
            cwd=config.repository,
            stdout=asyncio.subprocess.PIPE,
        )
        stdout, _ = await process.communicate()
        assert process.returncode == 0
        kept = (await server.api.get("/api/v1/events/head", roles=("audit",))).json
        assert stdout.decode().splitlines()[-1] == f"head: {kept['position']}:{kept['hash']}"
        assert audit(tmp_path / "backup.db").finding is None
        await server.stop()
    assert audit(config.data / LEDGER).finding is None


async def test_a_start_that_fails_after_a_kill_leaves_a_ledger_that_can_be_verified(config: Config) -> None:
    async with loaded(config) as server:
        await server.kill()
    (config.data / "ledger.key").write_text("no key")
    process = await asyncio.create_subprocess_exec(
        *(*MODULE, "serve", "--port=0", f"--data={config.data}", f"--repository={config.repository}"),
        env=clean_environment(),
        cwd=config.repository,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert "ledger.key is not a readable private key" in stderr.decode()
    assert audit(config.data / LEDGER).finding is None
