"""Who answers for a model in which state, and with which code nobody does."""

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import models
from support.running import Engine, running, stopped_clock
from support.workers import LIMIT_S, array, floats, tensor, trips, until

from events.jobs import LoadParameters
from events.models import ModelState
from events.types import WorkerExited
from runtime.errors import (
    InferenceTimeout,
    InvalidInput,
    InvalidModelId,
    QueueFull,
    RuntimeProblem,
    UnknownModel,
    WorkerDied,
)
from runtime.router import ModelNotLoaded, ModelReplaced, ModelUnloading, OtherVersionLoaded

SLOW = models.slow_model(side=800, depth=2_000).SerializeToString()
"""Loads for half a minute, if it is let."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a place with the models `adder` (versions 1 and 2), `loop` and `slow`."""
    root = tmp_path / "models"
    models.save(models.add(1), root, "adder", 1)
    models.save(models.add(2), root, "adder", 2)
    models.save(models.counting_loop(), root, "loop")
    models.save_bytes(SLOW, root, "slow")
    return tmp_path


async def refusal(engine: Engine, model_id: str, version: int | None = None) -> RuntimeProblem:
    """Return why nobody answers, which `is_ready` and `route` agree with."""
    assert not engine.router.is_ready(model_id, version)
    with pytest.raises((ModelNotLoaded, ModelUnloading)):
        engine.router.route(model_id, version)
    with pytest.raises(RuntimeProblem) as caught:
        await engine.router.route_or_why(model_id, version)
    return caught.value


async def test_a_loaded_model_is_answered_by_its_worker(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        route = await engine.router.route_or_why("adder")
        assert route == engine.router.route("adder", 2)
        assert engine.router.is_ready("adder")
        assert engine.router.is_ready("adder", 2)
        assert (route.model_id, route.version) == ("adder", 2)
        assert route.load.serving == (engine.worker("adder"),)
        events = await engine.events()
        assert events[route.position - 1].type == "ModelLoaded"
        assert [(spec.name, spec.datatype, spec.shape) for spec in route.inputs] == [("x", "FP32", (-1,))]
        assert [spec.name for spec in route.outputs] == ["y"]


async def test_a_model_that_was_never_loaded_is_answered_with_the_call_that_loads_it(folder: Path) -> None:
    async with running(folder) as engine:
        problem = await refusal(engine, "adder")
        assert isinstance(problem, ModelNotLoaded)
        assert problem.code == "model_not_loaded"
        assert "POST /api/v1/models/adder/load" in str(problem)


async def test_a_model_that_nobody_knows_is_unknown(folder: Path) -> None:
    async with running(folder) as engine:
        assert isinstance(await refusal(engine, "nobody"), UnknownModel)
        assert isinstance(await refusal(engine, "../adder"), InvalidModelId)


async def test_a_model_that_was_unloaded_and_left_the_repository_is_unknown(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        await engine.unload("loop")
        assert isinstance(await refusal(engine, "loop"), ModelNotLoaded)
        (folder / "models/loop/1/model.onnx").unlink()
        assert isinstance(await refusal(engine, "loop"), UnknownModel)


async def test_a_loaded_model_that_left_the_repository_still_answers(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        for version in (1, 2):
            (folder / f"models/adder/{version}/model.onnx").unlink()
        assert await engine.ask("adder", 1) == 2


async def test_another_version_than_the_loaded_one_does_not_answer(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        problem = await refusal(engine, "adder", 2)
        assert isinstance(problem, OtherVersionLoaded)
        assert "version 1 is" in str(problem)
        assert '{"version": 2}' in str(problem)


async def test_a_model_that_is_loading_does_not_answer_yet(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.ask_load("slow")
        await engine.becomes("slow", ModelState.LOADING)
        problem = await refusal(engine, "slow")
        assert isinstance(problem, ModelNotLoaded)
        assert "still loading" in str(problem)


async def test_a_model_that_failed_to_load_does_not_answer(folder: Path) -> None:
    models.save_bytes(models.TEXT, folder / "models", "bad")
    async with running(folder) as engine:
        await engine.load("bad")
        assert isinstance(await refusal(engine, "bad"), ModelNotLoaded)


async def test_the_old_version_answers_until_the_new_one_is_loaded(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        models.save_bytes(SLOW, folder / "models", "adder", 3)
        swap = await engine.ask_load("adder", 3)
        await engine.loading("adder")
        assert engine.router.route("adder").version == 1
        assert isinstance(await refusal(engine, "adder", 3), ModelNotLoaded)
        os.kill(engine.worker("adder").pid, signal.SIGKILL)
        await engine.ended(swap)
        assert engine.router.route("adder").version == 1
        await engine.load("adder", 2)
        assert engine.router.route("adder").version == 2
        assert isinstance(await refusal(engine, "adder", 1), ModelNotLoaded)


async def test_a_model_that_is_being_unloaded_takes_no_more_requests(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        asked = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
        await until(lambda: worker.in_flight == 1)
        await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
        problem = await refusal(engine, "loop")
        assert isinstance(problem, ModelUnloading)
        assert problem.code == "model_unloading"
        await engine.unload("loop", force=True)
        with pytest.raises(WorkerDied):
            await asked
        assert isinstance(await refusal(engine, "loop"), ModelNotLoaded)


async def test_a_lost_model_does_not_answer_until_it_is_back(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("adder")
        await engine.die("adder")
        problem = await refusal(engine, "adder")
        assert isinstance(problem, ModelNotLoaded)
        assert "is being loaded again" in str(problem)
        engine.pass_time(0.5)
        await engine.becomes("adder", ModelState.LOADED)
        assert engine.router.is_ready("adder")


async def test_a_worker_whose_death_is_not_recorded_yet_does_not_answer(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        await engine.consumer.stop()
        await asyncio.wait([engine.applying])
        worker = engine.worker("adder")
        os.kill(worker.pid, signal.SIGKILL)
        await asyncio.wait([worker.ended])
        assert engine.model("adder").state is ModelState.LOADED
        problem = await refusal(engine, "adder")
        assert isinstance(problem, ModelNotLoaded)
        assert "has just died" in str(problem)


async def test_an_inference_that_takes_too_long_is_stopped_and_the_worker_goes_on(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        with pytest.raises(InferenceTimeout) as caught:
            await engine.infer("loop", trips(models.ENDLESS), timeout_s=0.05)
        assert caught.value.code == "inference_timeout"
        assert "0.05 s" in str(caught.value)
        (answer,) = await engine.infer("loop", trips(7))
        assert array(answer) == 7


async def test_a_caller_that_gives_up_stops_the_inference(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        asked = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
        await until(lambda: worker.in_flight == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: worker.in_flight == 0)


async def test_what_the_model_does_not_take_is_the_callers_mistake(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        for inputs in ([], [floats("z", 1)], [tensor("x", "INT64", np.array([1], np.int64))]):
            with pytest.raises(InvalidInput):
                await engine.infer("adder", *inputs)
        with pytest.raises(InvalidInput):
            await engine.infer("adder", floats("x", 1), outputs=["nothing"])
        assert await engine.ask("adder", 1) == 3


# Queues, and workers that do not stop


async def test_as_many_as_may_be_are_in_flight_and_the_next_is_refused_at_once(folder: Path) -> None:
    async with running(folder, max_queue=2) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        asked = [asyncio.create_task(engine.infer("loop", trips(models.ENDLESS))) for _ in range(2)]
        await until(lambda: worker.in_flight == 2)
        with pytest.raises(QueueFull) as caught:
            await engine.infer("loop", trips(1))
        assert caught.value.code == "inference_queue_full"
        for task in asked:
            task.cancel()
        await until(lambda: worker.in_flight == 0)
        (answer,) = await engine.infer("loop", trips(7))
        assert array(answer) == 7


async def test_what_waited_behind_the_inference_that_killed_the_worker_is_answered_after_its_return(
    folder: Path,
) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        first = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
        await until(lambda: worker.in_flight == 1)
        behind = [asyncio.create_task(engine.infer("loop", trips(number))) for number in range(3)]
        await until(lambda: worker.in_flight == 4)
        await engine.die("loop")
        with pytest.raises(WorkerDied):
            await first
        assert not any(task.done() for task in behind)
        engine.pass_time(0.5)
        assert [int(array((await task)[0])) for task in behind] == [0, 1, 2]
        assert engine.model("loop").state is ModelState.LOADED


async def test_what_waits_for_a_model_that_is_unloaded_instead_is_told_so(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        tasks = [asyncio.create_task(engine.infer("loop", trips(models.ENDLESS))) for _ in range(2)]
        await until(lambda: worker.in_flight == 2)
        await engine.die("loop")
        await engine.unload("loop")
        with pytest.raises(ModelNotLoaded):
            await tasks[1]
        with pytest.raises(WorkerDied):
            await tasks[0]


async def test_a_worker_that_does_not_stop_is_killed_and_the_model_comes_back(folder: Path) -> None:
    async with running(folder, patience_s=0.05) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(InferenceTimeout):
            await engine.infer("loop", trips(1), timeout_s=0.05)
        await engine.becomes("loop", ModelState.LOST)
        [exited] = [e.data for e in await engine.events() if isinstance(e.data, WorkerExited)]
        assert exited.signal == signal.SIGKILL
        assert "did not stop within 0.05 s" in exited.stderr[-1]
        engine.pass_time(0.5)
        await engine.becomes("loop", ModelState.LOADED)
        (answer,) = await engine.infer("loop", trips(7))
        assert array(answer) == 7


async def test_a_cancelled_inference_that_only_waits_is_no_reason_to_kill_the_worker(folder: Path) -> None:
    async with running(folder, patience_s=0.01) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        first = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
        await until(lambda: worker.in_flight == 1)
        for _ in range(3):
            with pytest.raises(InferenceTimeout):
                await engine.infer("loop", trips(1), timeout_s=0.02)
        assert not first.done()
        worker._in_flight.patience_s = LIMIT_S  # how soon this one stops is not the question
        first.cancel()
        await until(lambda: worker.in_flight == 0)
        assert engine.worker("loop") is worker


async def test_answers_and_refusals_are_counted(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        for _ in range(3):
            await engine.ask("adder", 1)
        with pytest.raises(InvalidInput):
            await engine.infer("adder")
        counted = engine.live("adder").statistics
        assert (counted.requests, counted.failures, counted.executions) == (3, 1, 3)
        assert counted.total_ns >= counted.infer_ns > 0


async def test_a_model_was_last_used_when_its_last_inference_ended_answered_or_not(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        load = engine.live("loop")
        assert load.last_used_ns == 0
        await engine.infer("loop", trips(1))
        answered_ns = load.last_used_ns
        assert 0 < answered_ns <= time.monotonic_ns()
        with pytest.raises(InvalidInput):
            await engine.infer("loop")
        refused_ns = load.last_used_ns
        assert refused_ns > answered_ns
        asked = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
        await until(lambda: engine.worker("loop").in_flight == 1)
        assert load.last_used_ns == refused_ns
        asked.cancel()
        await asyncio.wait([asked])
        assert load.last_used_ns > refused_ns


async def test_a_model_that_makes_way_for_another_version_says_so(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        models.save_bytes(SLOW, folder / "models", "adder", 3)
        swap = await engine.ask_load("adder", 3, LoadParameters(strategy="in_place"))
        await engine.recorded(lambda: engine.model("adder").previous is not None)
        problem = await refusal(engine, "adder")
        assert isinstance(problem, ModelReplaced)
        assert "is being replaced by another version" in str(problem)
        await engine.loading("adder")
        engine.kill("adder")
        await engine.ended(swap)
        await engine.becomes("adder", ModelState.LOADED)
        assert engine.router.route("adder").version == 1
