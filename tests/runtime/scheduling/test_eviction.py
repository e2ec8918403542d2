"""Which idle models make room for a load: the fewest that are enough, the least recently used of them."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.decisions import Scene
from support.events import PLAIN, at

from events.models import Model
from events.types import Cause
from runtime.scheduling.actions import RequestEnd
from runtime.scheduling.eviction import LOOK_S, Victim, fewest
from runtime.scheduling.sight import MIN_RESIDENCY_S, Conditions, Phase

SIZES = st.lists(st.integers(0, 6), max_size=6)


def victims(sizes: list[int]) -> list[Victim]:
    return [Victim(Model(f"m{number}"), size, at(number)) for number, size in enumerate(sizes)]


@PLAIN
@given(SIZES, st.integers(-3, 20), st.integers(-2, 7))
def test_the_fewest_are_chosen_and_of_them_the_least_recently_used(
    sizes: list[int], missing_bytes: int, missing_models: int
) -> None:
    candidates = victims(sizes)
    choices = (
        choice
        for number in range(max(0, missing_models), len(sizes) + 1)
        for choice in combinations(candidates, number)  # in the order of their use, within each number
        if sum(victim.memory_bytes for victim in choice) >= missing_bytes
    )
    assert fewest(candidates, missing_bytes, missing_models) == next(choices, None)


def full(**given: object) -> Scene:
    """`old` and `new` fill the budget, for long enough; another model is asked for that needs half of it."""
    scene = Scene()
    scene.serves("old", 50, **given)  # type: ignore[arg-type]
    scene.serves("new", 50)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 50)
    return scene


def test_the_least_recently_used_model_makes_room() -> None:
    assert full().says() == "unload old, eviction for x1"
    scene = full()
    scene.runs(
        "old1", "old", scene.running["old1"].phase, memory_bytes=50, last_used_at=at(scene.history.seconds)
    )
    assert scene.says() == "unload new, eviction for x1"


def test_that_the_system_loaded_a_model_again_is_no_use_of_it() -> None:
    scene = Scene()
    scene.serves("a", 50)
    scene.serves("b", 50)
    scene.history.restart()
    for model in "ba":  # the one that was used last is loaded first
        scene.history.load(f"{model}1r", of=model, cause=Cause.RESTART)
        del scene.running[f"{model}1"]
        scene.runs(f"{model}1r", model, Phase.SERVING, memory_bytes=50)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 50)
    scene.conditions = Conditions(needs=scene.needs, last_used={"a": at(1), "b": at(2)})
    assert scene.says() == "unload a, eviction for x1"


def test_without_eviction_nobody_is_unloaded() -> None:
    scene = full()
    scene.policy = Scene(evicts=False).policy
    assert scene.says() == "nothing"


@pytest.mark.parametrize("given", [{"busy": True}, {"pinned": True}], ids=["busy or waited for", "pinned"])
def test_a_model_is_no_victim_that_is(given: dict[str, bool]) -> None:
    assert full(**given).says() == "unload new, eviction for x1"


def test_a_model_is_no_victim_of_which_something_is_asked() -> None:
    scene = full()
    scene.asks("old", 200, version=2)
    scene.needs["old2"] = None
    assert scene.says() == "unload new, eviction for x1"


def test_a_model_that_is_loading_is_no_victim() -> None:
    scene = Scene()
    scene.loads("a", 100)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 50)
    assert scene.says() == "nothing"


def test_a_model_that_is_being_unloaded_is_no_victim_and_its_bytes_come() -> None:
    scene = full()
    scene.ends("old")
    assert scene.waiting_for("x1").endswith("it is being given back")


def test_one_unload_is_asked_for_at_a_time_and_what_comes_is_counted() -> None:
    scene = Scene()
    for model in "abcd":
        scene.serves(model, 25)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 60)
    for model in "abc":
        assert scene.says() == f"unload {model}, eviction for x1"
        scene.ends(model, cause=Cause.EVICTION)
    assert scene.waiting_for("x1").endswith("it is being given back")


def test_one_that_is_enough_goes_before_two_that_were_used_longer_ago() -> None:
    scene = Scene()
    for model, memory_bytes in {"a": 20, "b": 20, "c": 50}.items():
        scene.serves(model, memory_bytes)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 45)
    assert scene.says() == "unload c, eviction for x1"


def test_nobody_is_evicted_in_vain() -> None:
    scene = Scene()
    scene.serves("a", 50)
    scene.serves("b", 50, busy=True)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 60)
    assert scene.waiting_for("x1").endswith("the others are busy, pinned, or were loaded just now")
    assert scene.next_look_s() == LOOK_S


def test_a_model_has_its_minimum_residency() -> None:
    scene = Scene()
    scene.serves("a", 80)
    scene.asks("x", 50)
    assert scene.says() == "nothing"
    assert scene.next_look_s() == MIN_RESIDENCY_S - 1
    scene.passes(MIN_RESIDENCY_S - 1)
    assert scene.says() == "unload a, eviction for x1"


def test_nobody_looks_for_victims_where_all_are_pinned() -> None:
    scene = Scene()
    scene.serves("a", 80, pinned=True)
    scene.asks("x", 50)
    assert scene.next_look_s() == pytest.approx(300)  # the load's own deadline


def test_a_place_is_made_as_memory_is() -> None:
    scene = Scene(budget_bytes=None, max_loaded=2)
    scene.serves("a", used_s_ago=0)
    scene.serves("b", used_s_ago=5)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x")
    assert scene.says() == "unload a, eviction for x1"


def test_what_comes_back_after_a_start_of_the_server_evicts_nobody() -> None:
    scene = Scene()
    scene.history.load("y0", of="y")
    scene.history.restart()
    scene.serves("a", 80)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("y", 50, cause=Cause.RESTART)
    assert scene.says() == "fail y1: insufficient_memory"


def test_an_eviction_says_for_which_load() -> None:
    action = full().decision().action
    assert isinstance(action, RequestEnd)
    assert action.cause_event_id == "x1"


# What outgrew the budget.


def grown(**policy: object) -> Scene:
    scene = Scene(**policy)  # type: ignore[arg-type]
    for model, memory_bytes in {"a": 60, "b": 30, "c": 30}.items():
        scene.serves(model, memory_bytes)
    scene.passes(MIN_RESIDENCY_S)
    return scene


def test_what_outgrew_the_budget_is_made_up_for_by_the_fewest() -> None:
    scene = grown()
    assert scene.says() == "unload a, eviction"
    scene.ends("a", cause=Cause.EVICTION)
    assert scene.says() == "nothing"


@pytest.mark.parametrize("policy", [{"evicts": False}, {"budget_bytes": None}, {"budget_bytes": 120}])
def test_nothing_is_made_up_for_where(policy: dict[str, object]) -> None:
    assert grown(**policy).decision() == grown(budget_bytes=None).decision()


def test_what_is_idle_goes_even_if_it_is_not_enough_when_the_budget_is_outgrown() -> None:
    scene = Scene()
    scene.serves("a", 150, busy=True)
    scene.serves("b", 10)
    scene.passes(MIN_RESIDENCY_S)
    assert scene.says() == "unload b, eviction"
    scene.ends("b", cause=Cause.EVICTION)
    assert scene.says() == "nothing"
    assert scene.next_look_s() == LOOK_S
