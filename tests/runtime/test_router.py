"""Which load answers an inference of a model, and with which code the router refuses one."""

import asyncio
import os
import signal
import time

import numpy as np
import pytest
from msgspec import UNSET, UnsetType
from support import models
from support.running import Engine, Run, stopped_clock
from support.workers import LIMIT_S, array, floats, tensor, trips, until

from events.models import ModelState
from events.types import LoadParameters, ModelLoaded, WorkerExited
from runtime.errors import (
    InferenceTimeout,
    InvalidInput,
    InvalidModelId,
    ModelNotLoaded,
    QueueFull,
    RuntimeProblem,
    UnknownModel,
)
from runtime.lostmodels import ModelLost
from runtime.router import (
    Absent,
    Answered,
    InferenceRequest,
    ModelReplaced,
    ModelUnloading,
    OtherVersionLoaded,
    choose_level,
)
from runtime.statistics import InferenceTimes


async def refusal(engine: Engine, model_id: str, version: int | None = None) -> tuple[type, str]:
    """Return the class and message of a refusal, on which `is_ready` and `resolve` agree."""
    assert not engine.router.is_ready(model_id, version)
    assert isinstance(engine.router.resolve(model_id, version), Absent)
    with pytest.raises(RuntimeProblem) as caught:
        await engine.router.find(model_id, version)
    return caught.type, str(caught.value)


def not_loaded(model_id: str) -> tuple[type, str]:
    load = f"load it with POST /api/v1/models/{model_id}/load"
    return ModelNotLoaded, f"model '{model_id}' is not loaded; {load}"


async def seven(engine: Engine) -> bool:
    """Whether `loop` answers as it should."""
    (answer,) = await engine.infer("loop", trips(7))
    return int(array(answer)) == 7


async def test_loaded_model_is_routed_to_its_worker(engine: Engine) -> None:
    await engine.load("adder")
    here = await engine.router.find("adder")
    assert here is engine.router.resolve("adder", 2)
    assert engine.router.is_ready("adder")
    assert engine.router.is_ready("adder", 2)
    assert (here.model_id, here.version) == ("adder", 2)
    assert here.load.serving == (engine.worker("adder"),)
    events = await engine.events()
    assert events[here.position - 1].type == "ModelLoaded"
    assert [(spec.name, spec.datatype, spec.shape) for spec in here.inputs] == [("x", "FP32", (-1,))]
    assert [spec.name for spec in here.outputs] == ["y"]


async def test_router_refuses_what_is_not_loaded(engine: Engine) -> None:
    models.save_bytes(models.TEXT, engine.root, "bad")
    assert await refusal(engine, "adder") == not_loaded("adder")
    assert (await refusal(engine, "nobody"))[0] is UnknownModel
    assert (await refusal(engine, "../adder"))[0] is InvalidModelId
    await engine.load("bad")
    assert await refusal(engine, "bad") == not_loaded("bad")
    await engine.load("loop")
    [asked] = await engine.start_endless()
    await engine.ask_unload("loop")
    await engine.becomes("loop", ModelState.UNLOADING)
    assert await refusal(engine, "loop") == (ModelUnloading, "model 'loop' is being unloaded by alice")
    await engine.unload("loop", force=True)
    with pytest.raises(ModelLost):
        await asked
    problem, message = await refusal(engine, "loop")
    assert (problem, "is not loaded: alice unloaded it 2" in message) == (ModelNotLoaded, True)
    (engine.root / "loop/1/model.onnx").unlink()
    assert (await refusal(engine, "loop"))[0] is UnknownModel
    await engine.ask_load("slow")
    await engine.becomes("slow", ModelState.LOADING)
    assert await refusal(engine, "slow") == (ModelNotLoaded, "model 'slow' is still loading")


async def test_old_version_answers_until_the_swap(engine: Engine) -> None:
    await engine.load("adder", 1)
    problem, message = await refusal(engine, "adder", 2)
    assert problem is OtherVersionLoaded
    assert "version 1 is" in message
    assert '{"version": 2}' in message
    models.save_bytes(models.endless_load(), engine.root, "adder", 3)
    swap = await engine.ask_load("adder", 3)
    await engine.loading("adder")
    assert (await engine.router.find("adder")).version == 1
    assert (await refusal(engine, "adder", 3))[0] is OtherVersionLoaded
    os.kill(engine.worker("adder").pid, signal.SIGKILL)
    await engine.ended(swap)
    assert (await engine.router.find("adder")).version == 1
    await engine.load("adder", 2)
    assert (await engine.router.find("adder")).version == 2
    assert (await refusal(engine, "adder", 1))[0] is OtherVersionLoaded
    for version in (1, 2):
        (engine.root / f"adder/{version}/model.onnx").unlink()
    assert await engine.ask("adder", 1) == 3  # what is loaded answers, whatever became of its files


async def test_router_refuses_during_in_place_swap(engine: Engine) -> None:
    await engine.load("adder", 1)
    models.save_bytes(models.endless_load(), engine.root, "adder", 3)
    swap = await engine.ask_load("adder", 3, LoadParameters(strategy="in_place"))
    await engine.recorded(lambda: engine.model("adder").previous is not None)
    replaced = (ModelReplaced, "model 'adder' is being replaced by another version")
    assert await refusal(engine, "adder") == replaced
    await engine.loading("adder")
    engine.kill("adder")
    await engine.ended(swap)
    await engine.becomes("adder", ModelState.LOADED)
    assert (await engine.router.find("adder")).version == 1


async def test_router_refuses_until_lost_model_is_reloaded(run: Run) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("adder")
        await engine.die("adder")
        assert "is being loaded again" in (await refusal(engine, "adder"))[1]
        engine.pass_time(0.5)
        await engine.becomes("adder", ModelState.LOADED)
        assert engine.router.is_ready("adder")
        await engine.consumer.stop()
        await asyncio.wait([engine.applying])
        worker = engine.worker("adder")
        os.kill(worker.pid, signal.SIGKILL)
        await asyncio.wait([worker.ended])
        assert engine.model("adder").state is ModelState.LOADED  # the death is not recorded yet
        assert "has just died" in (await refusal(engine, "adder"))[1]


async def test_chosen_worker_has_the_inference_unless_it_died(engine: Engine) -> None:
    await engine.load("loop", parameters=LoadParameters(instances=2))
    here = await engine.router.find("loop")
    first, second = here.load.serving
    assert here.choose_worker() is first
    request, times = InferenceRequest(None, None, (trips(models.ENDLESS),)), InferenceTimes(0)
    running = asyncio.create_task(engine.router.infer(here, request, LIMIT_S, times, worker=second))
    await until(lambda: second.in_flight == 1)
    region = first.tensor_memory.requests.reserve(10**6)  # for a body that is arriving
    assert [here.choose_worker(), first.in_flight] == [first, 0]
    also_arriving = first.tensor_memory.requests.reserve(10**6)
    assert here.choose_worker() is second
    del region, also_arriving
    running.cancel()
    os.kill(second.pid, signal.SIGKILL)
    await asyncio.wait([running])
    await asyncio.wait([second.ended])
    request = InferenceRequest(None, None, (trips(7),))
    answered = await engine.router.infer(here, request, LIMIT_S, times, worker=second)
    assert isinstance(answered, Answered)
    assert int(array(answered.outputs[0])) == 7


async def test_each_inference_is_a_use_however_it_ends(engine: Engine) -> None:
    await engine.load("loop")
    load = engine.live("loop")
    assert load.last_used_ns == 0
    assert await seven(engine)
    uses = [load.last_used_ns]
    with pytest.raises(InvalidInput):
        await engine.infer("loop")
    uses.append(load.last_used_ns)
    with pytest.raises(InferenceTimeout, match=r"0\.05 s"):
        await engine.infer("loop", trips(models.ENDLESS), timeout_s=0.05)
    uses.append(load.last_used_ns)
    await until(lambda: engine.worker("loop").in_flight == 0)
    [asked] = await engine.start_endless()
    assert load.last_used_ns == uses[-1]
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    uses.append(load.last_used_ns)
    assert uses == sorted(set(uses))
    assert 0 < uses[0] < uses[-1] <= time.monotonic_ns()
    assert await seven(engine)


async def test_wrong_input_is_refused_and_counted(engine: Engine) -> None:
    await engine.load("adder")
    for inputs in ([], [floats("z", 1)], [tensor("x", "INT64", np.array([1], np.int64))]):
        with pytest.raises(InvalidInput):
            await engine.infer("adder", *inputs)
    with pytest.raises(InvalidInput):
        await engine.infer("adder", floats("x", 1), outputs=["nothing"])
    for _ in range(3):
        assert await engine.ask("adder", 1) == 3
    counted = engine.live("adder").statistics
    assert (counted.requests, counted.failures, counted.executions) == (3, 4, 3)
    assert counted.total_ns >= counted.infer_ns > 0


@pytest.mark.parametrize(
    ("levels", "default", "priorities", "expected"),
    [
        (UNSET, UNSET, [0, 1, 7], [0, 0, 0]),
        (3, UNSET, [0, 1, 3, 4], [3, 1, 3, 3]),
        (3, 2, [0, 1, 3, 2**64 - 1], [2, 1, 3, 2]),
    ],
)
def test_level_of_an_inference_is_one_of_its_model(
    levels: int | UnsetType, default: int | UnsetType, priorities: list[int], expected: list[int]
) -> None:
    parameters = LoadParameters(priority_levels=levels, default_priority_level=default)
    assert [choose_level(parameters, each) for each in priorities] == expected


async def test_full_queue_refuses_at_once(run: Run) -> None:
    async with run(max_queue=2) as engine:
        await engine.load("loop")
        asked = [*await engine.start_endless(), asyncio.create_task(engine.infer("loop", trips(1)))]
        await until(lambda: engine.worker("loop").in_flight == 2)
        with pytest.raises(QueueFull) as caught:
            await engine.infer("loop", trips(1))
        assert caught.value.code == "inference_queue_full"
        asked[0].cancel()
        await asyncio.wait(asked)
        assert await seven(engine)


@pytest.mark.parametrize("unloaded", [False, True])
async def test_queued_inferences_wait_for_the_reload_of_their_model(run: Run, *, unloaded: bool) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("loop")
        worker = engine.worker("loop")
        [first] = await engine.start_endless()
        queued = [asyncio.create_task(engine.infer("loop", trips(number))) for number in range(3)]
        await until(lambda: worker.in_flight == 4)
        await engine.die("loop")
        with pytest.raises(ModelLost, match="probably the kernel's"):
            await first
        assert not any(task.done() for task in queued)
        if unloaded:
            await engine.unload("loop")
            for task in queued:
                with pytest.raises(ModelNotLoaded):
                    await task
        else:
            engine.pass_time(0.5)
            assert [int(array((await task)[0])) for task in queued] == [0, 1, 2]
            [*_, reloaded] = await engine.facts(ModelLoaded)
            waited_ns = 3 * reloaded.durations.loading_us * 1000
            assert engine.live("loop").statistics.queue_ns >= waited_ns > 0


async def test_stuck_worker_is_killed_and_reloaded(engine: Engine) -> None:
    await engine.load("loop")
    worker = engine.worker("loop")
    worker._in_flight.patience_s = 0.05
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(InferenceTimeout):
        await engine.infer("loop", trips(1), timeout_s=0.05)
    await engine.becomes("loop", ModelState.LOST)
    [exited] = await engine.facts(WorkerExited)
    assert exited.signal == signal.SIGKILL
    assert "did not stop within 0.05 s" in exited.stderr[-1]
    engine.pass_time(0.5)
    await engine.becomes("loop", ModelState.LOADED)
    assert await seven(engine)


async def test_cancel_of_queued_inference_does_not_kill_worker(engine: Engine) -> None:
    await engine.load("loop")
    worker = engine.worker("loop")
    worker._in_flight.patience_s = 0.01
    [first] = await engine.start_endless()
    for _ in range(3):
        with pytest.raises(InferenceTimeout):
            await engine.infer("loop", trips(1), timeout_s=0.02)
    assert not first.done()
    worker._in_flight.patience_s = LIMIT_S  # how soon this one stops is not the question
    first.cancel()
    await until(lambda: worker.in_flight == 0)
    assert engine.worker("loop") is worker
