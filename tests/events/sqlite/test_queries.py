"""Stored tables are what a fold of the log gives: every body to the byte, however events were grouped."""

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, History, as_event, drafts, opened
from support.ledgers import FAST_FOLDER

from events.audit.verify import verify
from events.codec import GENESIS, decode_event, encode_event, hash_body
from events.commands import Record
from events.jobs import Job
from events.sqlite import queries
from events.sqlite.queries import Row
from events.sqlite.schema import connect
from events.state import Attempt, State
from events.types import SYSTEM, Draft, Event, LoadFailed

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
"""All that UTF-8 has."""
GROUPS = st.lists(st.lists(st.lists(drafts(), min_size=1, max_size=3), min_size=1, max_size=6), max_size=6)
"""Groups of commands of facts: each group is submitted at once."""


class Ledger:
    """A ledger in memory, and the state that its events make."""

    def __init__(self) -> None:
        self.connection = connect(Path(":memory:"))
        self.state = State()
        self.rows: list[Row] = []

    def append(self, events: Sequence[Event]) -> None:
        """Append a group."""
        attempt, group = Attempt(self.state), list[Row]()
        for event in events:
            attempt.state.apply(event)
            previous = (self.rows + group)[-1].hash if self.rows or group else GENESIS
            body = encode_event(event)
            group.append(Row(event.position, body, hash_body(previous, body)))
        queries.write_group(self.connection, group, attempt.changes)
        attempt.commit()
        self.rows += group

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Return rows as they are."""
        return self.connection.execute(sql).fetchall()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.connection.close()


@FEWER
@given(GROUPS)
def test_stored_tables_equal_a_fold_of_the_log(groups: list[list[list[Draft]]]) -> None:
    async def write(path: Path) -> State:
        async with opened(path) as log:
            for group in groups:
                await asyncio.gather(*(log.submit(Record(tuple(command))) for command in group))
            return log.state

    async def reopen(path: Path) -> State:
        async with opened(path) as log:
            return log.state

    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        live = asyncio.run(write(path))
        state, jobs = State(), dict[str, Job]()
        with closing(sqlite3.connect(path)) as connection:
            for body, *columns in connection.execute(
                "SELECT body, type, model_id, job_id, actor, recorded_at FROM events ORDER BY position"
            ):
                event = decode_event(body)
                assert columns == [event.type, event.model_id, event.job_id, event.actor, event.recorded_at]
                jobs.update(state.apply(event).jobs)
            assert connection.execute("SELECT position FROM projected").fetchall() == [(state.position,)]
            models = connection.execute("SELECT id, body FROM models").fetchall()
            stored = connection.execute("SELECT body, id, created_position, model_id, status FROM jobs")
            for body, *columns in stored.fetchall():
                job = jobs.pop(columns[0])
                assert queries.as_job(body) == job
                assert columns == [job.id, job.created_position, job.model_id, str(job.status)]
            assert not jobs
        assert state.position == sum(len(command) for group in groups for command in group)
        assert {key: queries.as_model(body) for key, body in models} == state.models == live.models
        assert live.unended() == state.unended()
        assert live.jobs.keys() == {job.id for job in state.unended()}
        assert asyncio.run(reopen(path)) == live
        verification = verify(path)
        assert verification.verified, verification.finding
        assert verification.events == state.position


@FEWER
@given(st.lists(TEXTS, min_size=1, max_size=5))
@example(["\0", "a\0b", '"', "\\", "\\u0000", "\x1f\x7f\x85\u2028\ufeff", "é\U0001f600\uffff", "[{"])
def test_any_text_is_stored_as_it_is_hashed(texts: list[str]) -> None:
    made = Ledger()
    with closing(made.connection):
        told = [Draft(text, LoadFailed(text, text), SYSTEM, None, text, 1) for text in texts]
        made.append([as_event(draft, number, number) for number, draft in enumerate(told, 1)])
        stored = made.query("SELECT position, body, hash FROM events ORDER BY position")
        assert stored == [(row.position, row.body, row.hash) for row in made.rows]
        types = made.query("SELECT DISTINCT typeof(position), typeof(body), typeof(hash) FROM events")
        assert types == [("integer", "text", "blob")]


def test_group_beside_the_head_is_not_written(ledger: Ledger) -> None:
    told = History()
    told.load("L")
    ledger.append(told.facts[:2])
    one, two = Row(3, encode_event(told.facts[2]), bytes(32)), Row(5, "{}", bytes(32))
    with pytest.raises(sqlite3.IntegrityError):
        queries.write_group(ledger.connection, [one, two], told.state.apply(told.facts[2]))
    assert not ledger.connection.in_transaction
    assert ledger.query("SELECT max(position) FROM events") == [(2,)]
    assert ledger.query("SELECT position FROM projected") == [(2,)]


def jobs_of(told: History) -> list[tuple[object, ...]]:
    return [
        (job.created_position, job.id, queries.as_text(job))
        for job in sorted(told.state.jobs.values(), key=lambda job: job.created_position)
    ]


def test_removed_job_and_model_are_stored_again_with_their_next_event(ledger: Ledger) -> None:
    told = History()
    told.ask_load("L")
    told.ask_load("M", of="other")
    ledger.append(told.facts)
    ledger.query("DELETE FROM jobs WHERE id = 'L'")
    ledger.query("DELETE FROM models")
    told.start_load("L")
    told.start_load("M", of="other")
    ledger.append(told.facts[2:])
    assert ledger.query("SELECT created_position, id, body FROM jobs ORDER BY 1") == jobs_of(told)
    assert ledger.query("SELECT id, body FROM models ORDER BY id") == [
        (model_id, queries.as_text(told.model(model_id))) for model_id in (MODEL, "other")
    ]


@FEWER
@given(st.lists(st.lists(drafts(), min_size=1, max_size=4), max_size=6))
def test_repeated_job_id_is_stored_where_it_began_last(groups: list[list[Draft]]) -> None:
    made, position, jobs = Ledger(), 0, dict[str, tuple[int, str]]()
    state = State()
    with closing(made.connection):
        for group in groups:
            events = [as_event(draft, position + at, at) for at, draft in enumerate(group, 1)]
            position += len(group)
            made.append(events)
            for event in events:
                changed = state.apply(event).jobs.values()
                jobs.update({job.id: (job.created_position, queries.as_text(job)) for job in changed})
        stored = made.query("SELECT id, created_position, body FROM jobs ORDER BY id")
        assert stored == [(key, *job) for key, job in sorted(jobs.items())]
