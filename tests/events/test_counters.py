"""Counters for metrics: from histories, and from a log whose disk fails; histograms and labels."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, PLAIN, History, fold, opened, write
from support.ledgers import lose_connection
from support.strategies import drafts

from events.counters import (
    LOAD_STAGES,
    MAX_CODES,
    OTHER_CODE,
    OTHERS,
    Histogram,
    HistogramSnapshot,
    ModelLabels,
    Tally,
)
from events.errors import LogUnavailable
from events.state import State, Transaction
from events.types import AccessDenied, Cause, Draft, Durations, LoadStarted, ModelLoaded, ModelSettingsChanged


def counted(history: History) -> Tally:
    state, tally = State(), Tally()
    for event in history.facts:
        tally.count([event], state.apply(event).jobs.values())
    return tally


def count(observed: HistogramSnapshot) -> int:
    return sum(observed.counts)


def test_ended_job_is_counted_by_cause_and_status() -> None:
    history = History()
    history.load("a")
    history.ask_load("b", cause=Cause.DEMAND)
    history.fail_load("b", "invalid_model")
    history.ask_load("c")
    history.end_cancelled("c")
    history.ask_load("waits")
    history.ask_load("settings")  # a job, but no load
    history.add(ModelSettingsChanged("a", 60, pinned=True), "settings")
    history.unload("d", "a", cause=Cause.IDLE)
    tally = counted(history)
    assert tally.loads == {("request", "completed"): 2, ("demand", "failed"): 1, ("request", "cancelled"): 1}
    assert tally.unloads == {("idle", "completed"): 1}
    assert tally.failures == {"invalid_model": 1}
    counts = {status: count(each.snapshot()) for status, each in tally.load_s.items()}
    assert counts == {"completed": 1, "failed": 1, "cancelled": 1}
    assert tally.load_s["completed"].snapshot().total_s == 2  # a second passes before each fact
    assert tally.unload_s["completed"].snapshot().total_s == 2
    assert tally.events["LoadRequested"] == 5
    assert tally.events.total() == len(history.facts)


def test_load_is_counted_by_stage() -> None:
    history = History()
    history.load("a")
    history.ask_load("b", of="n")
    history.add(ModelLoaded((), ("w",), 1, 1, Durations(1_000_000, 2, 3, 4, 5, 6, 7, 8)), "b", of="n")
    tally = counted(history)
    assert {stage: round(tally.stage_s[stage] * 1e6) for stage in LOAD_STAGES} == {
        "waiting": 1_000_001,
        "copying": 8,
        "starting": 4,
        "loading": 6,
        "hashing": 8,
        "warming_up": 5,
        "measuring": 11,
    }


def test_exits_restarts_and_denied_requests_are_counted() -> None:
    history = History()
    history.load("a")
    history.kill_worker("w-a")
    history.load("b", cause=Cause.RECOVERY)
    history.kill_worker("w-b")
    history.ask_load("c", cause=Cause.RECOVERY)
    history.fail_load("c", "code")
    for times in (3, 4):
        history.add(AccessDenied("POST /", times), of=None, version=None, by="eve")
    for number in range(MAX_CODES + 4):
        history.ask_load(f"j{number}")
        history.fail_load(f"j{number}", f"code{number}")
    tally = counted(history)
    assert (tally.exits, tally.restarts, tally.denied) == ({MODEL: 2}, {MODEL: 1}, 7)
    assert len(tally.failures) == MAX_CODES + 1
    assert tally.failures[OTHER_CODE] == 5


def test_load_after_an_eviction_is_counted_as_a_reload() -> None:
    history = History()
    for number, cause in enumerate((Cause.EVICTION, Cause.IDLE, Cause.EVICTION)):
        history.load(f"a{number}", cause=Cause.DEMAND)
        history.unload(f"out{number}", f"a{number}", cause=cause)
    history.ask_load("fails", cause=Cause.DEMAND)
    history.fail_load("fails", "code")  # the next one brings it back
    history.load("again", cause=Cause.DEMAND)
    history.load("first", of="other", cause=Cause.DEMAND)
    history.unload("evicts", "first", of="other", cause=Cause.EVICTION)
    history.load("back", of="other")  # whoever asks for it
    tally = counted(history)
    assert tally.reloads == {MODEL: 2, "other": 1}


def test_load_after_a_later_unload_by_a_person_is_no_reload() -> None:
    history = History()
    history.load("a")
    history.unload("evicts", "a", cause=Cause.EVICTION)
    history.unload("asked", "a")  # of a model that is not loaded
    history.load("b")
    assert not counted(history).reloads


@FEWER
@given(st.lists(drafts(), max_size=30), st.integers(1, 7))
def test_counts_do_not_depend_on_transaction_size(recorded: list[Draft], size: int) -> None:
    alone, together = (count_in_groups(recorded, each) for each in (1, size))
    assert alone == together
    assert alone.pop("events").total() == len(recorded)


def count_in_groups(recorded: list[Draft], size: int) -> dict[str, Any]:
    state, tally = State(), Tally()
    events = fold(recorded).facts
    for first in range(0, len(events), size):
        attempt = Transaction(state)
        for event in events[first : first + size]:
            attempt.apply(event)
        attempt.commit()
        tally.count(events[first : first + size], attempt.changes.jobs.values())
    histograms = {**tally.load_s, **{f"unload {key}": each for key, each in tally.unload_s.items()}}
    names = ("events", "loads", "unloads", "failures", "exits", "restarts", "reloads", "denied")
    return {name: getattr(tally, name) for name in names} | {
        name: each.snapshot().counts for name, each in histograms.items()
    }


async def test_appends_commits_and_failures_are_counted(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
        assert count(log.tally.append_s.snapshot()) == 3
        assert count(log.tally.commit_s.snapshot()) == 3
        assert log.tally.append_s.snapshot().total_s >= log.tally.commit_s.snapshot().total_s > 0
        await lose_connection(log)
        with pytest.raises(LogUnavailable):
            await write(log, 1, first=4)
        assert log.tally.write_failures >= 1
        assert log.tally.events == {LoadStarted.TYPE: 3}
        await write(log, 1, first=4)
        assert log.tally.events == {LoadStarted.TYPE: 4}
        assert log.waiting == 0


# Histograms and labels.

BOUNDS = (0.001, 0.1, 1.0, 60.0)
SECONDS = st.floats(0, 1e6) | st.sampled_from(BOUNDS)


@PLAIN
@given(st.lists(SECONDS))
def test_histogram_counts_into_first_bucket_that_holds(times: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    before = histogram.snapshot()
    for seconds in times:
        histogram.observe(seconds)
    seen = histogram.snapshot()
    for place, bound in enumerate(BOUNDS):
        assert sum(seen.counts[: place + 1]) == sum(seconds <= bound for seconds in times)
    assert (sum(before.counts), sum(seen.counts)) == (0, len(times))
    assert abs(seen.total_s - sum(times)) <= 1e-6 * sum(times)


@PLAIN
@given(st.lists(st.sampled_from("abcdefgh")), st.integers(0, 8))
def test_model_keeps_its_label_up_to_limit(asked: list[str], most: int) -> None:
    names = ModelLabels(most)
    told = [(model_id, names.of(model_id)) for model_id in asked]
    assert all(names.of(model_id) == label for model_id, label in told)
    own = {label for _, label in told} - {OTHERS}
    assert len(own) == min(most, len(set(asked)))
    assert all(label in (model_id, OTHERS) for model_id, label in told)
