"""The queues of the live state are what looking through all its jobs would give, in a group and after it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, MODEL, History, as_event, drafts

from events.jobs import Job
from events.state import Attempt, State, in_queue
from events.types import Draft

GROUPS = st.lists(st.tuples(st.lists(drafts(), min_size=1, max_size=6), st.booleans()), max_size=8)
"""Groups of facts, and whether each becomes durable."""


def unended(state: State, model_id: str | None) -> list[Job]:
    """Look through all jobs."""
    jobs = [job for job in state.jobs.values() if not job.ended and model_id in (None, job.model_id)]
    return sorted(jobs, key=lambda job: job.created_position)


def assert_queues_are_right(state: State) -> None:
    assert state.unended() == unended(state, None)
    assert state.backlog == len(unended(state, None))
    for model_id in ("m", "n", "never"):
        assert state.unended(model_id) == unended(state, model_id)
        assert state.queue(model_id) == [job for job in unended(state, model_id) if in_queue(job)]


@FEWER
@given(GROUPS)
def test_the_jobs_that_have_not_ended_are_those_whatever_was_tried(
    groups: Sequence[tuple[list[Draft], bool]],
) -> None:
    state = State()
    for group, durable in groups:
        before = (state.unended(), state.backlog)
        attempt = Attempt(state)
        for draft in group:
            position = attempt.state.position + 1
            attempt.state.apply(as_event(draft, position, position))
            assert_queues_are_right(attempt.state)
        assert (state.unended(), state.backlog) == before
        if durable:
            attempt.commit()
            assert all(state.queues.values())  # no model leaves anything behind
        assert_queues_are_right(state)
        assert State(state.position, state.recorded_at, state.models, state.jobs) == state


@FEWER
@given(st.lists(drafts(), max_size=25))
def test_the_jobs_that_have_not_ended_are_those_though_no_ended_one_is_forgotten(told: list[Draft]) -> None:
    state = State()
    for position, draft in enumerate(told, 1):
        state.apply(as_event(draft, position, position))
        assert_queues_are_right(state)


@pytest.mark.parametrize("forget", [False, True], ids=["remembered", "forgotten"])
def test_an_id_that_is_requested_again_after_its_end_is_the_newest_job(forget: bool) -> None:  # noqa: FBT001
    history = History()
    history.ask_load("L")
    history.ask_load("M")
    history.end_cancelled("L")
    if forget:
        history.state.forget_ended(list(history.state.jobs.values()))
    history.ask_load("L")
    assert [job.id for job in history.state.queue(MODEL)] == ["M", "L"]
