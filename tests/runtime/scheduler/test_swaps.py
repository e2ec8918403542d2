"""How a version replaces another `in_place` and with `auto`; `beside` is in `test_scheduler.py`."""

import pytest
from support.decisions import Scene, decide_on, describe, estimate, read_table
from support.history import MODEL, at, given

from events.types import Cause
from runtime.rooms import MACHINE
from runtime.scheduler.actions import Decision
from runtime.scheduler.scheduler import decide
from runtime.scheduler.view import LoadView, Observations, Phase, Policy, SchedulerView

IN_PLACE = """
# facts                                     | processes    | next action
load request_in_place                       | L:serving    | replace L by L2
load request_in_place request_drain         | L:serving    | start S of L
load request_in_place request_drain start_drain | L:draining   | nothing
load request_in_place request_drain start_drain | L:gone       | finish S of L
load request_in_place request_drain finish_drain |              | start L2
load request_in_place request_drain finish_drain start_v2 | L2:loading   | nothing
load request_in_place request_drain finish_drain start_v2 fail_v2 | L2:draining! | reload digits, swap
load request_in_place request_drain finish_drain fail_v2 request_return |              | start R
load crash request_in_place                 |              | start L2
load request_in_place                       | L:gone       | record death of L
load request_in_place crash                 |              | start L2
load request_in_place request_drain         | L:gone       | record death of L
load request_in_place request_drain crash   |              | start S of L
# Cancelled, unloaded or killed.
load request_in_place request_cancel_L2     | L:serving    | cancel L2
load request_in_place request_drain start_drain request_cancel_L2 | L:draining   | cancel L2
load request_in_place request_drain start_drain request_cancel_L2 cancel_L2 | L:draining   | nothing
load request_in_place request_drain start_drain request_cancel_L2 cancel_L2 finish_drain |
  | reload digits, swap
load request_in_place request_drain finish_drain start_v2 request_cancel_L2 | L2:loading   | cancel L2
load request_in_place request_drain finish_drain start_v2 request_cancel_L2 cancel_L2 | | reload digits, swap
load request_in_place request_drain finish_drain fail_v2 request_return request_cancel_R cancel_R | | nothing
load request_in_place request_drain finish_drain start_v2 request_unload_v2 | L2:loading   | nothing
load request_in_place request_drain finish_drain start_v2 request_unload_v2 finish_v2 | L2:serving
  | start U of L2
load request_in_place request_drain finish_drain start_v2 request_unload_v2 fail_v2 | | start U of L
load request_in_place request_drain finish_drain fail_v2 request_return start_recovery request_unload
  | R:loading | cancel R
load request_in_place request_drain start_drain request_force | L:draining   | cancel L2
load request_in_place request_drain start_drain request_force cancel_L2 start_force | L:draining   | kill L
load request_in_place request_drain finish_drain start_v2 request_force_v2 | L2:loading   | cancel L2
load request_in_place request_drain finish_drain start_v2 request_force_v2 cancel_L2 start_force
  | L2:draining! | nothing
load request_in_place request_drain finish_drain start_v2 request_force_v2 cancel_L2 start_force |
  | finish F of L
# Another swap is requested.
load request_in_place request_again request_drain finish_drain start_v2 finish_v2 | L2:serving   | start L3
load request_in_place request_again request_drain finish_drain start_v2 fail_v2 |              | start L3
# The server is killed.
load request_in_place restart               |              | start L2
load request_in_place request_drain restart |              | start S of L
load request_in_place request_drain start_drain restart start_drain |              | finish S of L
load request_in_place request_drain finish_drain start_v2 restart |              | start L2
load request_in_place request_drain finish_drain start_v2 restart fail_v2 |              | reload digits, swap
load request_in_place request_drain finish_drain fail_v2 restart |              | reload digits, restart
load request_in_place request_drain finish_drain fail_v2 request_return start_recovery restart | | start R
"""


@pytest.mark.parametrize(("facts", "running", "action"), read_table(IN_PLACE))
def test_in_place_swap_decides(facts: str, running: str, action: str) -> None:
    assert describe(decide_on(facts, running).action) == action


def test_failed_reload_of_old_version_backs_off() -> None:
    history = given("load request_in_place drain fail_v2 request_return fail_recovery")
    assert decide_on(history) == Decision(None, at(history.seconds + 0.5))
    assert describe(decide_on(history, after_s=0.5).action) == "reload digits, recovery"


def test_late_in_place_swap_reloads_old_version() -> None:
    Scene(
        "load a 60; request a 60 version=2 strategy=in_place timeout_s=5; unload a cause=swap; exit a;"
        "begin a version=2 -> nothing; wait 1 -> fail a2: timeout; fail a timeout version=2 -> reload a, swap"
    )


@pytest.mark.parametrize("strategy", ["in_place", "auto"])
def test_repair_of_serving_model_never_replaces_it_first(strategy: str) -> None:
    history = given("load_pair crash_1")
    history.ask_load("R", cause=Cause.RECOVERY, strategy=strategy)
    assert describe(decide_on(history, "P:serving/P1").action) == "start R"


@pytest.mark.parametrize(
    ("facts", "running", "same_as", "action"),
    [
        ("load request_again", "L:serving", "L", "change settings of L for L3"),
        ("load request_again", "L:serving", None, "start L3"),
        ("load request_again", "L:serving", "L0", "start L3"),
        ("request start request_again_pinned finish", "L:serving", "L", "change settings of L for L3"),
        ("load request_unload request_again cancel_U", "L:serving", "L", "change settings of L for L3"),
        ("load request_v2", "L:serving", "L", "start L2"),
        ("load_pair request_again", "P:serving", "P", "start L3"),
        ("load_pair crash_1 request_again", "P:serving/P1", "P", "start L3"),
        ("load crash request_again", "", "L", "start L3"),
    ],
)
def test_load_of_what_is_loaded_changes_settings_only(
    facts: str, running: str, same_as: str | None, action: str
) -> None:
    history = given(facts)
    estimates = {job.id: estimate(0, same_as=same_as) for job in history.state.unended()}
    decision = decide_on(history, running, observations=Observations(estimates=estimates))
    assert describe(decision.action) == action


@pytest.mark.parametrize(
    ("facts", "running", "action"),
    [
        ("load request_unload request_demand cancel_U", "L:serving", "cancel D"),
        ("load request_unload request_demand", "L:serving", "start U of L"),
        ("request_demand", "", "start D"),
        ("load evict_L demand_v2 request_choice", "D:serving", "start D2"),
        ("load evict_L demand_other_bytes request_choice", "D:serving", "start D2"),
        ("load evict_L demand request_choice", "D:serving", "cancel D2"),
    ],
)
def test_on_demand_load_of_loaded_model_is_cancelled(facts: str, running: str, action: str) -> None:
    observations = Observations(pending_demand=[MODEL])
    assert describe(decide_on(facts, running, observations=observations).action) == action


def test_choice_returns_in_place_if_both_do_not_fit() -> None:
    history = given("load evict_L demand_v2 request_choice")
    running = {"D": LoadView("D", MODEL, Phase.SERVING, taken={MACHINE: 60})}
    seen = Observations(estimates={"D2": estimate(60)}, pending_demand=[MODEL])
    policy = Policy(loads_at_once=2, budget_bytes=100)
    decision = decide(SchedulerView(history.state, running, policy, at(history.seconds), seen))
    assert describe(decision.action) == "replace D by D2"


GAP = "load a 60; request a 80 version=2 strategy=in_place priority=low; unload a cause=swap;"
"""The old version takes 60 and drains; the new one will need 80."""

SCENES = f"""
# What each strategy does with memory. In place, what serves is replaced only once the new version has room.
load a 60; request a 40 version=2 strategy=beside -> start a2
load a 60; request a 41 version=2 strategy=beside -> fail a2: insufficient_memory
load a 60; request a 1 version=2 strategy=in_place -> replace a1 by a2
load a 60; request a 100 version=2 strategy=in_place -> replace a1 by a2
load a 60; request a 101 version=2 strategy=in_place -> fail a2: insufficient_memory
load a 60; request a 40 version=2 strategy=auto -> start a2
load a 60; request a 41 version=2 strategy=auto -> replace a1 by a2
load a 60; request a 101 version=2 strategy=auto -> fail a2: insufficient_memory
set evicts=false; load z 30; load a 30; request a 60 version=2 -> nothing
load z 50; load a 40; request a 70 version=2 strategy=in_place -> nothing; wait 10
  -> unload z, eviction for a2; unload z cause=eviction -> a2 waits for being released; exit z
  -> replace a1 by a2
load z 50; load a 40; request a 70 version=2 strategy=auto -> nothing; wait 10
  -> unload z, eviction for a2; unload z cause=eviction -> a2 waits for being released; exit z
  -> replace a1 by a2
set loads_at_once=1; load a 60; start b 10; request a 60 version=2 strategy=in_place
  -> a2 waits for a free load slot
set loads_at_once=1; load a 60; start b 10; request a 60 version=2 strategy=auto
  -> a2 waits for a free load slot

# On a device, what serves counts there only if it is on the same one.
device cuda:0 100; load a 10 on=cuda:0 there=60; request a 10 version=2 strategy=beside on=cuda:0 there=40
  -> start a2 on cuda:0
device cuda:0 100; load a 10 on=cuda:0 there=60; request a 10 version=2 strategy=beside on=cuda:0 there=41
  -> fail a2: insufficient_memory
device cuda:0 100; load a 10; request a 10 version=2 strategy=beside on=cuda:0 there=100
  -> start a2 on cuda:0
device cuda:0 100; load a 10 on=cuda:0 there=60; request a 10 version=2 strategy=in_place on=cuda:0 there=100
  -> replace a1 by a2
device cuda:0 100; load a 10 on=cuda:0 there=60; request a 10 version=2 strategy=auto on=cuda:0 there=41
  -> replace a1 by a2
device cuda:0 100; load a 60; request a 41 version=2 strategy=auto on=cuda:0 there=41 -> replace a1 by a2
device cuda:0 100; load z 10 on=cuda:0 there=60; load a 60; request a 10 version=2 strategy=auto on=cuda:0
  there=41 -> nothing
device cuda:0 100; device cuda:1 100; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=auto on=cuda:0,cuda:1 there=41 -> start a2 on cuda:1
device cuda:0 100; start z 10; begin z on=cuda:0 there=10; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=in_place on=cuda:0 there=41 -> a2 waits for model 'z' is loading
device cuda:0 100; start z 10; begin z on=cuda:0 there=10; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=in_place on=cuda:0,cpu there=41 -> a2 waits for model 'z' is loading;
  complete z 10 -> replace a1 by a2
device cuda:0 100; start z 10; begin z on=cuda:0 there=10; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=auto on=cuda:0,cpu there=30 -> a2 waits for model 'z' is loading;
  complete z 10 -> start a2 on cuda:0
device cuda:0 100; start z 10; begin z on=cuda:0 there=10; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=auto on=cuda:0,cpu there=41 -> start a2
device cuda:0 100; load a 10 on=cuda:0 there=60;
  request a 10 version=2 strategy=in_place on=cuda:0 there=100; unload a cause=swap;
  request b 10 on=cuda:0 there=10 priority=high -> b1 waits for room, which is reserved for model 'a';
  exit a -> start a2 on cuda:0

# A model between two versions goes before everything, and its room is kept.
{GAP} request b 30 priority=high -> a2 waits for the unload of the version that it replaces;
  -> b1 waits for room, which is reserved for model 'a', before it; exit a -> start a2
set budget_bytes=none; {GAP} request b -> start b1
{GAP} run z1 z memory_bytes=50; exit a; request b 30 priority=high
  -> b1 waits for room, which is reserved for model 'a'
{GAP} exit a; fail a version=2 -> reload a, swap; request b 60 priority=high;
  request a 60 version=3 cause=swap priority=low -> start a3
{GAP} exit a; observe under_pressure=true -> start a2

# Two swaps at once end in the later version.
load a 60; request a 60 version=2 strategy=in_place; request a 60 version=3 strategy=in_place
  -> replace a1 by a2;
  unload a cause=swap; exit a -> start a2; begin a version=2; complete a 60 version=2 -> replace a2 by a3;
  unload a version=2 cause=swap; exit a version=2 -> start a3; begin a version=3; complete a 60 version=3;
  wait 30 -> nothing
"""


@pytest.mark.parametrize("script", read_table(SCENES))
def test_swap_decides(script: str) -> None:
    Scene(script)


def test_swap_that_never_fits_beside_names_the_strategies() -> None:
    action = Scene("load a 60; request a 60 version=2").decision().action
    assert "with strategy auto or in_place it replaces that version" in action.message  # type: ignore[union-attr]
