"""Projections that other folds made are rebuilt from the log before anything uses them."""

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
from support.history import FEWER, History, as_event, drafts, opened, write
from support.ledgers import FAST_FOLDER, change_ledger, sample_history

from events.audit.verify import verify
from events.codec import GENESIS, encode_event, hash_body
from events.errors import LogUnavailable
from events.jobs import Job
from events.sqlite import queries, storage
from events.sqlite.queries import PAGE
from events.sqlite.schema import APPLICATION_ID, connect
from events.sqlite.storage import FOLDS, is_current
from events.state import State
from events.types import Draft, Event

HISTORY = sample_history()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def write_schema_1(path: Path, facts: list[Event]) -> None:
    """Write a ledger as the first release did; its stored jobs and models lack what was not known then."""
    script = resources.files("migrations").joinpath("0001_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(f"PRAGMA journal_mode = WAL; {script}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        state, digest = State(), GENESIS
        connection.execute("BEGIN")
        for event in facts:
            changes = state.apply(event)
            digest = hash_body(digest, body := encode_event(event))
            connection.execute("INSERT INTO events (position, body, hash) VALUES (?, ?, ?)",
                               (event.position, body, digest))  # fmt: skip
            queries.write_projections(
                connection, changes.models.values(), changes.jobs.values(), event.position
            )
        connection.execute("UPDATE jobs SET body = json_remove(body, '$.cancel_requested')")
        connection.execute("UPDATE models SET body = json_remove(body, '$.incidents')")
        connection.execute("COMMIT")


def stored(path: Path) -> list[tuple[object, ...]]:
    """Return all that is stored beside the log, as it is."""
    with closing(sqlite3.connect(path)) as connection:
        return [
            *connection.execute("SELECT id, body, created_position FROM jobs ORDER BY id"),
            *connection.execute("SELECT id, body FROM models ORDER BY id"),
            *connection.execute("SELECT * FROM projected"),
        ]


def open_once(path: Path) -> None:
    async def reopen() -> None:
        async with opened(path):
            pass

    asyncio.run(reopen())


@pytest.mark.parametrize("facts", [HISTORY, []], ids=["history", "empty"])
async def test_first_schema_is_migrated_and_rebuilt_once(
    path: Path, facts: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    write_schema_1(path, facts)
    before, state = verify(path), State()
    assert before.verified
    assert not before.compared  # nothing is reported before the upgrade, and nothing is claimed either
    for event in facts:
        state.apply(event)
    with caplog.at_level(logging.INFO):
        async with opened(path) as log:
            told = [f"{len(facts)} events are folded anew"] if facts else []
            assert [text for text in told if text in caplog.text] == told
            assert bool(caplog.text) == bool(facts)
            assert log.state.models == state.models
            assert log.state.unended() == state.unended()
            await write(log, 1)
        after = verify(path)
        assert after.verified, after.finding
        assert after.compared
        caplog.clear()
        async with opened(path) as log:
            assert log.head.position == len(facts) + 1
    assert not caplog.text


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_rebuilt_projections_equal_those_of_the_writer(told: list[Draft]) -> None:
    facts = [as_event(draft, number, number) for number, draft in enumerate(told, 1)]
    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        write_schema_1(path, facts)
        open_once(path)
        state, jobs = State(), dict[str, Job]()
        for event in facts:
            jobs.update(state.apply(event).jobs)
        expected = [(key, queries.as_text(job), job.created_position) for key, job in sorted(jobs.items())]
        models = [(key, queries.as_text(model)) for key, model in sorted(state.models.items())]
        assert stored(path) == [*expected, *models, (1, len(facts), FOLDS)]
        verification = verify(path)
        assert verification.verified, verification.finding


def test_projections_are_rebuilt_for_other_folds_only(path: Path) -> None:
    with closing(connect(path)) as connection:
        assert not is_current(connection)
    path.unlink()
    write_schema_1(path, HISTORY)
    open_once(path)
    sound = stored(path)
    for folds in (FOLDS - 1, FOLDS + 1):
        change_ledger(
            path,
            f"UPDATE projected SET folds = {folds}",
            "DELETE FROM models",
            "DELETE FROM jobs WHERE id = 'L0'",
            keeps_triggers=True,
        )
        assert not verify(path).compared
        open_once(path)
        assert stored(path) == sound
    with closing(connect(path)) as connection:
        assert is_current(connection)
        storage.rebuild(connection)
    assert stored(path) == sound
    change_ledger(path, "DELETE FROM models WHERE id = 'other'")
    open_once(path)
    finding = verify(path).finding  # what somebody changed is not mended in passing
    assert finding is not None
    assert finding.problem == "the stored models lack 'other'"
    change_ledger(path, "DELETE FROM projected")
    with pytest.raises(LogUnavailable, match="position of the stored projections is missing"):
        open_once(path)


def test_log_longer_than_a_page_is_folded_to_its_end(path: Path) -> None:
    told = History()
    for number in range(PAGE):
        told.ask_load(f"L{number}", of=f"m{number % 7}")
        told.start_load(f"L{number}", of=f"m{number % 7}")
        if number % 3:
            told.fail_load(f"L{number}", of=f"m{number % 7}")
    write_schema_1(path, told.facts)
    open_once(path)
    assert verify(path).verified
    assert verify(path).compared
    with closing(connect(path)) as connection:
        (unended,) = connection.execute("SELECT count(*) FROM jobs WHERE status = 'in_progress'").fetchone()
    assert unended == len(told.state.unended())


def test_failed_rebuild_changes_nothing_and_names_the_event(path: Path) -> None:
    write_schema_1(path, HISTORY)
    before = stored(path)
    change_ledger(
        path,
        "UPDATE events SET body = json_set(body, '$.data', 7, '$.type', 'LoadStarted') WHERE position = 3",
    )
    with pytest.raises(LogUnavailable, match="its event 3 is not valid"):
        open_once(path)
    after = stored(path)
    assert after[:-1] == before[:-1]
    assert after[-1][:2] == before[-1][:2]  # the migrations have added a column


@pytest.mark.parametrize(("table", "key"), [("models", "digits"), ("jobs", "L0")])
def test_rebuild_names_keys_that_became_bytes(path: Path, table: str, key: str) -> None:
    write_schema_1(path, HISTORY)
    open_once(path)
    sound = stored(path)
    change_ledger(path, f"UPDATE {table} SET id = CAST(id AS BLOB)", keeps_triggers=True)
    differences = storage.rebuild_file(path).differences
    assert f"the stored {table} lacked {key!r}" in differences
    assert f"the stored {table} had, and the log does not give, {key.encode()!r}" in differences
    assert stored(path) == sound
    assert verify(path).verified
