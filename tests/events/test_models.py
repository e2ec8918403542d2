"""The fold of models, as tables: given these facts, when one more comes, the model reads so.

`L…` are loads and `U…` unloads; the worker of the load `L` is `w-L`.
"""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.events import FEWER, MODEL, History, as_event, at, drafts, file, load_requested, model_loaded

from events.jobs import Failure, JobKind, LoadParameters
from events.models import (
    CRASH_LOOP,
    FORK_SERVER_DIED,
    INCIDENT_WINDOW_S,
    INSUFFICIENT_MEMORY,
    MAX_FOOTPRINTS,
    TIMEOUT,
    TOO_MANY_LOADED,
    Footprint,
    Model,
    ModelState,
    PendingLoad,
    Serving,
)
from events.types import (
    AccessDenied,
    CancelRequested,
    Cause,
    Data,
    Draft,
    JobCancelled,
    LoadFailed,
    LoadStarted,
    ModelUnloaded,
    Prepared,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadStarted,
)

UNLOADED, LOADING, LOADED = ModelState.UNLOADED, ModelState.LOADING, ModelState.LOADED
UNLOADING, FAILED, LOST = ModelState.UNLOADING, ModelState.FAILED, ModelState.LOST

Told = Callable[[History], object]


def cancel(job: str) -> Told:
    return lambda history: history.add(JobCancelled(), job)


def want_cancel(job: str) -> Told:
    return lambda history: history.add(CancelRequested(), job)


def fail_unload(job: str) -> Told:
    return lambda history: history.add(UnloadFailed("stuck", "x"), job)


STEPS: dict[str, Told] = {
    "ask": lambda h: h.ask_load("L"),
    "start": lambda h: h.start_load("L"),
    "load": lambda h: h.load("L"),
    "fail": lambda h: h.fail_load("L"),
    "ask_swap": lambda h: h.ask_load("L2", version=2),
    "start_swap": lambda h: h.start_load("L2", version=2),
    "end_swap": lambda h: h.end_load("L2", version=2),
    "fail_swap": lambda h: h.fail_load("L2", version=2),
    "loop_swap": lambda h: h.fail_load("L2", CRASH_LOOP, version=2),
    "swap": lambda h: h.load("L2", version=2),
    "ask_end_of_old": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_end_of_old": lambda h: h.start_unload("S"),
    "end_of_old": lambda h: h.end_unload("S"),
    "ask_unload": lambda h: h.ask_unload("U", "L"),
    "start_unload": lambda h: h.start_unload("U"),
    "end_unload": lambda h: h.end_unload("U"),
    "force": lambda h: h.ask_unload("F", "L", force=True),
    "end_force": lambda h: h.end_unload("F"),
    "ask_unload_of_pair": lambda h: h.ask_unload("U", "P"),
    "ask_unload_of_swap": lambda h: h.ask_unload("U", "L2"),
    "restart": lambda h: h.restart(),
    "die": lambda h: h.kill_worker("w-L"),
    "load_pair": lambda h: h.load_pair("P"),
    "die_1": lambda h: h.kill_worker("P1"),
    "die_2": lambda h: h.kill_worker("P2"),
    "die_2_later": lambda h: h.kill_worker("P2", after_s=INCIDENT_WINDOW_S + 1),
    "forkserver_ends_1": lambda h: h.kill_worker("P1", signal=None),
    "forkserver_ends_2": lambda h: h.kill_worker("P2", signal=None),
    "pair_is_back": lambda h: h.load_pair("R", cause=Cause.RECOVERY),
    "die_1_again": lambda h: h.kill_worker("R1"),
    "forkserver_dies": lambda h: h.kill_worker("w-L", signal=None),
    "ask_back": lambda h: h.ask_load("R", cause=Cause.RECOVERY),
    "start_back": lambda h: h.start_load("R"),
    "end_back": lambda h: h.end_load("R"),
    "fail_back": lambda h: h.fail_load("R"),
    "forkserver_fails_back": lambda h: h.fail_load("R", FORK_SERVER_DIED),
    "loop_back": lambda h: h.fail_load("R", CRASH_LOOP),
    "again": lambda h: h.load("L3"),
    "ask_again": lambda h: h.ask_load("L3"),
    "start_again": lambda h: h.start_load("L3"),
    "fail_again": lambda h: h.fail_load("L3"),
    "start_force": lambda h: h.start_unload("F"),
    "stop": lambda h: h.add(ServerStopped(), of=None),
    "die_again": lambda h: h.kill_worker("w-R"),
    "stranger_dies": lambda h: h.kill_worker("stranger"),
    "restore": lambda h: h.load("R", cause=Cause.RESTART),
    "ask_restore": lambda h: h.ask_load("R", cause=Cause.RESTART),
    "ask_stranger": lambda h: h.ask_unload("U", "somebody else's"),
    "ask_in_place": lambda h: h.ask_load("L2", version=2, strategy="in_place"),
    "end_old": lambda h: h.end_unload("S"),
    "loop_S": lambda h: h.unload("S2", "L", cause=Cause.SWAP),
    "ask_old": lambda h: h.ask_load("R", cause=Cause.SWAP),
    "no_room_back": lambda h: h.fail_load("R", INSUFFICIENT_MEMORY),
    "no_place_back": lambda h: h.fail_load("R", TOO_MANY_LOADED),
    "late_back": lambda h: h.fail_load("R", TIMEOUT),
    "no_room_again": lambda h: h.fail_load("L3", INSUFFICIENT_MEMORY),
    "late_again": lambda h: h.fail_load("L3", TIMEOUT),
    "forkserver_fails_swap": lambda h: h.fail_load("L2", FORK_SERVER_DIED, version=2),
    "force_swap": lambda h: h.ask_unload("F", "L2", force=True),
    **{f"want_cancel_{job}": want_cancel(job) for job in ("L", "L2", "L3", "R", "U")},
    **{f"cancel_{job}": cancel(job) for job in ("L", "L2", "L3", "R", "U", "F", "S")},
    **{f"fail_{job}": fail_unload(job) for job in ("U", "S")},
}
"""The words that the tables are told in."""


def told(words: str) -> History:
    history = History()
    for word in words.split():
        STEPS[word](history)
    return history


MADE_WAY = "made way for another version"
GAP = "load ask_in_place ask_end_of_old start_end_of_old end_of_old"

STATES: list[tuple[str, str, ModelState, int | None, int | None]] = [
    # (given and when, facts, then: state, version, next version)
    ("a load is only asked for", "ask", UNLOADED, None, None),
    ("a load is under way", "ask start", LOADING, 1, None),
    ("a load is done", "load", LOADED, 1, None),
    ("a load failed", "ask start fail", FAILED, 1, None),
    ("a load failed before it began", "ask fail", FAILED, 1, None),
    ("a load was cancelled while pending", "ask cancel_L", UNLOADED, None, None),
    ("a load was cancelled amid", "ask start cancel_L", UNLOADED, 1, None),
    ("a failed model is tried again", "ask start fail ask_again start_again", LOADING, 1, None),
    ("a failed model loads", "ask start fail again", LOADED, 1, None),
    ("a retry of a failed model was cancelled", "ask start fail ask_again cancel_L3", FAILED, 1, None),
    ("an unload is only asked for", "load ask_unload", LOADED, 1, None),
    ("an unload is under way", "load ask_unload start_unload", UNLOADING, 1, None),
    ("an unload is done", "load ask_unload start_unload end_unload", UNLOADED, 1, None),
    ("an unload is done without having begun", "load ask_unload end_unload", UNLOADED, 1, None),
    ("an unload failed", "load ask_unload start_unload fail_U", LOADED, 1, None),
    ("an unload was cancelled while pending", "load ask_unload cancel_U", LOADED, 1, None),
    ("an unload was cancelled amid", "load ask_unload start_unload cancel_U", LOADED, 1, None),
    ("a swap is asked for", "load ask_swap", LOADED, 1, None),
    ("a swap is under way", "load ask_swap start_swap", LOADED, 1, 2),
    ("a swap is done", "load swap", LOADED, 2, None),
    ("a swap failed", "load ask_swap start_swap fail_swap", LOADED, 1, None),
    ("a swap was cancelled", "load ask_swap start_swap cancel_L2", LOADED, 1, None),
    (
        "the old version is being ended after a swap",
        "load swap ask_end_of_old start_end_of_old",
        LOADED,
        2,
        None,
    ),
    (
        "the old version is gone after a swap",
        "load swap ask_end_of_old start_end_of_old end_of_old",
        LOADED,
        2,
        None,
    ),
    (
        "the end of the old version failed",
        "load swap ask_end_of_old start_end_of_old fail_S",
        LOADED,
        2,
        None,
    ),
    ("an unload waits for the swap", "load ask_swap start_swap ask_unload_of_swap", LOADED, 1, 2),
    (
        "an unload waited for the swap",
        "load ask_swap start_swap ask_unload_of_swap end_swap start_unload",
        UNLOADING,
        2,
        None,
    ),
    (
        "an unload waited for the swap and is done",
        "load ask_swap start_swap ask_unload_of_swap end_swap start_unload end_unload",
        UNLOADED,
        2,
        None,
    ),
    (
        "an unload waited for a swap that failed",
        "load ask_swap start_swap ask_unload_of_swap fail_swap start_unload end_unload",
        UNLOADED,
        2,
        None,
    ),
    ("force is asked for amid an unload", "load ask_unload start_unload force", UNLOADING, 1, None),
    (
        "a forced unload began amid an unload",
        "load ask_unload start_unload force start_force",
        UNLOADING,
        1,
        None,
    ),
    (
        "a pending forced unload was cancelled amid an unload",
        "load ask_unload start_unload force cancel_F",
        UNLOADING,
        1,
        None,
    ),
    (
        "both unloads ended together",
        "load ask_unload start_unload force end_unload end_force",
        UNLOADED,
        1,
        None,
    ),
    ("force amid a load", "ask start force cancel_L end_force", UNLOADED, 1, None),
    ("force amid a swap", "load ask_swap start_swap force cancel_L2 end_force", UNLOADED, 2, None),
    ("a load waits behind an unload", "load ask_unload start_unload ask_again", UNLOADING, 1, None),
    (
        "a load behind an unload began",
        "load ask_unload start_unload ask_again end_unload start_again",
        LOADING,
        1,
        None,
    ),
    ("the worker died", "load die", LOST, 1, None),
    ("the fork server died", "load forkserver_dies", LOST, 1, None),
    ("the worker died and its recovery is under way", "load die ask_back start_back", LOADING, 1, None),
    ("the worker died and is back", "load die ask_back start_back end_back", LOADED, 1, None),
    ("a recovery failed once", "load die ask_back start_back fail_back", LOST, 1, None),
    (
        "a recovery ended with the fork server",
        "load die ask_back start_back forkserver_fails_back",
        LOST,
        1,
        None,
    ),
    ("a recovery was cancelled", "load die ask_back start_back cancel_R", LOST, 1, None),
    ("recoveries kept failing", "load die ask_back loop_back", FAILED, 1, None),
    ("another version of a lost model failed", "load die ask_swap start_swap fail_swap", LOST, 1, None),
    ("another version of a lost model kept dying", "load die ask_swap start_swap loop_swap", LOST, 1, None),
    ("a person's load of the lost version failed", "load die ask_again fail_again", FAILED, 1, None),
    ("another version of a lost model loaded", "load die swap", LOADED, 2, None),
    ("the worker died amid a swap", "load ask_swap start_swap die", LOADING, 1, None),
    ("the worker died amid a swap that then failed", "load ask_swap start_swap die fail_swap", LOST, 1, None),
    ("the worker died amid its unload", "load ask_unload start_unload die", UNLOADING, 1, None),
    ("a lost model was unloaded", "load die ask_unload end_unload", UNLOADED, 1, None),
    ("the server stopped", "load stop", LOADED, 1, None),
    ("the server died while it was loaded", "load restart", LOST, 1, None),
    ("the server died twice", "load restart restart", LOST, 1, None),
    ("the server died while it was unloading", "load ask_unload start_unload restart", LOST, 1, None),
    (
        "the unload that the server died in ended",
        "load ask_unload start_unload restart end_unload",
        UNLOADED,
        1,
        None,
    ),
    ("the server died while it was loading", "ask start restart", UNLOADED, 1, None),
    (
        "the server died while a failed model was loading",
        "ask start fail ask_again start_again restart",
        FAILED,
        1,
        None,
    ),
    ("the server died in a swap", "load ask_swap start_swap restart", LOST, 1, None),
    (
        "the server died in a swap, which went on",
        "load ask_swap start_swap restart start_swap end_swap",
        LOADED,
        2,
        None,
    ),
    (
        "the server died in the end of an old version, which ended",
        "load swap ask_end_of_old start_end_of_old restart end_of_old",
        LOST,
        2,
        None,
    ),
    ("the server died while it was unloaded", "load ask_unload end_unload restart", UNLOADED, 1, None),
    ("the server died while it was failed", "ask fail restart", FAILED, 1, None),
    ("the server died while it was lost", "load die restart", LOST, 1, None),
    # In place: the old version is ended first.
    ("it is to make way", "load ask_in_place ask_end_of_old", LOADED, 1, None),
    ("it makes way", "load ask_in_place ask_end_of_old start_end_of_old", UNLOADING, 1, None),
    (f"it {MADE_WAY}", GAP, LOADING, 1, None),
    (f"it {MADE_WAY}, and the other is loading", f"{GAP} start_swap", LOADING, 2, None),
    (f"it {MADE_WAY}, and the other is there", f"{GAP} start_swap end_swap", LOADED, 2, None),
    (f"it {MADE_WAY}, and the other failed", f"{GAP} start_swap fail_swap", LOST, 1, None),
    (f"it {MADE_WAY}, and the other failed before it began", f"{GAP} fail_swap", LOST, 1, None),
    (f"it {MADE_WAY}, and the fork server died", f"{GAP} forkserver_fails_swap", LOST, 1, None),
    (f"it {MADE_WAY}, and the other was cancelled", f"{GAP} start_swap cancel_L2", LOST, 1, None),
    (f"it {MADE_WAY}, and a third waits", f"{GAP} ask_again fail_swap", LOADING, 2, None),
    (f"it {MADE_WAY}, and the third is there", f"{GAP} fail_swap again", LOADED, 1, None),
    (f"it {MADE_WAY}, and no third came either", f"{GAP} ask_again fail_swap fail_again", LOST, 1, None),
    (f"it {MADE_WAY}, and the server died", f"{GAP} start_swap restart", LOADING, 2, None),
    (f"it {MADE_WAY}, the server died, and it failed", f"{GAP} restart fail_swap", LOST, 1, None),
    (f"it {MADE_WAY}, and is to end", f"{GAP} ask_unload_of_swap end_swap end_unload", UNLOADED, 2, None),
    (f"it {MADE_WAY}, is to end, and the other failed", f"{GAP} ask_unload_of_swap fail_swap", LOST, 1, None),
    (
        f"it {MADE_WAY}, the other failed, and all has ended",
        f"{GAP} ask_unload_of_swap fail_swap start_unload end_unload",
        UNLOADED,
        2,
        None,
    ),
    (f"it {MADE_WAY}, and force came", f"{GAP} force_swap cancel_L2 end_force", UNLOADED, 1, None),
    (f"it {MADE_WAY} and comes back", f"{GAP} fail_swap ask_old start_back", LOADING, 1, None),
    (f"it {MADE_WAY} and is back", f"{GAP} fail_swap ask_old start_back end_back", LOADED, 1, None),
    (f"it {MADE_WAY} and failed to come back", f"{GAP} fail_swap ask_old fail_back", LOST, 1, None),
    (f"it {MADE_WAY} and kept failing", f"{GAP} fail_swap ask_old loop_back", FAILED, 1, None),
    (f"it {MADE_WAY}, and it was asked twice", f"{GAP} loop_S", LOADING, 1, None),
    (
        "the other was cancelled before it had made way",
        "load ask_in_place ask_end_of_old start_end_of_old cancel_L2 end_of_old",
        LOST,
        1,
        None,
    ),
    (
        "the other failed before it had made way",
        "load ask_in_place ask_end_of_old start_end_of_old fail_swap",
        UNLOADING,
        1,
        None,
    ),
    ("it died before it had made way", "load ask_in_place ask_end_of_old die", LOST, 1, None),
    ("it died and made way", "load ask_in_place ask_end_of_old die end_of_old", LOADING, 1, None),
    (
        "the server died while it made way",
        "load ask_in_place ask_end_of_old start_end_of_old restart",
        LOST,
        1,
        None,
    ),
    (
        "the server died while it made way, which ended",
        "load ask_in_place ask_end_of_old start_end_of_old restart end_of_old",
        LOADING,
        1,
        None,
    ),
    (
        "force came while it made way",
        "load ask_in_place ask_end_of_old start_end_of_old force cancel_L2 end_force",
        UNLOADED,
        1,
        None,
    ),
    (
        "force came while it made way, which then ended",
        "load ask_in_place ask_end_of_old start_end_of_old force cancel_L2 end_force end_of_old",
        UNLOADED,
        1,
        None,
    ),
    # What is wanted back.
    ("its reload was cancelled by somebody", "load die ask_back want_cancel_R cancel_R", UNLOADED, 1, None),
    ("its restore was cancelled", "load restart ask_restore want_cancel_R cancel_R", UNLOADED, 1, None),
    (
        "the return of what made way was cancelled",
        f"{GAP} fail_swap ask_old start_back want_cancel_R cancel_R",
        UNLOADED,
        1,
        None,
    ),
    ("a person's load of it was cancelled", "load die ask_again want_cancel_L3 cancel_L3", LOST, 1, None),
    ("its end was cancelled while it was lost", "load die ask_unload want_cancel_U cancel_U", LOST, 1, None),
    ("its recovery was late", "load die ask_back late_back", LOST, 1, None),
    ("its recovery had no room at all", "load die ask_back no_room_back", FAILED, 1, None),
    ("it had no place after a start", "load restart ask_restore no_place_back", FAILED, 1, None),
    ("a person's load of it was late", "load die ask_again late_again", LOST, 1, None),
    ("a person's load of it never fits", "load die ask_again no_room_again", LOST, 1, None),
    ("a person's load of it was late amid", "load die ask_again start_again late_again", FAILED, 1, None),
]


@pytest.mark.parametrize(
    ("facts", "state", "version", "next_version"), [row[1:] for row in STATES], ids=[row[0] for row in STATES]
)
def test_state_when(facts: str, state: ModelState, version: int | None, next_version: int | None) -> None:
    model = told(facts).model()
    assert (model.state, model.version, model.next_version) == (state, version, next_version)


@pytest.mark.parametrize("facts", [row[1] for row in STATES], ids=[row[0] for row in STATES])
def test_what_serves_and_what_waits_agree_with_the_state_when(facts: str) -> None:
    history = told(facts)
    assert_coherent(history)
    assert {load.job_id for load in history.model().loads} == {
        job.id for job in history.state.unended(MODEL) if job.kind is JobKind.LOAD
    }


def assert_coherent(history: History) -> None:
    for model in history.state.models.values():
        if model.previous is not None:
            assert (model.phase, model.serving, model.lost_by) == (UNLOADED, None, None)
            assert model.loads  # one of which takes its place, or it is wanted back
        kept = model.phase in {LOADED, UNLOADING, LOST}
        assert (model.serving is not None) == kept
        assert (model.rank is not None) == (kept or model.previous is not None)
        assert model.phase is not LOADING
        assert (model.lost_by is not None) == (model.lost_at is not None) == (model.phase is LOST)


def test_a_loaded_model_tells_which_bytes_were_loaded_by_whom_and_with_what() -> None:
    history = History()
    history.ask_load("L", version=3)
    history.start_load("L", version=3)
    history.add(model_loaded("w1", "w2"), "L", version=3)
    assert history.model() == Model(
        id=MODEL,
        phase=LOADED,
        serving=Serving(
            load_job_id="L",
            version=3,
            position=3,
            loaded_at=at(3),
            loaded_by="alice",
            worker_ids=("w1", "w2"),
            files=(file(),),
            memory_bytes=1_000,
            peak_memory_bytes=2_000,
            parameters=LoadParameters(),
        ),
        rank=3,
        last_version=3,
        footprints=(Footprint(3, (file(),), 1_000),),
    )


def test_loads_wait_in_the_order_of_their_requests() -> None:
    history = told("ask ask_swap start")
    assert history.model().loads == (PendingLoad("L", 1, started=True), PendingLoad("L2", 2))


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ("ask start fail", Failure("broken", "because")),
        ("load ask_swap start_swap fail_swap", Failure("broken", "because")),
        ("load die", Failure("worker_died", "its worker was killed by signal 9")),
        ("load die ask_back fail_back", Failure("broken", "because")),
        ("ask start fail again", None),
        ("load ask_swap start_swap fail_swap ask_unload end_unload", None),
        ("load", None),
    ],
)
def test_a_model_says_why_it_failed_until_it_loads_or_is_unloaded(facts: str, error: Failure | None) -> None:
    assert told(facts).model().error == error


# An unload is the model's own only if it ends its present load.


@pytest.mark.parametrize(
    ("facts", "own"),
    [
        ("load ask_unload", ("U",)),
        ("load ask_swap ask_unload_of_swap", ("U",)),
        ("load ask_unload force", ("U", "F")),
        ("load swap ask_end_of_old", ()),
        ("load ask_stranger", ()),
        ("load ask_unload end_unload", ()),
        ("load ask_unload cancel_U", ()),
        ("ask_unload", ()),
    ],
)
def test_unloads_that_a_model_takes_as_its_own(facts: str, own: tuple[str, ...]) -> None:
    assert told(facts).model().unloads == own


@pytest.mark.parametrize("end", ["start_end_of_old", "end_of_old", "fail_S", "cancel_S"])
def test_the_end_of_an_old_worker_does_not_touch_the_new_one(end: str) -> None:
    history = told("load swap ask_end_of_old")
    before = history.model()
    STEPS[end](history)
    assert history.model() == before


# Incidents: deaths and failed recoveries within ten minutes.


@pytest.mark.parametrize(
    ("facts", "incidents"),
    [
        ("load die", 1),
        ("load forkserver_dies", 0),
        ("load restart", 0),
        ("load die ask_back start_back fail_back", 2),
        ("load die ask_back start_back forkserver_fails_back", 1),
        ("load die ask_back start_back end_back", 1),
        ("load die ask_back start_back end_back die_again", 2),
        ("load die again", 0),
        ("load die ask_unload end_unload", 0),
        ("load stranger_dies", 0),
        ("load ask_unload start_unload die", 0),
        ("load restart restore", 0),
        ("load restart ask_restore fail_back", 1),
        ("load_pair die_1", 1),
        ("load_pair die_1 die_2", 1),
        ("load_pair die_1 die_2_later", 1),  # the first is forgotten, and this one is an incident of its own
        ("load_pair forkserver_ends_1 forkserver_ends_2", 0),
        ("load_pair die_1 forkserver_ends_2", 1),
        ("load_pair forkserver_ends_1 die_2", 0),
        ("load_pair die_1 ask_back start_back fail_back", 2),
        ("load_pair die_1 ask_back start_back forkserver_fails_back", 1),
        ("load_pair die_1 ask_back start_back fail_back die_2", 2),
        ("load_pair die_1 ask_swap start_swap fail_swap", 1),
        ("load_pair die_1 pair_is_back", 1),
        ("load_pair die_1 pair_is_back die_1_again", 2),
        ("load_pair die_1 again", 0),
        ("load_pair ask_unload_of_pair start_unload die_1", 0),
    ],
)
def test_incidents_charged_to_a_model(facts: str, incidents: int) -> None:
    assert len(told(facts).model().incidents) == incidents


@pytest.mark.parametrize(("pause_s", "incidents"), [(INCIDENT_WINDOW_S, 2), (INCIDENT_WINDOW_S + 1, 1)])
def test_incidents_are_forgotten_after_ten_minutes(pause_s: int, incidents: int) -> None:
    history = told("load die ask_back start_back end_back")
    history.kill_worker("w-R", after_s=pause_s - 3)  # three facts came after the first death
    assert len(history.model().incidents) == incidents


def test_a_model_with_an_instance_left_stays_loaded_and_says_what_it_lost() -> None:
    history = told("load_pair")
    assert not history.model().degraded
    history.kill_worker("P1")
    model = history.model()
    assert (model.state, model.degraded, model.lost_at) == (LOADED, True, None)
    assert model.error == Failure("worker_died", "its worker was killed by signal 9; 1 of 2 are left")
    assert model.serving is not None
    assert (model.serving.worker_ids, model.serving.degraded_at) == (("P2",), at(4))
    assert (model.serving.memory_bytes, model.incidents) == (1_000, (at(4),))
    history.kill_worker("P1")
    assert history.model() == model
    history.kill_worker("P2")
    model = history.model()
    assert (model.state, model.degraded, model.lost_at) == (LOST, False, at(6))
    assert model.error == Failure("worker_died", "its worker was killed by signal 9")


def test_a_model_is_whole_again_when_its_recovery_is_loaded() -> None:
    model = told("load_pair die_1 pair_is_back").model()
    assert (model.state, model.degraded, model.error) == (LOADED, False, None)
    assert model.serving is not None
    assert model.serving.worker_ids == ("R1", "R2")


@pytest.mark.parametrize(
    "facts", ["load_pair die_1 restart", "load_pair die_1 ask_unload_of_pair end_unload"]
)
def test_a_model_that_does_not_serve_is_not_degraded(facts: str) -> None:
    assert not told(facts).model().degraded


@pytest.mark.parametrize(
    ("facts", "by", "when"),
    [
        ("load die", Cause.RECOVERY, 4),
        ("load restart", Cause.RESTART, 4),
        ("load die restart", Cause.RESTART, 4),
        ("load restart ask_back fail_back", Cause.RECOVERY, 6),
        ("load die ask_back start_back end_back", None, None),
        ("load die ask_unload end_unload", None, None),
        ("load die ask_back loop_back", None, None),
    ],
)
def test_what_lost_a_model_and_since_when(facts: str, by: Cause | None, when: int | None) -> None:
    model = told(facts).model()
    assert (model.lost_by, model.lost_at) == (by, None if when is None else at(when))


# What made way for another version.


def test_what_made_way_is_remembered_until_the_other_is_there() -> None:
    before = told("load").model()
    gap = told(GAP).model()
    assert (gap.previous, gap.serving, gap.rank) == (before.serving, None, before.rank)
    there = told(f"{GAP} start_swap end_swap").model()
    assert there.previous is None


@pytest.mark.parametrize(
    ("end", "at_s"), [("start_swap fail_swap", 9), ("start_swap cancel_L2", 9), ("restart fail_swap", 9)]
)
def test_what_made_way_in_vain_is_wanted_back_at_once_as_it_was(end: str, at_s: int) -> None:
    before, model = told("load").model(), told(f"{GAP} {end}").model()
    assert (model.serving, model.previous, model.rank) == (before.serving, None, before.rank)
    assert (model.lost_by, model.lost_at, model.incidents) == (Cause.SWAP, at(at_s), ())


def test_a_model_that_made_way_in_vain_says_why() -> None:
    assert told(f"{GAP} fail_swap").model().error == Failure("broken", "because")


@pytest.mark.parametrize(
    ("cancelled", "kept_as_is"),
    [("cancel_R", False), ("want_cancel_R cancel_R", True), ("want_cancel_R cancel_R again", False)],
    ids=["by the system", "by somebody", "by somebody, and then somebody loaded it"],
)
def test_a_model_whose_repair_somebody_cancelled_is_left_as_it_is(
    cancelled: str,
    kept_as_is: bool,  # noqa: FBT001 - a column of the table
) -> None:
    model = told(f"load_pair die_1 ask_back {cancelled}").model()
    assert model.serving is not None
    assert model.serving.kept_as_is is kept_as_is


def test_a_model_whose_repair_has_no_room_is_left_as_it_is_and_that_is_no_incident() -> None:
    history = told("load_pair die_1 ask_back")
    incidents = history.model().incidents
    history.fail_load("R", INSUFFICIENT_MEMORY)
    model = history.model()
    assert model.serving is not None
    assert (model.state, model.serving.kept_as_is, model.incidents) == (LOADED, True, incidents)


# What versions took.


def test_the_footprint_of_a_version_is_that_of_one_worker_rounded_up() -> None:
    history = History()
    history.ask_load("L", instances=3)
    history.start_load("L")
    history.add(model_loaded("w1", "w2", "w3"), "L")  # which took 2,000 together
    assert history.model().footprints == (Footprint(1, (file(),), 667),)


def test_the_footprint_is_that_of_the_files_loaded_last() -> None:
    history = told("load")
    history.load("L4", mtime_ns=2)
    assert [footprint.files for footprint in history.model().footprints] == [(file(2),)]


def test_of_the_same_files_the_highest_peak_counts() -> None:
    history = told("load")
    for load, peak in (("L4", 9_000), ("L5", 500)):
        history.ask_load(load)
        history.start_load(load)
        history.add(replace(model_loaded(f"w-{load}"), peak_memory_bytes=peak), load)
    assert history.model().footprints == (Footprint(1, (file(),), 9_000),)


def test_what_a_prepared_form_takes_is_known_apart_from_what_the_files_take_bare() -> None:
    history = told("load")
    form = Prepared("optimised", "ab" * 32)
    for load, prepared, peak in (("L4", form, 300), ("L5", None, 500), ("L6", form, 200)):
        history.ask_load(load)
        history.start_load(load)
        history.add(replace(model_loaded(f"w-{load}"), prepared=prepared, peak_memory_bytes=peak), load)
    found = [(each.form, each.peak_memory_bytes) for each in history.model().footprints]
    assert found == [(None, 2_000), ("optimised", 300)]
    assert serving(history, MODEL).prepared == form
    history.load("L7", mtime_ns=2)
    assert [(each.form, each.files) for each in history.model().footprints] == [(None, (file(2),))]


def test_the_footprints_of_the_versions_loaded_last_are_kept_whatever_becomes_of_the_model() -> None:
    history = History()
    for version in (1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 10):
        history.load(f"V{version}-{history.seconds}", version=version)
    kept = [4, 5, 6, 7, 8, 9, 2, 10]
    assert len(kept) == MAX_FOOTPRINTS
    assert [footprint.version for footprint in history.model().footprints] == kept
    history.restart()
    history.unload("U", serving(history, MODEL).load_job_id)
    history.ask_load("X", version=11)
    history.fail_load("X", version=11)
    assert [footprint.version for footprint in history.model().footprints] == kept


# Which model is active.


VERBS: dict[str, Callable[[History, str, str], object]] = {
    "load": lambda h, model, job: h.load(job, of=model),
    "demand": lambda h, model, job: h.load(job, of=model, cause=Cause.DEMAND),
    "recover": lambda h, model, job: h.load(job, of=model, cause=Cause.RECOVERY),
    "restore": lambda h, model, job: h.load(job, of=model, cause=Cause.RESTART),
    "in_place": lambda h, model, job: h.load(job, of=model, cause=Cause.SWAP),
    "ask": lambda h, model, job: h.ask_load(job, of=model),
    "start": lambda h, model, job: h.start_load(job, of=model),
    "ask_unload": lambda h, model, job: h.ask_unload(job, serving(h, model).load_job_id, of=model),
    "start_unload": lambda h, model, job: h.start_unload(job, of=model),
    "unload": lambda h, model, job: h.unload(job, serving(h, model).load_job_id, of=model),
    "die": lambda h, model, _: h.kill_worker(*serving(h, model).worker_ids, of=model),
}
BEGIN_JOBS = VERBS.keys() - {"start", "start_unload", "die"}


def serving(history: History, model: str) -> Serving:
    found = history.model(model).serving
    assert found is not None
    return found


def told_of_several(words: str, history: History | None = None) -> History:
    """Tell facts of several models, `verb:model` each; `restart` is of all."""
    history = history or History()
    job = ""
    for number, word in enumerate(words.split()):
        verb, _, model = word.partition(":")
        if verb == "restart":
            history.restart()
            continue
        job = f"{verb}{number}" if verb in BEGIN_JOBS else job
        VERBS[verb](history, model, job)
    return history


ACTIVE: list[tuple[str, str, str | None]] = [
    ("nothing was loaded", "", None),
    ("one model is only loading", "ask:a start:a", None),
    ("one model is loaded", "load:a", "a"),
    ("two are loaded", "load:a load:b", "b"),
    ("the first was loaded again", "load:a load:b load:a", "a"),
    ("the second was loaded on demand", "load:a demand:b", "b"),
    ("the last is to be unloaded", "load:a load:b ask_unload:b", "b"),
    ("the last is being unloaded", "load:a load:b ask_unload:b start_unload:b", "b"),
    ("the last was unloaded", "load:a load:b unload:b", "a"),
    ("the first was unloaded", "load:a load:b unload:a", "b"),
    ("both were unloaded", "load:a load:b unload:b unload:a", None),
    ("the last died", "load:a load:b die:b", "a"),
    ("the last is back", "load:a load:b die:b recover:b", "b"),
    ("the first died and is back", "load:a load:b die:a recover:a", "b"),
    ("the server died", "load:a load:b restart", None),
    ("the server restored both, last loaded first", "load:a load:b restart restore:b restore:a", "b"),
    ("the first was loaded again by a swap in place", "load:a load:b in_place:a", "b"),
    (
        "the last was unloaded after all were restored",
        "load:a load:b load:c restart restore:c restore:b restore:a unload:c",
        "b",
    ),
    ("the first was loaded anew after its unload", "load:a load:b unload:a load:a", "a"),
]


@pytest.mark.parametrize(("facts", "active"), [row[1:] for row in ACTIVE], ids=[row[0] for row in ACTIVE])
def test_active_model_when(facts: str, active: str | None) -> None:
    found = told_of_several(facts).state.active()
    assert (found.id if found else None) == active


# What cannot concern a model changes nothing.


@pytest.mark.parametrize(
    "data",
    [
        LoadStarted(1),
        model_loaded("late"),
        LoadFailed("late", "late"),
        UnloadStarted(),
        ModelUnloaded(1, 1, 1),
        UnloadFailed("late", "late"),
        JobCancelled(),
        CancelRequested(),
        AccessDenied("x", 1),
        ServerStopped(),
        Unknown("Later", 1, {}),
    ],
    ids=lambda data: type(data).__name__,
)
@pytest.mark.parametrize(
    "facts",
    ["ask start cancel_L", "load", "load die", "ask fail", "load ask_unload end_unload"],
    ids=["cancelled", "loaded", "lost", "failed", "unloaded"],
)
@pytest.mark.parametrize("job", ["L", "nobody's", None])
def test_what_comes_late_or_from_nowhere_changes_no_model(
    facts: str, data: Data | Unknown, job: str | None
) -> None:
    history = told(facts)
    before = history.model()
    history.add(data, job)
    assert history.model() == before


def test_a_request_that_comes_twice_waits_once() -> None:
    history = told("ask ask")
    assert history.model().loads == (PendingLoad("L", 1),)


def test_a_request_whose_id_is_not_its_jobs_waits_nowhere() -> None:
    history = told("load")
    before = history.model()
    history.add(load_requested(), "L9", event_id="other")
    assert history.model() == before


def test_models_do_not_touch_each_other() -> None:
    history = told_of_several("load:a")
    before = history.model("a")
    told_of_several("load:b die:b recover:b unload:b", history)
    assert history.model("a") is before


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_whatever_comes_the_fold_never_raises_and_stays_coherent(told_drafts: list[Draft]) -> None:
    history = History()
    for number, draft in enumerate(told_drafts, 1):
        history.state.apply(as_event(draft, number, number))
        assert_coherent(history)
        for model in history.state.models.values():
            assert model.state in set(ModelState)
            assert model.id in {"m", "n"}
        active = history.state.active()
        assert active is None or active.phase in {LOADED, UNLOADING}


@FEWER
@given(st.lists(drafts(), max_size=30))
def test_ended_jobs_need_not_be_remembered(told_drafts: list[Draft]) -> None:
    remembering, forgetting = History(), History()
    for number, draft in enumerate(told_drafts, 1):
        event = as_event(draft, number, number)
        remembering.state.apply(event)
        changed = forgetting.state.apply(event)
        forgetting.state.forget_ended(changed.jobs.values())
    assert remembering.state.models == forgetting.state.models
    assert remembering.state.unended() == forgetting.state.unended()
