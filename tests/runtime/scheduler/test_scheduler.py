"""What the scheduler decides about jobs, deaths and time, as tables of facts and processes."""

from typing import Any

import pytest
from msgspec import structs
from support.decisions import Scene, decide_on, describe, read_table
from support.history import MODEL, History, at, given, model_loaded

from events.clock import LedgerClock, parse_timestamp
from events.jobcommands import RequestLoad
from events.jobs import CRASH_LOOP, FORK_SERVER_DIED, Failure
from events.models import ModelState
from events.types import Cause
from runtime.scheduler.actions import Decision, FailLoad, FailModel, RequestReload, build_request
from runtime.scheduler.scheduler import FORK_SERVER_POLL_S, decide, is_load_current
from runtime.scheduler.view import Observations, Policy, SchedulerView

NEXT_ACTIONS = """
# facts                                      | processes               | next action
-                                            |                         | nothing
request                                      |                         | start L
request start                                | L:loading               | nothing
load                                         | L:serving               | nothing
request start request_other                  | L:loading               | start O
request_other request                        |                         | start O
request start request_v2                     | L:loading               | nothing
request request_v2                           |                         | start L
request start fail request_v2                |                         | start L2
request cancel_L request_v2                  |                         | start L2
request start fail request_v2                | L:draining!             | start L2
request start request_v2 request_other       | L:loading               | start O
# Swaps beside the old version.
load request_v2                              | L:serving               | start L2
load load_v2 request_drain                   | L:serving L2:serving    | start S of L
load load_v2 request_drain start_drain       | L:draining L2:serving   | nothing
load load_v2 request_drain start_drain       | L:gone L2:serving       | finish S of L
load load_v2 request_drain start_drain request_again | L:draining L2:serving   | start L3
load load_v2 request_drain start_drain request_unload_v2 | L:draining L2:serving   | start U of L2
load request_v2 start_v2                     | L:gone L2:loading       | record death of L
# Unloads.
load request_unload                          | L:serving               | start U of L
load request_unload start_unload             | L:draining              | nothing
load request_unload start_unload             | L:gone                  | finish U of L
load request_unload start_unload             |                         | finish U of L
load request_unload start_unload             | L:serving               | start U of L
load request_unload start_unload request_v2  | L:draining              | nothing
load request_unload start_unload request_v2 fail_v2 | L:gone                  | finish U of L
load request_v2 start_v2 request_unload_v2   | L:serving L2:loading    | nothing
load load_v2 request_drain request_unload_v2 | L:serving L2:serving    | start S of L
load request_v2 start_v2 request_unload_v2 fail_v2 | L:serving L2:draining!  | start U of L
# Force.
load request_force                           | L:serving               | start F of L
load request_force start_force               | L:serving               | kill L
load request_force start_force               | L:draining!             | nothing
load request_force start_force               | L:gone!                 | finish F of L
request request_force                        |                         | cancel L
request start request_force                  | L:loading               | cancel L
request start request_force cancel_L         | L:draining              | start F of L
request start request_force cancel_L start_force | L:draining              | kill L
request start request_force cancel_L start_force | L:draining!             | nothing
request start request_force cancel_L start_force |                         | finish F of L
load request_v2 start_v2 request_force       | L:serving L2:loading    | cancel L2
load request_v2 request_again request_force  | L:serving               | cancel L2
load request_unload start_unload request_force | L:draining              | start F of L
load request_unload start_unload request_force start_force | L:draining              | kill L
load request_unload start_unload request_force start_force | L:gone!                 | finish U and F of L
load request_unload request_force            | L:serving               | start U of L
load request_unload start_unload request_again request_force | L:draining              | cancel L3
load load_v2 request_drain start_drain request_force_v2 start_force | L:draining L2:draining! | kill L
load request_force start_force request_v2    | L:draining!             | nothing
load request_force start_force request_again request_force_again | L:draining!             | cancel L3
load request_force start_force request_other | L:draining!             | start O
load_other load unload_other request_force   | O:serving L:serving     | start F of L
request_other start_other load request_force | O:loading L:serving     | start F of L
load request_force                           | L:gone                  | start F of L
load crash request_recovery start_recovery request_force | R:loading               | cancel R
load request_v2 start_v2 request_force cancel_L2 start_force | L:gone! L2:draining!    | nothing
# Cancels.
request request_cancel_L                     |                         | cancel L
request start request_cancel_L               | L:loading               | cancel L
load request_cancel_L                        | L:serving               | nothing
load request_v2 start_v2 request_cancel_L2   | L:serving L2:loading    | cancel L2
request start request_v2 request_cancel_L2   | L:loading               | cancel L2
load request_unload request_cancel_U         | L:serving               | cancel U
load request_unload start_unload request_cancel_U | L:draining              | nothing
load request_unload start_unload restart request_cancel_U |                         | start U of L
load_pair crash_1 request_recovery start_recovery request_cancel_R cancel_R | P:serving/P1 R:draining!
  | nothing
# Deaths of all workers.
load                                         | L:gone                  | record death of L
load request_unload                          | L:gone                  | record death of L
load crash                                   |                         | nothing
load crash request_unload                    |                         | start U of L
load crash request_unload start_unload       |                         | finish U of L
load crash request_recovery start_recovery request_unload | R:loading               | cancel R
load request_v2 start_v2 crash               | L2:loading              | nothing
# Deaths of some instances.
load_pair                                    | P:serving/P1            | record death of P1
load_pair                                    | P:gone/P1/P2            | record death of P1 P2
load_pair crash_1                            | P:serving/P1            | nothing
load_pair crash_1                            | P:gone/P1/P2            | record death of P2
load_pair request_unload_pair start_unload   | P:draining/P1           | nothing
load_pair request_unload_pair                | P:serving/P1            | record death of P1
load_pair crash_1 request_recovery start_recovery request_unload | P:serving/P1 R:loading  | cancel R
load_pair crash_1 request_unload_pair        | P:serving/P1            | start U of P
load_pair crash_1 request_recovery start_recovery crash_2 | R:loading               | nothing
load_pair crash_1 restart                    |                         | reload digits, restart
# The server starts again.
request start restart                        |                         | start L
request start                                |                         | start L
load request_unload start_unload restart     |                         | start U of L
load request_unload start_unload restart start_unload |                         | finish U of L
load load_v2 request_drain start_drain restart |                         | start S of L
load restart                                 |                         | reload digits, restart
load_other load restart                      |                         | reload digits, restart
load load_other restart                      |                         | reload other, restart
load request_v2 restart                      |                         | start L2
load crash restart                           |                         | reload digits, restart
load request_unload restart                  |                         | start U of L
request start restart start restart          |                         | start L
request start restart start restart start restart |                         | fail L: crash_loop
request start restart_cleanly start restart_cleanly start restart_cleanly |                         | start L
request restart restart restart              |                         | start L
"""


@pytest.mark.parametrize(("facts", "running", "action"), read_table(NEXT_ACTIONS))
def test_scheduler_decides(facts: str, running: str, action: str) -> None:
    assert describe(decide_on(facts, running).action) == action


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_loads_at_once_start_oldest_first(limit: int) -> None:
    scene = Scene(loads_at_once=limit, budget_bytes=None)
    for number in range(9, 0, -1):
        scene.request(f"q{number}_")
    for number in range(9, 9 - limit, -1):
        scene.play(f"-> start q{number}_1; begin q{number}_")
    scene.play("-> nothing")


# Loads at once.


@pytest.mark.parametrize("running", ["L:serving O:serving", "L:serving O:draining", "L:serving"])
def test_only_loading_counts_as_load_at_once(running: str) -> None:
    history = given("load load_other")
    history.ask_load("N", of="new")
    assert describe(decide_on(history, running, policy=Policy(1)).action) == "start N"


def test_pending_jobs_report_what_they_wait_for() -> None:
    decision = decide_on("request start request_other", "L:loading", policy=Policy(1))
    assert decision == Decision(None, at(301), {"O": "a free load slot: at most 1 may run at once"})
    decision = decide_on("load request_unload start_unload request_v2 request_again", "L:draining")
    assert decision.waiting_for == {
        "L2": "the unload of the same model, before it",
        "L3": "the unload of the same model, before it",
    }


DOWN = Observations(fork_server_up=False)


def test_missing_fork_server_delays_loads_only() -> None:
    history = given("load request_other")
    waits = {"O": "the fork server, which is being started again"}
    decision = decide_on(history, "L:serving", observations=DOWN)
    assert decision == Decision(None, at(history.seconds + FORK_SERVER_POLL_S), waits)
    history.ask_unload("U", "L")
    assert describe(decide_on(history, "L:serving", observations=DOWN).action) == "start U of L"
    assert decide_on("load", "L:serving", observations=DOWN) == Decision()


# Time.


@pytest.mark.parametrize(
    ("facts", "running", "observations", "waited_for"),
    [
        ("request_10s start", "L:loading", None, "its worker, which had not finished loading"),
        (
            "request_other start_other request_10s",
            "O:loading",
            None,
            "a free load slot: at most 1 may run at once",
        ),
        ("load_other request_10s", "", None, "its turn"),
        (
            "request_again start_again request_10s",
            "L3:loading",
            None,
            "the load of the same model, before it",
        ),
        ("request_10s", "", DOWN, "the fork server, which is being started again"),
    ],
)
def test_late_load_fails_with_what_it_waited_for(
    facts: str, running: str, observations: Observations | None, waited_for: str
) -> None:
    before, late = (
        decide_on(facts, running, policy=Policy(1), after_s=seconds, observations=observations).action
        for seconds in (7.9, 10)
    )
    assert not isinstance(before, FailLoad)
    assert isinstance(late, FailLoad)
    assert (late.job.id, late.code) == ("L", "timeout")
    assert late.message == f"not loaded within 10 s; it waited for {waited_for}"


def test_scheduler_wakes_at_next_deadline() -> None:
    history = given("request_other start_other request_10s start")
    decision = decide_on(history, "L:loading O:loading")
    assert decision.wake_at == history.job("L").deadline_at
    assert decide_on("load request_unload start_unload", "L:draining") == Decision()


def test_server_downtime_does_not_count_against_timeout() -> None:
    history = given("request_10s start")
    history.restart(down_s=3600)
    assert describe(decide_on(history, after_s=8).action) == "start L"
    assert describe(decide_on(history, after_s=9).action) == "fail L: timeout"


def test_deadline_counts_from_when_its_event_was_folded() -> None:
    """The wall clock was set back by 100 s before the load was requested, so its times are recorded as 0."""
    passed = [0.0]
    clock = LedgerClock(lambda: parse_timestamp(at(0)), lambda: passed[0])
    passed[0] = 100
    clock.note(1, at(0))
    history = given("request_10s start")  # at 1, due at 11
    found = [
        decide(SchedulerView(history.state, {}, Policy(1), at(seconds), Observations(clock=clock))).action
        for seconds in (12, 110.9, 111)
    ]
    assert [isinstance(action, FailLoad) and action.code == "timeout" for action in found] == [
        False, False, True,
    ]  # fmt: skip


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


FAILS_4 = "break_recovery " * 4
HINDRANCES_4 = "break_recovery:fork_server_unavailable " * 4

RELOADS = f"""
# facts                                | processes    | after s | next action
load crash break_recovery              | -            | 0.999   | nothing
load crash break_recovery              | -            | 1       | reload digits, recovery
load crash {FAILS_4}                   | -            | 0       | give up digits
# What does not speak against the model is repeated for ever, at last every half a minute.
load crash break_recovery:fork_server_unavailable | - | 0.999 | nothing
load crash break_recovery:fork_server_unavailable | - | 1 | reload digits, recovery
load crash {HINDRANCES_4}              | -            | 7.999   | nothing
load crash {HINDRANCES_4}              | -            | 8       | reload digits, recovery
load crash {HINDRANCES_4 * 9}          | -            | 29.999  | nothing
load crash {HINDRANCES_4 * 9}          | -            | 30      | reload digits, recovery
load crash break_recovery {HINDRANCES_4} break_recovery | -            | 30 | reload digits, recovery
load crash {HINDRANCES_4} {FAILS_4}    | -            | 0       | give up digits
load forkserver_exit {HINDRANCES_4}    | -            | 8       | reload digits, recovery
load_pair crash_1 {HINDRANCES_4}       | P:serving/P1 | 7.999   | nothing
load_pair crash_1 {HINDRANCES_4}       | P:serving/P1 | 8       | reload digits, recovery
load restart request_restore fail_recovery:invalid_defaults | - | 0.999 | nothing
load restart request_restore fail_recovery:invalid_defaults | - | 1 | reload digits, restart
load crash break_recovery:fork_server_unavailable restart | - | 0 | reload digits, restart
load crash request_recovery fail_recovery:bytes_gone | - | 1000 | nothing
load forkserver_exit request_again fail_again:timeout | - | 0.5 | reload digits, recovery
load_pair crash_1 {FAILS_4}            | P:serving/P1 | 0       | nothing
load_pair crash_1 {FAILS_4}            | P:serving/P1 | 1000000 | nothing
load_pair crash_1 {FAILS_4} crash_2    | -            | 0       | give up digits
load_pair crash_1 {FAILS_4} restart    | -            | 0       | reload digits, restart
# A clock that is set back delays nothing, and an outcome goes before a timeout.
load restart                           | -            | -86400  | reload digits, restart
# A model with a job, or whose reload was cancelled, is not reloaded.
load crash request_v2                  | -            | 1000    | fail L2: timeout
load crash request_recovery            | -            | 200     | start R
load crash request_unload start_unload | -            | 1000    | finish U of L
load crash request_recovery request_cancel_R cancel_R | -            | 0       | nothing
load crash request_recovery request_cancel_R cancel_R | -            | 1000000 | nothing
load_pair crash_1 request_recovery request_cancel_R cancel_R | P:serving/P1 | 0       | nothing
load_pair crash_1 request_recovery request_cancel_R cancel_R | P:serving/P1 | 1000000 | nothing
"""


@pytest.mark.parametrize(("facts", "running", "after_s", "action"), read_table(RELOADS))
def test_scheduler_reloads(facts: str, running: str, after_s: str, action: str) -> None:
    decision = decide_on(facts, running, after_s=float(after_s))
    assert describe(decision.action) == action
    assert action != "nothing" or (decision.wake_at is None) is not after_s.endswith("999")


@pytest.mark.parametrize(("deaths", "pause_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4)])
def test_back_off_doubles_with_each_death(deaths: int, pause_s: float) -> None:
    history = dying(deaths)
    early = decide_on(history, after_s=pause_s - 0.001)
    assert early == Decision(None, at(history.seconds + pause_s))
    assert describe(decide_on(history, after_s=pause_s).action) == "reload digits, recovery"


def test_fifth_death_is_a_crash_loop() -> None:
    action = decide_on(dying(5)).action
    assert isinstance(action, FailModel)
    assert action.message == "failed 5 times within 10 minutes; at last: its worker was killed by signal 9"
    action = decide_on(f"load crash {FAILS_4}").action
    assert isinstance(action, FailModel)
    assert action.message.endswith("at last: because")


def test_incidents_expire_after_ten_minutes() -> None:
    history = dying(9, apart_s=151)
    assert decide_on(history).wake_at == at(history.seconds + 4)
    history = given(f"load_pair crash_1 {FAILS_4}")
    history.kill_worker("P2", after_s=10_000)
    assert decide_on(history).wake_at == at(history.seconds + 0.5)


def test_fork_server_death_is_no_incident() -> None:
    history = given("load forkserver_exit request_recovery start_recovery")
    history.kill_worker("w-R", signal=None)
    history.fail_load("R", FORK_SERVER_DIED)
    assert (history.model().state, history.model().incidents) == (ModelState.LOST, ())
    assert decide_on(history).wake_at == at(history.seconds + 1)


def test_request_clears_incidents_of_degraded_model() -> None:
    history = given(f"load_pair crash_1 {FAILS_4}")
    assert history.model().error == Failure("broken", "because")
    history.load_pair("Q")
    assert (history.model().degraded, history.model().incidents, history.model().error) == (False, (), None)
    history.kill_worker("Q1")
    assert describe(decide_on(history, "Q:serving/Q1", after_s=0.5).action) == "reload digits, recovery"


def test_crash_looped_model_loads_on_request() -> None:
    history = dying(5)
    history.ask_load("G", cause=Cause.RECOVERY)
    history.fail_load("G", CRASH_LOOP)
    assert history.model().state is ModelState.FAILED
    assert decide_on(history) == Decision()
    history.ask_load("L")
    assert describe(decide_on(history).action) == "start L"


def test_restart_reloads_last_loaded_first() -> None:
    scene = Scene("load a; load b; load c; load d; load b version=2; restart", loads_at_once=0)
    for model in "bdca":
        scene.play(f"-> reload {model}, restart; request {model} version=3 cause=restart")


@pytest.mark.parametrize(
    ("asked", "taken", "expected"),
    [
        ({}, {"threads": 2}, (None, 300)),  # of the server that reloads it, not of the one that loaded it
        ({"threads": 3, "progress_timeout_s": 10}, {"threads": 3}, (3, 300)),
        ({"progress_timeout_s": 500}, {"threads": 2}, (None, 500)),
    ],
)
@pytest.mark.parametrize("cause", [Cause.RECOVERY, Cause.RESTART])
def test_reload_asks_for_threads_and_no_less_time_than_the_load(
    asked: dict[str, Any], taken: dict[str, Any], expected: tuple[int | None, int], cause: Cause
) -> None:
    history = History()
    history.ask_load("L", **asked)
    history.start_load("L")
    history.add(structs.replace(model_loaded("w-L"), **taken), "L")
    if cause is Cause.RESTART:
        history.restart()
    else:
        history.kill_worker("w-L")
    lost = history.model().loaded
    assert lost is not None
    reload = build_request(RequestReload(lost, cause), (), 300)
    assert isinstance(reload, RequestLoad)
    assert (reload.parameters.threads, reload.parameters.progress_timeout_s) == expected


WANTED = """
# facts                                | load | is wanted
request start                          | L    | yes
load                                   | L    | yes
load request_unload start_unload       | L    | yes
load load_v2 request_drain             | L    | yes
load load_v2 request_drain start_drain | L2   | yes
load load_v2                           | L    | no
load crash                             | L    | no
load restart                           | L    | no
request start fail                     | L    | no
request start cancel_L                 | L    | no
request start request_force cancel_L   | L    | no
load request_v2 start_v2 request_unload_v2 fail_v2 | L2   | no
-                                      | L    | no
"""


@pytest.mark.parametrize(("facts", "load", "wanted"), read_table(WANTED))
def test_process_is_wanted_while_a_fact_is_due(facts: str, load: str, wanted: str) -> None:
    assert is_load_current(given(facts).state, load, MODEL) is (wanted == "yes")
