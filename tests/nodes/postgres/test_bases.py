"""Archived events of a ledger in PostgreSQL: the base in the database, and replicas that begin there."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from support.crashes import run_traced
from support.fleet import of_both
from support.history import START, History, facts, opened, write
from support.ledgers import (
    SIGN,
    append_events,
    archive_before,
    archived_copy,
    copy_of,
    rows_of,
    run_forked,
    sound_ledger,
    stored,
)
from support.postgres import Database
from support.replicas import change, copy_ledger, opened_replica, owned, read_base, replica_log, rows_in

from events.audit.archive import move_events
from events.audit.audit import audit, fold_archives
from events.audit.exportreader import prove_archives
from events.audit.verify import verify
from events.errors import LedgerDamaged, LedgerProblem, LogUnavailable
from events.sqlite.bases import entities_of, read_stored_base, state_at_base
from events.sqlite.datalock import LEDGER
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import connect
from events.storage import StoredBase, digest_state
from events.tokens import is_refused
from events.types import Anchor, TokenIssued, TokenRevoked
from nodes.postgres.bases import move_base, write_stored_base
from nodes.postgres.leases import LeaseStore
from nodes.postgres.transfer import open_database

ROUNDS = 3
LEDGER_FILE = sound_ledger(ROUNDS)
BASE = 19
PROJECTIONS = ("models", "jobs", "tokens", "nodes")


def base_in(path: Path) -> StoredBase:
    with open_read_only(path) as connection:
        return read_stored_base(connection)


@pytest.fixture
async def archived(ledger: Database) -> AsyncIterator[tuple[Database, Path]]:
    """A database with a ledger whose first events are archived, and the file that it came from."""
    with archived_copy(LEDGER_FILE, 8, BASE + 1) as (path, _):
        await copy_ledger(ledger, path)
        yield ledger, path


def test_stored_base_is_what_archiving_wrote() -> None:
    with archived_copy(LEDGER_FILE, 8, BASE + 1) as (path, _), closing(connect(path)) as connection:
        found = read_stored_base(connection)
        assert (found.base.position, [each.last_position for each in found.archives]) == (BASE, [7, BASE])
    assert found.is_unchanged
    assert sorted(entities_of(state_at_base(found))) == sorted(found.entities)
    first, *others = found.entities
    for changed in ((), tuple(others), (first._replace(body="{}"), *others), (first._replace(kind="x"),)):
        assert not replace(found, entities=changed).is_unchanged
    assert replace(found, entities=tuple(reversed(found.entities))).is_unchanged  # whatever their order here


async def test_empty_replica_begins_at_the_base(archived: tuple[Database, Path], tmp_path: Path) -> None:
    database, path = archived
    async with opened_replica(database.server_url, tmp_path / "a") as log:
        assert (log.head.position, log.head.hash) == rows_of(path)[-1][::2]
        assert (await write(log, 1))[0].position == log.head.position
    replica = tmp_path / "a" / LEDGER
    assert rows_of(replica) == await rows_in(database)
    assert (base_in(replica), audit(replica).finding) == (base_in(path), None)
    assert stored(replica, *PROJECTIONS) == stored(path, *PROJECTIONS)


async def test_nodes_and_tokens_of_archived_events_stay(ledger: Database, tmp_path: Path) -> None:
    path, history = tmp_path / LEDGER, History()
    history.join("a")
    history.join("b")
    history.leave("b")
    token = TokenIssued("t", "alice", ("admin",), "2030-01-01T00:00:00.000000Z")
    history.add(token, of=None, version=None, by="alice")
    history.add(TokenRevoked("r", "2030-01-01T00:00:00.000000Z"), of=None, version=None, by="alice")
    history.load("L")
    async with opened(path) as log:
        await append_events(log, history.facts)
        await log.server_stopped()
    archive_before(path, 6)
    await copy_ledger(ledger, path)
    async with opened_replica(ledger.server_url, tmp_path / "a") as later:
        assert later.state.registers.nodes.keys() == {"a", "b"}
        tokens = later.state.registers.tokens
        assert [is_refused(tokens, each) for each in ("t", "r")] == [False, True]
        assert tokens.keys() == {"t", "r"}
    leases = LeaseStore(ledger.server_url)
    assert [(lease.node_id, lease.epoch, lease.ended) for lease in await leases.read(10)] == [("a", 1, False)]
    await leases.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE base_state SET body = replace(body, 'alice', 'mallory')",
        "DELETE FROM base_state WHERE kind = 'job'",
        "UPDATE base SET state_sha256 = sha256(state_sha256)",
    ],
)
async def test_replica_refuses_changed_state_at_the_base(
    archived: tuple[Database, Path], tmp_path: Path, statement: str
) -> None:
    await change(archived[0], statement)
    log = replica_log(archived[0].server_url, tmp_path / "a")
    with pytest.raises(LedgerDamaged, match=f"position {BASE}"):
        await log.open()
    await log.close()
    assert base_in(tmp_path / "a" / LEDGER).base.position == 0


def archive_in(database: Database, folder: Path, before: int) -> StoredBase:
    with open_database(database.owner_url) as owned_ledger:
        file = folder / f"{before}.gz"
        move_events(owned_ledger, str(before), file, SIGN, START + timedelta(days=30))
        return owned_ledger.stored_base()


async def test_servers_go_on_while_events_are_archived(ledger: Database, tmp_path: Path) -> None:
    async with (
        opened_replica(ledger.server_url, tmp_path / "a") as log,
        owned(ledger) as connection,
    ):
        await write(log, 20)
        await log.server_started()
        end = Anchor(10, rows_of(log.path)[9][2])
        async with connection.transaction():
            await write_stored_base(connection, StoredBase(end, digest_state(())))
            await connection.execute("DELETE FROM events WHERE position <= 10")
            await write(log, 1, first=21)
    assert [position for position, _, _ in await rows_in(ledger)] == list(range(11, 23))


async def test_replica_keeps_events_that_were_archived(ledger: Database, tmp_path: Path) -> None:
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        await asyncio.gather(*map(log.submit, facts(20)))
        await log.server_started()
        moved = await asyncio.to_thread(archive_in, ledger, tmp_path, 11)
        await write(log, 1, first=21)
    async with opened_replica(ledger.server_url, tmp_path / "b") as later:
        assert later.head.position == 22
    old, new = tmp_path / "a" / LEDGER, tmp_path / "b" / LEDGER
    assert [len(rows_of(path)) for path in (old, new)] == [22, 12]
    assert (base_in(new), await read_base(ledger)) == (moved, moved)
    assert verify(old).hash == verify(new).hash
    assert stored(old, *PROJECTIONS) == stored(new, *PROJECTIONS)


async def test_replica_behind_the_base_is_refused(ledger: Database, tmp_path: Path) -> None:
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        await write(log, 5)
    async with opened_replica(ledger.server_url, tmp_path / "b") as log:
        await write(log, 10, first=6)
        await log.server_started()
    await asyncio.to_thread(archive_in, ledger, tmp_path, 11)
    behind = replica_log(ledger.server_url, tmp_path / "a")
    with pytest.raises(LogUnavailable, match=r"after position 5 were archived, up to 10.*ledger\.db away"):
        await behind.open()
    await behind.close()
    (tmp_path / "a" / LEDGER).unlink()
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        assert log.head.position == 16


TRACED = ("/audit/archive.py", "/postgres/bases.py", "/postgres/transfer.py", "/events/files.py")
"""The modules of an archive in a database."""


async def wait_until_alone(database: Database) -> None:
    """Wait until PostgreSQL has noticed that a killed process is gone."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with owned(database) as connection:
        while await connection.fetchval(f"SELECT count(*) {others}"):
            await connection.execute("SELECT pg_sleep(0.005)")


@pytest.mark.parametrize("modules", [TRACED, ("/asyncpg/transaction.py",)], ids=["archive", "transaction"])
async def test_archive_killed_at_any_step_leaves_the_log_whole(
    ledger: Database, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    with copy_of(LEDGER_FILE) as path:
        await copy_ledger(ledger, path)
    rows, runs, moved = await rows_in(ledger), of_both(short=10, long=40), 0
    counted = partial(run_traced, lambda: archive_in(ledger, tmp_path, 2), modules)
    assert run_forked(lambda: (tmp_path / "lines").write_text(str(counted()))) == 0
    lines = int((tmp_path / "lines").read_text())
    for run in range(runs):
        before = run + 3
        work = partial(archive_in, ledger, tmp_path, before)
        assert run_forked(partial(run_traced, work, modules, lines * (run + 1) // runs)) == -signal.SIGKILL
        await wait_until_alone(ledger)
        found = await read_base(ledger)
        assert found.base.position in {before - 2, before - 1}
        assert await rows_in(ledger) == rows[found.base.position :]
        moved += found.base.position == before - 1
        if found.base.position == before - 2:
            assert run_forked(work) == 0
            found = await read_base(ledger)
        assert found.base == Anchor(before - 1, rows[before - 2][2])
        paths = [tmp_path / each.file for each in found.archives]
        folded = fold_archives(prove_archives(paths, found.base, found.archives)).state()
        assert tuple(sorted(entities_of(folded))) == found.entities
        assert found.is_unchanged
    assert moved or modules == TRACED  # later archives have more lines than the first


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE base SET position = 1", "archived meanwhile"),
        ("UPDATE events SET hash = sha256(hash) WHERE position = 19", "does not have the archived event"),
        ("DELETE FROM events WHERE position = 12", "DELETE 18"),
    ],
)
async def test_base_of_another_history_is_not_moved(ledger: Database, statement: str, words: str) -> None:
    with copy_of(LEDGER_FILE) as path:
        await copy_ledger(ledger, path)
        before = base_in(path)
        archive_before(path, BASE + 1)
        await change(ledger, statement)
        rows, base = await rows_in(ledger), await read_base(ledger)
        async with owned(ledger) as connection:
            with pytest.raises(LedgerProblem, match=words):
                await move_base(connection, before.base, base_in(path))
        assert (await rows_in(ledger), await read_base(ledger)) == (rows, base)


async def test_only_the_owner_lifts_the_triggers(archived: tuple[Database, Path]) -> None:
    settings = {"search_path": "loadledger", "loadledger.archiving": "on"}
    connection = await asyncpg.connect(archived[0].server_url, server_settings=settings)
    for statement in ("DELETE FROM events", "UPDATE base SET position = 0", "TRUNCATE events"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()
