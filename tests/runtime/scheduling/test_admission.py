"""Which load begins next, and what the others wait for: priority, age, places, memory, pressure."""

from itertools import pairwise

import pytest
from support.decisions import Scene, said

from events.models import INSUFFICIENT_MEMORY, TOO_MANY_LOADED
from events.types import Cause
from runtime.scheduling.actions import FailLoad, StartLoad
from runtime.scheduling.admission import OVERTAKEN_S, PRESSURE_LOOK_S, RISE_S
from runtime.scheduling.room import megabytes
from runtime.scheduling.sight import Conditions, Phase

TWO_MINUTES_S = 2 * RISE_S


def order(scene: Scene) -> list[str]:
    """Start what is to be started, one after the other, and say in which order."""
    started = []
    while isinstance(action := scene.decision().action, StartLoad):
        started.append(action.job.id)
        scene.history.start_load(action.job.id, of=action.job.model_id)
        scene.runs(action.job.id, action.job.model_id, Phase.FAILED)
        scene.history.fail_load(action.job.id, of=action.job.model_id)
        del scene.running[action.job.id]
    return started


# Turns.


def test_loads_have_their_turn_by_priority_then_age() -> None:
    scene = Scene()
    for model, priority in {"a": "low", "b": "normal", "c": "high", "d": "low", "e": "high"}.items():
        scene.asks(model, priority=priority)
    assert order(scene) == ["c1", "e1", "b1", "a1", "d1"]


@pytest.mark.parametrize(
    ("older", "newer", "waited_s"),
    [("normal", "high", RISE_S), ("low", "normal", RISE_S), ("low", "high", TWO_MINUTES_S)],
)
def test_who_waits_rises_by_one_priority_a_minute(older: str, newer: str, waited_s: float) -> None:
    for waited, first in ((waited_s - 3, "b1"), (waited_s, "a1")):
        scene = Scene()
        scene.asks("a", priority=older)
        scene.passes(waited)
        scene.asks("b", priority=newer)
        assert order(scene)[0] == first


@pytest.mark.parametrize("priority", ["low", "normal", "high"])
def test_nobody_who_came_later_comes_before_who_has_waited_two_minutes(priority: str) -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 60)
    scene.asks("a", 50, priority=priority)
    scene.passes(TWO_MINUTES_S)
    scene.asks("b", 1, priority="high")
    assert scene.waiting_for("b1") == "room, which is kept for job a1, before it"


def test_a_clock_that_was_set_back_makes_nobody_wait_longer_than_the_queue_says() -> None:
    scene = Scene()
    scene.asks("a")
    scene.passes(-86_400)
    assert scene.says() == "start a1"


# Need.


def test_a_load_is_sized_up_before_it_begins() -> None:
    scene = Scene()
    scene.asks("a", None)
    del scene.needs["a1"]
    assert scene.says() == "size up a1"


def test_loads_keep_their_order_for_a_look_at_the_files_of_one() -> None:
    scene = Scene()
    scene.looked_at.add(scene.asks("a", None))
    scene.asks("b", 60)
    assert scene.waiting_for("b1") == "a look at the files of 'a', which comes first"
    scene.needs["a1"] = 60
    assert scene.says() == "start a1"


def test_what_comes_later_is_sized_up_or_fails_meanwhile() -> None:
    scene = Scene()
    scene.looked_at.add(scene.asks("a", None))
    scene.asks("b", None)
    del scene.needs["b1"]
    assert scene.says() == "size up b1"
    scene.needs["b1"] = 101
    assert scene.says() == "fail b1: insufficient_memory"


def test_a_load_whose_files_are_looked_at_for_long_holds_nobody_up() -> None:
    scene = Scene()
    scene.asks("a", None)
    assert scene.waiting_for("a1") == "a look at its files"
    scene.asks("b", 60)
    assert scene.says() == "start b1"


def test_without_a_budget_nothing_is_sized_up() -> None:
    scene = Scene(budget_bytes=None)
    scene.asks("a", None)
    del scene.needs["a1"]
    assert scene.says() == "start a1"


def test_a_load_behind_another_of_its_model_is_not_sized_up_yet() -> None:
    scene = Scene()
    scene.loads("a", 10)
    scene.asks("a", version=2)
    scene.needs.clear()
    assert scene.says() == "nothing"


@pytest.mark.parametrize(("need", "says"), [(100, "start a1"), (101, "fail a1: insufficient_memory")])
def test_what_never_fits_fails_at_once_and_says_the_numbers(need: int, says: str) -> None:
    scene = Scene()
    scene.asks("a", need)
    assert scene.says() == says


def test_what_never_fits_says_what_it_needs_and_what_there_is() -> None:
    scene = Scene(budget_bytes=1_500_000_000)
    scene.asks("a", 2_000_000_000)
    action = scene.decision().action
    assert isinstance(action, FailLoad)
    assert action.message == "it needs 2,000 MB of memory, and the budget is 1,500 MB in all"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 MB"), (9_940_000, "9.9 MB"), (10_000_000, "10 MB"), (12_345_678_901, "12,346 MB")],
)
def test_bytes_are_written_for_people(number: int, text: str) -> None:
    assert megabytes(number) == text


# Room.


def test_a_load_is_reserved_what_it_needs_before_it_begins() -> None:
    scene = Scene(evicts=False)
    scene.loads("a", 60)
    scene.asks("b", 41)
    assert scene.says() == "nothing"
    scene.asks("c", 40)
    assert scene.says() == "start c1"


def test_a_load_that_waits_for_memory_says_how_much_and_what_to_do() -> None:
    scene = Scene(budget_bytes=100_000_000, evicts=False)
    scene.serves("a", 80_000_000)
    scene.asks("b", 30_000_000)
    assert scene.waiting_for("b1") == (
        "30 MB of memory, and of the budget of 100 MB 20 MB are free; "
        "unload a model, or have --evict idle do it"
    )


def test_a_load_that_waits_for_a_place_says_so() -> None:
    scene = Scene(budget_bytes=None, max_loaded=1, evicts=False)
    scene.serves("a")
    scene.asks("b")
    assert scene.waiting_for("b1").startswith("a place among the 1 models that may be loaded; ")


def test_what_is_on_its_way_out_counts_until_it_is_gone() -> None:
    scene = Scene()
    scene.serves("a", 80)
    scene.asks("b", 50)
    scene.ends("a")
    assert scene.waiting_for("b1").endswith("it is being given back")
    scene.is_gone("a")
    assert scene.says() == "start b1"


@pytest.mark.parametrize("max_loaded", [1, None])
def test_a_killed_process_counts_until_it_is_gone(max_loaded: int | None) -> None:
    scene = Scene(max_loaded=max_loaded)
    scene.is_killed("x1", "x", 80)
    scene.asks("b", 50)
    assert scene.waiting_for("b1").endswith("it is being given back")


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (10, "start c1"),  # of the 20 that are free, b needs nothing: it gets what a gives back
        (20, "start c1"),
        (21, "being given back"),
        (50, "being given back"),
        (51, "some kept for job b1, before it; unload a model, or have --evict idle do it"),
    ],
)
def test_of_room_that_is_being_given_back_others_get_what_is_left(needs: int, says: str) -> None:
    scene = Scene(evicts=False)
    scene.serves("a", 80)
    scene.asks("b", 50)
    scene.asks("c", needs)
    scene.ends("a")
    assert (scene.waiting_for("c1") if scene.says() == "nothing" else scene.says()).endswith(says)


def test_a_place_that_is_being_given_back_is_kept_for_who_waits_for_it() -> None:
    scene = Scene(max_loaded=2)
    scene.serves("a", 10)
    scene.serves("z", 10)
    scene.ends("a")
    for model in "bc":
        scene.asks(model, 10)
    assert scene.waiting_for("b1").endswith("it is being given back")
    assert scene.waiting_for("c1").startswith(
        "a place among the 2 models that may be loaded, some kept for job b1"
    )


def test_a_model_that_is_leaving_takes_its_place_again_unless_somebody_came_first() -> None:
    scene = Scene(max_loaded=2, evicts=False)
    scene.serves("a", 10)
    scene.is_killed("x1", "b", 10)
    scene.asks("b", 10)
    assert scene.says() == "start b1"
    scene = Scene(max_loaded=2, evicts=False)
    scene.serves("a", 10)
    scene.is_killed("x1", "b", 10)
    for model in "cb":
        scene.asks(model, 10)
    assert scene.waiting_for("c1").endswith("it is being given back")
    assert scene.waiting_for("b1") == "room, which is kept for job c1, before it"


@pytest.mark.parametrize("cause", [Cause.RECOVERY, Cause.RESTART, Cause.SWAP])
def test_what_is_wanted_back_goes_before_what_was_asked_for_earlier(cause: Cause) -> None:
    scene = Scene()
    scene.asks("a", 30, priority="high")
    scene.asks("b", 30, cause=cause)
    assert scene.says() == "start b1"


def test_who_waits_for_room_keeps_none_from_a_recovery_that_fits() -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 50)
    scene.asks("a", 60, timeout_s=3600)
    scene.passes(300)
    scene.asks("b", 30, cause=Cause.RECOVERY)
    assert scene.says() == "start b1"


def test_a_recovery_that_does_not_fit_keeps_no_room() -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 50)
    scene.asks("a", 60, cause=Cause.RECOVERY)
    scene.passes(200)
    scene.asks("b", 30)
    assert scene.says() == "start b1"


def test_loads_without_end_leave_one_place_for_what_served_until_now() -> None:
    scene = Scene(loads_at_once=2)
    for model in "ab":
        scene.loads(model, 10)
    scene.asks("c", 10)
    assert scene.waiting_for("c1").startswith("a free place")
    scene.asks("d", 10, cause=Cause.RECOVERY)
    assert scene.says() == "start d1"
    scene.history.start_load("d1", of="d")
    scene.runs("d1", "d", Phase.LOADING)
    scene.asks("e", 10, cause=Cause.RECOVERY)
    assert scene.waiting_for("e1").startswith("a free place")


def test_a_load_on_demand_that_nobody_waits_for_any_more_is_cancelled_unless_it_has_begun() -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 80)
    scene.asks("a", 30, cause=Cause.DEMAND)
    assert scene.says() == "cancel a1"
    scene.conditions = Conditions(needs=scene.needs, awaited={"a"})
    assert scene.says() == "nothing"
    begun = Scene()
    begun.loads("a", 30, cause=Cause.DEMAND)
    assert begun.says() == "nothing"


def test_an_estimate_is_told_as_one() -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 80)
    scene.asks("a", 120)
    scene.conditions = Conditions(needs=scene.needs, estimated={"a1"})
    action = scene.decision().action
    assert isinstance(action, FailLoad)
    assert "(estimated from its files)" in action.message
    assert "memory_limit_bytes" in action.message


def test_who_waits_for_room_is_overtaken_for_a_while_by_those_that_fit() -> None:
    for waited_s, says in ((OVERTAKEN_S - 2, "start c1"), (OVERTAKEN_S, "nothing")):
        scene = Scene(evicts=False)
        scene.serves("a", 80)
        scene.asks("b", 50)
        scene.passes(waited_s)
        scene.asks("c", 10)
        assert scene.says() == says


def test_room_is_kept_until_who_waits_for_it_has_failed() -> None:
    scene = Scene(evicts=False)
    scene.serves("a", 80)
    scene.asks("b", 50, timeout_s=40)
    scene.passes(38)
    scene.asks("c", 10)
    assert scene.waiting_for("c1") == "room, which is kept for job b1, before it"
    scene.passes(1)
    decision = scene.decision()
    assert isinstance(decision.action, FailLoad)
    assert "it waited for 0.0 MB of memory, and of the budget" in decision.action.message
    scene.history.fail_load("b1", "timeout", of="b")
    assert scene.says() == "start c1"


def test_a_load_that_rises_before_who_keeps_the_room_is_looked_at_in_time() -> None:
    scene = Scene(evicts=False)
    scene.serves("a", 80)
    scene.asks("c", 10, priority="low")
    scene.runs("y1", "y", Phase.LOADING)
    scene.runs("z1", "z", Phase.LOADING)
    scene.passes(40)
    scene.asks("b", 50, priority="high", timeout_s=3_600)
    scene.passes(35)
    del scene.running["y1"]
    assert scene.waiting_for("c1") == "room, which is kept for job b1, before it"
    looks = []
    while (seconds := scene.next_look_s()) is not None and scene.says() == "nothing":
        looks.append(seconds)
        scene.passes(seconds)
    assert scene.says() == "start c1"
    assert sum(looks) + 40 + 35 + 1 == pytest.approx(TWO_MINUTES_S)


@pytest.mark.parametrize(("max_loaded", "says"), [(2, "start c1"), (1, "nothing")])
def test_so_many_models_may_have_a_process(max_loaded: int, says: str) -> None:
    scene = Scene(max_loaded=max_loaded, evicts=False)
    scene.serves("a")
    scene.asks("c")
    assert scene.says() == says


def test_a_swap_is_no_additional_model() -> None:
    scene = Scene(max_loaded=1, evicts=False)
    scene.serves("a")
    scene.asks("a", version=2)
    assert scene.says() == "start a2"


def test_the_place_of_a_model_is_free_when_all_its_processes_are_gone() -> None:
    scene = Scene(max_loaded=1)
    scene.serves("a", version=2)
    scene.is_killed("a1", "a", 10)
    scene.ends("a", version=2)
    scene.asks("b")
    assert scene.waiting_for("b1").endswith("it is being given back")
    scene.is_gone("a", version=2)
    assert scene.says() == "nothing"
    del scene.running["a1"]
    assert scene.says() == "start b1"


# Pressure.


def under_pressure(scene: Scene) -> Scene:
    scene.conditions = Conditions(under_pressure=True, needs=scene.needs)
    return scene


@pytest.mark.parametrize(
    ("priority", "says"), [("low", "nothing"), ("normal", "start a1"), ("high", "start a1")]
)
def test_only_low_priority_yields_to_pressure(priority: str, says: str) -> None:
    scene = under_pressure(Scene())
    scene.asks("a", priority=priority)
    assert scene.says() == says


@pytest.mark.parametrize("cause", [Cause.RECOVERY, Cause.RESTART, Cause.SWAP])
def test_what_is_wanted_back_does_not_yield_to_pressure(cause: Cause) -> None:
    scene = under_pressure(Scene())
    scene.asks("a", priority="low", cause=cause)
    assert scene.says() == "start a1"


def test_low_priority_yields_for_a_minute_at_most_and_looks_every_second() -> None:
    scene = under_pressure(Scene())
    scene.asks("a", priority="low")
    assert scene.waiting_for("a1") == "the machine, which is under pressure"
    assert scene.next_look_s() == PRESSURE_LOOK_S
    scene.passes(RISE_S - 0.5)
    assert scene.next_look_s() == 0.5
    scene.passes(0.5)
    assert scene.says() == "start a1"


def test_who_yields_to_pressure_keeps_nothing() -> None:
    scene = under_pressure(Scene())
    scene.asks("a", 100, priority="low")
    scene.passes(OVERTAKEN_S + 1)
    scene.asks("b", 100)
    assert scene.says() == "start b1"


# After a start of the server.


def restored(**policy: int | bool | None) -> Scene:
    """Three models were loaded when the server died, and their loads have been requested again."""
    scene = Scene(**policy)
    for model in "abc":
        scene.history.load(f"{model}0", of=model)
    scene.history.restart()
    for model in "cba":
        scene.asks(model, 45, cause=Cause.RESTART)
    return scene


def test_what_was_loaded_comes_back_as_far_as_there_is_room_and_the_rest_has_failed() -> None:
    scene = restored()
    for model in "cb":
        assert scene.says() == f"start {model}1"
        scene.history.start_load(f"{model}1", of=model)
        scene.runs(f"{model}1", model, Phase.LOADING, memory_bytes=45)
    scene.policy = Scene(loads_at_once=3).policy
    assert scene.waiting_for("a1").startswith("0.0 MB of memory")  # what loads may keep less than it reserved
    for model in "cb":
        scene.history.end_load(f"{model}1", of=model)
        scene.runs(f"{model}1", model, Phase.SERVING, memory_bytes=45)
    scene.passes(1_000)  # both may be evicted by now, though not for this
    assert scene.says() in {"fail a1: insufficient_memory", "fail a1: timeout"}


def test_what_has_no_place_after_a_start_has_failed_and_is_not_tried_again() -> None:
    scene = restored(max_loaded=1)
    scene.history.start_load("c1", of="c")
    scene.history.end_load("c1", of="c")
    scene.runs("c1", "c", Phase.SERVING, memory_bytes=45)
    assert scene.says() == f"fail b1: {TOO_MANY_LOADED}"
    scene.history.fail_load("b1", TOO_MANY_LOADED, of="b")
    scene.history.fail_load("a1", INSUFFICIENT_MEMORY, of="a")
    assert scene.says() == "nothing"
    assert [scene.model(model).state for model in "abc"] == ["failed", "failed", "loaded"]


def test_what_was_used_last_comes_back_first() -> None:
    scene = Scene(loads_at_once=0)
    for model in "abc":
        scene.history.load(f"{model}0", of=model)
    scene.history.restart()
    used = {"a": "2026-01-01T00:00:30.000000Z", "b": "2026-01-01T00:00:20.000000Z"}
    scene.conditions = Conditions(last_used=used, needs=scene.needs)
    told = []
    for _ in "abc":
        told.append(said(scene.decision().action))
        scene.asks(told[-1].split()[1].rstrip(","), cause=Cause.RESTART)
    assert told == ["reload a, restart", "reload b, restart", "reload c, restart"]
    ranks = [scene.history.job(f"{model}1").created_position for model in "abc"]
    assert all(earlier < later for earlier, later in pairwise(ranks))
