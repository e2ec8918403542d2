"""`loadledger migrate` and `verify --ledger`: output, exit codes, refusals."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.clients import printed, printed_json, refused, run_command
from support.http import local_server
from support.ledgers import DATA_ROUNDS, rows_of, sample_history
from support.postgres import PASSWORD, Database, postgres_server, require_programs
from support.replicas import change, make_ledger, replica_log, rows_in

from events.errors import IsReplica, LedgerForked
from events.sqlite.datalock import LEDGER, REPLICA, mark_replica, refuse_replica
from events.sqlite.schema import connect
from nodes.postgres import admin as databases
from server.app import create_app
from server.config import Config

HEAD = len(sample_history(DATA_ROUNDS)) + 1
OTHER_PROGRAM = "CREATE SCHEMA loadledger; CREATE TABLE loadledger.notes (id int)"


@pytest.fixture
def migrated(database: Database, data: Path) -> Database:
    """A database with that ledger, of which the data directory has a replica."""
    printed("migrate", "--ledger", database.owner_url, "--server-role", "ledger_server", "--data", data)
    return database


def head_of(data: Path) -> str:
    return f"{HEAD}:{rows_of(data / LEDGER)[-1][2].hex()}"


def count_rows(database: Database) -> int:
    return len(asyncio.run(rows_in(database)))


# migrate


def test_migrate_prints_what_it_did(database: Database, data: Path) -> None:
    migrate = ("migrate", "--ledger", database.owner_url)
    assert printed(*migrate).splitlines() == ["schema: 1 migrations applied"]
    assert printed(*migrate, "--server-role", "ledger_server", "--data", data).splitlines() == [
        "schema: 0 migrations applied",
        "role ledger_server: may read and append",
        f"copied and verified: {HEAD} events, head {head_of(data)}",
    ]
    assert (data / REPLICA).read_text() == f"{database.server_url}\n"  # which a server is given
    assert asyncio.run(rows_in(database)) == rows_of(data / LEDGER)
    (data / REPLICA).unlink()
    assert "has events already" in refused(*migrate, "--data", data)


def test_migrate_in_json_names_the_copied_head(database: Database, data: Path) -> None:
    position, digest = head_of(data).split(":")
    told = {"migrations": 1, "server_role": None, "events": HEAD, "position": int(position), "hash": digest}
    assert printed_json("migrate", "--ledger", database.owner_url, "--data", data) == told


def test_migrate_refuses_ledgers_it_cannot_copy(database: Database, data: Path) -> None:
    migrate = ("migrate", "--ledger", database.owner_url, "--data", data)
    with closing(connect(data / LEDGER)) as connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET hash = zeroblob(32) WHERE position = 4")
    assert "does not verify: position 4" in refused(*migrate)
    (data / LEDGER).unlink()
    assert "ledger.db" in refused(*migrate)
    (data / REPLICA).write_text("postgresql://db/other\n")
    assert "is a replica of the ledger in postgresql://db/other" in refused(*migrate)
    assert "no name of a role" in refused(*migrate[:3], "--server-role", 'x"; DROP')
    assert count_rows(database) == 0


def mark_and_end(data: object, address: str, *_: object) -> None:
    if isinstance(data, Path):
        mark_replica(data, address)
    sys.exit(9)


@pytest.mark.parametrize("step", ["mark_replica", "verify_address"])
def test_migrate_that_was_killed_is_completed(
    database: Database, data: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    printed("migrate", "--ledger", database.owner_url, "--server-role", "ledger_server")
    with monkeypatch.context() as patch:
        patch.setattr(databases, step, mark_and_end)
        with pytest.raises(SystemExit):
            databases.migrate_database(database.owner_url, "ledger_server", data)
    assert count_rows(database) == (0 if step == "mark_replica" else HEAD)
    with pytest.raises(IsReplica, match="is a replica of the ledger in postgresql://ledger_server"):
        refuse_replica(data)
    again = ("migrate", "--ledger", database.owner_url, "--server-role", "ledger_server", "--data", data)
    assert f"copied and verified: {HEAD} events, head {head_of(data)}" in printed(*again)
    assert count_rows(database) == HEAD


# a ledger that was migrated


def test_migrated_ledger_is_served_and_verified(migrated: Database, data: Path) -> None:
    async def serve() -> None:
        async with local_server(data.parent, ledger=migrated.server_url) as api:
            assert (await api.get("/api/v1/events/head")).json["position"] > HEAD

    before = head_of(data)
    asyncio.run(serve())
    rows = asyncio.run(rows_in(migrated))
    assert rows == rows_of(data / LEDGER)
    assert len(rows) > HEAD
    for where in (("--ledger", migrated.server_url), ("--data", data)):
        assert f"head: {rows[-1][0]}:{rows[-1][2].hex()}" in printed("verify", *where)
        assert printed("verify", *where, "--expect", before)


def dump_into(source: Database, target: Database) -> None:
    """Back up a database and restore it as another one, with PostgreSQL's programs."""
    folder = require_programs()
    dump = [str(folder / "pg_dump"), "--schema=loadledger", source.owner_url]
    restore = [str(folder / "psql"), "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", target.owner_url]
    script = subprocess.run(dump, check=True, capture_output=True).stdout
    subprocess.run(restore, check=True, capture_output=True, input=script)


def test_restore_to_an_earlier_point_is_noticed(ledger: Database, database: Database, tmp_path: Path) -> None:
    async def back_up_while_served() -> None:
        async with local_server(tmp_path, ledger=ledger.server_url, lease_s=1.0):
            await asyncio.to_thread(dump_into, ledger, database)

    async def begin() -> None:
        log = replica_log(database.server_url, data)
        try:
            await log.open()
        finally:
            await log.close()

    async def accept() -> None:
        config = Config(repository=repository, data=data, ledger=database.server_url, lease_s=1.0)
        async with TestClient(TestServer(create_app(config, accepts_rollback=True))):
            pass

    data, repository = tmp_path / "data", tmp_path / "repository"
    asyncio.run(back_up_while_served())
    position, _, digest = rows_of(data / LEDGER)[-1]
    verify = ("verify", "--ledger", database.server_url, "--expect", f"{position}:{digest.hex()}")
    assert "the log ends at" in printed(*verify, code=1)
    serve = ("serve", "--data", data, "--repository", repository, "--ledger", database.server_url)
    with pytest.raises(LedgerForked, match=f"does not have the event at position {position}"):
        asyncio.run(begin())
    (data / LEDGER).rename(tmp_path / "lost.db")
    assert "start once with --accept-rollback" in run_command(*serve).stderr
    asyncio.run(accept())
    assert any('"type":"RollbackAccepted"' in body for _, body, _ in asyncio.run(rows_in(database)))


def test_replica_is_written_by_its_servers_only(migrated: Database, data: Path) -> None:
    rows = rows_of(data / LEDGER)
    for arguments in (
        ("serve", "--data", data, "--repository", data.parent / "repository"),
        ("migrate", "--ledger", migrated.owner_url, "--data", data),
    ):
        (data.parent / "repository").mkdir(exist_ok=True)
        assert "is a replica of the ledger in postgresql://" in refused(*arguments), arguments
    assert rows_of(data / LEDGER) == rows == asyncio.run(rows_in(migrated))


# verify


@pytest.mark.parametrize(
    ("statement", "position", "words"),
    [
        ("UPDATE events SET body = replace(body, 'alice', 'mallory') WHERE position = 2", 2, "hash"),
        (f"DELETE FROM events WHERE position = {HEAD}", HEAD - 1, "the stored head is"),
    ],
)
def test_verify_names_position_of_forged_event(
    migrated: Database, statement: str, position: int, words: str
) -> None:
    asyncio.run(change(migrated, statement))
    first = printed("verify", "--ledger", migrated.owner_url, code=1).splitlines()[0]
    assert first.startswith(f"NOT verified: position {position}: ")
    assert words in first
    found = printed_json("verify", "--ledger", migrated.owner_url, code=1)
    assert (found["verified"], found["finding"]["position"]) == (False, position)


def test_verify_expects_a_head_and_refuses_other_options(migrated: Database, data: Path) -> None:
    verify = ("verify", "--ledger", migrated.server_url)
    assert printed(*verify, "--expect", head_of(data))
    assert "the log ends at" in printed(*verify, "--expect", f"{HEAD + 1}:{'0' * 64}", code=1)
    assert "was expected" in printed(*verify, "--expect", f"4:{'0' * 64}", code=1)
    for arguments, words in (
        (("--data", data), "nothing else to verify"),
        (("--store",), "nothing else to verify"),
        ((data / LEDGER,), "nothing else to verify"),
        (("--key", "0" * 32), "--key is for signed files"),
    ):
        assert words in refused(*verify, *arguments), arguments


# databases that cannot be used


@pytest.fixture
async def unusable(database: Database, ledger: Database, kind: str) -> AsyncIterator[tuple[str, str]]:
    """The address of a database, and what a command says about it."""
    match kind:
        case "unreachable":
            host, port = database.server.address
            yield f"postgresql://ledger_owner@{host}:{port + 1}/x", "cannot be reached"
        case "no such database":
            yield database.server.url("nowhere", "ledger_owner"), "does not exist"
        case "empty":
            yield database.owner_url, "has no ledger"
        case "another program's":
            async with database.server.connection(database.name) as superuser:
                await superuser.execute(f"{OTHER_PROGRAM}; ALTER SCHEMA loadledger OWNER TO ledger_owner")
            yield database.owner_url, "is no ledger; nothing in it was touched"
        case "a later release's":
            await change(ledger, "INSERT INTO applied_migrations VALUES (99, now())")
            yield ledger.owner_url, "the database has schema 99"
        case "another role's":
            yield ledger.server_url, "does not own the ledger"
        case "wrong password":
            async with postgres_server(auth="scram-sha-256") as server, server.database(make_ledger) as made:
                yield made.owner_url.replace(quote(PASSWORD, safe=""), "wrong"), "password authentication"


KINDS = ("unreachable", "no such database", "another program's", "a later release's", "wrong password")


@pytest.mark.parametrize("kind", [*KINDS, "empty", "another role's"])
def test_commands_refuse_unusable_database(
    kind: str, unusable: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    address, words = unusable
    assert words in refused("discard", "--ledger", address, tmp_path / "discarded.jsonl")
    if kind != "another role's":
        assert words in refused("verify", "--ledger", address)
    if kind in KINDS:
        assert words in refused("migrate", "--ledger", address, "--data", data)
    assert not (data / REPLICA).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_migrate_by_another_role_is_refused(ledger: Database, database: Database, data: Path) -> None:
    assert "permission denied" in refused("migrate", "--ledger", database.server_url)
    assert "permission denied" in refused("migrate", "--ledger", ledger.server_url, "--data", data)
    assert not (data / REPLICA).exists()
