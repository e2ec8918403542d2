"""Who answers for a model in which state, and with which code nobody does."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from support import models
from support.running import Engine, running
from support.workers import LIMIT_S, array, floats, tensor, trips, until

from events.models import ModelState
from runtime.errors import InvalidInput, InvalidModelId, RuntimeProblem, UnknownModel, WorkerDied
from runtime.router import InferenceTimeout, ModelNotLoaded, ModelUnloading, infer

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
        assert route.worker is engine.worker("adder")
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
        assert isinstance(problem, ModelNotLoaded)
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
        route = engine.router.route("loop")
        asked = asyncio.create_task(infer(route, [trips(models.ENDLESS)], (), LIMIT_S))
        await until(lambda: route.worker.in_flight == 1)
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
    async with running(folder) as engine:
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
        route = engine.router.route("loop")
        with pytest.raises(InferenceTimeout) as caught:
            await infer(route, [trips(models.ENDLESS)], (), 0.05)
        assert caught.value.code == "inference_timeout"
        assert "0.05 s" in str(caught.value)
        (answer,) = await infer(route, [trips(7)], (), LIMIT_S)
        assert array(answer) == 7


async def test_a_caller_that_gives_up_stops_the_inference(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop")
        route = engine.router.route("loop")
        asked = asyncio.create_task(infer(route, [trips(models.ENDLESS)], (), LIMIT_S))
        await until(lambda: route.worker.in_flight == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: route.worker.in_flight == 0)


async def test_what_the_model_does_not_take_is_the_callers_mistake(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        route = engine.router.route("adder")
        for inputs in ([], [floats("z", 1)], [tensor("x", "INT64", np.array([1], np.int64))]):
            with pytest.raises(InvalidInput):
                await infer(route, inputs, (), LIMIT_S)
        with pytest.raises(InvalidInput):
            await infer(route, [floats("x", 1)], ("nothing",), LIMIT_S)
        assert await engine.ask("adder", 1) == 3
