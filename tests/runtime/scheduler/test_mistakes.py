"""Mistakes that users of comparable servers reported: where each is tested.

| reported at | tested in |
| --- | --- |
| triton #4844, llama.cpp #28443 | test_admission.py (memory until exit, kept room) |
| MLServer #1316 | test_admission.py (reserved), ../test_estimates.py (the last peak) |
| llama.cpp #20763 | test_scheduler.py (`L:failed`), ../consumer/test_consumer.py |
| llama.cpp #28698, #25528, #23640 | test_eviction.py (no victim, the fewest) |
| llama.cpp #22284, pytorch/serve #2030 | here |
| llama-swap #25 | test_eviction.py (idle timeout) |
| llama-swap #92, pytorch/serve #2428, triton #6536 | test_scheduler.py (reloads) |
| ollama #7779, #14364, #17428 | test_scheduler.py (force), ../consumer/test_consumer.py |
| tensorflow/serving #2017 | test_swaps.py (strategies), tests/server/api/test_loads.py |
| llama-swap #946 | tests/server/api/test_unloads.py |
| triton #6711 | tests/server/api/test_loads.py |
| triton #6536 | tests/server/v2/test_repository.py |
| triton #356 | ../worker/test_worker_loading.py, ../consumer/test_instances.py |
| triton #8958, #5940; MLServer #957 | tests/server/api/test_health.py, tests/server/api/test_jobs.py |
| TorchServe's CVEs, Kokoro-FastAPI #478 | tests/server/auth/test_gate.py |
"""

from itertools import pairwise

from support.history import CONTENTS
from support.worlds import World

from events.clock import add_seconds, seconds_between
from events.commands import RequestLoad
from events.jobs import CRASH_LOOP
from events.models import ModelState
from events.types import LoadParameters, ModelLoaded, WorkerExited
from runtime.scheduler.scheduler import MAX_INCIDENTS
from runtime.scheduler.view import MIN_RESIDENCY_S, Policy


def test_llama_cpp_22284_models_that_do_not_fit_together_take_turns() -> None:
    world = World(Policy(loads_at_once=2, budget_bytes=100, evicts=True))
    for _ in range(100):
        for name, version in {"b": 2, "c": 1}.items():
            world.submit(RequestLoad(name, version, CONTENTS, "alice", LoadParameters(timeout_s=3_600)))
        world.settle()
        world.progress("loaded")
        world.settle()
        world.now = add_seconds(world.now, 1)
    loaded = [event for event in world.events if isinstance(event.data, ModelLoaded)]
    assert len(loaded) >= 100 // (MIN_RESIDENCY_S + 3)
    for first, second in pairwise(loaded):
        assert first.model_id != second.model_id
        assert seconds_between(first.recorded_at, second.recorded_at) >= MIN_RESIDENCY_S


def test_pytorch_serve_2030_restarts_are_bounded() -> None:
    world = World()
    world.submit(RequestLoad("a", 1, None, "alice"))
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
