"""What the system unloads by itself: idle models, and what is not restored."""

import pytest
from support.decisions import PAIR, Scene, said, told
from support.events import MODEL, at

from events.types import Cause
from runtime.scheduling.eviction import LOOK_S
from runtime.scheduling.scheduler import decide
from runtime.scheduling.sight import MIN_RESIDENCY_S, Policy


@pytest.mark.parametrize("keep_alive_s", [0, 1, 30])
def test_the_idle_clock_starts_when_the_last_request_ends(keep_alive_s: int) -> None:
    scene = Scene()
    scene.serves("a", used_s_ago=0, keep_alive_s=keep_alive_s)
    if keep_alive_s:
        assert scene.next_look_s() == keep_alive_s
    scene.passes(keep_alive_s)
    assert scene.says() == "unload a, idle"


@pytest.mark.parametrize("keep_alive_s", [None, -1])
def test_a_model_without_a_keep_alive_stays(keep_alive_s: int | None) -> None:
    scene = Scene()
    scene.serves("a", used_s_ago=0, keep_alive_s=keep_alive_s)
    scene.passes(1_000_000)
    assert scene.decision().action is None
    assert scene.next_look_s() is None


def test_a_pinned_model_stays_whatever_its_keep_alive() -> None:
    scene = Scene()
    scene.serves("a", used_s_ago=0, keep_alive_s=0, pinned=True)
    scene.passes(1_000_000)
    assert scene.says() == "nothing"


@pytest.mark.parametrize("keep_alive_s", [0, 5, 30])
def test_a_model_that_was_not_asked_yet_has_its_minimum_residency(keep_alive_s: int) -> None:
    scene = Scene()
    scene.serves("a", keep_alive_s=keep_alive_s)
    stays_s = max(keep_alive_s, MIN_RESIDENCY_S)
    assert scene.next_look_s() == stays_s
    scene.passes(stays_s)
    assert scene.says() == "unload a, idle"


@pytest.mark.parametrize(("keep_alive_s", "look_s"), [(0, LOOK_S), (30, 30)])
def test_a_busy_model_is_looked_at_again(keep_alive_s: int, look_s: float) -> None:
    scene = Scene()
    scene.serves("a", used_s_ago=0, busy=True, keep_alive_s=keep_alive_s)
    scene.passes(1_000)
    assert scene.says() == "nothing"
    assert scene.next_look_s() == look_s


def test_a_model_of_which_something_is_asked_is_not_idle() -> None:
    scene = Scene()
    scene.serves("a", 10, used_s_ago=0, keep_alive_s=0)
    scene.asks("a", 100, version=2)
    scene.needs["a2"] = None
    assert scene.says() == "nothing"
    scene.ends("a", begun=False)
    assert scene.says() == "nothing"


def test_what_was_loaded_is_let_go_where_nothing_is_restored() -> None:
    state, now = told("load restart").state, at(100)
    none = Policy(loads_at_once=1, restores=False)
    assert said(decide(state, {}, none, now).action) == "unload digits, restart"
    assert said(decide(state, {}, PAIR, now).action) == "reload digits, restart"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("load die restart", "unload digits, restart"),  # it was wanted back when the server ended
        ("load die", "reload digits, recovery"),
        ("load restart unload", "begin U of L"),
        ("load restart unload start_unload", "finish U of L"),
        ("ask restart", "start L"),
        ("load ask_2 restart", "start L2"),
        ("load die recover restart", "start R"),
    ],
)
def test_where_nothing_is_restored_jobs_go_on(facts: str, says: str) -> None:
    policy = Policy(loads_at_once=1, restores=False)
    assert said(decide(told(facts).state, {}, policy, at(100)).action) == says


def test_what_is_not_restored_is_unloaded() -> None:
    history = told("load restart")
    history.ask_unload("U", "L", cause=Cause.RESTART)
    history.end_unload("U")
    assert history.model().state == "unloaded"
    assert MODEL not in {model.id for model in history.state.models.values() if model.serving}
