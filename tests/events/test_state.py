"""The live state: its queues, the active model, and what holds of folding any events."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import FEWER, MODEL, History, as_event, fold, opened
from support.history import given as given_facts
from support.ledgers import FAST_FOLDER, rows_of, sample_history, store_events
from support.strategies import drafts

from events import jobs, models
from events.audit.verify import verify
from events.codec import encode_event
from events.jobs import Job
from events.models import Model
from events.registers import OF_REGISTERS
from events.sqlite.schema import connect
from events.state import Entities, State, Transaction, has_turn
from events.types import SCHEMA, TYPES, Cause, Draft, Event, Unknown

# Queues of unended jobs.

GROUPS = st.lists(st.tuples(st.lists(drafts(), min_size=1, max_size=6), st.booleans()), max_size=8)
"""Groups of facts, and whether each becomes durable."""


def unended(state: State, model_id: str | None) -> list[Job]:
    """Look through all jobs."""
    found = [job for job in state.jobs.values() if not job.ended and model_id in (None, job.model_id)]
    return sorted(found, key=lambda job: job.created_position)


def assert_queues_are_right(state: State) -> None:
    assert state.unended() == unended(state, None)
    assert state.backlog == len(unended(state, None))
    for model_id in ("m", "n", "never"):
        assert state.unended(model_id) == unended(state, model_id)
        assert state.queue(model_id) == [job for job in unended(state, model_id) if has_turn(job)]


@FEWER
@given(GROUPS)
def test_queues_hold_unended_jobs_in_any_transaction(groups: Sequence[tuple[list[Draft], bool]]) -> None:
    state = State()
    for group, durable in groups:
        before = (state.unended(), state.backlog)
        attempt = Transaction(state)
        for draft in group:
            position = attempt.state.position + 1
            attempt.apply(as_event(draft, position, position))
            assert_queues_are_right(attempt.state)
        assert (state.unended(), state.backlog) == before
        if durable:
            attempt.commit()
            assert all(state.queues.values())  # no model leaves anything behind
        assert_queues_are_right(state)
        same = State(state.position, state.recorded_at, state.models, state.jobs, registers=state.registers)
        assert same == state


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_ended_jobs_may_be_forgotten(events: list[Draft]) -> None:
    remembering, forgetting = History(), History()
    for number, draft in enumerate(events, 1):
        event = as_event(draft, number, number)
        remembering.state.apply(event)
        assert_queues_are_right(remembering.state)
        forgetting.state.forget_ended(forgetting.state.apply(event).jobs.values())
    assert remembering.state.models == forgetting.state.models
    assert remembering.state.unended() == forgetting.state.unended()
    assert_queues_are_right(State(jobs=dict(reversed(list(remembering.state.jobs.items())))))


@pytest.mark.parametrize("forget", [False, True])
def test_repeated_id_after_end_is_newest_job(forget: bool) -> None:  # noqa: FBT001
    history = given_facts("request request_v2 cancel_L")
    assert State(jobs=history.state.jobs).queues == {MODEL: (history.job("L2"),)}
    if forget:
        history.state.forget_ended(list(history.state.jobs.values()))
    history.ask_load("L")
    assert [job.id for job in history.state.queue(MODEL)] == ["L2", "L"]


# The active model.


VERBS: dict[str, Callable[[History, str, str], object]] = {
    "load": lambda h, model, job: h.load(job, of=model),
    "demand": lambda h, model, job: h.load(job, of=model, cause=Cause.DEMAND),
    "recover": lambda h, model, job: h.load(job, of=model, cause=Cause.RECOVERY),
    "restore": lambda h, model, job: h.load(job, of=model, cause=Cause.RESTART),
    "return": lambda h, model, job: h.load(job, of=model, cause=Cause.SWAP),
    "request": lambda h, model, job: h.ask_load(job, of=model),
    "start": lambda h, model, job: h.start_load(job, of=model),
    "request_unload": lambda h, model, job: h.ask_unload(job, h.serving(model).load_job_id, of=model),
    "start_unload": lambda h, model, job: h.start_unload(job, of=model),
    "unload": lambda h, model, job: h.unload(job, h.serving(model).load_job_id, of=model),
    "crash": lambda h, model, _: h.kill_worker(*h.serving(model).worker_ids, of=model),
    "restart": lambda h, *_: h.restart(),
}
CONTINUES = {"start", "start_unload", "crash", "restart"}
"""Verbs that go on with the job of the verb before."""


def tell(history: History, words: str) -> History:
    """Tell facts of several models, `verb:model` each; `restart` concerns all."""
    job = ""
    for number, word in enumerate(words.split()):
        verb, _, model = word.partition(":")
        job = job if verb in CONTINUES else f"{verb}{number}"
        VERBS[verb](history, model, job)
    return history


ACTIVE: list[tuple[str, str | None]] = [
    ("", None),
    ("request:a start:a", None),
    ("load:a", "a"),
    ("load:a load:b", "b"),
    ("load:a load:b load:a", "a"),
    ("load:a demand:b", "b"),
    ("load:a load:b request_unload:b", "b"),
    ("load:a load:b request_unload:b start_unload:b", "b"),
    ("load:a load:b unload:b", "a"),
    ("load:a load:b unload:a", "b"),
    ("load:a load:b unload:b unload:a", None),
    ("load:a load:b crash:b", "a"),
    ("load:a load:b crash:b recover:b", "b"),
    ("load:a load:b crash:a recover:a", "b"),
    ("load:a load:b restart", None),
    ("load:a load:b restart restore:b restore:a", "b"),
    ("load:a load:b return:a", "b"),
    ("load:a load:b load:c restart restore:c restore:b restore:a unload:c", "b"),
    ("load:a load:b unload:a load:a", "a"),
]


@pytest.mark.parametrize(("facts", "active"), ACTIVE)
def test_active_model(facts: str, active: str | None) -> None:
    found = tell(History(), facts).state.active()
    assert (found.id if found else None) == active


# `Entities` folds the same, faster.


@FEWER
@given(st.lists(drafts(), max_size=30).map(lambda events: fold(events).facts))
@example(sample_history(rounds=3))
def test_entities_agree_with_state(events: Sequence[Event]) -> None:
    state, entities = State(), Entities()
    for event in events:
        ended = entities.apply(event)
        changed = state.apply(event).jobs.values()
        state.forget_ended(changed)
        assert [job for job in changed if job.ended] == ([] if ended is None else [ended])
        assert entities.models == state.models
        assert entities.jobs == state.jobs
        assert entities.registers == state.registers


def test_stop_keeps_queue_of_each_model() -> None:
    history = tell(History(), "request:a start:a request:a request:b request:a")
    before = [job.id for job in history.state.unended()]
    history.stop()
    assert [job.id for job in history.state.unended()] == before
    assert history.state.backlog == len(before) == 4
    history.restart(unclean=False)
    assert [job.id for job in history.state.unended("a")] == [each for each in before if each != "request3"]


def test_every_type_has_a_fold() -> None:
    of_no_job = {
        *("ServerStarted", "ServerStopped", "AccessDenied", "PolicyInForce", "LoadJoined", "UnloadJoined"),
        *("ClockStepped", "RollbackAccepted", "EventsDiscarded", "VersionAdded", "VersionRemoved"),
        *("TokenIssued", "TokenRevoked", "SignInLinkIssued", "SignInLinkUsed"),
        *("NodeJoined", "NodeDraining", "NodeLeft", "NodeLost", "LabelSet", "LabelRemoved"),
        *("VersionApproved", "ApprovalWithdrawn", "RecordsClosed", "RecordsErased"),
    }
    assert {kind.__name__ for kind in {*jobs.STEPS, *jobs.REQUESTS}} == TYPES.keys() - of_no_job
    of_no_model = (of_no_job | {"CancelRequested", "LoadPlaced"}) - {"LoadJoined"}
    assert {kind.__name__ for kind in models.STEPS} == TYPES.keys() - of_no_model
    assert not {*models.STEPS, *jobs.STEPS} & OF_REGISTERS


# What this release does not know changes nothing.

HISTORIES = st.lists(drafts(), max_size=30).map(lambda events: fold(events).facts)


def fold_events(events: Sequence[Event]) -> State:
    state = State()
    for event in events:
        state.apply(event)
    return state


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5)
OBJECTS = st.dictionaries(st.text(max_size=5), LEAVES | st.lists(LEAVES, max_size=2), max_size=3)
NEW_NAMES = st.text(min_size=1, max_size=8).map(lambda name: f"new_{name}")
UNKNOWN = st.builds(Unknown, NEW_NAMES, st.integers(1, 3), OBJECTS) | st.builds(
    Unknown, st.sampled_from(sorted(TYPES)), st.integers(SCHEMA + 1, SCHEMA + 3), OBJECTS
)


async def models_after_start(path: Path) -> Mapping[str, Model]:
    async with opened(path) as log:
        await log.server_started()
        return log.state.models


@FEWER
@given(HISTORIES, st.data())
def test_events_of_later_release_are_kept_and_skipped(events: list[Event], draws: st.DataObject) -> None:
    known = draws.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    pairs = list(zip(events, known, strict=True))
    written = [event if is_known else replace(event, data=draws.draw(UNKNOWN)) for event, is_known in pairs]
    without = fold_events([event for event, is_known in pairs if is_known])
    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        with closing(connect(path)) as connection:
            state = store_events(connection, written)
        assert (state.models, state.unended()) == (without.models, without.unended())
        verification = verify(path)
        assert verification.verified, verification.finding
        assert [body for _, body, _ in rows_of(path)] == list(map(encode_event, written))
        assert asyncio.run(models_after_start(path)) == without.models
