"""The fold of models and unended jobs alone agrees with that of the live state."""

from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, as_event, drafts
from support.ledgers import told_history

from events import jobs, models
from events.jobs import Job
from events.state import Entities, State
from events.types import TYPES, Event


def ended_in_state(state: State, event: Event) -> list[Job]:
    """Fold an event into a live state as the writer does, and return the jobs that ended with it."""
    changed = state.apply(event).jobs.values()
    state.forget_ended(changed)
    return [job for job in changed if job.ended]


def agree(events: list[Event]) -> None:
    state, entities = State(), Entities()
    for event in events:
        ended = entities.apply(event)
        assert ended_in_state(state, event) == ([] if ended is None else [ended])
        assert entities.models == state.models
        assert entities.jobs == state.jobs


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_it_agrees_with_the_live_state_whatever_is_folded(told: list[object]) -> None:
    agree([as_event(draft, number, number) for number, draft in enumerate(told, 1)])  # type: ignore[arg-type]


def test_it_agrees_with_the_live_state_on_a_story() -> None:
    agree(told_history(rounds=3))


def test_it_goes_on_from_models_and_jobs() -> None:
    events = told_history()
    whole = Entities()
    for middle, event in enumerate(events, 1):
        whole.apply(event)
        rest = Entities(whole.models.values(), whole.jobs.values())
        for later in events[middle:]:
            rest.apply(later)
        assert (len(rest.models), len(rest.jobs)) == (3, 1)


def test_each_type_says_what_it_does_to_models_and_jobs() -> None:
    kinds = set(TYPES.values())
    assert {kind.TYPE for kind in kinds - set(models.STEPS)} == {"ServerStarted", "AccessDenied"}
    assert {kind.TYPE for kind in kinds - set(jobs.STEPS) - set(jobs.REQUESTS)} == {
        *("ServerStarted", "ServerStopped", "AccessDenied")
    }
