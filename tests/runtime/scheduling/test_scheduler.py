"""What the scheduler decides about jobs, deaths and time, as tables of facts and processes."""

import pytest
from support.decisions import OTHER, PAIR, STEPS, decided, processes, said, told
from support.events import MODEL, History, at

from events.clock import later
from events.jobs import Failure
from events.models import CRASH_LOOP, FORK_SERVER_DIED, ModelState
from events.types import Cause
from runtime.scheduling.actions import Decision, FailLoad, GiveUp, RequestReload, StartLoad
from runtime.scheduling.scheduler import FORK_SERVER_LOOK_S, decide, is_wanted
from runtime.scheduling.sight import Conditions, Phase, Policy, Running

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
    (
        "force waits for all that it has killed",
        "load ask_2 start_2 force cancel_2 start_force",
        "L:gone! L2:draining!",
        "nothing",
    ),
    # Cancels.
    ("a pending load is cancelled", "ask want_cancel", "", "cancel L"),
    ("a load is cancelled amid", "ask start want_cancel", "L:loading", "cancel L"),
    ("a load is cancelled that is done this moment", "ask start want_cancel", "L:loaded", "cancel L"),
    ("a load is cancelled that failed this moment", "ask start want_cancel", "L:failed", "cancel L"),
    ("a load is cancelled that is recorded", "ask start end want_cancel", "L:serving", "nothing"),
    ("a swap is cancelled", "load ask_2 start_2 want_cancel_2", "L:serving L2:loading", "cancel L2"),
    ("a load behind another is cancelled", "ask start ask_2 want_cancel_2", "L:loading", "cancel L2"),
    ("a pending unload is cancelled", "load unload want_cancel_U", "L:serving", "cancel U"),
    (
        "an unload is cancelled that has begun",
        "load unload start_unload want_cancel_U",
        "L:draining",
        "nothing",
    ),
    (
        "an unload is cancelled that had begun when the server died",
        "load unload start_unload restart want_cancel_U",
        "",
        "begin U of L",
    ),
    ("the reload of a lost model is cancelled", "load die recover want_cancel_R cancel_R", "", "nothing"),
    (
        "the repair of a degraded model is cancelled",
        "load_pair die_1 recover start_R want_cancel_R cancel_R",
        "P:serving/P1 R:draining!",
        "nothing",
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
    decision = decide(history.state, processes("L:serving"), PAIR, now, Conditions(fork_server_up=False))
    assert decision.action is None
    assert decision.waiting_for == {"O": "the fork server, which is being started again"}
    assert decision.wake_at == later(now, FORK_SERVER_LOOK_S)
    STEPS["unload"](history)
    decision = decide(history.state, processes("L:serving"), PAIR, now, Conditions(fork_server_up=False))
    assert said(decision.action) == "begin U of L"


def test_a_fork_server_that_nobody_waits_for_is_not_looked_at() -> None:
    history = told("load")
    decision = decide(
        history.state, processes("L:serving"), PAIR, at(history.seconds), Conditions(fork_server_up=False)
    )
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
    decision = decide(history.state, {}, PAIR, at(history.seconds + 10), Conditions(fork_server_up=False))
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
def test_what_somebody_cancelled_is_not_requested_again(after_s: float) -> None:
    for facts, running in (
        ("load die recover want_cancel_R cancel_R", ""),
        ("load_pair die_1 recover want_cancel_R cancel_R", "P:serving/P1"),
    ):
        assert decided(facts, running, after_s=after_s) == Decision()


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
