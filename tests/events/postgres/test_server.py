"""The PostgreSQL servers that tests use do what the tests rely on."""

import asyncpg
from support.postgres import Database, PostgresServer, postgres_server

TABLE = "CREATE TABLE rows (number int); GRANT ALL ON rows TO ledger_server"


async def make_table(database: Database) -> None:
    connection = await asyncpg.connect(database.owner_url)
    await connection.execute(TABLE)
    await connection.close()


async def test_prepared_database_is_a_copy_of_the_template(postgres: PostgresServer) -> None:
    for _ in range(2):
        async with postgres.database(make_table) as database:
            connection = await asyncpg.connect(database.server_url)
            await connection.execute("INSERT INTO rows VALUES (1)")
            assert await connection.fetchval("SELECT count(*) FROM rows") == 1
            await connection.close()


async def test_committed_rows_survive_kill_and_synchronous_failover() -> None:
    async with postgres_server(auth="scram-sha-256") as server, server.database(make_table) as database:
        connection = await asyncpg.connect(database.server_url)
        await connection.execute("INSERT INTO rows VALUES (1)")
        await server.kill()
        await server.start()
        standby = await server.standby()
        connection = await asyncpg.connect(database.server_url)
        for number in range(2, 101):
            await connection.execute("INSERT INTO rows VALUES ($1)", number)
        await server.kill()
        await standby.promote()
        addresses = server.address, standby.address
        connection = await asyncpg.connect(database.url("ledger_server", *addresses))
        assert await connection.fetchval("SELECT count(*) FROM rows") == 100
        await connection.close()
