"""History: models, jobs, the server and nodes, read at any position, are what a fold of the log gives."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, History, fold, with_own_ids
from support.ledgers import ledger_of
from support.strategies import copied_histories, drafts, histories

from answers.models import ModelInfo
from events.history import ShownModel, describe_model, find_landmark, landmarks_around
from events.jobs import Job, JobStatus
from events.sqlite import storage
from events.sqlite.history import transitions_between
from events.sqlite.timetravel import active_at, liveness_at, model_at, models_at
from events.state import State
from events.types import Event, VersionRemoved
from server.api.models import make_model_info

FORGED = st.lists(drafts(), max_size=30).map(lambda events: fold(events).facts)
FACTS = (histories() | copied_histories()).map(lambda history: list(with_own_ids(history.facts)))


def answers(models: Iterable[ShownModel]) -> list[ModelInfo]:
    """Return models as the API has them, by id."""
    return [make_model_info(model, is_active=False) for model in models]


def check(connection: sqlite3.Connection, events: Sequence[Event]) -> None:
    """Compare what is read at each position with a fold of the events."""
    state = State()
    for event in (None, *events):
        if event is not None:
            state.apply(event)
        found = models_at(connection, state.position)
        known = sorted({*state.models, *state.registers.versions})
        folded = [describe_model(state, model_id) for model_id in known]
        assert [model.row for model in found] == [model.row for model in folded]
        assert answers(found) == answers(folded)
        assert [model_at(connection, state.position, model.id) for model in found] == found
        active = state.active()
        assert active_at(connection, state.position) == (active and active.id)
        nodes = liveness_at(connection, state.position).servers if state.position else ()
        assert {node.id: node.state.value for node in nodes} == {
            node.id: node.phase.value for node in state.registers.nodes.values()
        }


@FEWER
@given(FORGED | FACTS)
def test_models_and_nodes_at_each_position_are_the_folds(events: Sequence[Event]) -> None:
    with ledger_of(events) as connection:
        check(connection, events)
        before = rows(connection)
        storage.rebuild(connection)
        assert rows(connection) == before


def rows(connection: sqlite3.Connection) -> list[list[tuple[object, ...]]]:
    tables = ("model_history", "presence", "jobs")
    return [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]


def test_page_of_past_models_begins_at_its_cursor() -> None:
    history = History()
    for number in range(5):
        history.load(f"L{number}", of=f"m{number}")
    with ledger_of(history.facts) as connection:
        found = models_at(connection, 12, cursor="m0", limit=2)
        assert [model.id for model in found] == ["m1", "m2"]
        assert [model.id for model in models_at(connection, 12, cursor="m2", limit=2)] == ["m3"]


def test_model_known_by_removal_alone_is_in_its_history() -> None:
    history = History()
    history.add(VersionRemoved(), of="up")
    history.load("L")
    with ledger_of(history.facts) as connection:
        check(connection, history.facts)


def test_transitions_of_a_range_are_found_without_the_others() -> None:
    history = History()
    for _ in range(200):
        history.restart()
    with ledger_of(history.facts) as connection, counted_steps(connection) as counted:
        found = transitions_between(connection, 100, 102)
    assert [each.position for each in found] == [101, 102]
    assert len(counted) < 10


@contextmanager
def counted_steps(connection: sqlite3.Connection) -> Iterator[list[None]]:
    """Yield a list that grows with every ten instructions that SQLite's virtual machine runs."""
    counted = list[None]()
    connection.set_progress_handler(lambda: counted.append(None), 10)
    yield counted
    connection.set_progress_handler(None, 0)


@given(st.integers(1, 2**40), st.integers(1, 2**40), st.integers(0, 2**40))
def test_landmark_is_around_each_position_of_its_job(created: int, took: int, after: int) -> None:
    ended = created + took
    history = History()
    history.load("L")
    job = history.job("L")
    assert job.ended
    landmark = find_landmark(replaced(job, created, ended))
    assert landmark is not None
    assert created <= landmark < ended
    assert landmark in landmarks_around(min(created + after, ended - 1))
    assert find_landmark(replaced(job, created, ended, JobStatus.PENDING)) is None


def replaced(job: Job, created: int, position: int, status: JobStatus = JobStatus.COMPLETED) -> Job:
    return replace(job, created_position=created, position=position, status=status)
