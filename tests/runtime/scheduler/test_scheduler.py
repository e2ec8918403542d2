"""What the scheduler decides about jobs, deaths and time, as tables of facts and processes."""

import pytest
from support.decisions import OTHER, PAIR, STEPS, decide_on, describe, history_of, processes, read_table
from support.history import MODEL, History, at

from events.jobs import Failure
from events.models import CRASH_LOOP, FORK_SERVER_DIED, ModelState
from events.types import Cause
from runtime.scheduler.actions import Decision, FailLoad, FailModel, RequestReload, StartLoad
from runtime.scheduler.scheduler import FORK_SERVER_POLL_S, decide, is_load_current
from runtime.scheduler.view import LoadView, Observations, Phase, Policy

NEXT_ACTIONS = """
# facts                                      | processes              | next action
-                                            |                        | nothing
request                                      |                        | start L
request start                                | L:loading              | nothing
request start                                | L:loaded               | complete L
request start                                | L:failed               | fail L
load                                         | L:serving              | nothing
request start request_other                  | L:loading              | start O
request_other request                        |                        | start O
request start request_2                      | L:loading              | nothing
request request_2                            |                        | start L
request start fail request_2                 |                        | start L2
request cancel request_2                     |                        | start L2
request start fail request_2                 | L:draining!            | start L2
request start request_2 request_other        | L:loading              | start O
# Swaps beside the old version.
load request_2                               | L:serving              | start L2
load request_2 start_2                       | L:serving L2:loaded    | complete L2, replacing L
load request_2 start_2                       | L:serving L2:failed    | fail L2
load request_2 start_2 complete_2 replace    | L:serving L2:serving   | start S of L
load request_2 start_2 complete_2 replace start_replace | L:draining L2:serving | nothing
load request_2 start_2 complete_2 replace start_replace | L:gone L2:serving | finish S of L
load request_2 start_2 complete_2 replace start_replace request_3 | L:draining L2:serving | start L3
load request_2 start_2 complete_2 replace start_replace unload_2 | L:draining L2:serving | start U of L2
load request_2 start_2                       | L:gone L2:loaded       | record death of L
load request_2 start_2 die                   | L2:loaded              | complete L2
# Unloads.
load unload                                  | L:serving              | start U of L
load unload start_unload                     | L:draining             | nothing
load unload start_unload                     | L:gone                 | finish U of L
load unload start_unload                     |                        | finish U of L
load unload start_unload                     | L:serving              | start U of L
load unload start_unload request_2           | L:draining             | nothing
load unload start_unload request_2 fail_2    | L:gone                 | finish U of L
load request_2 start_2 unload_2              | L:serving L2:loading   | nothing
load request_2 start_2 complete_2 replace unload_2 | L:serving L2:serving | start S of L
load request_2 start_2 unload_2 fail_2       | L:serving L2:draining! | start U of L
# Force.
load force                                   | L:serving              | start F of L
load force start_force                       | L:serving              | kill L
load force start_force                       | L:draining!            | nothing
load force start_force                       | L:gone!                | finish F of L
request force                                |                        | cancel L
request start force                          | L:loading              | cancel L
request start force                          | L:loaded               | cancel L
request start force                          | L:failed               | cancel L
request start force cancel                   | L:draining             | start F of L
request start force cancel start_force       | L:draining             | kill L
request start force cancel start_force       | L:draining!            | nothing
request start force cancel start_force       |                        | finish F of L
load request_2 start_2 force                 | L:serving L2:loading   | cancel L2
load request_2 request_3 force               | L:serving              | cancel L2
load unload start_unload force               | L:draining             | start F of L
load unload start_unload force start_force   | L:draining             | kill L
load unload start_unload force start_force   | L:gone!                | finish U and F of L
load unload force                            | L:serving              | start U of L
load unload start_unload request_3 force     | L:draining             | cancel L3
load request_2 start_2 complete_2 replace start_replace force_2 start_force | L:draining L2:draining! | kill L
load force start_force request_2             | L:draining!            | nothing
load force start_force request_3 force_again | L:draining!            | cancel L3
load force start_force request_other         | L:draining!            | start O
load_other load unload_other force           | O:serving L:serving    | start F of L
request_other start_other load force         | O:loaded L:serving     | start F of L
load force                                   | L:gone                 | start F of L
load die recover start_R force               | R:loading              | cancel R
load request_2 start_2 force cancel_2 start_force | L:gone! L2:draining! | nothing
# Cancels.
request request_cancel                       |                        | cancel L
request start request_cancel                 | L:loading              | cancel L
request start request_cancel                 | L:loaded               | cancel L
request start request_cancel                 | L:failed               | cancel L
request start complete request_cancel        | L:serving              | nothing
load request_2 start_2 request_cancel_2      | L:serving L2:loading   | cancel L2
request start request_2 request_cancel_2     | L:loading              | cancel L2
load unload request_cancel_U                 | L:serving              | cancel U
load unload start_unload request_cancel_U    | L:draining             | nothing
load unload start_unload restart request_cancel_U |                   | start U of L
load_pair die_1 recover start_R request_cancel_R cancel_R | P:serving/P1 R:draining! | nothing
# Deaths of all workers.
load                                         | L:gone                 | record death of L
load unload                                  | L:gone                 | record death of L
load die                                     |                        | nothing
load die unload                              |                        | start U of L
load die unload start_unload                 |                        | finish U of L
load die recover start_R unload_R            | R:loading              | cancel R
load request_2 start_2 die                   | L2:loading             | nothing
# Deaths of some instances.
load_pair                                    | P:serving/P1           | record death of P1
load_pair                                    | P:gone/P1/P2           | record death of P1 P2
load_pair die_1                              | P:serving/P1           | nothing
load_pair die_1                              | P:gone/P1/P2           | record death of P2
request start                                | L:failed/w-L           | fail L
load_pair unload_P start_unload              | P:draining/P1          | nothing
load_pair unload_P                           | P:serving/P1           | record death of P1
load_pair die_1 recover start_R              | P:serving/P1 R:loaded  | complete R, replacing P
load_pair die_1 recover start_R unload_R     | P:serving/P1 R:loading | cancel R
load_pair die_1 unload_P                     | P:serving/P1           | start U of P
load_pair die_1 recover start_R die_2        | R:loading              | nothing
load_pair die_1 restart                      |                        | reload digits, restart
# The server starts again.
request start restart                        |                        | start L
request start                                |                        | start L
load unload start_unload restart             |                        | start U of L
load unload start_unload restart start_unload |                       | finish U of L
load request_2 start_2 complete_2 replace start_replace restart |     | start S of L
load restart                                 |                        | reload digits, restart
load_other load restart                      |                        | reload digits, restart
load load_other restart                      |                        | reload other, restart
load request_2 restart                       |                        | start L2
load die restart                             |                        | reload digits, restart
load unload restart                          |                        | start U of L
request start restart start restart          |                        | start L
request start restart start restart start restart |                   | fail L: crash_loop
request start stop_and_start start stop_and_start start stop_and_start | | start L
request restart restart restart              |                        | start L
"""


@pytest.mark.parametrize(("facts", "running", "action"), read_table(NEXT_ACTIONS))
def test_scheduler_decides(facts: str, running: str, action: str) -> None:
    assert describe(decide_on(facts, running).action) == action


# Loads at once.


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_loads_at_once_start_oldest_first(limit: int) -> None:
    history, running, started = History(), dict[str, LoadView](), []
    for number in range(9):
        history.ask_load(f"Q{number}", of=f"model{9 - number}")
    while (action := decide(history.state, running, Policy(limit), at(history.seconds)).action) is not None:
        assert isinstance(action, StartLoad)
        started.append(action.job.id)
        history.start_load(action.job.id, of=action.job.model_id)
        running[action.job.id] = LoadView(action.job.id, action.job.model_id, Phase.LOADING)
    assert started == [f"Q{number}" for number in range(limit)]


@pytest.mark.parametrize("running", ["L:serving O:serving", "L:serving O:draining", "L:serving"])
def test_only_loading_counts_as_load_at_once(running: str) -> None:
    history = history_of("load load_other")
    history.ask_load("N", of="new")
    decision = decide(history.state, processes(running), Policy(1), at(history.seconds))
    assert describe(decision.action) == "start N"


def test_pending_jobs_report_what_they_wait_for() -> None:
    decision = decide_on("request start request_other", "L:loading", policy=Policy(1))
    assert decision == Decision(None, at(301), {"O": "a free load slot: at most 1 may run at once"})
    decision = decide_on("load unload start_unload request_2 request_3", "L:draining")
    assert decision.waiting_for == {"L2": "job U of the same model", "L3": "job U of the same model"}


def test_missing_fork_server_delays_loads_only() -> None:
    history = history_of("load request_other")
    down, now = Observations(fork_server_up=False), at(history.seconds)
    decision = decide(history.state, processes("L:serving"), PAIR, now, down)
    waits = {"O": "the fork server, which is being started again"}
    assert decision == Decision(None, at(history.seconds + FORK_SERVER_POLL_S), waits)
    STEPS["unload"](history)
    action = decide(history.state, processes("L:serving"), PAIR, now, down).action
    assert describe(action) == "start U of L"
    idle = history_of("load")
    assert decide(idle.state, processes("L:serving"), PAIR, at(idle.seconds), down) == Decision()


# Time.


@pytest.mark.parametrize(
    ("facts", "running", "waited_for"),
    [
        ("request_10s start", "L:loading", "its worker, which had not finished loading"),
        ("request_other start_other request_10s", "O:loading", "a free load slot: at most 1 may run at once"),
        ("load_other request_10s", "", "its turn"),
    ],
)
def test_late_load_fails_with_what_it_waited_for(facts: str, running: str, waited_for: str) -> None:
    before, late = (decide_on(facts, running, policy=Policy(1), after_s=seconds) for seconds in (7.9, 10))
    assert not isinstance(before.action, FailLoad)
    assert isinstance(late.action, FailLoad)
    assert late.action.code == "timeout"
    assert late.action.message == f"not loaded within 10 s; it waited for {waited_for}"


def test_load_behind_another_times_out() -> None:
    history = history_of("request start")
    history.ask_load("L2", version=2, timeout_s=10)
    action = decide(history.state, processes("L:loading"), PAIR, at(history.seconds + 10)).action
    assert isinstance(action, FailLoad)
    assert (action.job.id, action.code) == ("L2", "timeout")
    assert "job L of the same model" in action.message


def test_load_times_out_without_fork_server() -> None:
    state, down = history_of("request_10s").state, Observations(fork_server_up=False)
    action = decide(state, {}, PAIR, at(11), down).action
    assert isinstance(action, FailLoad)
    assert "the fork server" in action.message


def test_outcome_goes_before_timeout() -> None:
    assert describe(decide_on("request_10s start", "L:loaded", after_s=99).action) == "complete L"


def test_scheduler_wakes_at_next_deadline() -> None:
    history = history_of("request start")
    history.ask_load("O", of=OTHER, timeout_s=10)
    history.start_load("O", of=OTHER)
    decision = decide(history.state, processes("L:loading O:loading"), PAIR, at(history.seconds))
    assert decision.wake_at == history.job("O").deadline_at
    assert decide_on("load unload start_unload", "L:draining") == Decision()


def test_server_downtime_does_not_count_against_timeout() -> None:
    history = history_of("request_10s start")
    history.restart(down_s=3600)
    assert describe(decide(history.state, {}, PAIR, at(history.seconds + 8)).action) == "start L"
    assert describe(decide(history.state, {}, PAIR, at(history.seconds + 9)).action) == "fail L: timeout"


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


def decision_of(history: History, running: str = "", after_s: float = 0) -> Decision:
    return decide(history.state, processes(running), PAIR, at(history.seconds + after_s))


FAILS_4 = "recover_fails recover_fails recover_fails recover_fails"

RELOADS = f"""
# facts                                 | processes    | after s | next action
load die recover_fails                  | -            | 0.999   | nothing
load die recover_fails                  | -            | 1       | reload digits, recovery
load die {FAILS_4}                      | -            | 0       | give up digits
load fork_server_dies request_3 fail_3  | -            | 0.5     | reload digits, recovery
load_pair die_1 {FAILS_4}               | P:serving/P1 | 0       | nothing
load_pair die_1 {FAILS_4}               | P:serving/P1 | 1000000 | nothing
load_pair die_1 {FAILS_4} die_2         | -            | 0       | give up digits
load_pair die_1 {FAILS_4} restart       | -            | 0       | reload digits, restart
# A model with a job, or whose reload was cancelled, is not reloaded.
load die request_2                      | -            | 1000    | fail L2: timeout
load die recover                        | -            | 200     | start R
load die unload start_unload            | -            | 1000    | finish U of L
load die recover request_cancel_R cancel_R | -         | 0       | nothing
load die recover request_cancel_R cancel_R | -         | 1000000 | nothing
load_pair die_1 recover request_cancel_R cancel_R | P:serving/P1 | 0 | nothing
load_pair die_1 recover request_cancel_R cancel_R | P:serving/P1 | 1000000 | nothing
"""


@pytest.mark.parametrize(("facts", "running", "after_s", "action"), read_table(RELOADS))
def test_scheduler_reloads(facts: str, running: str, after_s: str, action: str) -> None:
    decision = decide_on(facts, running, after_s=float(after_s))
    assert describe(decision.action) == action
    assert action != "nothing" or (decision.wake_at is None) is (float(after_s) != 0.999)


@pytest.mark.parametrize(("deaths", "pause_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4)])
def test_back_off_doubles_with_each_death(deaths: int, pause_s: float) -> None:
    history = dying(deaths)
    early = decision_of(history, after_s=pause_s - 0.001)
    assert early == Decision(None, at(history.seconds + pause_s))
    assert describe(decision_of(history, after_s=pause_s).action) == "reload digits, recovery"


def test_fifth_death_is_a_crash_loop() -> None:
    action = decide(dying(5).state, {}, PAIR, at(0)).action
    assert isinstance(action, FailModel)
    assert action.message == "failed 5 times within 10 minutes; at last: its worker was killed by signal 9"
    action = decide_on(f"load die {FAILS_4}").action
    assert isinstance(action, FailModel)
    assert action.message.endswith("at last: because")


def test_incidents_expire_after_ten_minutes() -> None:
    history = dying(9, apart_s=151)
    assert decision_of(history).wake_at == at(history.seconds + 4)
    history = history_of(f"load_pair die_1 {FAILS_4}")
    history.kill_worker("P2", after_s=10_000)
    assert decision_of(history).wake_at == at(history.seconds + 0.5)


def test_fork_server_death_is_no_incident() -> None:
    history = history_of("load fork_server_dies recover start_R")
    history.kill_worker("w-R", signal=None)
    history.fail_load("R", FORK_SERVER_DIED)
    assert (history.model().state, history.model().incidents) == (ModelState.LOST, ())
    assert decision_of(history).wake_at == at(history.seconds + 0.5)


def test_request_clears_incidents_of_degraded_model() -> None:
    history = history_of(f"load_pair die_1 {FAILS_4}")
    assert history.model().error == Failure("broken", "because")
    history.load_pair("Q")
    assert (history.model().degraded, history.model().incidents, history.model().error) == (False, (), None)
    history.kill_worker("Q1")
    assert describe(decision_of(history, "Q:serving/Q1", 0.5).action) == "reload digits, recovery"


def test_crash_looped_model_loads_on_request() -> None:
    history = dying(5)
    history.ask_load("G", cause=Cause.RECOVERY)
    history.fail_load("G", CRASH_LOOP)
    assert history.model().state is ModelState.FAILED
    assert decision_of(history) == Decision()
    history.ask_load("L")
    assert describe(decision_of(history).action) == "start L"


def test_restart_reloads_last_loaded_first() -> None:
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


def test_clock_set_back_does_not_delay_restart() -> None:
    state = history_of("load restart").state
    assert describe(decide(state, {}, PAIR, at(-86_400)).action) == "reload digits, restart"


WANTED = """
# facts                                        | load | is wanted
request start                                  | L    | yes
load                                           | L    | yes
load unload start_unload                       | L    | yes
load request_2 start_2 complete_2 replace      | L    | yes
load request_2 start_2 complete_2 replace start_replace | L2 | yes
load request_2 start_2 complete_2              | L    | no
load die                                       | L    | no
load restart                                   | L    | no
request start fail                             | L    | no
request start cancel                           | L    | no
request start force cancel                     | L    | no
load request_2 start_2 unload_2 fail_2         | L2   | no
-                                              | L    | no
"""


@pytest.mark.parametrize(("facts", "load", "wanted"), read_table(WANTED))
def test_process_is_wanted_while_a_fact_is_due(facts: str, load: str, wanted: str) -> None:
    assert is_load_current(history_of(facts).state, load, MODEL) is (wanted == "yes")
