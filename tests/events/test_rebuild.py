"""Projections that were made by other folds are made anew, from the log, before anything uses them."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, History, as_event, drafts, opened, write

from events import rebuild, store
from events.bodies import to_body
from events.canonical import GENESIS, chain
from events.errors import LogUnavailable
from events.jobs import Job
from events.rebuild import FOLDS, PAGE, is_current
from events.schema import APPLICATION_ID, connect
from events.state import State
from events.types import Draft, Event
from events.verify import verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def history() -> list[Event]:
    """Return the facts of a ledger that has something of most things."""
    told = History()
    told.restart()
    told.load("L")
    told.ask_load("L2", version=2)
    told.start_load("L2", version=2)
    told.fail_load("L2", version=2)
    told.kill_worker("w-L")
    told.restart()
    told.load("O", of="other")
    told.ask_unload("U", "O", of="other")
    told.ask_cancel("U", of="other")
    return told.facts


def write_schema_1(path: Path, facts: list[Event]) -> None:
    """Write a ledger as the first release did; its stored jobs and models lack what was not known then."""
    script = resources.files("migrations").joinpath("0001_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(f"PRAGMA journal_mode = WAL; {script}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA synchronous = OFF")
        state, digest = State(), GENESIS
        connection.execute("BEGIN")
        for event in facts:
            changes = state.apply(event)
            body = to_body(event)
            digest = chain(digest, body)
            connection.execute("INSERT INTO events (position, body, hash) VALUES (?, ?, ?)",
                               (event.position, body, digest))  # fmt: skip
            store.write_projections(
                connection, changes.models.values(), changes.jobs.values(), event.position
            )
        connection.execute("UPDATE jobs SET body = json_remove(body, '$.cancel_requested')")
        connection.execute("UPDATE models SET body = json_remove(body, '$.incidents')")
        connection.execute("COMMIT")


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def stored(path: Path) -> list[tuple[object, ...]]:
    """Return all that is stored beside the log, as it is."""
    with closing(sqlite3.connect(path)) as connection:
        return [
            *connection.execute("SELECT id, body, created_position FROM jobs ORDER BY id"),
            *connection.execute("SELECT id, body FROM models ORDER BY id"),
            *connection.execute("SELECT position, folds FROM projected"),
        ]


async def test_a_ledger_of_the_first_schema_is_migrated_and_its_projections_made_anew(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = history()
    write_schema_1(path, facts)
    before = verify(path)
    assert before.verified
    assert not before.compared  # nothing cries before the upgrade, and nothing is claimed either
    with caplog.at_level(logging.INFO):
        async with opened(path) as log:
            assert f"{len(facts)} events are folded anew" in caplog.text
            assert log.state.models == fold(facts).models
            assert log.state.unended() == fold(facts).unended()
            assert log.state.jobs["U"].cancel_requested
            await write(log, 1)
    after = verify(path)
    assert after.verified, after.finding
    assert after.compared
    caplog.clear()
    with caplog.at_level(logging.INFO):
        async with opened(path) as log:
            assert log.head.position == len(facts) + 1
    assert not caplog.text


def fold(facts: list[Event]) -> State:
    state = State()
    for event in facts:
        state.apply(event)
    return state


async def test_an_empty_ledger_of_the_first_schema_is_migrated_without_a_word(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_schema_1(path, [])
    with caplog.at_level(logging.INFO):
        async with opened(path) as log:
            await write(log, 1)
    assert not caplog.text
    assert verify(path).verified
    assert verify(path).compared


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_projections_made_anew_are_those_that_were_written_with_their_events(told: list[Draft]) -> None:
    facts = [as_event(draft, number, number) for number, draft in enumerate(told, 1)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        write_schema_1(path, facts)
        asyncio.run(open_once(path))
        anew = stored(path)
        state, jobs = State(), dict[str, Job]()
        for event in facts:
            jobs.update(state.apply(event).jobs)
        expected = [(key, store.as_text(job), job.created_position) for key, job in sorted(jobs.items())]
        models = [(key, store.as_text(model)) for key, model in sorted(state.models.items())]
        assert anew == [*expected, *models, (len(facts), FOLDS)]
        verification = verify(path)
        assert verification.verified, verification.finding


async def open_once(path: Path) -> None:
    async with opened(path):
        pass


async def test_a_change_of_the_folds_makes_the_projections_anew_whichever_way_it_went(path: Path) -> None:
    write_schema_1(path, history())
    await open_once(path)
    sound = stored(path)
    for folds in (FOLDS - 1, FOLDS + 1):
        change(
            path,
            f"UPDATE projected SET folds = {folds}",
            "DELETE FROM models",
            "DELETE FROM jobs WHERE id = 'L'",
        )
        assert not verify(path).compared
        await open_once(path)
        assert stored(path) == sound


async def test_projections_of_these_folds_are_not_made_anew(path: Path) -> None:
    write_schema_1(path, history())
    await open_once(path)
    change(path, "DELETE FROM models WHERE id = 'other'")
    await open_once(path)
    finding = verify(path).finding  # what somebody changed is not mended in passing
    assert finding is not None
    assert finding.problem == "the stored models lack 'other'"


async def test_a_log_longer_than_a_page_is_folded_to_its_end(path: Path) -> None:
    told = History()
    for number in range(PAGE):
        told.ask_load(f"L{number}", of=f"m{number % 7}")
        told.start_load(f"L{number}", of=f"m{number % 7}")
        if number % 3:
            told.fail_load(f"L{number}", of=f"m{number % 7}")
    write_schema_1(path, told.facts)
    async with opened(path) as log:
        assert log.state.unended() == told.state.unended()
        assert log.state.backlog == len(told.state.unended())
    assert verify(path).verified


async def test_a_rebuild_that_fails_changes_nothing_and_says_which_event_is_in_the_way(path: Path) -> None:
    write_schema_1(path, history())
    before = stored_v1(path)
    change(
        path,
        "DROP TRIGGER events_never_change",
        "UPDATE events SET body = json_set(body, '$.data', 7, '$.type', 'LoadStarted') WHERE position = 3",
    )
    with pytest.raises(LogUnavailable, match="its event 3 is none"):
        await open_once(path)
    assert stored_v1(path) == before


def stored_v1(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return [
            *connection.execute("SELECT id, body FROM jobs ORDER BY id"),
            *connection.execute("SELECT id, body FROM models ORDER BY id"),
            *connection.execute("SELECT position FROM projected"),
        ]


async def test_projections_whose_position_is_gone_are_damaged_and_not_mended_in_passing(path: Path) -> None:
    write_schema_1(path, history())
    await open_once(path)
    change(path, "DELETE FROM projected")
    with pytest.raises(LogUnavailable, match="position of the stored projections is missing"):
        await open_once(path)
    finding = verify(path).finding
    assert finding is not None
    assert finding.problem == "the stored projections are at position None"


def test_a_rebuild_can_be_asked_for_and_changes_nothing_where_nothing_is_wrong(path: Path) -> None:
    write_schema_1(path, history())
    asyncio.run(open_once(path))
    sound = stored(path)
    with closing(connect(path)) as connection:
        assert is_current(connection)
        rebuild.rebuild(connection)
        rebuild.rebuild(connection)
    assert stored(path) == sound


@pytest.mark.parametrize(("table", "key"), [("models", "digits"), ("jobs", "L")])
def test_keys_that_became_bytes_are_made_anew_and_named(path: Path, table: str, key: str) -> None:
    write_schema_1(path, history())
    asyncio.run(open_once(path))
    sound = stored(path)
    change(path, f"UPDATE {table} SET id = CAST(id AS BLOB)")
    differences = rebuild.rebuild_file(path).differences
    assert f"the stored {table} lacked {key!r}" in differences
    assert f"the stored {table} had, and the log does not give, {key.encode()!r}" in differences
    assert stored(path) == sound
    assert verify(path).verified


def test_what_is_in_a_ledger_of_no_events_is_current_once_it_was_opened(path: Path) -> None:
    with closing(connect(path)) as connection:
        assert not is_current(connection)
    asyncio.run(open_once(path))
    with closing(connect(path)) as connection:
        assert is_current(connection)
