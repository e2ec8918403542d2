"""When models were last used: noted beside the log, by its writer, and it fails alone."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, at, facts, opened, write

from events.errors import LogClosed, LogUnavailable, NotEncodable
from events.log import Log, Receipt
from events.verify import verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


async def noted(path: Path) -> dict[str, str]:
    async with opened(path) as log:
        return dict(log.last_used)


async def test_a_new_ledger_knows_of_no_use(path: Path) -> None:
    assert await noted(path) == {}


async def test_what_was_noted_is_known_at_the_next_start(path: Path) -> None:
    async with opened(path) as log:
        await log.note_last_used({"a": at(1), "b": at(2)})
        await log.note_last_used({"b": at(3), "é\U0001f600": at(4)})
        await log.note_last_used({})
    assert await noted(path) == {"a": at(1), "b": at(3), "é\U0001f600": at(4)}


async def test_what_was_noted_later_stays(path: Path) -> None:
    async with opened(path) as log:
        await log.note_last_used({"a": at(5)})
        await log.note_last_used({"a": at(3)})
    assert await noted(path) == {"a": at(5)}


STAMPS = st.integers(0, 10**6).map(at)
NOTES = st.lists(st.dictionaries(st.text(max_size=3), STAMPS, max_size=3), max_size=6)


@FEWER
@given(NOTES)
def test_the_latest_use_of_each_model_is_kept_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, notes: list[dict[str, str]]
) -> None:
    async def note_all(path: Path) -> dict[str, str]:
        async with opened(path) as log:
            await asyncio.gather(*map(log.note_last_used, notes))
        return await noted(path)

    latest: dict[str, str] = {}
    for each in notes:
        latest |= {model: max(used_at, latest.get(model, "")) for model, used_at in each.items()}
    assert asyncio.run(note_all(tmp_path_factory.mktemp("ledger") / "ledger.db")) == latest


async def test_a_note_is_no_event_and_nobody_is_woken_for_it(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 2)
        head, wakeup = log.head, log.subscribe()
        await log.note_last_used({"a": at(1)})
        assert log.head == head
        assert not wakeup.is_set()
    assert verify(path).verified
    change(path, "UPDATE last_used SET used_at = 'forged'")
    assert verify(path).verified  # it proves nothing and is no part of the proof


async def test_notes_and_commands_that_wait_together_are_all_written(path: Path) -> None:
    async with opened(path) as log:
        await asyncio.gather(
            log.note_last_used({"a": at(1)}), write(log, 3), log.note_last_used({"a": at(2), "b": at(1)})
        )
        assert log.head.position == 3
    assert await noted(path) == {"a": at(2), "b": at(1)}


async def test_a_note_that_cannot_be_written_fails_alone_and_the_log_stays_healthy(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        change(path, "DROP TABLE last_used", "CREATE TABLE last_used (something_else)")
        note, *receipts = await asyncio.gather(
            log.note_last_used({"a": at(1)}), *map(log.submit, facts(5, first=2)), return_exceptions=True
        )
        assert type(note) is LogUnavailable
        assert [each.position for each in receipts if isinstance(each, Receipt)] == [2, 3, 4, 5, 6]
        assert log.healthy
        assert [receipt.position for receipt in await write(log, 1, first=7)] == [7]
    assert verify(path).verified


async def test_an_id_that_is_no_text_fails_its_own_note(path: Path) -> None:
    async with opened(path) as log:
        results = await asyncio.gather(
            log.note_last_used({"\ud800": at(1)}), log.note_last_used({"a": at(1)}), return_exceptions=True
        )
        assert type(results[0]) is NotEncodable
        assert results[1] is None
        assert log.healthy
    assert await noted(path) == {"a": at(1)}


async def test_a_note_that_is_nonsense_ends_nobody_else(path: Path) -> None:
    nonsense: dict[str, Any] = {"a": 2**64}
    async with opened(path) as log:
        results = await asyncio.gather(
            log.note_last_used(nonsense), *map(log.submit, facts(1)), return_exceptions=True
        )
        assert type(results[0]) is LogUnavailable
        assert isinstance(results[1], Receipt)
        assert log.healthy


async def test_a_note_on_a_connection_that_is_gone_fails_and_the_log_recovers_by_itself(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        assert log._database._connection is not None
        log._database._connection.close()
        with pytest.raises(LogUnavailable):
            await log.note_last_used({"a": at(1)})
        await log.note_last_used({"a": at(2)})
        assert [receipt.position for receipt in await write(log, 1, first=2)] == [2]
    assert await noted(path) == {"a": at(2)}


async def test_a_note_that_nobody_waits_for_any_more_disturbs_nobody(path: Path) -> None:
    async with opened(path) as log:
        note = asyncio.create_task(log.note_last_used({"a": at(1)}))
        await asyncio.sleep(0)
        note.cancel()
        assert [receipt.position for receipt in await write(log, 2)] == [1, 2]
        assert log.healthy


async def test_close_writes_the_notes_that_wait_and_refuses_later_ones(path: Path) -> None:
    log = Log(path)
    await log.open()
    note = asyncio.create_task(log.note_last_used({"a": at(1)}))
    await asyncio.sleep(0)
    await log.close()
    await note
    with pytest.raises(LogClosed):
        await log.note_last_used({"a": at(2)})
    assert await noted(path) == {"a": at(1)}


async def test_nobody_waits_for_a_note_to_a_writer_that_died(path: Path) -> None:
    async with opened(path) as log:
        note = asyncio.create_task(log.note_last_used({"a": at(1)}))
        await asyncio.sleep(0)
        log.writer.cancel()
        async with asyncio.timeout(60):
            with pytest.raises(LogClosed):
                await note
