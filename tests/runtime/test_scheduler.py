"""What the scheduler decides, as tables of recorded facts and running processes, and in simulated worlds.

Facts are told in the words of STEPS: `L…`, `R…` are loads and `U…`, `F…` (forced), `S` (a swap's) unloads of
the model `digits`; `O…` are loads of the model `other`; `P` is one of two instances, `P1` and `P2`. Processes
are told as `<load>:<phase>`, with `!` when they were killed, and then `/<worker>` for each that died. An
action is named as `said` does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import assert_never

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.events import MODEL, PLAIN, History, at, load_requested, model_loaded

from events.accept import Accepted, Command, FileStat, Record, RequestLoad, RequestUnload, accept
from events.clock import later
from events.jobs import Failure, Job, JobKind, JobStatus, LoadParameters
from events.models import CRASH_LOOP, FORK_SERVER_DIED, ModelState
from events.state import State
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    JobCancelled,
    LoadFailed,
    LoadStarted,
    ModelUnloaded,
    ServerStarted,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
    recorded,
)
from runtime.scheduler import (
    FORK_SERVER_LOOK_S,
    MAX_INCIDENTS,
    Action,
    CancelLoad,
    CompleteLoad,
    Decision,
    FailLoad,
    FinishUnload,
    GiveUp,
    Kill,
    Phase,
    Policy,
    RecordDeath,
    RequestReload,
    Running,
    StartLoad,
    StartUnload,
    decide,
    is_wanted,
)

OTHER = "other"
PAIR = Policy(loads_at_once=2)

STEPS: dict[str, Callable[[History], object]] = {
    "ask": lambda h: h.ask_load("L"),
    "ask_briefly": lambda h: h.ask_load("L", timeout_s=10),
    "start": lambda h: h.start_load("L"),
    "end": lambda h: h.end_load("L"),
    "load": lambda h: h.load("L"),
    "fail": lambda h: h.fail_load("L"),
    "ask_2": lambda h: h.ask_load("L2", version=2),
    "start_2": lambda h: h.start_load("L2", version=2),
    "end_2": lambda h: h.end_load("L2", version=2),
    "fail_2": lambda h: h.fail_load("L2", version=2),
    "ask_3": lambda h: h.ask_load("L3"),
    "swap_out": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_swap_out": lambda h: h.start_unload("S"),
    "unload": lambda h: h.ask_unload("U", "L"),
    "start_unload": lambda h: h.start_unload("U"),
    "unload_2": lambda h: h.ask_unload("U", "L2"),
    "unload_R": lambda h: h.ask_unload("U", "R"),
    "force": lambda h: h.ask_unload("F", "L", force=True),
    "start_force": lambda h: h.start_unload("F"),
    "force_2": lambda h: h.ask_unload("F", "L2", force=True),
    "force_again": lambda h: h.ask_unload("F2", "L", force=True),
    "cancel": lambda h: h.add(JobCancelled(), "L"),
    "die": lambda h: h.kill_worker("w-L"),
    "fork_server_dies": lambda h: h.kill_worker("w-L", signal=None),
    "load_pair": lambda h: h.load_pair("P"),
    "die_1": lambda h: h.kill_worker("P1"),
    "die_2": lambda h: h.kill_worker("P2"),
    "unload_P": lambda h: h.ask_unload("U", "P"),
    "recover": lambda h: h.ask_load("R", cause=Cause.RECOVERY),
    "start_R": lambda h: h.start_load("R"),
    "fail_R": lambda h: h.fail_load("R"),
    "restart": lambda h: h.restart(),
    "restart_cleanly": lambda h: h.restart(unclean=False),
    "ask_other": lambda h: h.ask_load("O", of=OTHER),
    "start_other": lambda h: h.start_load("O", of=OTHER),
    "load_other": lambda h: h.load("O", of=OTHER),
    "unload_other": lambda h: h.ask_unload("P", "O", of=OTHER),
}
"""The words that the tables are told in."""


def told(words: str) -> History:
    history = History()
    for word in words.split():
        STEPS[word](history)
    return history


def processes(words: str) -> dict[str, Running]:
    found = {}
    for word in words.split():
        load, _, phase = word.partition(":")
        model = OTHER if load.startswith("O") else MODEL
        phase, *dead = phase.split("/")
        killed = phase.endswith("!")
        found[load] = Running(load, model, Phase(phase.rstrip("!")), killed=killed, dead=tuple(dead))
    return found


def decided(facts: str, running: str = "", *, policy: Policy = PAIR, after_s: float = 0) -> Decision:
    history = told(facts)
    return decide(history.state, processes(running), policy, at(history.seconds + after_s))


def said(action: Action | None) -> str:
    match action:
        case None:
            return "nothing"
        case StartLoad(job):
            return f"start {job.id}"
        case CompleteLoad(job, replaces):
            return f"complete {job.id}" + (f", replacing {replaces}" if replaces else "")
        case FailLoad(job, code):
            return f"fail {job.id}" + (f": {code}" if code else "")
        case CancelLoad(job):
            return f"cancel {job.id}"
        case StartUnload(job, load):
            return f"begin {job.id} of {load}"
        case Kill(load):
            return f"kill {load}"
        case FinishUnload(jobs, load):
            return f"finish {' and '.join(job.id for job in jobs)} of {load}"
        case RecordDeath(load, workers):
            return " ".join(["record death of", *([load] if workers == (f"w-{load}",) else workers)])
        case RequestReload(model, cause):
            return f"reload {model.id}, {cause}"
        case GiveUp(model):
            return f"give up {model.id}"
        case _ as never:
            assert_never(never)


ACTIONS: list[tuple[str, str, str, str]] = [
    # (given and when, facts, processes, then the next action)
    ("there is nothing", "", "", "nothing"),
    # Loads.
    ("a load is pending", "ask", "", "start L"),
    ("a load is under way", "ask start", "L:loading", "nothing"),
    ("a load's worker has it loaded", "ask start", "L:loaded", "complete L"),
    ("a load's worker has failed", "ask start", "L:failed", "fail L"),
    ("a model serves", "load", "L:serving", "nothing"),
    ("another model's load is pending beside one", "ask start ask_other", "L:loading", "start O"),
    ("two are pending", "ask_other ask", "", "start O"),
    ("a load of the same model is under way", "ask start ask_2", "L:loading", "nothing"),
    ("a load of the same model is pending", "ask ask_2", "", "start L"),
    ("the load before it failed", "ask start fail ask_2", "", "start L2"),
    ("the load before it was cancelled", "ask cancel ask_2", "", "start L2"),
    ("a failed load's process still ends", "ask start fail ask_2", "L:draining!", "start L2"),
    (
        "a load waits behind one, and another model's does not",
        "ask start ask_2 ask_other",
        "L:loading",
        "start O",
    ),
    # Swaps.
    ("another version is asked for", "load ask_2", "L:serving", "start L2"),
    ("another version is loaded", "load ask_2 start_2", "L:serving L2:loaded", "complete L2, replacing L"),
    ("another version failed", "load ask_2 start_2", "L:serving L2:failed", "fail L2"),
    (
        "the old version is to end",
        "load ask_2 start_2 end_2 swap_out",
        "L:serving L2:serving",
        "begin S of L",
    ),
    (
        "the old version drains",
        "load ask_2 start_2 end_2 swap_out start_swap_out",
        "L:draining L2:serving",
        "nothing",
    ),
    (
        "the old version is gone",
        "load ask_2 start_2 end_2 swap_out start_swap_out",
        "L:gone L2:serving",
        "finish S of L",
    ),
    (
        "the old version's end holds up no load",
        "load ask_2 start_2 end_2 swap_out start_swap_out ask_3",
        "L:draining L2:serving",
        "start L3",
    ),
    (
        "the old version's end holds up no unload",
        "load ask_2 start_2 end_2 swap_out start_swap_out unload_2",
        "L:draining L2:serving",
        "begin U of L2",
    ),
    (
        "the old version died before the new one was loaded",
        "load ask_2 start_2",
        "L:gone L2:loaded",
        "record death of L",
    ),
    ("the old version is lost, the new one loaded", "load ask_2 start_2 die", "L2:loaded", "complete L2"),
    # Unloads.
    ("an unload is pending", "load unload", "L:serving", "begin U of L"),
    ("an unload drains", "load unload start_unload", "L:draining", "nothing"),
    ("an unload's process is gone", "load unload start_unload", "L:gone", "finish U of L"),
    ("an unload's process was swept away", "load unload start_unload", "", "finish U of L"),
    ("a load waits behind an unload", "load unload start_unload ask_2", "L:draining", "nothing"),
    ("an unload waits behind a swap", "load ask_2 start_2 unload_2", "L:serving L2:loading", "nothing"),
    (
        "the swap before an unload is done",
        "load ask_2 start_2 end_2 swap_out unload_2",
        "L:serving L2:serving",
        "begin S of L",
    ),
    (
        "the swap before an unload failed",
        "load ask_2 start_2 unload_2 fail_2",
        "L:serving L2:draining!",
        "begin U of L",
    ),
    (
        "an unload began, and nobody drains",  # nobody knew whether its beginning was recorded
        "load unload start_unload",
        "L:serving",
        "begin U of L",
    ),
    (
        "the load that an unload waited for failed",
        "load unload start_unload ask_2 fail_2",
        "L:gone",
        "finish U of L",
    ),
    # Force.
    ("force is pending", "load force", "L:serving", "begin F of L"),
    ("force has begun", "load force start_force", "L:serving", "kill L"),
    ("force has killed", "load force start_force", "L:draining!", "nothing"),
    ("force has killed, and it is gone", "load force start_force", "L:gone!", "finish F of L"),
    ("force meets a pending load", "ask force", "", "cancel L"),
    ("force meets a load in progress", "ask start force", "L:loading", "cancel L"),
    ("force meets a load that is done this moment", "ask start force", "L:loaded", "cancel L"),
    ("force meets a load that failed this moment", "ask start force", "L:failed", "cancel L"),
    ("force has cancelled a load", "ask start force cancel", "L:draining", "begin F of L"),
    ("force ends what is loading", "ask start force cancel start_force", "L:draining", "kill L"),
    ("force waits for what was loading", "ask start force cancel start_force", "L:draining!", "nothing"),
    ("force has ended what was loading", "ask start force cancel start_force", "", "finish F of L"),
    ("force meets a swap", "load ask_2 start_2 force", "L:serving L2:loading", "cancel L2"),
    ("force meets two waiting loads", "load ask_2 ask_3 force", "L:serving", "cancel L2"),
    ("force meets a drain", "load unload start_unload force", "L:draining", "begin F of L"),
    ("force ends a drain", "load unload start_unload force start_force", "L:draining", "kill L"),
    (
        "force has ended a drain",
        "load unload start_unload force start_force",
        "L:gone!",
        "finish U and F of L",
    ),
    ("force meets a pending unload", "load unload force", "L:serving", "begin U of L"),
    (
        "force comes behind a load behind an unload",
        "load unload start_unload ask_3 force",
        "L:draining",
        "cancel L3",
    ),
    (
        "force meets a swapped-out version that drains",
        "load ask_2 start_2 end_2 swap_out start_swap_out force_2 start_force",
        "L:draining L2:draining!",
        "kill L",
    ),
    ("a load waits behind force", "load force start_force ask_2", "L:draining!", "nothing"),
    ("force twice", "load force start_force ask_3 force_again", "L:draining!", "cancel L3"),
    (
        "force waits in one model, and another loads",
        "load force start_force ask_other",
        "L:draining!",
        "start O",
    ),
    (
        "force comes after another model's unload",
        "load_other load unload_other force",
        "O:serving L:serving",
        "begin F of L",
    ),
    (
        "force comes after another model's outcome",
        "ask_other start_other load force",
        "O:loaded L:serving",
        "begin F of L",
    ),
    ("force meets a death", "load force", "L:gone", "begin F of L"),
    (
        "force meets a lost model that is coming back",
        "load die recover start_R force",
        "R:loading",
        "cancel R",
    ),
    # Deaths.
    ("a serving worker is gone", "load", "L:gone", "record death of L"),
    ("a draining worker died", "load unload start_unload", "L:gone", "finish U of L"),
    ("a worker died with its unload pending", "load unload", "L:gone", "record death of L"),
    ("a worker died just now", "load die", "", "nothing"),
    ("a lost model is to be unloaded", "load die unload", "", "begin U of L"),
    ("a lost model's unload has begun", "load die unload start_unload", "", "finish U of L"),
    (
        "a lost model that is coming back is to be unloaded",
        "load die recover start_R unload_R",
        "R:loading",
        "cancel R",
    ),
    ("a lost model's swap is under way", "load ask_2 start_2 die", "L2:loading", "nothing"),
    # Deaths of some instances.
    ("an instance died", "load_pair", "P:serving/P1", "record death of P1"),
    ("both instances died", "load_pair", "P:gone/P1/P2", "record death of P1 P2"),
    ("an instance's death is recorded", "load_pair die_1", "P:serving/P1", "nothing"),
    ("the other instance died too", "load_pair die_1", "P:gone/P1/P2", "record death of P2"),
    ("an instance died while it was loading", "ask start", "L:failed/w-L", "fail L"),
    ("an instance died while it drained", "load_pair unload_P start_unload", "P:draining/P1", "nothing"),
    ("an instance died with its unload pending", "load_pair unload_P", "P:serving/P1", "record death of P1"),
    (
        "a degraded model is whole again",
        "load_pair die_1 recover start_R",
        "P:serving/P1 R:loaded",
        "complete R, replacing P",
    ),
    (
        "a degraded model that is coming back is to be unloaded",
        "load_pair die_1 recover start_R unload_R",
        "P:serving/P1 R:loading",
        "cancel R",
    ),
    ("a degraded model is to be unloaded", "load_pair die_1 unload_P", "P:serving/P1", "begin U of P"),
    (
        "a degraded model is lost while it comes back",
        "load_pair die_1 recover start_R die_2",
        "R:loading",
        "nothing",
    ),
    ("a degraded model's server dies", "load_pair die_1 restart", "", "reload digits, restart"),
    # The server starts again.
    ("a load was in progress", "ask start restart", "", "start L"),
    ("a load was in progress, and nobody knew that", "ask start", "", "start L"),
    ("an unload was in progress", "load unload start_unload restart", "", "begin U of L"),
    (
        "an unload that was in progress has begun again",
        "load unload start_unload restart start_unload",
        "",
        "finish U of L",
    ),
    (
        "a swap-out was in progress",
        "load ask_2 start_2 end_2 swap_out start_swap_out restart",
        "",
        "begin S of L",
    ),
    ("a model was loaded", "load restart", "", "reload digits, restart"),
    ("two models were loaded", "load_other load restart", "", "reload digits, restart"),
    ("two models were loaded, the other last", "load load_other restart", "", "reload other, restart"),
    ("a model was loaded, and a load is pending", "load ask_2 restart", "", "start L2"),
    ("a model was lost, and the server too", "load die restart", "", "reload digits, restart"),
    ("a model was loaded and is not wanted", "load unload restart", "", "begin U of L"),
    ("the server died twice amid a load", "ask start restart start restart", "", "start L"),
    (
        "the server died three times amid a load",
        "ask start restart start restart start restart",
        "",
        "fail L: crash_loop",
    ),
    (
        "the server stopped three times amid a load",
        "ask start restart_cleanly start restart_cleanly start restart_cleanly",
        "",
        "start L",
    ),
    ("the server died three times with a load pending", "ask restart restart restart", "", "start L"),
]


@pytest.mark.parametrize(
    ("facts", "running", "action"), [row[1:] for row in ACTIONS], ids=[row[0] for row in ACTIONS]
)
def test_next_action_when(facts: str, running: str, action: str) -> None:
    assert said(decided(facts, running).action) == action


# Loads at once.


@pytest.mark.parametrize("places", [1, 2, 3, 7])
def test_loads_take_the_places_there_are_in_the_order_of_their_age(places: int) -> None:
    history, running, started = History(), dict[str, Running](), []
    for number in range(9):
        history.ask_load(f"Q{number}", of=f"model{9 - number}")
    while (action := decide(history.state, running, Policy(places), at(history.seconds)).action) is not None:
        assert isinstance(action, StartLoad)
        started.append(action.job.id)
        history.start_load(action.job.id, of=action.job.model_id)
        running[action.job.id] = Running(action.job.id, action.job.model_id, Phase.LOADING)
    assert started == [f"Q{number}" for number in range(places)]


@pytest.mark.parametrize("phase", [Phase.LOADED, Phase.FAILED, Phase.SERVING, Phase.DRAINING, Phase.GONE])
def test_only_what_is_loading_takes_a_place(phase: Phase) -> None:
    history = told("load load_other")
    history.ask_load("N", of="new")
    running = processes(f"L:serving O:{'serving' if phase in {Phase.LOADED, Phase.FAILED} else phase}")
    if phase is Phase.GONE:
        running.pop("O")
    decision = decide(history.state, running, Policy(1), at(history.seconds))
    assert said(decision.action) == "start N"


def test_a_pending_load_says_which_bound_it_waits_for() -> None:
    decision = decided("ask start ask_other", "L:loading", policy=Policy(1))
    assert decision.action is None
    assert decision.waiting_for == {"O": "a free place: of loads, 1 may run at once"}


def test_a_job_behind_another_of_its_model_says_so() -> None:
    decision = decided("load unload start_unload ask_2 ask_3", "L:draining")
    assert decision.waiting_for == {"L2": "job U of the same model", "L3": "job U of the same model"}


def test_loads_wait_for_the_fork_server_and_everything_else_goes_on() -> None:
    history = told("load ask_other")
    now = at(history.seconds)
    decision = decide(history.state, processes("L:serving"), PAIR, now, fork_server_up=False)
    assert decision.action is None
    assert decision.waiting_for == {"O": "the fork server, which is being started again"}
    assert decision.wake_at == later(now, FORK_SERVER_LOOK_S)
    STEPS["unload"](history)
    decision = decide(history.state, processes("L:serving"), PAIR, now, fork_server_up=False)
    assert said(decision.action) == "begin U of L"


def test_a_fork_server_that_nobody_waits_for_is_not_looked_at() -> None:
    history = told("load")
    decision = decide(history.state, processes("L:serving"), PAIR, at(history.seconds), fork_server_up=False)
    assert decision == Decision()


# Time.


@pytest.mark.parametrize(
    ("facts", "running", "waited_for"),
    [
        ("ask_briefly start", "L:loading", "its worker, which had not finished loading"),
        ("ask_other start_other ask_briefly", "O:loading", "a free place: of loads, 1 may run at once"),
        ("load_other ask_briefly", "", "its turn"),
    ],
)
def test_a_load_that_is_late_fails_and_says_what_it_waited_for(
    facts: str, running: str, waited_for: str
) -> None:
    one = Policy(1)
    before, late = (decided(facts, running, policy=one, after_s=seconds) for seconds in (7.9, 10))
    assert not isinstance(before.action, FailLoad)
    assert isinstance(late.action, FailLoad)
    assert late.action.code == "timeout"
    assert late.action.message == f"not loaded within 10 s; it waited for {waited_for}"


def test_a_load_behind_another_is_late_as_well() -> None:
    history = told("ask start")
    history.ask_load("L2", version=2, timeout_s=10)
    action = decide(history.state, processes("L:loading"), PAIR, at(history.seconds + 10)).action
    assert isinstance(action, FailLoad)
    assert (action.job.id, action.code) == ("L2", "timeout")
    assert "job L of the same model" in action.message


def test_an_outcome_that_is_there_beats_the_deadline() -> None:
    assert said(decided("ask_briefly start", "L:loaded", after_s=99).action) == "complete L"


def test_a_load_is_late_also_while_there_is_no_fork_server() -> None:
    history = told("ask_briefly")
    decision = decide(history.state, {}, PAIR, at(history.seconds + 10), fork_server_up=False)
    assert isinstance(decision.action, FailLoad)
    assert "the fork server" in decision.action.message


def test_the_next_deadline_is_when_to_ask_again() -> None:
    history = told("ask start")
    history.ask_load("O", of=OTHER, timeout_s=10)
    history.start_load("O", of=OTHER)
    decision = decide(history.state, processes("L:loading O:loading"), PAIR, at(history.seconds))
    assert decision.wake_at == history.job("O").deadline_at


def test_nothing_to_wait_for_is_no_reason_to_ask_again() -> None:
    assert decided("load unload start_unload", "L:draining") == Decision()


def test_the_time_that_the_server_was_down_is_not_charged_to_a_load() -> None:
    history = told("ask_briefly start")
    history.restart(down_s=3600)
    assert said(decide(history.state, {}, PAIR, at(history.seconds + 8)).action) == "start L"
    assert said(decide(history.state, {}, PAIR, at(history.seconds + 9)).action) == "fail L: timeout"


# Reloads.


def dying(deaths: int, *, apart_s: float = 1) -> History:
    """A model whose worker has died so many times, and was loaded again in between."""
    history = History()
    history.load("D0")
    for number in range(deaths):
        history.kill_worker(f"w-D{number}", after_s=apart_s)
        if number + 1 < deaths:
            history.load(f"D{number + 1}", cause=Cause.RECOVERY)
    return history


@pytest.mark.parametrize(("deaths", "pause_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4)])
def test_each_death_doubles_the_pause_before_a_recovery(deaths: int, pause_s: float) -> None:
    history = dying(deaths)
    due = at(history.seconds + pause_s)
    early = decide(history.state, {}, PAIR, at(history.seconds + pause_s - 0.001))
    assert (early.action, early.wake_at) == (None, due)
    assert said(decide(history.state, {}, PAIR, due).action) == "reload digits, recovery"


def test_the_fifth_death_is_the_last() -> None:
    action = decide(dying(5).state, {}, PAIR, at(0)).action
    assert isinstance(action, GiveUp)
    assert action.message == "failed 5 times within 10 minutes; at last: its worker was killed by signal 9"


def test_failed_recoveries_count_as_deaths() -> None:
    history = told("load die recover start_R fail_R")
    assert decide(history.state, {}, PAIR, at(history.seconds)).wake_at == at(history.seconds + 1)
    for number in range(3):
        history.ask_load(f"R{number}", cause=Cause.RECOVERY)
        history.fail_load(f"R{number}")
    assert said(decide(history.state, {}, PAIR, at(history.seconds)).action) == "give up digits"


def test_deaths_that_are_long_ago_do_not_count() -> None:
    history = dying(9, apart_s=151)
    assert decide(history.state, {}, PAIR, at(history.seconds)).wake_at == at(history.seconds + 4)


def test_the_end_of_the_fork_server_is_charged_to_no_model() -> None:
    history = told("load fork_server_dies recover start_R")
    history.kill_worker("w-R", signal=None)
    history.fail_load("R", FORK_SERVER_DIED)
    assert history.model().state is ModelState.LOST
    assert history.model().incidents == ()
    assert decide(history.state, {}, PAIR, at(history.seconds)).wake_at == at(history.seconds + 0.5)


def test_a_load_that_people_asked_for_leaves_a_lost_model_wanted_when_the_fork_server_ends_it() -> None:
    history = told("load fork_server_dies ask_3")
    history.fail_load("L3", FORK_SERVER_DIED)
    assert (
        said(decide(history.state, {}, PAIR, at(history.seconds + 0.5)).action) == "reload digits, recovery"
    )


def degraded(failures: int) -> History:
    """A model that lost an instance, and its recovery failed so many times."""
    history = told("load_pair die_1")
    for number in range(failures):
        history.ask_load(f"R{number}", cause=Cause.RECOVERY)
        history.fail_load(f"R{number}")
    return history


@pytest.mark.parametrize(("failures", "pause_s"), [(0, 0.5), (1, 1), (2, 2), (3, 4)])
def test_a_degraded_model_is_requested_again_as_a_lost_one_is(failures: int, pause_s: float) -> None:
    history, running = degraded(failures), processes("P:serving/P1")
    due = at(history.seconds + pause_s)
    early = decide(history.state, running, PAIR, at(history.seconds + pause_s - 0.001))
    assert (early.action, early.wake_at) == (None, due)
    assert said(decide(history.state, running, PAIR, due).action) == "reload digits, recovery"


@pytest.mark.parametrize("after_s", [0, 1_000, 1_000_000])
def test_a_degraded_model_that_keeps_failing_goes_on_with_what_is_left(after_s: float) -> None:
    history = degraded(4)
    decision = decide(history.state, processes("P:serving/P1"), PAIR, at(history.seconds + after_s))
    assert decision == Decision()
    assert history.model().error == Failure("broken", "because")


def test_a_degraded_model_that_kept_failing_is_tried_again_when_somebody_asks() -> None:
    history = degraded(4)
    history.load_pair("Q")
    assert (history.model().degraded, history.model().incidents, history.model().error) == (False, (), None)
    history.kill_worker("Q1")
    decision = decide(history.state, processes("Q:serving/Q1"), PAIR, at(history.seconds + 0.5))
    assert said(decision.action) == "reload digits, recovery"


def test_the_death_of_the_last_instance_of_a_model_that_kept_failing_is_the_end() -> None:
    history = degraded(4)
    history.kill_worker("P2")
    assert said(decide(history.state, {}, PAIR, at(history.seconds)).action) == "give up digits"


def test_the_death_of_the_last_instance_long_after_is_an_incident_of_its_own() -> None:
    history = degraded(4)
    history.kill_worker("P2", after_s=10_000)
    assert decide(history.state, {}, PAIR, at(history.seconds)).wake_at == at(history.seconds + 0.5)


def test_a_degraded_model_that_kept_failing_comes_back_whole_with_the_server() -> None:
    history = degraded(4)
    history.restart()
    assert said(decide(history.state, {}, PAIR, at(history.seconds)).action) == "reload digits, restart"


@pytest.mark.parametrize("facts", ["load die ask_2", "load die recover", "load die unload start_unload"])
def test_a_lost_model_that_has_a_job_is_not_requested_again(facts: str) -> None:
    history = told(facts)
    action = decide(history.state, {}, PAIR, at(history.seconds + 1000)).action
    assert not isinstance(action, RequestReload)


def test_what_was_given_up_is_tried_again_when_somebody_asks() -> None:
    history = dying(5)
    history.ask_load("G", cause=Cause.RECOVERY)
    history.fail_load("G", CRASH_LOOP)
    assert history.model().state is ModelState.FAILED
    assert decide(history.state, {}, PAIR, at(history.seconds)) == Decision()
    history.ask_load("L")
    assert said(decide(history.state, {}, PAIR, at(history.seconds)).action) == "start L"


def test_after_a_restart_models_come_back_in_the_order_last_loaded_first() -> None:
    history, order = History(), []
    for name in ("a", "b", "c", "d"):
        history.load(f"L{name}", of=name)
    history.load("again", of="b", version=2)
    history.restart()
    while (action := decide(history.state, {}, Policy(0), at(history.seconds)).action) is not None:
        assert isinstance(action, RequestReload)
        order.append(action.model.id)
        history.ask_load(f"R{action.model.id}", of=action.model.id, cause=action.cause)
    assert order == ["b", "d", "c", "a"]


def test_a_clock_that_was_set_back_does_not_delay_a_restart() -> None:
    history = told("load restart")
    assert said(decide(history.state, {}, PAIR, at(-86_400)).action) == "reload digits, restart"


# What is wanted.


@pytest.mark.parametrize(
    ("facts", "load", "wanted"),
    [
        ("ask start", "L", True),
        ("load", "L", True),
        ("load unload start_unload", "L", True),
        ("load ask_2 start_2 end_2 swap_out", "L", True),
        ("load ask_2 start_2 end_2 swap_out start_swap_out", "L2", True),
        ("load ask_2 start_2 end_2", "L", False),
        ("load die", "L", False),
        ("load restart", "L", False),
        ("ask start fail", "L", False),
        ("ask start cancel", "L", False),
        ("ask start force cancel", "L", False),
        ("load ask_2 start_2 unload_2 fail_2", "L2", False),
        ("", "L", False),
    ],
)
def test_a_process_is_wanted_as_long_as_something_is_to_be_recorded_of_it(
    facts: str,
    load: str,
    wanted: bool,  # noqa: FBT001 - a column of the table
) -> None:
    assert is_wanted(told(facts).state, load, MODEL) is wanted


# Simulated worlds.

NAMES = st.sampled_from(["a", "b", "c"])
OUTCOMES = st.sampled_from(["loaded", "loaded", "refused", "dies"])
AS_LOADED = FileStat("model.onnx", 4_096, 1)
UNFORCED = (StartLoad, CompleteLoad, FailLoad, RequestReload, GiveUp, RecordDeath)
"""What is not done to a model before its forced unload has ended."""


@dataclass
class Process:
    """What runs for one load, as the consumer knows it; `started` is whether there are processes yet.

    `dead` are the workers that ended and nobody had asked; `ended`, that all others did.
    """

    model_id: str
    version: int
    workers: tuple[str, ...]
    started: bool = False
    loaded: bool = False
    failure: str | None = None
    dead: dict[str, WorkerExited] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    ended: bool = False
    unloading: bool = False
    killed: bool = False

    def view(self, job: Job | None, load: str) -> Running:
        return Running(load, self.model_id, self._phase(job), self.killed, tuple(self.dead))

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.failure is not None or self.dead or self.ended:
                return Phase.FAILED
            return Phase.LOADED if self.loaded else Phase.LOADING
        if self.gone:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    @property
    def left(self) -> list[str]:
        there_are = self.started and not self.ended
        return [worker for worker in self.workers if worker not in self.dead] if there_are else []

    @property
    def gone(self) -> bool:
        return self.started and not self.left

    @property
    def over(self) -> bool:
        stillborn = not self.started and (self.killed or self.failure is not None)
        return self.gone or stillborn

    def die(self, end: WorkerExited, *workers: str) -> None:
        self.dead.update({worker: end for worker in workers if worker in self.left})


class World:
    """A log, a clock and processes, around the real `accept`, folds and `decide`.

    `act` appends what the consumer does for an action. `fault` is what the log does to the next of them:
    `lost`, not recorded and said so; `unsure`, recorded, though it said that it was not; `twice`, the same,
    but this was seen only after it was tried again.
    """

    def __init__(self, loads_at_once: int = 2) -> None:
        self.state = State()
        self.policy = Policy(loads_at_once)
        self.live: dict[str, Process] = {}
        self.now = at(0)
        self.fork_server_up = True
        self.fault: str | None = None
        self._ids = count(1)

    def new_id(self) -> str:
        return f"j{next(self._ids)}"

    def submit(self, command: Command) -> None:
        decision = accept(self.state, command, self.new_id)
        for draft in decision.drafts if isinstance(decision, Accepted) else ():
            changes = self.state.apply(recorded(draft, self.state.position + 1, self.now))
            self.state.forget_ended(changes.jobs.values())

    def step(self) -> Decision:
        """Do what the consumer does in one turn."""
        for load, process in list(self.live.items()):
            if not is_wanted(self.state, load, process.model_id):
                process.killed = True
                if process.over:
                    del self.live[load]
        running = {load: p.view(self.state.unended_job(load), load) for load, p in self.live.items()}
        decision, again = (
            decide(self.state, running, self.policy, self.now, fork_server_up=self.fork_server_up)
            for _ in range(2)
        )
        assert decision == again
        if decision.action is not None:
            self._check(decision.action)
            self.act(decision.action)
        else:
            assert not [
                job for job in self.state.unended() if job.deadline_at and job.deadline_at <= self.now
            ]
        return decision

    def settle(self) -> Decision:
        """Take turns until there is nothing to do, which has to be soon."""
        limit = 20 + 6 * (len(self.state.jobs) + len(self.live) + len(self.state.models))
        for _ in range(limit):
            decision = self.step()
            if decision.action is None:
                return decision
        pytest.fail("busy without end")

    def work(self, turns: int) -> None:
        for _ in range(turns):
            if self.step().action is None:
                return

    def act(self, action: Action) -> None:
        if isinstance(action, Kill):
            self.live[action.load_job_id].killed = True
            return
        fault, self.fault = self.fault, None
        for _ in range({None: 1, "lost": 0, "unsure": 1, "twice": 2}[fault]):
            self.submit(self._command(action))
        if fault in {None, "twice"}:
            self._note_deaths(action)
            self._begin(action)

    def _note_deaths(self, action: Action) -> None:
        match action:
            case FailLoad(job):
                load = job.id
            case FinishUnload(_, load) | RecordDeath(load):
                pass
            case _:
                return
        if load in self.live:
            self.live[load].recorded.update(self.live[load].dead)

    def _begin(self, action: Action) -> None:
        """Begin the effect of what is recorded."""
        match action:
            case StartLoad(job):
                assert job.version is not None
                assert job.load is not None
                workers = tuple(f"w{number}-{job.id}" for number in range(job.load.instances))
                self.live[job.id] = Process(job.model_id, job.version, workers)
            case StartUnload(job, load) if load in self.live and not job.forced:
                self.live[load].unloading = True
            case _:
                pass

    def _command(self, action: Action) -> Command:
        match action:
            case StartLoad(job):
                return self._record(job, LoadStarted(job.attempt + 1))
            case CompleteLoad(job, replaces):
                drafts = [self._draft(job, model_loaded(*self.live[job.id].workers))]
                if replaces in self.live:
                    swap, old = self.new_id(), self.live[replaces]
                    data = UnloadRequested(force=False, load_job_id=replaces, cause=Cause.SWAP)
                    drafts.append(Draft(swap, data, SYSTEM, swap, job.model_id, old.version))
                return Record(tuple(drafts))
            case FailLoad(job, code):
                process = self.live.get(job.id)
                code = code or (process.failure if process else None) or "worker_died"
                return self._record(job, LoadFailed(code, "because"), dead=job.id)
            case CancelLoad(job):
                return self._record(job, JobCancelled())
            case StartUnload(job):
                return self._record(job, UnloadStarted())
            case FinishUnload(jobs, load):
                ends = (self._draft(job, ModelUnloaded(0, 0, 0)) for job in jobs)
                return Record((*self._deaths(load), *ends))
            case RecordDeath(load, workers):
                assert set(workers) <= self.live[load].dead.keys()
                return Record(self._deaths(load, workers))
            case RequestReload(model, cause):
                assert model.serving is not None
                serving = model.serving
                return RequestLoad(model.id, serving.version, (), SYSTEM, serving.parameters, cause)
            case GiveUp(model):
                assert model.serving is not None
                about = (SYSTEM, job_id := self.new_id(), model.id, model.serving.version)
                failed = Draft(self.new_id(), LoadFailed(CRASH_LOOP, "because"), *about)
                return Record((Draft(job_id, load_requested(Cause.RECOVERY), *about), failed))
            case Kill():
                raise AssertionError
            case _ as never:
                assert_never(never)

    def _record(self, job: Job, data: Data, *, dead: str | None = None) -> Record:
        return Record((*(self._deaths(dead) if dead else ()), self._draft(job, data)))

    def _draft(self, job: Job, data: Data) -> Draft:
        return Draft(self.new_id(), data, SYSTEM, job.id, job.model_id, job.version)

    def _deaths(self, load: str, workers: tuple[str, ...] | None = None) -> tuple[Draft, ...]:
        process = self.live.get(load)
        if process is None:
            return ()
        new = [worker for worker in workers or process.dead if worker not in process.recorded]
        about = (SYSTEM, load, process.model_id, process.version)
        return tuple(Draft(self.new_id(), process.dead[worker], *about, worker) for worker in new)

    def _check(self, action: Action) -> None:
        """An unload ends after its process, and nothing else is done to a model before a forced one has."""
        if isinstance(action, FinishUnload) and action.load_job_id in self.live:
            assert self.live[action.load_job_id].gone
        model, position = self._about(action)
        forced = [job.created_position for job in self.state.queue(model) if job.forced]
        if forced and isinstance(action, UNFORCED):
            assert isinstance(action, FailLoad)
            assert position > forced[-1]  # behind it one may be late

    def _about(self, action: Action) -> tuple[str, int]:
        match action:
            case Kill(load) | RecordDeath(load):
                return self.live[load].model_id, 0
            case FinishUnload(jobs):
                return jobs[0].model_id, jobs[0].created_position
            case RequestReload(model) | GiveUp(model):
                return model.id, 0
            case _:
                return action.job.model_id, action.job.created_position

    def loading(self) -> list[Process]:
        return [
            process
            for load, process in self.live.items()
            if process.view(self.state.unended_job(load), load).phase is Phase.LOADING
        ]

    def alive(self) -> list[Process]:
        return [process for process in self.live.values() if process.left]

    def end_all(self) -> None:
        """What was killed, or has drained, is gone."""
        for process in self.alive():
            if process.killed or process.unloading:
                process.ended = True

    def lose_fork_server(self) -> None:
        self.fork_server_up = False
        for process in self.alive():
            process.die(WorkerExited(None, None, ()), *process.left)
            process.failure = process.failure or FORK_SERVER_DIED

    def progress(self, outcome: str) -> None:
        """Let all that runs come to its end: what loads has this outcome, what is to end ends."""
        for process in self.loading():
            finish(process, outcome)
        self.end_all()

    def restart(self, *, unclean: bool) -> None:
        down_since = self.state.recorded_at or None
        self.live.clear()
        self.fault, self.fork_server_up = None, True
        self.submit(Record((Draft(self.new_id(), ServerStarted(unclean, down_since), SYSTEM),)))

    def calm_down(self, outcome: str) -> None:
        """Be fair for long enough; then nothing is left to do."""
        self.fault, self.fork_server_up = None, True
        for _ in range(60 + 8 * len(self.state.jobs)):
            decision = self.settle()
            if self.loading() or any(process.killed or process.unloading for process in self.live.values()):
                self.progress(outcome)
            elif decision.wake_at is not None:
                self.now = decision.wake_at
            else:
                return
        pytest.fail("never at rest")


def finish(process: Process, outcome: str) -> None:
    """End a load: it is loaded, refused, or a worker of it dies."""
    process.started = True
    match outcome:
        case "loaded":
            process.loaded = True
        case "refused":
            process.failure, process.killed = "invalid_model", True
        case "dies":
            process.failure = "worker_died"
            process.die(WorkerExited(None, 9, ()), process.workers[-1])
        case _:
            pytest.fail(outcome)


TURNS = st.sampled_from([0, 1, 2, 3, 100, 100])
"""That the consumer takes before the next thing happens; with the last it comes to rest."""

TROUBLES = [
    "fork server dies",
    "fork server is back",
    "a fork fails",
    "log loses",
    "log is unsure",
    "log has it twice",
    "server is killed",
    "server is stopped",
]


class Simulation(RuleBasedStateMachine):
    """Anything happens in any order, and in the end everything ends."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(loads_at_once=st.integers(1, 2))
    def begin(self, loads_at_once: int) -> None:
        self.world = World(loads_at_once)

    @rule(
        name=NAMES,
        version=st.integers(1, 2),
        timeout_s=st.sampled_from([5, 300, 300]),
        instances=st.sampled_from([1, 1, 2, 3]),
        turns=TURNS,
    )
    def somebody_loads(self, name: str, version: int, timeout_s: int, instances: int, turns: int) -> None:
        parameters = LoadParameters(timeout_s=timeout_s, instances=instances)
        asked = frozenset({"instances"} if instances > 1 else ())
        self.world.submit(RequestLoad(name, version, (AS_LOADED,), "alice", parameters, asked=asked))
        self.world.work(turns)

    @rule(name=NAMES, turns=TURNS)
    def files_change_and_somebody_loads(self, name: str, turns: int) -> None:
        changed = replace(AS_LOADED, mtime_ns=2)
        self.world.submit(RequestLoad(name, 1, (changed,), "alice"))
        self.world.work(turns)

    @rule(name=NAMES | st.none(), force=st.booleans(), turns=TURNS)
    def somebody_unloads(self, name: str | None, *, force: bool, turns: int) -> None:
        self.world.submit(RequestUnload(name, "alice", force))
        self.world.work(turns)

    @rule(which=st.integers(0, 3), outcome=OUTCOMES, turns=TURNS)
    def a_load_ends(self, which: int, outcome: str, turns: int) -> None:
        loading = self.world.loading()
        if loading and self.world.fork_server_up:
            finish(loading[which % len(loading)], outcome)
        self.world.work(turns)

    @rule(which=st.integers(0, 3), count=st.sampled_from([1, 1, 2, 3]), turns=TURNS)
    def workers_of_a_model_die(self, which: int, count: int, turns: int) -> None:
        alive = self.world.alive()
        if alive:
            process = alive[which % len(alive)]
            process.die(WorkerExited(None, 9, ()), *process.left[:count])
        self.world.work(turns)

    @rule(turns=TURNS)
    def what_is_to_end_ends(self, turns: int) -> None:
        self.world.end_all()
        self.world.work(turns)

    @rule(seconds=st.sampled_from([0.001, 1, 30, 400]), turns=TURNS)
    def time_passes(self, seconds: float, turns: int) -> None:
        self.world.now = later(self.world.now, seconds)
        self.world.work(turns)

    @rule(trouble=st.sampled_from(TROUBLES), turns=TURNS)
    def there_is_trouble(self, trouble: str, turns: int) -> None:
        match trouble:
            case "fork server dies":
                self.world.lose_fork_server()
            case "fork server is back":
                self.world.fork_server_up = True
            case "a fork fails":
                for process in self.world.loading()[:1]:
                    process.failure = process.failure or "fork_server_unavailable"
            case "log loses":
                self.world.fault = "lost"
            case "log is unsure":
                self.world.fault = "unsure"
            case "log has it twice":
                self.world.fault = "twice"
            case _:
                self.world.restart(unclean=trouble == "server is killed")
        self.world.work(turns)

    @rule(outcome=OUTCOMES)
    def all_is_calm_for_a_while(self, outcome: str) -> None:
        self.world.calm_down(outcome)
        self.check_rest()

    @invariant()
    def no_more_loads_at_once_than_allowed(self) -> None:
        assert len(self.world.loading()) <= self.world.policy.loads_at_once

    @invariant()
    def one_operation_on_a_model_at_a_time(self) -> None:
        for name in self.world.state.models:
            begun = [job for job in self.world.state.queue(name) if job.status is JobStatus.IN_PROGRESS]
            if any(job.kind is JobKind.LOAD for job in begun):
                assert len(begun) == 1
            assert len([process for process in self.world.loading() if process.model_id == name]) <= 1

    def teardown(self) -> None:
        self.world.calm_down("loaded")
        self.check_rest()

    def check_rest(self) -> None:
        """Every job has ended, and there is a process for each model that is loaded, and none else."""
        state = self.world.state
        assert state.unended() == []
        loaded = [model for model in state.models.values() if model.phase is ModelState.LOADED]
        serving = {model.serving.load_job_id for model in loaded if model.serving}
        assert serving == self.world.live.keys()
        for model in loaded:
            assert model.serving is not None
            assert model.serving.worker_ids == tuple(self.world.live[model.serving.load_job_id].left)
            whole = len(model.serving.worker_ids) == model.serving.parameters.instances
            assert whole != model.degraded
            assert whole or len(model.incidents) >= MAX_INCIDENTS
        wanted_back = [model for model in state.models.values() if model.phase is ModelState.LOST]
        assert wanted_back == []


Simulation.TestCase.settings = settings(PLAIN, max_examples=250, stateful_step_count=50)
TestSimulation = Simulation.TestCase
