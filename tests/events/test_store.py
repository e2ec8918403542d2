"""What the writer's statements leave in the tables: every body to the byte, and every entity in its place."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.events import FEWER, MODEL, History, as_event, drafts

from events import store
from events.bodies import to_body
from events.canonical import GENESIS, chain
from events.schema import APPLICATION_ID, connect
from events.state import Attempt, State
from events.store import Row
from events.types import SYSTEM, Draft, Event, LoadFailed

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
"""All that UTF-8 has."""


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
            body = to_body(event)
            group.append(Row(event.position, body, chain(previous, body)))
        store.write_group(self.connection, group, attempt.changes, entities=0)
        attempt.commit()
        self.rows += group

    def change(self, statement: str) -> None:
        """Change the tables behind the writer's back."""
        self.connection.execute(statement)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Return rows as they are."""
        return self.connection.execute(sql).fetchall()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.connection.close()


@FEWER
@given(st.lists(TEXTS, min_size=1, max_size=5))
@example(["\0", "a\0b", '"', "\\", "\\u0000", "\x1f\x7f\x85\u2028\ufeff", "é\U0001f600\uffff", "[{"])
def test_whatever_a_body_says_is_stored_as_it_is_hashed(texts: list[str]) -> None:
    made = Ledger()
    with closing(made.connection):
        told = [Draft(text, LoadFailed(text, text), SYSTEM, None, text, 1) for text in texts]
        made.append([as_event(draft, number, number) for number, draft in enumerate(told, 1)])
        stored = made.query("SELECT position, body, hash FROM events ORDER BY position")
        assert stored == [(row.position, row.body, row.hash) for row in made.rows]
        types = made.query("SELECT DISTINCT typeof(position), typeof(body), typeof(hash) FROM events")
        assert types == [("integer", "text", "blob")]


def test_a_group_that_is_not_at_the_head_is_not_written_at_all(ledger: Ledger) -> None:
    told = History()
    told.load("L")
    ledger.append(told.facts[:2])
    one, two = Row(3, to_body(told.facts[2]), bytes(32)), Row(5, "{}", bytes(32))
    with pytest.raises(sqlite3.IntegrityError):
        store.write_group(ledger.connection, [one, two], told.state.apply(told.facts[2]), entities=0)
    assert not ledger.connection.in_transaction
    assert ledger.query("SELECT max(position) FROM events") == [(2,)]
    assert ledger.query("SELECT position FROM projected") == [(2,)]


def jobs_of(told: History) -> list[tuple[object, ...]]:
    return [
        (job.created_position, job.id, store.as_text(job))
        for job in sorted(told.state.jobs.values(), key=lambda job: job.created_position)
    ]


@pytest.mark.parametrize("groups", [[7], [1, 6], [2, 5], [1, 1, 1, 1, 1, 1, 1], [3, 4]], ids=str)
def test_jobs_are_stored_as_they_are_however_they_were_grouped(ledger: Ledger, groups: list[int]) -> None:
    told = History()
    told.load("L")
    told.ask_load("M", version=2)
    told.unload("U", "L")
    ends = [sum(groups[: number + 1]) for number in range(len(groups))]
    for size, end in zip(groups, ends, strict=True):
        ledger.append(told.facts[end - size : end])
    assert ledger.query("SELECT created_position, id, body FROM jobs ORDER BY 1") == jobs_of(told)


def test_a_job_and_a_model_that_somebody_removed_are_there_again_once_they_go_on(ledger: Ledger) -> None:
    told = History()
    told.ask_load("L")
    told.ask_load("M", of="other")
    ledger.append(told.facts)
    ledger.change("DELETE FROM jobs WHERE id = 'L'")
    ledger.change("DELETE FROM models")
    told.start_load("L")
    told.start_load("M", of="other")
    ledger.append(told.facts[2:])
    assert ledger.query("SELECT created_position, id, body FROM jobs ORDER BY 1") == jobs_of(told)
    assert ledger.query("SELECT id, body FROM models ORDER BY id") == [
        (model_id, store.as_text(told.model(model_id))) for model_id in (MODEL, "other")
    ]


@FEWER
@given(st.lists(st.lists(drafts(), min_size=1, max_size=4), max_size=6))
def test_a_job_whose_id_comes_again_is_where_it_began_the_last_time(groups: list[list[Draft]]) -> None:
    made, position, jobs = Ledger(), 0, dict[str, tuple[int, str]]()
    state = State()
    with closing(made.connection):
        for group in groups:
            events = [as_event(draft, position + at, at) for at, draft in enumerate(group, 1)]
            position += len(group)
            made.append(events)
            for event in events:
                changed = state.apply(event).jobs.values()
                jobs.update({job.id: (job.created_position, store.as_text(job)) for job in changed})
        stored = made.query("SELECT id, created_position, body FROM jobs ORDER BY id")
        assert stored == [(key, *job) for key, job in sorted(jobs.items())]


def test_models_of_a_ledger_of_an_earlier_schema_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    scripts = sorted(resources.files("migrations").iterdir(), key=lambda file: file.name)
    models = [(f"model-{number:03}", f'{{"id":"{number}"}}' * 200) for number in range(40)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for script in [file for file in scripts if file.name.endswith(".sql")][:4]:
            connection.executescript(script.read_text(encoding="utf-8"))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 4")
        connection.executemany("INSERT INTO models (id, body) VALUES (?, ?)", models)
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT id, body FROM models ORDER BY id").fetchall() == models
        assert connection.execute("SELECT count(rowid) FROM models").fetchone() == (40,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
