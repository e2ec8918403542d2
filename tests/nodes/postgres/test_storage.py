"""Several servers over one ledger in PostgreSQL: one order, no lost fact, and no history but one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import asyncpg
import pytest
from support.cutting import cutting_proxy
from support.history import MODEL, History, facts, ids, write
from support.ledgers import append_events, rows_of
from support.postgres import Database, postgres_server
from support.replicas import (
    change,
    make_ledger,
    opened_replica,
    replica_log,
    rows_in,
    storage_of,
)
from support.workers import until

from events.audit.verify import verify
from events.clock import format_timestamp, seconds_between, utc_now
from events.commands import Receipt
from events.errors import (
    EpochOver,
    ForeignHead,
    LedgerForked,
    LedgerProblem,
    LogUnavailable,
    OutcomeUnknown,
    RequestRefused,
)
from events.jobcommands import RequestCancel, RequestLoad, RequestUnload
from events.log import Log
from events.sqlite.datalock import REPLICA, refuse_replica
from events.sqlite.listing import open_reader
from events.sqlite.timetravel import BeyondHead
from events.storage import LogHead, Row, StorageError
from events.tail import Tails
from events.types import Event, Idempotency
from nodes.postgres.storage import CHANNEL, Authority

LIMIT_S = 60
"""Only against hanging."""


def load(key: str, actor: str = "alice") -> RequestLoad:
    return RequestLoad(MODEL, 1, None, actor, idempotency=Idempotency(key * 64, "ab" * 32))


Pair = tuple[Log, Log]


@pytest.fixture
async def pair(ledger: Database, tmp_path: Path) -> AsyncIterator[Pair]:
    """The logs of two servers."""
    async with (
        opened_replica(ledger.server_url, tmp_path / "a", new_id=ids("a")) as one,
        opened_replica(ledger.server_url, tmp_path / "b", new_id=ids("b")) as other,
    ):
        yield one, other


@pytest.fixture
async def log(ledger: Database, tmp_path: Path) -> AsyncIterator[Log]:
    """The log of one server."""
    async with opened_replica(ledger.server_url, tmp_path / "a") as opened:
        yield opened


async def heads_agree(*logs: Log) -> None:
    await until(lambda: len({log.head for log in logs}) == 1)


async def test_servers_append_in_one_order(pair: Pair, ledger: Database, tmp_path: Path) -> None:
    one, other = pair
    firsts = (one, 1), (other, 10_000)
    commands = [log.submit(fact) for log, first in firsts for fact in facts(200, first=first)]
    singles = [write(log, 40, first=first + 1_000) for log, first in firsts]
    await asyncio.gather(*commands, *singles)
    await heads_agree(one, other)
    assert one.head.position == 480
    rows = await rows_in(ledger)
    assert rows == rows_of(tmp_path / "a" / "ledger.db") == rows_of(tmp_path / "b" / "ledger.db")
    assert verify(tmp_path / "a" / "ledger.db").verified


async def test_same_request_at_two_servers_is_one_job(pair: Pair) -> None:
    one, other = pair
    first, second = await asyncio.gather(one.submit(load("1")), other.submit(load("1")))
    assert first.job_id == second.job_id
    assert {first.existing, second.existing} == {False, True}
    joined = await other.submit(load("2", "bob"))
    assert (joined.job_id, joined.existing) == (first.job_id, True)


async def test_idle_server_hears_what_another_appends(pair: Pair) -> None:
    one, other = pair
    await one.submit(load("1"))
    assert await other.wait_until(lambda: MODEL in other.state.queues, LIMIT_S)
    assert other.state.queues.keys() == {MODEL}


async def test_server_hears_of_events_while_it_catches_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    storage, late = storage_of(other), facts(1, first=2)
    other._poll_s = None
    read_after = storage.read_after

    async def read_then_hear(head: LogHead) -> Sequence[Row]:
        rows = await read_after(head)
        if not rows and (fact := next(late, None)) is not None:
            await one.submit(fact)
            await until(lambda: storage.has_news)
        return rows

    monkeypatch.setattr(storage, "read_after", read_then_hear)
    await write(one, 1)
    async with asyncio.timeout(LIMIT_S):
        await until(lambda: other.head.position == 2)


async def test_later_server_begins_with_all_events(ledger: Database, tmp_path: Path) -> None:
    async with opened_replica(ledger.server_url, tmp_path / "a") as one:
        await asyncio.gather(*map(one.submit, facts(2_500)))
        await one.submit(load("1"))
        async with opened_replica(ledger.server_url, tmp_path / "b") as other:
            assert (other.head, other.state.jobs) == (one.head, one.state.jobs)
            assert not other.tally.events


async def test_busy_server_does_not_starve_another(pair: Pair) -> None:
    async def keep_busy(log: Log) -> None:
        for first in count(1_000, 20):
            await asyncio.gather(*map(log.submit, facts(20, first=first)))

    one, other = pair
    busy = asyncio.create_task(keep_busy(one))
    async with asyncio.timeout(LIMIT_S):
        await write(other, 50)
    assert not busy.done()
    busy.cancel()
    await asyncio.wait([busy])
    await heads_agree(one, other)


async def test_killed_database_loses_nothing_acknowledged(tmp_path: Path) -> None:
    async with postgres_server() as server, server.database(make_ledger) as database:
        async with opened_replica(database.server_url, tmp_path / "a") as log:
            acknowledged: list[Receipt] = []
            for round_ in range(2):
                acknowledged += await write(log, 20, first=1 + 100 * round_)
                await server.kill()
                refused = await asyncio.gather(
                    *map(log.submit, facts(5, first=50 + 100 * round_)), return_exceptions=True
                )
                assert {type(each) for each in refused} == {LogUnavailable}
                assert not log.healthy
                await server.start()
                await until(lambda: log.healthy)
            assert [receipt.position for receipt in acknowledged] == list(range(1, 41))
        assert await rows_in(database) == rows_of(tmp_path / "a" / "ledger.db")


async def test_promoted_standby_has_all_acknowledged_events(tmp_path: Path) -> None:
    async with postgres_server() as server, server.database(make_ledger) as database:
        standby = await server.standby()
        address = database.url("ledger_server", server.address, standby.address)
        async with opened_replica(f"{address}?target_session_attrs=primary", tmp_path / "a") as log:
            await write(log, 50)
            await server.kill()
            await standby.promote()
            await until(lambda: log.healthy)
            assert (await write(log, 1, first=51))[0].position == 51
        assert verify(tmp_path / "a" / "ledger.db").position == 51


CANCEL_WAIT = """
SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%append%'
"""


async def test_append_that_no_standby_has_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with postgres_server() as server, server.database(make_ledger) as database:
        standby = await server.standby()
        async with opened_replica(database.server_url, tmp_path / "a") as log:
            await write(log, 1)
            monkeypatch.setattr("nodes.postgres.connection.COMMAND_S", 0.5)
            await standby.kill()
            with pytest.raises(OutcomeUnknown):
                await log.submit(load("1"))
            assert await rows_in(database) == rows_of(tmp_path / "a" / "ledger.db")
            assert log.head.position == 1
            await standby.start()
            await until(lambda: log.healthy)
            assert (await log.submit(load("1"))) == Receipt(ANY, existing=True, position=2)

            monkeypatch.setattr("nodes.postgres.connection.COMMAND_S", 2.0)
            await standby.kill()
            waiting = asyncio.create_task(write(log, 1, first=2))
            async with server.connection() as superuser:
                while not await superuser.fetchval(CANCEL_WAIT):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.01)
            with pytest.raises(OutcomeUnknown, match="it is unknown whether"):
                await waiting
            await server.kill()
            await standby.start()
            await standby.promote()
            left = await rows_in(Database(standby, database.name))
            assert left == rows_of(tmp_path / "a" / "ledger.db")[:2]


async def test_head_never_goes_back_after_an_uncertain_commit(ledger: Database, tmp_path: Path) -> None:
    async with (
        cutting_proxy(ledger.server.address) as proxy,
        opened_replica(ledger.url("ledger_server", proxy.address), tmp_path / "a") as one,
        opened_replica(ledger.server_url, tmp_path / "b") as other,
    ):
        await write(one, 1)
        await heads_agree(one, other)
        proxy.swallow("answers")
        uncertain = asyncio.create_task(one.submit(next(facts(1, first=2))))
        await until(lambda: other.head.position == 2)
        await write(other, 1, first=3)
        await proxy.reset()
        proxy.heal()
        assert (await uncertain).position == 2
        assert (one.head.position, one.state.position) == (3, 3)
        await write(one, 1, first=4)
        await heads_agree(one, other)
    assert verify(tmp_path / "a" / "ledger.db").position == 4


async def test_uncertain_commit_of_the_replica_ends_no_writer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    storage = storage_of(other)
    store = storage.store

    async def store_and_fail(*args: Any) -> None:
        monkeypatch.undo()
        await store(*args)
        raise StorageError("the disk did not answer a commit")

    monkeypatch.setattr(storage, "store", store_and_fail)
    await write(one, 1)
    await heads_agree(one, other)
    assert (await write(other, 1, first=2))[0].position == 2


LAST = "position = (SELECT max(position) FROM events)"
TIP = f"UPDATE head SET (position, hash) = (SELECT position, hash FROM events WHERE {LAST})"
CHANGES = {
    "changed last event": "UPDATE events SET hash = sha256(hash) WHERE position = 3",
    "lost last event": "DELETE FROM events WHERE position = 3",
}


@pytest.mark.parametrize("changed", CHANGES)
async def test_server_stops_at_a_database_with_another_history(
    ledger: Database, tmp_path: Path, changed: str
) -> None:
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        await write(log, 3)
    await change(ledger, CHANGES[changed], TIP)
    (tmp_path / "a" / REPLICA).unlink()
    later = replica_log(ledger.server_url, tmp_path / "a")
    with pytest.raises(LedgerForked, match="does not have the event at position 3"):
        await later.open()
    await later.close()
    refuse_replica(tmp_path / "a")  # it may be a ledger of its own, given the wrong database


async def test_running_writer_ends_when_the_history_changes(log: Log, ledger: Database) -> None:
    await write(log, 3)
    await change(
        ledger,
        "DELETE FROM events",
        "UPDATE head SET position = 0, hash = decode(repeat('00', 32), 'hex')",
    )
    with pytest.raises(LedgerProblem):
        await log.submit(load("1"))
    with pytest.raises(ForeignHead):
        await log.writer


async def test_facts_of_an_ended_epoch_are_refused(log: Log, ledger: Database) -> None:
    await write(log, 1)
    await change(ledger, "INSERT INTO nodes VALUES ('a', 3, false, 10, now(), now())")
    storage_of(log).authority = Authority("a", 3, 10.0)
    await write(log, 1, first=2)
    await change(ledger, "UPDATE nodes SET ended = true")
    with pytest.raises(EpochOver) as refused:
        await write(log, 1, first=3)
    assert (refused.value.code, log.head.position) == ("log_unavailable", 2)
    storage_of(log).authority = Authority()
    assert (await write(log, 1, first=4))[0].position == 3


async def test_later_schema_refuses_only_what_is_written(log: Log, ledger: Database) -> None:
    await write(log, 1)
    await change(ledger, "INSERT INTO applied_migrations VALUES (99, now())")
    await storage_of(log)._connected.close()
    with pytest.raises(LogUnavailable, match="use the release that wrote it"):
        await log.submit(load("1"))
    await change(ledger, "DELETE FROM applied_migrations WHERE number = 99")
    assert (await log.submit(load("1"))).position == 2


async def be_deaf(log: Log) -> None:
    """Let a server hear nothing of what others append, and not look by itself."""
    storage = storage_of(log)
    await log.catch_up()  # then the writer leaves its connection alone for a while
    await storage._connected.remove_listener(CHANNEL, storage._heard)
    storage._is_notified, storage._read_s = False, float("inf")


async def test_look_brings_what_others_have_appended(pair: Pair) -> None:
    one, other = pair
    await write(one, 1)
    await heads_agree(one, other)
    await be_deaf(other)
    await write(one, 3, first=2)
    await asyncio.gather(other.catch_up(), other.catch_up())
    assert other.head == one.head


def loaded() -> list[Event]:
    history = History()
    history.load("L")
    return history.facts


async def test_refusal_rests_on_what_others_have_appended(pair: Pair) -> None:
    one, other = pair
    await write(one, 1)
    await heads_agree(one, other)
    await be_deaf(other)
    await append_events(one, loaded())
    receipt, refused = await asyncio.gather(
        other.submit(RequestUnload(MODEL, "alice")),
        other.submit(RequestUnload("unknown", "alice")),
        return_exceptions=True,
    )
    assert isinstance(receipt, Receipt)
    assert isinstance(refused, RequestRefused)
    assert other.head.position == 1 + len(loaded()) + 1


async def test_existing_job_rests_on_what_others_have_appended(pair: Pair) -> None:
    one, other = pair
    request = RequestLoad(MODEL, 1, None, "alice")
    first = await one.submit(request)
    await heads_agree(one, other)
    assert (await other.submit(request)).job_id == first.job_id
    await be_deaf(other)
    assert first.job_id is not None
    await one.submit(RequestCancel(first.job_id, "bob"))
    again = await other.submit(request)
    assert (again.existing, again.job_id == first.job_id) == (False, False)


async def test_position_read_at_another_server_is_reached(ledger: Database, tmp_path: Path) -> None:
    async with (
        cutting_proxy(ledger.server.address) as proxy,
        opened_replica(ledger.server_url, tmp_path / "a") as one,
        opened_replica(ledger.url("ledger_server", proxy.address), tmp_path / "b") as other,
        open_reader(tmp_path / "b" / "ledger.db") as reader,
    ):
        tails = Tails(other, reader, [reader])
        await write(one, 1)
        await heads_agree(one, other)
        await be_deaf(other)
        await write(one, 2, first=2)
        await tails.reaches(3)
        assert other.head.position == 3
        with pytest.raises(BeyondHead):
            await tails.reaches(4)
        await write(one, 1, first=4)
        await proxy.cut()
        with pytest.raises(LogUnavailable, match="ask another node"):
            await tails.reaches(4)


async def test_clock_that_is_ahead_is_measured_before_an_append(log: Log) -> None:
    await write(log, 1)
    storage_of(log)._clock.offset += timedelta(seconds=50)  # as if this machine's clock was set since
    with pytest.raises(LogUnavailable):
        await write(log, 1, first=2)
    assert (await write(log, 1, first=3))[0].position == 2
    assert seconds_between(log.head.recorded_at, format_timestamp(utc_now())) > -1


async def test_server_role_can_read_and_append_only(ledger: Database, tmp_path: Path) -> None:
    async with opened_replica(ledger.server_url, tmp_path / "a") as log:
        await write(log, 1)
    connection = await asyncpg.connect(ledger.server_url, server_settings={"search_path": "loadledger"})
    for table in ("events", "head", "nodes", "applied_migrations"):
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}", f"INSERT INTO {table} DEFAULT VALUES"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    for statement in ("UPDATE events SET body = ''", "UPDATE head SET position = 0", "DROP TABLE events"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    for bodies, hashes in ((["{}"], [bytes(32)]), ([], []), (["x"], [bytes(32)])):
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute(
                "SELECT append(position, hash, $1, $2, NULL, NULL, NULL) FROM head", bodies, hashes
            )
    await connection.close()
    owner = await asyncpg.connect(ledger.owner_url, server_settings={"search_path": "loadledger"})
    for statement in (
        "DELETE FROM events",
        "UPDATE events SET body = ''",
        "TRUNCATE events",
    ):
        with pytest.raises(asyncpg.RaiseError, match="never changed"):
            await owner.execute(statement)
    await owner.close()
    assert len(await rows_in(ledger)) == 1


async def test_server_refuses_the_owners_role(ledger: Database, database: Database, tmp_path: Path) -> None:
    for address, code in ((ledger.owner_url, "unsafe_role"), (database.server_url, "schema_missing")):
        log = replica_log(address, tmp_path / "a")
        with pytest.raises(LedgerProblem) as refused:
            await log.open()
        await log.close()
        assert refused.value.code == code
