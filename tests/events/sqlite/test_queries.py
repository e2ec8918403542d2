"""Stored tables are what a fold of the log gives: every body to the byte, however events were grouped."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, History, as_event, opened, with_own_ids
from support.ledgers import FAST_FOLDER, store_events, stored
from support.strategies import drafts

from events.audit.verify import verify
from events.codec import decode_event, encode_event
from events.commands import Record
from events.jobs import Job
from events.sqlite import queries, storage
from events.sqlite.schema import connect
from events.state import Changes, State
from events.storage import Row
from events.types import SYSTEM, Draft, LoadFailed

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
"""All that UTF-8 has."""
GROUPS = st.lists(st.lists(st.lists(drafts(), min_size=1, max_size=3), min_size=1, max_size=6), max_size=6)
"""Groups of commands of facts: each group is submitted at once."""


@FEWER
@given(GROUPS)
def test_stored_tables_equal_a_fold_of_the_log(groups: list[list[list[Draft]]]) -> None:
    async def write(path: Path, to_write: list[list[list[Draft]]]) -> State:
        known = set[str]()
        async with opened(path) as log:
            for group in to_write:
                commands = [Record(tuple(with_own_ids(command, known))) for command in group]
                await asyncio.gather(*map(log.submit, commands))
            return log.state

    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        live = asyncio.run(write(path, groups))
        state, jobs = State(), dict[str, Job]()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for body, *columns in connection.execute(
                "SELECT body, type, model_id, job_id, actor, recorded_at FROM events ORDER BY position"
            ):
                event = decode_event(body)
                assert columns == [event.type, event.model_id, event.job_id, event.actor, event.recorded_at]
                jobs.update(state.apply(event).jobs)
            assert state.position == sum(len(command) for group in groups for command in group)
            assert connection.execute("SELECT position FROM projected").fetchall() == [(state.position,)]
            models = connection.execute("SELECT id, body FROM models").fetchall()
            assert {key: queries.as_model(body) for key, body in models} == state.models == live.models
            rows = connection.execute("SELECT body, id, created_position, model_id, status FROM jobs")
            for body, *columns in rows.fetchall():
                job = jobs.pop(columns[0])
                assert queries.as_job(body) == job
                assert columns == [job.id, job.created_position, job.model_id, str(job.status)]
            assert not jobs
            assert live.unended() == state.unended()
            assert live.jobs.keys() == {job.id for job in state.unended()}
            by_writer = stored(path, "jobs", "models", "projected")
            storage.rebuild(connection)
        assert stored(path, "jobs", "models", "projected") == by_writer
        assert asyncio.run(write(path, [])) == live
        verification = verify(path)
        assert verification.verified, verification.finding
        assert verification.position == state.position


@FEWER
@given(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
@example(["\0", "a\0b", '"', "\\", "\\u0000", "\x1f\x7f\x85\u2028\ufeff", "é\U0001f600\uffff", "[{"])
def test_any_text_is_stored_as_it_is_hashed(texts: list[str]) -> None:
    drafts = [Draft(text, LoadFailed(text, text), SYSTEM, None, text, 1) for text in texts]
    events = [as_event(draft, number, number) for number, draft in enumerate(drafts, 1)]
    with closing(connect(Path(":memory:"))) as connection:
        store_events(connection, events)
        found = connection.execute("SELECT body FROM events ORDER BY position").fetchall()
        assert found == [(encode_event(event),) for event in events]
        types = connection.execute("SELECT DISTINCT typeof(position), typeof(body), typeof(hash) FROM events")
        assert types.fetchall() == [("integer", "text", "blob")]


def test_group_beside_the_head_is_not_written() -> None:
    history = History()
    history.ask_load("L")
    one, two = (Row(position, encode_event(history.facts[0]), bytes(32)) for position in (1, 3))
    with closing(connect(Path(":memory:"))) as connection:
        with pytest.raises(sqlite3.IntegrityError):
            queries.write_group(connection, [one, two], Changes(history.state.models, history.state.jobs))
        assert not connection.in_transaction
        for sql in ("SELECT * FROM events", "SELECT * FROM jobs", "SELECT * FROM projected WHERE position"):
            assert connection.execute(sql).fetchall() == []


def test_removed_rows_are_stored_again_with_the_next_event() -> None:
    history = History()
    history.ask_load("L")
    history.ask_load("M", of="other")
    with closing(connect(Path(":memory:"))) as connection:
        store_events(connection, history.facts)
        connection.execute("DELETE FROM jobs WHERE id = 'L'")
        connection.execute("DELETE FROM models")
        history.start_load("L")
        history.start_load("M", of="other")
        models, jobs = history.state.models.values(), history.state.jobs.values()
        queries.write_projections(connection, models, jobs, 4)
        stored_models = connection.execute("SELECT body FROM models ORDER BY id").fetchall()
        assert stored_models == [(queries.as_text(history.model(each)),) for each in (MODEL, "other")]
        stored_jobs = connection.execute("SELECT created_position, body FROM jobs ORDER BY 1").fetchall()
        assert stored_jobs == [
            (job.created_position, queries.as_text(job)) for job in history.state.unended()
        ]
