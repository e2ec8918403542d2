"""What is counted of what is recorded: from plain histories, and from a log whose disk fails."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, MODEL, History, at, drafts, opened, write

from events.commands import Record
from events.errors import LogUnavailable
from events.group import Waiting, decide
from events.series import Observed
from events.state import State
from events.store import Head
from events.tally import BARE, MAX_CODES, OTHER_CODE, STAGES, Tally
from events.types import AccessDenied, Cause, Draft, Durations, LoadStarted, ModelLoaded, Prepared


def counted(history: History) -> Tally:
    """Count a history as if each fact had become durable alone."""
    state, tally = State(), Tally()
    for event in history.facts:
        tally.count([event], state.apply(event).jobs.values())
    return tally


def count(observed: Observed) -> int:
    return sum(observed.counts)


def test_a_job_is_counted_once_when_it_ends_with_its_cause_outcome_and_time() -> None:
    history = History()
    history.load("a")
    history.ask_load("b", cause=Cause.DEMAND)
    history.fail_load("b", "invalid_model")
    history.ask_load("c")
    history.end_cancelled("c")
    history.ask_load("waits")
    history.unload("d", "a", cause=Cause.IDLE)
    tally = counted(history)
    assert tally.loads == {("request", "completed"): 1, ("demand", "failed"): 1, ("request", "cancelled"): 1}
    assert tally.unloads == {("idle", "completed"): 1}
    assert tally.failures == {"invalid_model": 1}
    assert {status: count(each.observed()) for status, each in tally.load_s.items()} == {
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
    }
    assert tally.load_s["completed"].observed().total_s == 2  # a second passes before each fact
    assert tally.unload_s["completed"].observed().total_s == 2
    assert tally.events["LoadRequested"] == 4
    assert tally.events.total() == len(history.facts)


def test_a_load_is_counted_by_its_form_and_by_what_took_its_time() -> None:
    history = History()
    history.load("a")
    durations = Durations(1_000_000, 2, 3, 4, 5, 6, 7)
    data = ModelLoaded((), ("w",), Prepared("prepacked", "ab"), 1, 1, durations)
    history.ask_load("b", of="n")
    history.add(data, "b", of="n")
    tally = counted(history)
    assert tally.forms == {BARE: 1, "prepacked": 1}
    assert {stage: round(tally.stage_s[stage] * 1e6) for stage in STAGES} == {
        "waiting": 1_000_001,
        "starting": 4,
        "loading": 6,
        "hashing": 8,
        "warming_up": 5,
        "measuring": 11,
    }


def test_what_only_changes_the_parameters_of_a_load_is_a_job_and_no_load() -> None:
    history = History()
    history.load("a")
    history.ask_load("b", keeps_load_job_id="a")
    history.add(ModelLoaded((), ("w-a",), None, 1, 1, Durations(0, 0, 0, 0, None, 0, 0)), "b")
    tally = counted(history)
    assert tally.loads == {("request", "completed"): 2}
    assert tally.forms == {BARE: 1}
    assert count(tally.load_s["completed"].observed()) == 1


def test_deaths_of_workers_and_what_comes_back_are_counted_by_model() -> None:
    history = History()
    history.load("a")
    history.kill_worker("w-a")
    history.load("b", cause=Cause.RECOVERY)
    history.kill_worker("w-b")
    history.ask_load("c", cause=Cause.RECOVERY)
    history.fail_load("c")
    tally = counted(history)
    assert tally.exits == {MODEL: 2}
    assert tally.restarts == {MODEL: 1}


def test_refused_requests_are_counted_as_often_as_they_were_made() -> None:
    history = History()
    for times in (3, 4):
        history.add(AccessDenied("POST /", times), of=None, version=None, by="eve")
    assert counted(history).denied == 7


def test_codes_without_end_are_counted_as_others() -> None:
    history = History()
    for number in range(MAX_CODES + 5):
        history.ask_load(f"j{number}")
        history.fail_load(f"j{number}", f"code{number}")
    failures = counted(history).failures
    assert len(failures) == MAX_CODES + 1
    assert failures[OTHER_CODE] == 5


@FEWER
@given(st.lists(drafts(), max_size=30), st.integers(1, 7))
def test_whatever_is_recorded_is_counted_alike_in_groups_of_any_size(
    recorded: list[Draft], size: int
) -> None:
    told = [_told_in_groups(recorded, each) for each in (1, size)]
    assert told[0] == told[1]
    assert told[0][0] == len(recorded)


def _told_in_groups(recorded: list[Draft], size: int) -> tuple[object, ...]:
    loop = asyncio.new_event_loop()
    state, tally, head = State(), Tally(), Head()
    try:
        for first in range(0, len(recorded), size):
            group = [
                Waiting(Record((draft,)), loop.create_future()) for draft in recorded[first : first + size]
            ]
            decided = decide(group, state, head, known={}, now=at(0), new_id=lambda: "new")
            decided.attempt.commit()
            head = decided.head
            tally.count(decided.events, decided.attempt.changes.jobs.values())
    finally:
        loop.close()
    histograms = [each.observed().counts for each in (*tally.load_s.values(), *tally.unload_s.values())]
    return (
        tally.events.total(),
        tally.events,
        tally.loads,
        tally.unloads,
        tally.failures,
        tally.forms,
        tally.exits,
        histograms,
    )


async def test_appends_and_transactions_are_timed_and_failed_ones_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path) as log:
        await write(log, 3)
        assert count(log.tally.append_s.observed()) == 3
        assert count(log.tally.commit_s.observed()) == 3
        assert log.tally.append_s.observed().total_s >= log.tally.commit_s.observed().total_s > 0
        assert log._database._connection is not None
        log._database._connection.execute("PRAGMA busy_timeout = 20")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailable):
                await write(log, 1, first=4)
            other.execute("ROLLBACK")
        assert log.tally.write_failures >= 1
        assert log.tally.events == {LoadStarted.TYPE: 3}
        await write(log, 1, first=4)
        assert log.tally.events == {LoadStarted.TYPE: 4}
        assert log.waiting == 0
