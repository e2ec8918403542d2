"""The PostgreSQL servers and the network that tests use do what those tests rely on."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from support.cutting import cutting_proxy
from support.postgres import Address, Connection, Database, PostgresServer, postgres_server, require_programs
from support.workers import LIMIT_S, until, wait_gone

TESTS = Path(__file__).parents[2]
TABLE = "CREATE TABLE rows (number int PRIMARY KEY); GRANT SELECT, INSERT ON rows TO ledger_server"
OWNER = """
import asyncio
from support.postgres import postgres_server

async def main():
    async with postgres_server() as server:
        print(server.home, server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""A process that starts a server and does not end it."""

LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What asyncpg raises where a connection is lost."""


@asynccontextmanager
async def connected(database: Database, *addresses: Address) -> AsyncIterator[Connection]:
    """Connect as the product does, and drop the connection in the end, even if nothing comes through."""
    connection = await asyncpg.connect(database.url("ledger_server", *addresses), timeout=LIMIT_S)
    try:
        yield connection
    finally:
        connection.terminate()


async def make_table(database: Database) -> None:
    connection = await asyncpg.connect(database.owner_url)
    await connection.execute(TABLE)
    await connection.close()


async def append(connection: Connection, *numbers: int) -> None:
    for number in numbers:
        await connection.execute(f"INSERT INTO rows VALUES ({number})")  # one round trip


async def numbers_in(connection: Connection) -> list[int]:
    return [number for (number,) in await connection.fetch("SELECT number FROM rows ORDER BY number")]


async def test_database_is_a_fresh_copy_of_its_template(postgres: PostgresServer) -> None:
    for _ in range(2):
        async with postgres.database(make_table) as database, connected(database) as connection:
            await append(connection, 1)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("DELETE FROM rows")


async def test_committed_rows_survive_kill_and_synchronous_failover() -> None:
    async with postgres_server(auth="scram-sha-256") as server, server.database(make_table) as database:
        async with connected(database) as connection:
            await append(connection, 1)
            await server.kill()
        await server.start()
        standby = await server.standby()
        async with connected(database) as connection:
            await append(connection, *range(2, 101))
            await server.kill()
        await standby.promote()
        async with connected(database, server.address, standby.address) as connection:
            await append(connection, 101)  # it waits for no standby
            assert await numbers_in(connection) == list(range(1, 102))


async def test_server_and_its_folder_end_with_their_killed_owner() -> None:
    require_programs()
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = (sys.executable, "-c", OWNER)
    owner = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        assert owner.stdout is not None
        home, pid = (await owner.stdout.readline()).decode().split()
        server = os.pidfd_open(int(pid))
    finally:
        owner.kill()
        await owner.wait()
    assert await asyncio.to_thread(wait_gone, [server])
    await until(lambda: not Path(home).exists())


async def test_query_times_out_while_all_is_swallowed(postgres: PostgresServer) -> None:
    async with postgres.database() as database, cutting_proxy(postgres.address) as proxy:
        async with connected(database, proxy.address) as connection:
            proxy.swallow()
            with pytest.raises(TimeoutError):
                await connection.fetchval("SELECT 1", timeout=0.1)
        proxy.heal()
        async with connected(database, proxy.address) as healed:
            assert await healed.fetchval("SELECT 1") == 1


async def test_acknowledgement_is_lost_in_a_cut_connection(postgres: PostgresServer) -> None:
    async with (
        postgres.database(make_table) as database,
        cutting_proxy(postgres.address) as proxy,
        connected(database, proxy.address) as connection,
        connected(database) as direct,
    ):
        proxy.swallow("answers")
        waiting = asyncio.create_task(append(connection, 1))
        async with asyncio.timeout(LIMIT_S):
            while await numbers_in(direct) != [1]:
                assert not waiting.done()
        await proxy.cut()
        with pytest.raises(LOST):
            await waiting


async def test_swallowed_request_arrives_after_healing(postgres: PostgresServer) -> None:
    async with (
        postgres.database(make_table) as database,
        cutting_proxy(postgres.address) as proxy,
        connected(database, proxy.address) as connection,
        connected(database) as direct,
    ):
        await append(connection, 1)
        proxy.swallow()
        late = asyncio.create_task(append(connection, 2))
        assert await numbers_in(direct) == [1]
        proxy.heal()
        await late
        assert await numbers_in(direct) == [1, 2]


async def test_cut_connection_is_lost_and_a_new_one_heals(postgres: PostgresServer) -> None:
    async with (
        postgres.database(make_table) as database,
        cutting_proxy(postgres.address) as proxy,
        connected(database, proxy.address) as connection,
    ):
        await proxy.cut()
        with pytest.raises(LOST):
            await append(connection, 1)
        with pytest.raises(LOST):
            async with connected(database, proxy.address):
                pytest.fail("connected while cut")
        proxy.heal()
        async with connected(database, proxy.address) as healed:
            assert await numbers_in(healed) == []


def test_missing_programs_fail_where_ci_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSTGRES", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="no initdb"):
        require_programs()
