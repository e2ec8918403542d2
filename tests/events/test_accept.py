"""What the writer decides, as tables: given these facts, this command is accepted, joined or refused.

`L…` are loads and `U…` unloads of the model `digits`; new events are called `new`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from support.events import FEWER, MODEL, History, as_event, at, drafts, ids

from events.accept import MAX_QUEUE, Accepted, Decision, Existing, Refused, accept
from events.commands import Command, FileStat, Record, RequestCancel, RequestLoad, RequestUnload
from events.jobs import LoadParameters, load_parameters
from events.state import State
from events.types import Cause, Draft, Idempotency, LoadRequested, LoadStarted, UnloadRequested, recorded

KEY = Idempotency("5f" * 32, "c0" * 32)
FILES = (FileStat("model.onnx", 4_096, 1),)
CHANGED = (FileStat("model.onnx", 4_096, 2),)

Told = Callable[[History], object]

STEPS: dict[str, Told] = {
    "ask": lambda h: h.ask_load("L"),
    "start": lambda h: h.start_load("L"),
    "load": lambda h: h.load("L"),
    "fail": lambda h: h.fail_load("L"),
    "ask_swap": lambda h: h.ask_load("L2", version=2),
    "start_swap": lambda h: h.start_load("L2", version=2),
    "end_swap": lambda h: h.end_load("L2", version=2),
    "make_way": lambda h: h.unload("S", "L", cause=Cause.SWAP),
    "fail_swap": lambda h: h.fail_load("L2", version=2),
    "swap": lambda h: h.load("L2", version=2),
    "ask_end_of_old": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_end_of_old": lambda h: h.start_unload("S"),
    "ask_unload": lambda h: h.ask_unload("U", "L"),
    "start_unload": lambda h: h.start_unload("U"),
    "end_unload": lambda h: h.end_unload("U"),
    "force": lambda h: h.ask_unload("F", "L", force=True),
    "ask_again": lambda h: h.ask_load("L3"),
    "die": lambda h: h.kill_worker("w-L"),
    "load_pair": lambda h: h.load_pair("P"),
    "die_1": lambda h: h.kill_worker("P1"),
    "pair_is_back": lambda h: h.load_pair("R", cause=Cause.RECOVERY),
    "ask_back": lambda h: h.ask_load("R", cause=Cause.RECOVERY),
    "start_back": lambda h: h.start_load("R"),
    "restart": lambda h: h.restart(),
    "cancel": lambda h: h.ask_cancel("L"),
    "cancel_swap": lambda h: h.ask_cancel("L2"),
    "cancel_unload": lambda h: h.ask_cancel("U"),
    "load_other": lambda h: h.load("O", of="other"),
    "ask_other": lambda h: h.ask_load("O", of="other"),
    "ask_unload_other": lambda h: h.ask_unload("P", "O", of="other"),
}


def told(words: str) -> State:
    history = History()
    for word in words.split():
        STEPS[word](history)
    return history.state


def decide(state: State, command: Command) -> Decision:
    return accept(state, command, lambda: "new", at(9_999))


def load(version: int = 1, files: tuple[FileStat, ...] = FILES, cause: Cause = Cause.REQUEST) -> RequestLoad:
    return RequestLoad(MODEL, version, files, "alice", cause=cause)


def several(instances: int) -> RequestLoad:
    return replace(load(), parameters=LoadParameters(instances=instances), asked=frozenset({"instances"}))


BATCHES = LoadParameters(timeout_s=5, max_batch_size=8)
BATCHING = frozenset({"max_batch_size"})


def unload(model_id: str | None = MODEL, *, force: bool = False) -> RequestUnload:
    return RequestUnload(model_id, "alice", force=force)


def test_a_load_that_repairs_a_model_makes_it_what_it_was_but_for_what_is_asked() -> None:
    for asked, instances in ((load(), 2), (several(3), 3), (several(1), 1)):
        decision = decide(told("load_pair die_1"), asked)
        assert isinstance(decision, Accepted)
        [draft] = decision.drafts
        assert isinstance(draft.data, LoadRequested)
        assert draft.data.instances == instances


def kept(state: State, command: RequestLoad) -> tuple[str | None, LoadParameters]:
    """Return the load whose workers are kept for what is accepted, and the parameters that are recorded."""
    decision = decide(state, command)
    assert isinstance(decision, Accepted)
    [draft] = decision.drafts
    assert isinstance(draft.data, LoadRequested)
    return draft.data.keeps_load_job_id, load_parameters(draft.data)


def asking(command: RequestLoad, **parameters: Any) -> RequestLoad:
    return replace(command, parameters=LoadParameters(**parameters), asked=frozenset(parameters))


def test_how_long_a_loaded_model_stays_is_changed_by_a_load_that_keeps_its_workers() -> None:
    loaded = told("load_pair")
    assert kept(loaded, asking(load(), pinned=True)) == ("P", LoadParameters(instances=2, pinned=True))
    assert kept(loaded, asking(load(), keep_alive_s=5)) == ("P", LoadParameters(instances=2, keep_alive_s=5))
    asked = asking(load(), pinned=True, priority="low", timeout_s=9)
    as_it_is = LoadParameters(instances=2, pinned=True, priority="low", timeout_s=9)
    assert kept(loaded, asked) == ("P", as_it_is)


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ("load", asking(load(), pinned=True, instances=3)),
        ("load", asking(load(), pinned=True, memory_limit_bytes=2**30)),
        ("load", asking(load(2), pinned=True)),
        ("load", asking(load(files=CHANGED), pinned=True)),
        ("load_pair die_1", asking(load(), pinned=True)),
        ("load die", asking(load(), pinned=True)),
        ("load restart", asking(load(), pinned=True)),
        ("load ask_unload", asking(load(), pinned=True)),
        ("", asking(load(), pinned=True)),
    ],
)
def test_nothing_is_kept_of_what_is_not_as_it_is_asked_for_when(facts: str, command: RequestLoad) -> None:
    keeps, parameters = kept(told(facts), command)
    assert keeps is None
    assert parameters.pinned


NEW = "new"

LOADS: list[tuple[str, str, RequestLoad, str]] = [
    ("nothing was there", "", load(), NEW),
    ("the same is pending", "ask", load(), "L"),
    ("the same is under way", "ask start", load(), "L"),
    ("the same is under way, whatever its files are now", "ask start", load(files=CHANGED), "L"),
    ("the same is loaded", "load", load(), "L"),
    ("the same is loaded, on demand", "load", load(cause=Cause.DEMAND), "L"),
    ("another version is loaded, on demand", "load", load(2, cause=Cause.DEMAND), "L"),
    ("another version is under way, on demand", "ask start", load(2, cause=Cause.DEMAND), "L"),
    ("another version is being unloaded, on demand", "load ask_unload", load(2, cause=Cause.DEMAND), NEW),
    ("it is loaded and is never to be idle", "load", asking(load(), keep_alive_s=-1), "L"),
    ("it is loaded and not pinned, as is asked", "load", asking(load(), pinned=False), "L"),
    ("it is loaded and is to be pinned", "load", asking(load(), pinned=True), NEW),
    ("it is loading, and is to be pinned", "ask start", asking(load(), pinned=True), "L"),
    ("its files have changed", "load", load(files=CHANGED), NEW),
    ("a file was added", "load", load(files=(*FILES, FileStat("weights.bin", 1, 1))), NEW),
    ("its files are gone", "load", load(files=()), NEW),
    ("another version is loaded", "load", load(2), NEW),
    ("another version is under way", "ask start", load(2), NEW),
    ("another model has the same version", "load_other", load(), NEW),
    ("the swap to it is pending", "load ask_swap", load(2), "L2"),
    ("the swap to it is under way", "load ask_swap start_swap", load(2), "L2"),
    ("the swap to it is done", "load swap", load(2), "L2"),
    (
        "the swap is done and the old version drains",
        "load swap ask_end_of_old start_end_of_old",
        load(2),
        "L2",
    ),
    ("the old version drains, and is wanted again", "load swap ask_end_of_old start_end_of_old", load(), NEW),
    ("it is loaded, but a swap away from it is pending", "load ask_swap", load(), NEW),
    ("an unload is pending", "load ask_unload", load(), NEW),
    ("an unload is under way", "load ask_unload start_unload", load(), NEW),
    (
        "an unload is under way and a load waits behind it",
        "load ask_unload start_unload ask_again",
        load(),
        "L3",
    ),
    ("a forced unload is pending", "ask start force", load(), NEW),
    ("it was unloaded", "load ask_unload end_unload", load(), NEW),
    ("it failed", "ask start fail", load(), NEW),
    ("its worker died", "load die", load(), NEW),
    ("both instances are loaded", "load_pair", load(), "P"),
    ("two are asked for, and one is loaded", "load", several(2), NEW),
    ("two are asked for, and one is pending", "ask", several(2), NEW),
    ("two are asked for, and both are loaded", "load_pair", several(2), "P"),
    ("one is asked for, and two are loaded", "load_pair", several(1), NEW),
    ("one is asked for, and is loaded", "load", several(1), "L"),
    ("batches are asked for", "load", replace(load(), parameters=BATCHES, asked=BATCHING), NEW),
    ("the model's defaults have changed to batches", "load", replace(load(), parameters=BATCHES), "L"),
    ("more time is asked for", "load", replace(load(), asked=frozenset({"timeout_s"})), "L"),
    ("an instance died", "load_pair die_1", load(), NEW),
    ("an instance died, and it is wanted on demand", "load_pair die_1", load(cause=Cause.DEMAND), NEW),
    ("an instance died, and it is to be whole", "load_pair die_1", load(cause=Cause.RECOVERY), NEW),
    ("an instance died, and the recovery is pending", "load_pair die_1 ask_back", load(), "R"),
    ("an instance died, and the recovery is done", "load_pair die_1 pair_is_back", load(), "R"),
    ("its worker died and its recovery is pending", "load die ask_back", load(), "R"),
    ("the server was started again with it lost", "load restart", load(), NEW),
    ("the server was started again amid the load", "ask start restart", load(), "L"),
    ("the same is pending, and being cancelled", "ask cancel", load(), NEW),
    ("the same is under way, and being cancelled", "ask start cancel", load(), NEW),
    ("the swap away from it is being cancelled, and may still win", "load ask_swap cancel_swap", load(), NEW),
    ("an unload is being cancelled, and may still win", "load ask_unload cancel_unload", load(), NEW),
]


@pytest.mark.parametrize(
    ("facts", "command", "job"), [row[1:] for row in LOADS], ids=[row[0] for row in LOADS]
)
def test_job_behind_a_load_when(facts: str, command: RequestLoad, job: str) -> None:
    decision = decide(told(facts), command)
    if job == NEW:
        assert isinstance(decision, Accepted)
        assert decision.job_id == NEW
    else:
        assert decision == Existing(job)


def test_an_accepted_load_is_one_event_with_all_that_was_asked_for() -> None:
    parameters = LoadParameters("high", 10, 20, 30, "auto", pinned=True, instances=2)
    command = RequestLoad(MODEL, 3, FILES, "alice", parameters, Cause.DEMAND, "e7", idempotency=KEY)
    assert decide(State(), command) == Accepted(
        (
            Draft(
                id=NEW,
                data=LoadRequested("high", 10, 20, 30, "auto", True, 2, Cause.DEMAND, "e7", KEY),
                actor="alice",
                job_id=NEW,
                model_id=MODEL,
                version=3,
            ),
        ),
        NEW,
    )


def test_the_order_of_files_does_not_make_a_reload() -> None:
    history = History()
    history.load("L")
    model = history.model()
    assert model.serving is not None
    files = tuple(structs.replace(model.serving.files[0], path=path) for path in "ba")
    serving = structs.replace(model.serving, files=files)
    history.state.models[MODEL] = structs.replace(model, serving=serving)
    stats = (FileStat("a", 4_096, 1), FileStat("b", 4_096, 1))
    assert decide(history.state, load(files=stats)) == Existing("L")
    assert decide(history.state, load(files=stats[::-1])) == Existing("L")


UNLOADS: list[tuple[str, str, RequestUnload, str]] = [
    # then: `new:X`, a new job that ends the load X; `U`, the job that is there; or the code of a refusal
    ("nothing was ever there", "", unload(), "not_loaded"),
    ("nothing was ever there, with force", "", unload(force=True), "not_loaded"),
    ("it is loaded", "load", unload(), "new:L"),
    ("it is loaded, with force", "load", unload(force=True), "new:L"),
    ("a load is pending", "ask", unload(), "not_loaded"),
    ("a load is under way", "ask start", unload(), "not_loaded"),
    ("a load is pending, with force", "ask", unload(force=True), "new:L"),
    ("a load is under way, with force", "ask start", unload(force=True), "new:L"),
    ("two loads wait, with force", "ask ask_swap", unload(force=True), "new:L"),
    ("it is in mid-swap", "load ask_swap start_swap", unload(), "new:L2"),
    ("a swap is pending", "load ask_swap", unload(), "new:L2"),
    ("it is in mid-swap, with force", "load ask_swap start_swap", unload(force=True), "new:L"),
    ("it makes way for a swap", "load ask_swap ask_end_of_old start_end_of_old", unload(), "new:L2"),
    ("it made way for a swap", "load ask_swap make_way", unload(), "new:L2"),
    ("it made way for a swap that is under way", "load ask_swap make_way start_swap", unload(), "new:L2"),
    ("it made way for a swap, with force", "load ask_swap make_way", unload(force=True), "new:L2"),
    ("it made way for nothing", "load ask_swap make_way start_swap fail_swap", unload(), "new:L"),
    ("it was swapped", "load swap", unload(), "new:L2"),
    (
        "it was swapped and the old version drains",
        "load swap ask_end_of_old start_end_of_old",
        unload(),
        "new:L2",
    ),
    (
        "it was swapped and the old version drains, with force",
        "load swap ask_end_of_old start_end_of_old",
        unload(force=True),
        "new:L2",
    ),
    ("an unload is pending", "load ask_unload", unload(), "U"),
    ("an unload is under way", "load ask_unload start_unload", unload(), "U"),
    ("an unload is pending, with force", "load ask_unload", unload(force=True), "new:L"),
    ("an unload is under way, with force", "load ask_unload start_unload", unload(force=True), "new:L"),
    ("a forced unload is pending", "load force", unload(), "F"),
    ("a forced unload is pending, with force", "load force", unload(force=True), "F"),
    ("a forced unload escalated one", "load ask_unload start_unload force", unload(), "F"),
    (
        "a forced unload escalated one, with force",
        "load ask_unload start_unload force",
        unload(force=True),
        "F",
    ),
    ("a forced unload ends a load", "ask start force", unload(), "F"),
    ("a load waits behind an unload", "load ask_unload start_unload ask_again", unload(), "new:L3"),
    (
        "a load waits behind an unload, with force",
        "load ask_unload start_unload ask_again",
        unload(force=True),
        "new:L",
    ),
    ("an unload is being cancelled", "load ask_unload cancel_unload", unload(), "new:L"),
    (
        "an unload has begun and was to be cancelled",
        "load ask_unload cancel_unload start_unload",
        unload(),
        "U",
    ),
    ("it was unloaded", "load ask_unload end_unload", unload(), "not_loaded"),
    ("it was unloaded, with force", "load ask_unload end_unload", unload(force=True), "not_loaded"),
    ("it failed", "ask start fail", unload(), "not_loaded"),
    ("it failed, with force", "ask start fail", unload(force=True), "not_loaded"),
    ("it is lost", "load die", unload(), "new:L"),
    ("it is lost, with force", "load die", unload(force=True), "new:L"),
    ("the server lost it", "load restart", unload(), "new:L"),
    ("the server died amid its unload", "load ask_unload start_unload restart", unload(), "U"),
    # The active model, where none is named.
    ("no model is named and nothing was loaded", "", unload(None), "nothing_loaded"),
    ("no model is named and nothing was loaded, with force", "", unload(None, force=True), "nothing_loaded"),
    ("no model is named and one is loaded", "load", unload(None), "new:L"),
    ("no model is named and two are loaded", "load_other load", unload(None), "new:L"),
    ("no model is named and two are loaded, the other last", "load load_other", unload(None), "new:O"),
    (
        "no model is named and the active one is being unloaded",
        "load_other load ask_unload",
        unload(None),
        "U",
    ),
    ("no model is named and one is only loading", "ask start", unload(None), "nothing_loaded"),
    ("no model is named and one is only loading, with force", "ask start", unload(None, force=True), "new:L"),
    ("no model is named and two wait, with force", "ask_other ask", unload(None, force=True), "new:O"),
    (
        "no model is named and one is loaded, another loading, with force",
        "load ask_other",
        unload(None, force=True),
        "new:L",
    ),
    ("no model is named and all are lost", "load restart", unload(None), "nothing_loaded"),
    ("no model is named and one was unloaded", "load ask_unload end_unload", unload(None), "nothing_loaded"),
    ("another model is loaded", "load_other", unload(), "not_loaded"),
    ("a name that is empty is no name for the active model", "load", unload(""), "not_loaded"),
]


@pytest.mark.parametrize(
    ("facts", "command", "outcome"), [row[1:] for row in UNLOADS], ids=[row[0] for row in UNLOADS]
)
def test_outcome_of_an_unload_when(facts: str, command: RequestUnload, outcome: str) -> None:
    decision = decide(told(facts), command)
    match decision:
        case Accepted((Draft(data=UnloadRequested(load_job_id=ended, force=force)),), job):
            assert outcome == f"new:{ended}"
            assert (job, force) == (NEW, command.force)
        case Existing(job):
            assert outcome == job
        case Refused(code, message):
            assert outcome == code
            assert message
        case _:
            pytest.fail(f"{decision}")


def test_an_accepted_unload_is_one_event_about_the_version_that_it_ends() -> None:
    command = RequestUnload(
        MODEL, "bob", force=True, cause=Cause.EVICTION, cause_event_id="e9", idempotency=KEY
    )
    assert decide(told("load swap"), command) == Accepted(
        (
            Draft(
                id=NEW,
                data=UnloadRequested(True, "L2", Cause.EVICTION, "e9", KEY),
                actor="bob",
                job_id=NEW,
                model_id=MODEL,
                version=2,
            ),
        ),
        NEW,
    )


def test_a_refusal_says_that_force_would_end_the_load() -> None:
    decision = decide(told("ask start"), unload())
    assert isinstance(decision, Refused)
    assert "force=true" in decision.message


ONLY: list[tuple[str, str, str, str]] = [
    ("it is loaded", "load", "L", "new:L"),
    ("it is lost", "load die", "L", "new:L"),
    ("the server lost it", "load restart", "L", "new:L"),
    ("nothing was ever there", "", "L", "not_loaded"),
    ("the load is pending", "ask", "L", "not_loaded"),
    ("the load is under way", "ask start", "L", "not_loaded"),
    ("another load is under way", "load ask_swap start_swap", "L", "not_loaded"),
    ("another load serves", "load swap", "L", "not_loaded"),
    ("it serves in the place of another", "load swap", "L2", "new:L2"),
    ("it serves, and the one before drains", "load swap ask_end_of_old start_end_of_old", "L2", "new:L2"),
    ("an unload is pending", "load ask_unload", "L", "not_loaded"),
    ("an unload is pending, and being cancelled", "load ask_unload cancel_unload", "L", "not_loaded"),
    ("an unload is under way", "load ask_unload start_unload", "L", "not_loaded"),
    ("a forced unload is pending", "load force", "L", "not_loaded"),
    ("it was unloaded", "load ask_unload end_unload", "L", "not_loaded"),
    ("it was loaded again", "load ask_unload end_unload load_pair", "L", "not_loaded"),
    ("its recovery is pending", "load die ask_back", "L", "not_loaded"),
    ("another model has it", "load_other", "O", "not_loaded"),
]


@pytest.mark.parametrize(
    ("facts", "only", "outcome"), [row[1:] for row in ONLY], ids=[row[0] for row in ONLY]
)
@pytest.mark.parametrize("force", [False, True], ids=["gently", "with force"])
def test_outcome_of_an_unload_of_one_load_and_no_newer_when(
    facts: str,
    only: str,
    outcome: str,
    force: bool,  # noqa: FBT001 - a column of the table
) -> None:
    command = RequestUnload(MODEL, "system", force=force, cause=Cause.IDLE, load_job_id=only)
    match decide(told(facts), command):
        case Accepted((Draft(data=UnloadRequested(load_job_id=ended)),), job):
            assert (f"new:{ended}", job) == (outcome, NEW)
        case Refused(code, message):
            assert code == outcome
            assert MODEL in message
        case decision:
            pytest.fail(f"{decision}")


def test_facts_are_recorded_as_they_are() -> None:
    drafts_given = (Draft("a", LoadStarted(1), "system"), Draft("b", LoadStarted(2), "system"))
    assert decide(State(), Record(drafts_given)) == Accepted(drafts_given)


# The queue's bound.


def queue_of(length: int) -> State:
    history = History()
    for number in range(length):
        history.ask_load(f"Q{number}", of=f"model{number}")
    return history.state


def test_the_queue_takes_256_jobs() -> None:
    assert MAX_QUEUE == 256
    assert isinstance(decide(queue_of(MAX_QUEUE - 1), load()), Accepted)


def test_what_is_wanted_on_demand_leaves_room_for_what_is_asked_for() -> None:
    on_demand = load(cause=Cause.DEMAND)
    assert isinstance(decide(queue_of(MAX_QUEUE // 2 - 1), on_demand), Accepted)
    assert isinstance(decide(queue_of(MAX_QUEUE // 2), on_demand), Refused)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_full_queue_refuses_what_people_ask_for_and_nothing_else(cause: Cause) -> None:
    decision = decide(queue_of(MAX_QUEUE), load(cause=cause))
    if cause in {Cause.REQUEST, Cause.DEMAND}:
        assert isinstance(decision, Refused)
        assert decision.code == "queue_full"
    else:
        assert isinstance(decision, Accepted)


def test_a_full_queue_still_joins_what_is_there() -> None:
    again = RequestLoad("model7", 1, FILES, "alice")
    assert decide(queue_of(MAX_QUEUE), again) == Existing("Q7")


def test_ended_jobs_take_no_room() -> None:
    history = History()
    for number in range(MAX_QUEUE):
        history.ask_load(f"Q{number}", of=f"model{number}")
    history.fail_load("Q7", of="model7")
    assert isinstance(decide(history.state, load()), Accepted)


def test_an_unload_is_taken_when_the_queue_is_full() -> None:
    history = History()
    history.load("L")
    for number in range(MAX_QUEUE):
        history.ask_load(f"Q{number}", of=f"model{number}")
    assert isinstance(decide(history.state, unload()), Accepted)


# Whatever happens.

MODELS = st.sampled_from(["m", "n", ""])
COMMANDS = st.builds(
    RequestLoad,
    MODELS,
    st.integers(1, 2),
    st.sampled_from([FILES, CHANGED, ()]),
    st.just("alice"),
    cause=st.sampled_from(Cause),
) | st.builds(
    RequestUnload,
    MODELS | st.none(),
    st.just("alice"),
    st.booleans(),
    st.sampled_from([cause for cause in Cause if cause is not Cause.SWAP]),  # names its load, as a fact
)


CODES = {
    "not_loaded",
    "nothing_loaded",
    "queue_full",
    "already_finished",
    "already_started",
    "idempotency_mismatch",
}
KEYS = st.none() | st.builds(Idempotency, st.sampled_from("kl"), st.sampled_from("fg"))
CANCELS = st.builds(RequestCancel, st.sampled_from(["job1", "job2", "job3", "a"]), st.just("alice"), KEYS)
SYSTEM_UNLOADS = st.builds(
    RequestUnload,
    MODELS,
    st.just("system"),
    cause=st.sampled_from([Cause.IDLE, Cause.EVICTION]),
    load_job_id=st.sampled_from(["job1", "job2", "a"]),
)
KEYED = st.builds(lambda command, key: replace(command, idempotency=key), COMMANDS, KEYS)


@FEWER
@given(
    st.lists(
        COMMANDS | KEYED | CANCELS | SYSTEM_UNLOADS | drafts().map(lambda draft: Record((draft,))),
        max_size=40,
    )
)
def test_whatever_is_commanded_accept_decides_and_names_jobs_that_exist(commands: list[Command]) -> None:
    state, new_id = State(), ids("job")
    for command in commands:
        decision = accept(state, command, new_id, at(state.position))
        match decision:
            case Accepted(accepted):
                for draft in accepted:
                    position = state.position + 1
                    state.apply(recorded(draft, position, at(position)))
            case Existing(job_id):
                serving = {model.serving.load_job_id for model in state.models.values() if model.serving}
                known = {key.job_id for key in state.keys.values()}
                assert job_id in {job.id for job in state.unended()} | serving | known
            case Refused(code, message):
                assert code in CODES
                assert message


@FEWER
@given(st.lists(drafts(), max_size=30), COMMANDS)
def test_the_same_command_twice_is_one_job(facts: list[Draft], command: RequestLoad | RequestUnload) -> None:
    history = History()
    for number, draft in enumerate(facts, 1):
        history.state.apply(as_event(draft, number, number))
    first = accept(history.state, command, lambda: "first", at(99))
    if isinstance(first, Accepted):
        (draft,) = first.drafts
        position = history.state.position + 1
        history.state.apply(recorded(draft, position, at(position)))
        second = accept(history.state, command, lambda: "second", at(99))
        assert second == Existing("first")
    else:
        assert accept(history.state, command, lambda: "second", at(99)) == first
