"""Mistakes that others' users reported (DESIGN.md, "Policies"), each held by a test.

Here are those that are decided by the scheduler alone. Of the others, and of what these come to end to end:

| reported at | held by |
| --- | --- |
| triton #4844 | here; tests/runtime/scheduling/test_admission.py |
| MLServer #1316 | here; tests/events/test_models.py (footprints) |
| llama.cpp #20763 | here; tests/runtime/test_consumer.py |
| llama.cpp #28698, #25528, #23640 | here; tests/runtime/scheduling/test_eviction.py |
| llama.cpp #22284, #28443 | here; tests/runtime/scheduling/test_simulation.py |
| llama-swap #25 | here; tests/runtime/scheduling/test_removal.py |
| llama-swap #946 | tests/server/test_mistakes_over_http.py |
| ollama #7779, #14364, #17428 | here (force); tests/server/test_mistakes_over_http.py |
| llama-swap #92 | here; tests/runtime/scheduling/test_scheduler.py |
| pytorch/serve #2030, #2428 | here; tests/runtime/scheduling/test_scheduler.py |
| triton #6711, #6536 | tests/server/test_mistakes_over_http.py |
| triton #8958, #5940 | here (a load that waits); tests/server/test_mistakes_over_http.py |
| triton #356 | tests/server/test_mistakes_over_http.py; tests/runtime/worker/test_worker.py |
| MLServer #957 | tests/server/test_mistakes_over_http.py; tests/events/test_projections.py |
| tensorflow/serving #2017 | here; test_swaps.py; tests/server/test_mistakes_over_http.py |
| TorchServe's CVEs, Kokoro-FastAPI #478 | tests/server/test_mistakes_over_http.py; test_roles.py |
"""

from itertools import pairwise

import pytest
from support.decisions import PAIR, Scene, decided, said, told
from support.events import at, file
from support.worlds import World

from events.clock import later, seconds_between
from events.commands import FileStat, RequestLoad
from events.jobs import LoadParameters
from events.models import CRASH_LOOP, Footprint, ModelState
from events.types import Cause, ModelLoaded, WorkerExited
from runtime.needs import need_of
from runtime.repository import FileStat as FoundFile
from runtime.scheduling.actions import FailLoad, GiveUp
from runtime.scheduling.scheduler import MAX_INCIDENTS, decide
from runtime.scheduling.sight import MIN_RESIDENCY_S, Phase, Policy


def test_triton_4844_memory_of_an_unloading_model_counts_until_its_process_has_exited() -> None:
    scene = Scene()
    scene.serves("a", 80)
    scene.ends("a")
    scene.asks("b", 50)
    assert scene.waiting_for("b1").endswith("it is being given back")
    scene.runs("a1", "a", Phase.DRAINING, killed=True, memory_bytes=80)
    assert scene.waiting_for("b1").endswith("it is being given back")
    scene.is_gone("a")
    assert scene.says() == "start b1"


def test_mlserver_1316_a_load_is_admitted_by_its_peak_and_that_is_reserved_before_it_begins() -> None:
    found = (FoundFile("model.onnx", 4_096, 1),)
    seen = (Footprint(1, (file(),), 70),)
    assert need_of(found, 1, LoadParameters(), seen).bytes == 70
    scene = Scene(evicts=False)
    scene.loads("a", 70)
    scene.asks("b", 50)
    assert scene.says() == "nothing"
    scene.history.end_load("a1", of="a")
    scene.runs("a1", "a", Phase.SERVING, memory_bytes=30)  # what it keeps
    assert scene.says() == "start b1"


@pytest.mark.parametrize("phase", ["failed", "failed/w-L"])
def test_llama_cpp_20763_a_worker_killed_while_it_loads_ends_its_load(phase: str) -> None:
    assert said(decided("ask start", f"L:{phase}").action) == "fail L"


@pytest.mark.parametrize("begun", [True, False])
def test_llama_cpp_28698_a_loading_model_is_no_victim(*, begun: bool) -> None:
    scene = Scene(loads_at_once=3)
    scene.loads("a", 90)
    if begun:
        scene.runs("a1", "a", Phase.LOADED, memory_bytes=90)
        assert scene.says() == "complete a1"
        scene.runs("a1", "a", Phase.LOADING, memory_bytes=90)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("b", 50, priority="high")
    assert scene.says() == "nothing"


def test_llama_cpp_25528_a_model_just_loaded_for_a_waiting_request_is_no_victim() -> None:
    scene = Scene()
    scene.serves("a", 90, cause=Cause.DEMAND, busy=True)  # a request that waits for it holds a lease
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("b", 50, priority="high")
    assert scene.says() == "nothing"


def test_llama_cpp_23640_the_fewest_are_evicted() -> None:
    scene = Scene()
    for model in "abcd":
        scene.serves(model, 25)
    scene.passes(MIN_RESIDENCY_S)
    scene.asks("x", 20)
    assert scene.says() == "unload a, eviction for x1"
    scene.ends("a", cause=Cause.EVICTION)
    assert scene.waiting_for("x1").endswith("it is being given back")


def test_llama_cpp_22284_two_models_that_do_not_fit_together_take_turns() -> None:
    world = World(Policy(loads_at_once=2, budget_bytes=100, evicts=True))
    for _ in range(100):
        for name, version in {"b": 2, "c": 1}.items():
            files = (FileStat("model.onnx", 4_096, 1),)
            world.submit(RequestLoad(name, version, files, "alice", LoadParameters(timeout_s=3_600)))
        world.settle()
        world.progress("loaded")
        world.settle()
        world.now = later(world.now, 1)
    loaded = [event for event in world.events if isinstance(event.data, ModelLoaded)]
    assert len(loaded) >= 100 // (MIN_RESIDENCY_S + 3)
    for first, second in pairwise(loaded):
        assert first.model_id != second.model_id  # each has its turn, and nobody has two
        assert seconds_between(first.recorded_at, second.recorded_at) >= MIN_RESIDENCY_S


def test_llama_cpp_28443_who_waits_for_room_is_not_passed_by_for_ever() -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 60)
    scene.asks("big", 90, timeout_s=3_600)
    scene.passes(30)
    for number in range(3):
        scene.asks(f"small{number}", 10)
    assert scene.says() == "nothing"
    scene.passes(90)
    scene.asks("urgent", 10, priority="high")
    assert scene.says() == "nothing"
    scene.ends("z")
    scene.is_gone("z")
    assert scene.says() == "start big1"


def test_llama_swap_25_the_idle_clock_starts_when_the_last_request_ends() -> None:
    scene = Scene()
    scene.serves("a", busy=True, keep_alive_s=30)
    scene.passes(10_000)
    assert scene.says() == "nothing"
    scene.runs("a1", "a", Phase.SERVING, last_used_at=at(scene.history.seconds))
    scene.passes(29.9)
    assert scene.says() == "nothing"
    scene.passes(0.1)
    assert scene.says() == "unload a, idle"


def test_ollama_7779_an_unload_that_is_stuck_is_ended_by_force() -> None:
    assert said(decided("load unload start_unload force start_force", "L:draining").action) == "kill L"


def test_llama_swap_92_a_failed_model_is_loaded_when_it_is_asked_for_again() -> None:
    history = told("ask start fail")
    assert history.model().state is ModelState.FAILED
    history.ask_load("L3")
    assert said(decide(history.state, {}, PAIR, at(history.seconds)).action) == "start L3"


def test_pytorch_serve_2030_restarts_are_bounded() -> None:
    world = World()
    world.submit(RequestLoad("a", 1, (), "alice"))
    world.settle()
    deaths = 0
    while world.state.models["a"].state is not ModelState.FAILED:
        world.progress("loaded")
        world.settle()
        for process in world.alive():
            process.die(WorkerExited(None, 9, ()), *process.left)
        deaths += 1
        world.now = world.settle().wake_at or world.now
        world.settle()
    assert deaths == MAX_INCIDENTS
    assert world.state.models["a"].error is not None
    assert world.state.models["a"].error.code == CRASH_LOOP


def test_pytorch_serve_2428_a_bad_model_is_told_from_a_crash() -> None:
    bad = decided("ask start fail")
    assert bad.action is None  # is not tried again
    crashed = decided("load die", after_s=0.5)
    assert said(crashed.action) == "reload digits, recovery"
    kept_dying = told("load die recover fail_R")
    for number in range(MAX_INCIDENTS - 2):
        kept_dying.ask_load(f"R{number}", cause=Cause.RECOVERY)
        kept_dying.fail_load(f"R{number}")
    action = decide(kept_dying.state, {}, PAIR, at(kept_dying.seconds)).action
    assert isinstance(action, GiveUp)
    assert "because" in action.message


def test_triton_6536_a_load_that_somebody_gave_up_leaves_a_model_wanted_back() -> None:
    history = told("load die")
    history.ask_load("L3", timeout_s=1)
    late = decide(history.state, {}, Policy(0), at(history.seconds + 1)).action
    assert isinstance(late, FailLoad)
    history.fail_load("L3", "timeout")
    assert said(decide(history.state, {}, PAIR, at(history.seconds + 1)).action) == "reload digits, recovery"


def test_triton_8958_a_load_that_waits_for_room_does_nothing_to_those_that_serve() -> None:
    scene = Scene()
    scene.serves("a", 80, busy=True)
    scene.asks("b", 50)
    scene.passes(100)
    assert scene.says() == "nothing"


@pytest.mark.parametrize(
    ("strategy", "says"), [("beside", "nothing"), ("in_place", "end a1 for a2"), ("auto", "end a1 for a2")]
)
def test_tensorflow_serving_2017_a_swap_has_a_strategy(strategy: str, says: str) -> None:
    scene = Scene(evicts=False)
    scene.serves("z", 30)
    scene.serves("a", 30)
    scene.asks("a", 60, version=2, strategy=strategy)
    assert scene.says() == says
