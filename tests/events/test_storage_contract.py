"""What every storage gives the writer: the same tests over SQLite and over PostgreSQL with its replica."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from support.history import MODEL, START, at, facts, ids, opened, steady, write
from support.ledgers import append_events, change_ledger, rows_of, sample_history, stored
from support.postgres import join_shared_server
from support.replicas import make_ledger, opened_replica, rows_in

from events.audit.verify import verify
from events.codec import GENESIS, decode_event, hash_body
from events.commands import JobUnchanged, Receipt, Record
from events.errors import LogUnavailable, NotEncodable, RequestRefused
from events.jobcommands import RequestLoad, RequestUnload
from events.log import Log
from events.types import SYSTEM, AccessDenied, Draft, Idempotency, LoadFailed, LoadStarted

Open = Callable[..., AbstractAsyncContextManager[Log]]


@pytest.fixture(params=["sqlite", "postgresql"])
async def open_log(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Open]:
    """Open the log of one ledger, again and again; its file is `path`."""
    if request.param == "sqlite":
        yield lambda **options: opened(path, **options)
        return
    postgres = await join_shared_server()
    async with postgres.database(make_ledger) as database:
        yield lambda **options: opened_replica(database.server_url, path.parent, **options)
        assert await rows_in(database) == rows_of(path)


def load(key: str | None = None, *, actor: str = "alice") -> RequestLoad:
    given = None if key is None else Idempotency(key * 64, "ab" * 32)
    return RequestLoad(MODEL, 1, None, actor, idempotency=given)


def assert_chain(rows: list[tuple[int, str, bytes]]) -> None:
    digest = GENESIS
    for number, (position, body, found) in enumerate(rows, 1):
        digest = hash_body(digest, body)
        assert (position, found, decode_event(body).position) == (number, digest, number)


async def test_positions_have_no_gap_and_hashes_link(open_log: Open, path: Path) -> None:
    async with open_log() as log:
        receipts = await asyncio.gather(*map(log.submit, facts(300)))
        assert [receipt.position for receipt in receipts] == list(range(1, 301))
        await write(log, 3, first=301)
        assert log.head.position == 303
    assert_chain(rows_of(path))
    assert len(rows_of(path)) == 303
    assert verify(path).verified


async def test_known_id_is_refused(open_log: Open, path: Path) -> None:
    async with open_log() as log:
        await write(log, 1)
        with pytest.raises(LogUnavailable):
            await write(log, 1)
        await write(log, 1, first=2)
    assert [decode_event(body).id for _, body, _ in rows_of(path)] == ["f1", "f2"]


async def test_command_that_cannot_be_encoded_fails_alone(open_log: Open, path: Path) -> None:
    broken = Record((Draft("f", LoadFailed("x", "\ud800"), SYSTEM, "job", MODEL, 1),))
    odd = Record((Draft("denied", AccessDenied("a\x00\\u0000b", 1), "mallory"),))
    async with open_log() as log:
        results = await asyncio.gather(
            *map(log.submit, [*facts(1), broken, odd, *facts(1, first=2)]), return_exceptions=True
        )
    assert [type(each) for each in results] == [Receipt, NotEncodable, Receipt, Receipt]
    assert [decode_event(body).id for _, body, _ in rows_of(path)] == ["f1", "denied", "f2"]
    assert decode_event(rows_of(path)[1][1]).data == AccessDenied("a\x00\\u0000b", 1)
    assert verify(path).verified


async def test_state_and_projections_survive_a_new_start(open_log: Open, path: Path) -> None:
    options = steady(lambda: START)
    async with open_log(**options) as log:
        await append_events(log, sample_history(3))
        state, head = log.state, log.head
    before = stored(path, "models", "jobs")
    async with open_log(**options) as log:
        assert (log.head, log.state.models, log.state.jobs) == (head, state.models, state.jobs)
        assert stored(path, "models", "jobs") == before


async def test_repeated_key_gets_its_job_after_a_start(open_log: Open) -> None:
    async with open_log(new_id=ids("a")) as log:
        first = await log.submit(load("1"))
    async with open_log(new_id=ids("b")) as log:
        assert await log.submit(load("1")) == Receipt(first.job_id, existing=True, position=1)
        joined = await log.submit(load(actor="bob"))
        assert (joined.job_id, joined.existing) == (first.job_id, True)
        assert (await log.submit(load(actor="bob"))).position == joined.position  # it joined before


async def test_outdated_and_refused_commands_append_nothing(open_log: Open) -> None:
    async with open_log() as log:
        with pytest.raises(RequestRefused, match="loaded") as refused:
            await log.submit(RequestUnload(None, "alice"))
        assert refused.value.code == "nothing_loaded"
        job = (await log.submit(load())).job_id
        assert job is not None
        with pytest.raises(RequestRefused) as outdated:
            await log.submit(Record((Draft("e", LoadStarted(1), SYSTEM, job),), (JobUnchanged(job, 7),)))
        assert (outdated.value.code, log.head.position) == ("outdated", 1)


async def test_notes_last_and_are_no_events(open_log: Open, path: Path) -> None:
    async with open_log() as log:
        with log.subscribed() as wakeup:
            await log.note_last_use({MODEL: at(8)})
            assert (log.head.position, wakeup.is_set()) == (0, False)
        await asyncio.gather(log.note_last_use({MODEL: at(9)}), write(log, 3))
        assert log.head.position == 3
    async with open_log() as log:
        assert log.last_used == {MODEL: at(9)}
    change_ledger(path, "UPDATE last_used SET used_at = 'forged'")
    assert verify(path).verified  # it proves nothing and is no part of the proof
