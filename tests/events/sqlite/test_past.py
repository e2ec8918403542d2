"""The past: what is read at a position or time, and a replay, are what a fold of the log by then gives."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, START, History, as_event, at, fold, opened, with_own_ids, write
from support.ledgers import ledger_of
from support.strategies import copied_histories, drafts, histories

from answers.models import ModelInfo
from events.audit.replay import replay
from events.errors import LogUnavailable
from events.history import ShownModel, describe_model, find_landmark, landmarks_around
from events.jobs import Job, JobStatus
from events.presence import Liveness, ServerState, SharingLiveness
from events.sqlite import readonly, storage
from events.sqlite.history import transitions_between
from events.sqlite.queries import JobQuery
from events.sqlite.readonly import open_past
from events.sqlite.timetravel import (
    NOTE_EVERY_S,
    BeforeFirst,
    BeyondHead,
    InvalidMoment,
    Moment,
    active_at,
    job_at,
    jobs_at,
    liveness_at,
    model_at,
    models_at,
    moment_at,
    parse_time,
    read_moment,
)
from events.sqlite.writing import WRITE_NOTE
from events.state import State
from events.types import Event, LoadRequested, ServerStarted, TokenRevoked, UnloadRequested, VersionRemoved
from features.nodes.facts import NodeLost, NodeState
from features.nodes.register import KEPT_S
from server.api.models import make_model_info

T = TypeVar("T")

LIMIT_S = 60
"""Only against hanging."""

# At each position.


@st.composite
def requested(draw: st.DrawFn) -> list[Event]:
    """Return events in which each request has an id of its own, as the writer's have."""
    asked, events = list[str](), []
    for number, draft in enumerate(draw(st.lists(drafts(), max_size=30)), 1):
        event_id = f"e{number}"
        if isinstance(draft.data, LoadRequested | UnloadRequested):
            job_id: str | None = event_id
            asked.append(event_id)
        else:
            job_id = draw(st.sampled_from([*asked, None]))
        events.append(as_event(replace(draft, id=event_id, job_id=job_id), number, number))
    return events


FORGED = st.lists(drafts(), max_size=30).map(lambda events: fold(events).facts)
FACTS = (histories() | copied_histories()).map(lambda history: list(with_own_ids(history.facts)))


def answers(models: Iterable[ShownModel]) -> list[ModelInfo]:
    """Return models as the API has them, by id."""
    return [make_model_info(model, is_active=False) for model in models]


def check_models(connection: sqlite3.Connection, state: State) -> None:
    found = models_at(connection, state.position)
    folded = [describe_model(state, each) for each in sorted({*state.models, *state.registers.versions})]
    assert [model.row for model in found] == [model.row for model in folded]
    assert answers(found) == answers(folded)
    assert [model_at(connection, state.position, model.id) for model in found] == found
    active = state.active()
    assert active_at(connection, state.position) == (active and active.id)
    nodes = liveness_at(connection, state.position).servers if state.position else ()
    assert {node.id: node.state.value for node in nodes} == {
        node.id: node.phase.value for node in state.registers.nodes.values()
    }


def check_replay(connection: sqlite3.Connection, state: State) -> None:
    (_, found) = replay(connection, str(state.position))
    connection.rollback()
    assert (found.models, found.unended()) == (state.models, state.unended())
    assert (found.position, found.recorded_at) == (state.position, state.recorded_at)


def stored_rows(connection: sqlite3.Connection) -> list[list[tuple[object, ...]]]:
    tables = ("model_history", "presence", "jobs")
    return [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]


def check_each_position(events: Sequence[Event]) -> None:
    with ledger_of(events) as connection:
        state = State()
        for event in (None, *events):
            if event is not None:
                state.apply(event)
            check_models(connection, state)
            check_replay(connection, state)
        before = stored_rows(connection)
        storage.rebuild(connection)
        assert stored_rows(connection) == before


@FEWER
@given(FORGED | FACTS)
def test_past_models_and_nodes_are_what_a_fold_gives(events: Sequence[Event]) -> None:
    check_each_position(events)


@FEWER
@given(requested())
def test_past_jobs_are_what_a_fold_gives(events: list[Event]) -> None:
    with ledger_of(events) as connection:
        state, jobs = State(), dict[str, Job]()
        for event in [None, *events]:
            if event is not None:
                jobs.update(state.apply(event).jobs)
            then = sorted(jobs.values(), key=lambda job: -job.created_position)
            assert jobs_at(connection, state.position, JobQuery()) == then
            for status in JobStatus:
                found = jobs_at(connection, state.position, JobQuery(status=status, model_id="m"))
                assert found == [job for job in then if job.status is status and job.model_id == "m"]
            for job_id in (each.id for each in events if each.id == each.job_id):
                assert job_at(connection, state.position, job_id) == jobs.get(job_id)


def test_model_known_by_removal_alone_is_in_its_history() -> None:
    history = History()
    history.add(VersionRemoved(), of="up")
    history.load("L")
    check_each_position(history.facts)


def test_page_of_past_models_begins_at_its_cursor() -> None:
    history = History()
    for number in range(5):
        history.load(f"L{number}", of=f"m{number}")
    with ledger_of(history.facts) as connection:
        for cursor, page in (("m0", ["m1", "m2"]), ("m2", ["m3"])):
            assert [each.id for each in models_at(connection, 12, cursor=cursor, limit=2)] == page


@pytest.mark.parametrize("status", [None, *JobStatus])
def test_page_of_past_jobs_begins_at_its_cursor(status: JobStatus | None) -> None:
    history = History()
    for number in range(4):
        history.load(f"L{number}", of=f"m{number}")
    for number in range(4, 8):
        history.ask_load(f"L{number}", of=f"m{number}")
    at_end = history.state.position
    history.restart()
    for number in range(4, 8):
        history.fail_load(f"L{number}", of=f"m{number}")
    for number in range(8, 11):
        history.ask_load(f"L{number}", of=f"m{number}")
    with ledger_of(history.facts) as connection:
        whole = jobs_at(connection, at_end, JobQuery(status=status))
        assert len(whole) == {None: 8, JobStatus.COMPLETED: 4, JobStatus.PENDING: 4}.get(status, 0)
        assert jobs_at(connection, at_end, JobQuery(status=status, limit=2)) == whole[:2]
        for cut in range(len(whole)):
            after_it = JobQuery(whole[cut].created_position, status=status, limit=2)
            assert jobs_at(connection, at_end, after_it) == whole[cut + 1 :][:2]


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
    ended, history = created + took, History()
    history.load("L")
    job = replace(history.job("L"), created_position=created, position=ended)
    landmark = find_landmark(job)
    assert landmark is not None
    assert created <= landmark < ended
    assert landmark in landmarks_around(min(created + after, ended - 1))
    assert find_landmark(replace(job, status=JobStatus.PENDING)) is None


# At a time.


def test_time_means_the_last_event_recorded_by_then() -> None:
    history = History()
    history.restart()  # at 1 s
    history.load("L")  # at 2, 3, 4 s
    history.add(history.facts[0].data, None, of=None, after_s=0)
    with ledger_of(history.facts) as connection:
        for seconds, position in {1: 1, 1.5: 1, 2: 2, 3.999999: 3, 4: 5, 100: 5}.items():
            found = moment_at(connection, at(seconds))
            assert found.position == position, seconds
            assert found.recorded_at == history.facts[position - 1].recorded_at
            assert replay(connection, at(seconds))[0].position == position
            connection.rollback()
        assert moment_at(connection, "0") == Moment(0, None)
        assert moment_at(connection, "0004") == Moment(4, at(4))
        with pytest.raises(BeyondHead):
            moment_at(connection, "6")
        with pytest.raises(BeforeFirst, match=rf"{at(0)[:19]}Z is before the first event, .* {at(1)}"):
            replay(connection, at(0.5))
    with ledger_of([]) as connection:
        assert moment_at(connection, at(1)) == Moment(0, None)


TIMES = {
    "2026-01-31T14:02:00Z": "14:02:00.000000",
    "2026-01-31t14:02:00z": "14:02:00.000000",
    "2026-01-31 14:02:00Z": "14:02:00.000000",
    "2026-01-31T14:02:00.5Z": "14:02:00.500000",
    "2026-01-31T14:02:00.1234569Z": "14:02:00.123456",
    "2026-01-31T14:02:00+01:00": "13:02:00.000000",
    "2026-01-31T14:02:00 01:00": "13:02:00.000000",
    "2026-01-31T14:02:00-03:30": "17:32:00.000000",
    "2026-01-31T14:02:00-00:00": "14:02:00.000000",
}
NO_TIMES = (
    "", "noon", "2026-01-31", "2026-01-31T14:02:00", "2026-01-31T14:02Z", "2026-W05-6T14:02:00Z",
    "20260131T140200Z", "2026-02-30T00:00:00Z", "2026-01-31T25:00:00Z", "0001-01-01T00:00:00+10:00",
    "9999-12-31T23:59:59-10:00", "2026-01-31T14:02:00,5Z", "2026-01-31T14:02:00Z\n",
)  # fmt: skip


def test_times_of_rfc_3339_are_parsed() -> None:
    for text, expected in TIMES.items():
        assert parse_time(text) == f"2026-01-31T{expected}Z", text
    for text in NO_TIMES:
        with pytest.raises(InvalidMoment):
            parse_time(text)


# Whether the server and nodes ran.

RUNNING, STOPPED, UNKNOWN = ServerState.RUNNING, ServerState.STOPPED, ServerState.UNKNOWN


def server_history() -> tuple[History, float]:
    """A start, a load, an unclean end, a start, a stop, and a start that still runs; and the last note."""
    history = History()
    history.add(ServerStarted(False), None, of=None, version=None, after_s=2)
    history.load("L")  # at 3, 4, 5
    unclean = ServerStarted(True, last_event_at=at(5), last_seen_at=at(60))
    history.add(unclean, None, of=None, version=None, after_s=995)  # at 1,000
    history.restart(unclean=False, down_s=1_000)  # stopped at 1,001, started at 2,001
    history.ask_load("M", of="other")  # at 2,002
    return history, 2_100


def node_history() -> tuple[History, float]:
    """One node is drained and leaves, one is lost, and one is killed and joins again; and the last note."""
    history = History()
    history.add(TokenRevoked("jti", at(900)), of=None, version=None, by="alice")  # at 1
    history.join("n1")  # at 2
    history.join("n2")  # at 3
    history.drain("n1")  # at 4
    history.about_node(NodeLost("n2", 1, at(60)), after_s=96)  # at 100
    history.leave("n1")  # at 101
    history.join("n1", after_s=899)  # at 1,000
    history.join("n1", unclean=True, last_seen_at=at(2_000), no_node_since=at(2_000), after_s=2_000)
    return history, 3_100


@contextmanager
def noted(told: tuple[History, float]) -> Iterator[sqlite3.Connection]:
    history, noted_s = told
    with ledger_of(history.facts) as connection:
        connection.execute(WRITE_NOTE, ("{}", at(noted_s)))
        yield connection


OF_SERVER = """
0 -    stopped -
1 -    running 2
4 -    running 2
4 60   running 2
4 61   unknown 60
4 999  unknown 60
5 -    running 1000
6 -    stopped 1001
6 1500 stopped 1001
7 -    running 2001
8 -    running 2001
8 2150 running 2001
8 9000 unknown 2100
"""
OF_NODES = """
1 -    stopped -
1 1    stopped -
2 -    running 2    n1 joined 2
3 -    running 2    n1 joined 2    n2 joined 3
4 60   running 2    n1 draining 4  n2 joined 3
4 61   running 2    n1 draining 4  n2 unknown 60
5 -    running 2    n1 draining 4  n2 lost 100
6 500  stopped 101  n1 left 101    n2 lost 100
7 -    running 1000 n1 joined 1000 n2 lost 100
7 2000 running 1000 n1 joined 1000 n2 lost 100
7 2001 unknown 2000 n1 unknown 2000 n2 lost 100
8 3200 running 3000 n1 joined 3000 n2 lost 100
8 9000 unknown 3100 n1 unknown 3100 n2 lost 100
"""
"""Position, and the asked time if there was one; the state of the server and of nodes, and since when."""


@pytest.mark.parametrize(("told", "moments"), [(server_history, OF_SERVER), (node_history, OF_NODES)])
def test_presence_at_moment(told: Callable[[], tuple[History, float]], moments: str) -> None:
    for row in filter(None, moments.splitlines()):
        position, time, state, since, *nodes = row.split()
        with noted(told()) as connection:
            found = liveness_at(connection, int(position), None if time == "-" else at(int(time)))
            connection.execute("DELETE FROM presence")  # which replay does not read
            replayed = replay(connection, position if time == "-" else at(int(time)))[0].server
        shares = zip(nodes[::3], nodes[1::3], nodes[2::3], strict=True)
        assert replayed == Liveness(
            ServerState(state),
            None if since == "-" else at(int(since)),
            tuple(SharingLiveness(node, NodeState(phase), at(int(then))) for node, phase, then in shares),
        ), row
        assert found == replayed or time == "9000"  # a running server knows that it is there


def test_node_that_ended_long_before_another_joined_is_not_shown() -> None:
    history = History()
    for node in ("n1", "n2", "n3"):
        history.join(node)
    history.leave("n1")  # at 4
    history.join("n2", unclean=True, after_s=KEPT_S)
    history.join("n3", unclean=True)
    with ledger_of(history.facts) as connection:
        shown = [[node.id for node in liveness_at(connection, position).servers] for position in (5, 6)]
    assert shown == [["n1", "n2", "n3"], ["n2", "n3"]]


def test_time_travel_and_replay_say_whether_server_ran() -> None:
    with noted(server_history()) as connection:
        assert liveness_at(connection, 8, at(10**9)) == Liveness(RUNNING, at(2_001))
        assert replay(connection, None)[0].server == Liveness(UNKNOWN, at(2_100))
        connection.rollback()
        assert NOTE_EVERY_S <= 60
        for time, position, server, state in (
            (500, 4, Liveness(UNKNOWN, at(60)), "loaded"),
            (1_500, 6, Liveness(STOPPED, at(1_001)), "lost"),
        ):
            moment, models = read_moment(connection, at(time), models_at)
            assert (moment.position, moment.server) == (position, server)
            assert [model.row.state for model in models] == [state]


# Damage, and beside the writer.


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("substr(body, 9)", "history of 'digits' is damaged"),
        ("'5'", "history of 'digits' is damaged"),
        ("replace(body, '3', '2')", "is not its load"),
        ("replace(body, '3', '99')", "99 is not its load"),
    ],
)
def test_damaged_history_is_named_rebuilt_and_no_part_of_a_replay(damage: str, problem: str) -> None:
    history = History()
    history.load("L")  # 1 to 3
    history.load("O", of="other")
    with ledger_of(history.facts) as connection:
        before, replayed = models_at(connection, 3), replay(connection, "3")[1].models
        connection.rollback()
        changed = f"UPDATE model_history SET body = {damage} WHERE position = 3"
        assert connection.execute(changed).rowcount == 1
        with pytest.raises(LogUnavailable, match=problem):
            models_at(connection, 3)
        assert replay(connection, "3")[1].models == replayed
        connection.rollback()
        storage.rebuild(connection)
        assert models_at(connection, 3) == before


async def test_past_is_read_beside_the_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(path, now=lambda: START, boottime=float) as log, open_past(path) as past:

        async def read(at: str, query: Callable[[sqlite3.Connection, int], T]) -> tuple[Moment, T]:
            return await past.run(partial(read_moment, at=at, query=query))

        await write(log, 3)
        asked = [read(str(position), models_at) for position in (1, 2, 3)]
        assert [moment.position for moment, _ in await asyncio.gather(*asked)] == [1, 2, 3]
        await write(log, 1, first=4)
        assert (await read("4", models_at))[0] == Moment(4, log.head.recorded_at)
        assert (await read("0", partial(jobs_at, query=JobQuery())))[1] == []
        assert await read("4", partial(job_at, job_id="none")) == (Moment(4, log.head.recorded_at), None)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        monkeypatch.setattr(readonly, "BUSY_S", 0)
        async with open_past(path) as past:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(LogUnavailable, match="locked"):  # and not damaged
                await past.run(partial(read_moment, at="4", query=models_at))


async def test_cancelled_query_of_the_past_keeps_its_turn(path: Path) -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), list[str]()

    def wait(_: sqlite3.Connection) -> None:
        began.set()
        assert goes_on.wait(LIMIT_S)
        ended.append("first")

    async with opened(path), open_past(path) as past:
        first = asyncio.create_task(past.run(wait))
        assert await asyncio.to_thread(began.wait, LIMIT_S)
        second = asyncio.create_task(past.run(lambda _: ended.append("second")))
        third = asyncio.create_task(past.run(lambda _: ended.append("third")))
        await asyncio.sleep(0)
        for task in (first, second):
            task.cancel()
        await asyncio.wait([first, second])
        assert ended == []
        goes_on.set()
        await third
    assert ended == ["first", "third"]
