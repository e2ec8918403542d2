"""How a version takes the place of another: `in_place` and `auto`; `beside` is in `test_scheduler.py`."""

import pytest
from support.decisions import STEPS, Scene, decided, processes, said, told
from support.events import at

from events.types import CancelRequested, Cause
from runtime.scheduling.actions import MakeWay
from runtime.scheduling.admission import OVERTAKEN_S
from runtime.scheduling.scheduler import decide
from runtime.scheduling.sight import MIN_RESIDENCY_S, Phase, Policy

IN_PLACE: list[tuple[str, str, str, str]] = [
    # (given and when, facts, processes, then the next action)
    ("it is asked for", "load ask_2_in_place", "L:serving", "end L for L2"),
    ("the old version is to end", "load ask_2_in_place swap_out", "L:serving", "begin S of L"),
    ("the old version drains", "load ask_2_in_place swap_out start_swap_out", "L:draining", "nothing"),
    ("the old version is gone", "load ask_2_in_place swap_out start_swap_out", "L:gone", "finish S of L"),
    ("the place is free", "load ask_2_in_place swap_out end_swap_out", "", "start L2"),
    ("the new version loads", "load ask_2_in_place swap_out end_swap_out start_2", "L2:loading", "nothing"),
    (
        "the new version is there",
        "load ask_2_in_place swap_out end_swap_out start_2",
        "L2:loaded",
        "complete L2",
    ),
    ("the new version failed", "load ask_2_in_place swap_out end_swap_out start_2", "L2:failed", "fail L2"),
    (
        "the old version is wanted back",
        "load ask_2_in_place swap_out end_swap_out start_2 fail_2",
        "L2:draining!",
        "reload digits, swap",
    ),
    (
        "the old version is coming back",
        "load ask_2_in_place swap_out end_swap_out fail_2 reload_old",
        "",
        "start R",
    ),
    ("the model was lost before", "load die ask_2_in_place", "", "start L2"),
    ("the old version died before it was asked to end", "load ask_2_in_place", "L:gone", "record death of L"),
    ("the old version died and the new one has its place", "load ask_2_in_place die", "", "start L2"),
    (
        "the old version died when it was to end",
        "load ask_2_in_place swap_out",
        "L:gone",
        "record death of L",
    ),
    ("the old version died and was to end", "load ask_2_in_place swap_out die", "", "begin S of L"),
    # Ended by somebody.
    ("it is cancelled before it began", "load ask_2_in_place want_cancel_2", "L:serving", "cancel L2"),
    (
        "it is cancelled while the old version drains",
        "load ask_2_in_place swap_out start_swap_out want_cancel_2 cancel_2",
        "L:draining",
        "nothing",
    ),
    (
        "it was cancelled while the old version drained",
        "load ask_2_in_place swap_out start_swap_out want_cancel_2 cancel_2 end_swap_out",
        "",
        "reload digits, swap",
    ),
    (
        "it is cancelled in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 want_cancel_2",
        "L2:loaded",
        "cancel L2",
    ),
    (
        "it was cancelled in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 want_cancel_2 cancel_2",
        "",
        "reload digits, swap",
    ),
    (
        "the reload of the old version is cancelled",
        "load ask_2_in_place swap_out end_swap_out fail_2 reload_old want_cancel_R cancel_R",
        "",
        "nothing",
    ),
    (
        "an unload waits in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 unload_2",
        "L2:loading",
        "nothing",
    ),
    (
        "an unload waited in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 unload_2 end_2",
        "L2:serving",
        "begin U of L2",
    ),
    (
        "an unload waited in the gap for one that failed",
        "load ask_2_in_place swap_out end_swap_out start_2 unload_2 fail_2",
        "",
        "begin U of L",
    ),
    (
        "an unload comes when the old version is coming back",
        "load ask_2_in_place swap_out end_swap_out fail_2 reload_old start_R unload_R",
        "R:loading",
        "cancel R",
    ),
    (
        "force comes while the old version drains",
        "load ask_2_in_place swap_out start_swap_out force",
        "L:draining",
        "cancel L2",
    ),
    (
        "force has cancelled it while the old version drains",
        "load ask_2_in_place swap_out start_swap_out force cancel_2 start_force",
        "L:draining",
        "kill L",
    ),
    (
        "force in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 force_2",
        "L2:loading",
        "cancel L2",
    ),
    (
        "force has cancelled it in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 force_2 cancel_2 start_force",
        "L2:draining!",
        "nothing",
    ),
    (
        "force has ended it in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 force_2 cancel_2 start_force",
        "",
        "finish F of L",
    ),
    # Another is asked for.
    (
        "two swaps are asked for at once",
        "load ask_2_in_place ask_3 swap_out end_swap_out start_2 end_2",
        "L2:serving",
        "start L3",
    ),
    (
        "the first of two swaps failed in the gap",
        "load ask_2_in_place ask_3 swap_out end_swap_out start_2 fail_2",
        "",
        "start L3",
    ),
    # The server dies.
    ("the server died before", "load ask_2_in_place restart", "", "start L2"),
    ("the server died when the old was to end", "load ask_2_in_place swap_out restart", "", "begin S of L"),
    (
        "the server died while the old drained",
        "load ask_2_in_place swap_out start_swap_out restart start_swap_out",
        "",
        "finish S of L",
    ),
    (
        "the server died in the gap",
        "load ask_2_in_place swap_out end_swap_out start_2 restart",
        "",
        "start L2",
    ),
    (
        "the server died in the gap, and it failed",
        "load ask_2_in_place swap_out end_swap_out start_2 restart fail_2",
        "",
        "reload digits, swap",
    ),
    (
        "the server died when the old version was wanted back",
        "load ask_2_in_place swap_out end_swap_out fail_2 restart",
        "",
        "reload digits, restart",
    ),
    (
        "the server died while the old version was coming back",
        "load ask_2_in_place swap_out end_swap_out fail_2 reload_old start_R restart",
        "",
        "start R",
    ),
]


@pytest.mark.parametrize(
    ("facts", "running", "action"), [row[1:] for row in IN_PLACE], ids=[row[0] for row in IN_PLACE]
)
def test_a_swap_in_place_when(facts: str, running: str, action: str) -> None:
    assert said(decided(facts, running).action) == action


def test_the_old_version_comes_back_with_back_off_once_its_reload_failed() -> None:
    history = told("load ask_2_in_place swap_out end_swap_out fail_2 reload_old fail_R")
    decision = decide(history.state, {}, Policy(2), at(history.seconds))
    assert (decision.action, decision.wake_at) == (None, at(history.seconds + 0.5))
    assert said(decide(history.state, {}, Policy(2), at(history.seconds + 0.5)).action) == (
        "reload digits, recovery"
    )


def test_a_swap_in_place_that_is_late_brings_the_old_version_back() -> None:
    history = told("load")
    history.ask_load("L2", version=2, strategy="in_place", timeout_s=5)
    for word in ("swap_out", "end_swap_out", "start_2"):
        STEPS[word](history)
    late = decide(history.state, processes("L2:loading"), Policy(2), at(history.seconds + 5))
    assert said(late.action) == "fail L2: timeout"
    history.fail_load("L2", "timeout", version=2)
    assert said(decide(history.state, {}, Policy(2), at(history.seconds)).action) == "reload digits, swap"


# Which strategy.


@pytest.mark.parametrize(
    ("strategy", "need", "says"),
    [
        ("beside", 40, "start a2"),
        ("beside", 41, "fail a2: insufficient_memory"),
        ("in_place", 1, "end a1 for a2"),
        ("in_place", 100, "end a1 for a2"),
        ("in_place", 101, "fail a2: insufficient_memory"),
        ("auto", 40, "start a2"),
        ("auto", 41, "end a1 for a2"),
        ("auto", 101, "fail a2: insufficient_memory"),
    ],
)
def test_a_strategy_does_with_memory_what_it_says(strategy: str, need: int, says: str) -> None:
    scene = Scene()
    scene.serves("a", 60)
    scene.asks("a", need, version=2, strategy=strategy)
    assert scene.says() == says


def test_a_swap_beside_that_never_fits_says_which_strategy_would() -> None:
    scene = Scene()
    scene.serves("a", 60)
    scene.asks("a", 60, version=2)
    assert "with strategy auto or in_place it takes its place" in scene.decision().action.message  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["in_place", "auto"])
def test_what_repairs_a_model_that_still_serves_does_not_end_it_first(strategy: str) -> None:
    history = told("load_pair die_1")
    history.ask_load("R", cause=Cause.RECOVERY, strategy=strategy)
    decision = decide(history.state, processes("P:serving/P1"), Policy(2), at(history.seconds))
    assert said(decision.action) == "start R"


@pytest.mark.parametrize("strategy", ["in_place", "auto"])
def test_what_serves_is_ended_only_when_the_new_version_then_has_room(strategy: str) -> None:
    scene = Scene()
    scene.serves("z", 50)
    scene.serves("a", 40)
    scene.asks("a", 70, version=2, strategy=strategy)
    assert scene.says() == "nothing"
    scene.passes(MIN_RESIDENCY_S)
    assert scene.says() == "unload z, eviction for a2"
    scene.ends("z", cause=Cause.EVICTION)
    assert scene.waiting_for("a2").endswith("it is being given back")
    scene.is_gone("z")
    assert isinstance(scene.decision().action, MakeWay)


@pytest.mark.parametrize("strategy", ["in_place", "auto"])
def test_what_serves_is_not_ended_before_a_load_may_begin(strategy: str) -> None:
    scene = Scene(loads_at_once=1)
    scene.serves("a", 60)
    scene.loads("b", 10)
    scene.asks("a", 60, version=2, strategy=strategy)
    assert scene.waiting_for("a2") == "a free place: of loads, 1 may run at once"


def in_the_gap(**policy: object) -> Scene:
    """A model's old version takes 60 and drains; the new one will need 80."""
    scene = Scene(**policy)  # type: ignore[arg-type]
    scene.serves("a", 60)
    scene.asks("a", 80, version=2, strategy="in_place", priority="low")
    scene.ends("a", cause=Cause.SWAP)
    return scene


def test_room_is_kept_while_the_old_version_drains() -> None:
    scene = in_the_gap()
    scene.asks("b", 30, priority="high")
    assert scene.waiting_for("a2") == "the end of the version whose place it takes"
    assert scene.waiting_for("b1") == "room, which is kept for job a2, before it"


def test_without_a_budget_a_drain_holds_nobody_up() -> None:
    scene = in_the_gap(budget_bytes=None)
    scene.asks("b")
    assert scene.says() == "start b1"


def test_a_model_that_made_way_goes_before_everything() -> None:
    scene = in_the_gap()
    scene.asks("b", 30, priority="high")
    scene.is_gone("a")
    assert scene.says() == "start a2"


def test_room_is_kept_for_a_model_that_made_way_from_the_first_moment() -> None:
    scene = in_the_gap()
    scene.runs("z1", "z", Phase.SERVING, memory_bytes=50)  # it grew meanwhile
    scene.is_gone("a")
    scene.asks("b", 30, priority="high")
    assert scene.waiting_for("b1") == "room, which is kept for job a2, before it"


def test_a_version_that_is_coming_back_goes_before_everything() -> None:
    scene = in_the_gap()
    scene.is_gone("a")
    scene.history.fail_load("a2", of="a", version=2)
    assert scene.says() == "reload a, swap"
    scene.asks("b", 60, priority="high")
    scene.asks("a", 60, version=3, cause=Cause.SWAP, priority="low")
    assert scene.says() == "start a3"


def test_a_model_that_made_way_does_not_yield_to_pressure() -> None:
    scene = in_the_gap()
    scene.is_gone("a")
    scene.conditions = type(scene.conditions)(under_pressure=True, needs=scene.needs)
    assert scene.says() == "start a2"


def test_a_model_that_makes_way_for_another_is_its_own_no_more() -> None:
    scene = in_the_gap()
    assert scene.model("a").unloads == ("-a1",)
    scene.history.add(CancelRequested(), "a2", of="a", version=2)
    assert scene.says() == "cancel a2"


def test_two_swaps_at_once_end_in_the_later_one() -> None:
    scene = Scene()
    scene.serves("a", 60)
    scene.asks("a", 60, version=2, strategy="in_place")
    scene.asks("a", 60, version=3, strategy="in_place")
    for old, new in ((1, 2), (2, 3)):
        assert scene.says() == f"end a{old} for a{new}"
        scene.ends("a", version=old, cause=Cause.SWAP)
        scene.is_gone("a", version=old)
        assert scene.says() == f"start a{new}"
        scene.history.start_load(f"a{new}", of="a", version=new)
        scene.history.end_load(f"a{new}", of="a", version=new)
        scene.runs(f"a{new}", "a", Phase.SERVING, memory_bytes=60)
    scene.passes(OVERTAKEN_S)
    assert scene.says() == "nothing"
    assert scene.model("a").version == 3
