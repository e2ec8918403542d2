"""Several workers for one version, with a real log, real workers and real models."""

import asyncio
import os
import signal

import pytest
from support import models
from support.running import Engine, Run, code_of, error_of, gone, stopped_clock
from support.workers import array, computing, freeze, is_stopped, loaded_memory, trips, until

from events.jobcommands import RequestUnload
from events.jobs import JobStatus
from events.models import ModelState
from events.types import (
    SYSTEM,
    Cause,
    LoadParameters,
    LoadRequested,
    ModelLoaded,
    ModelUnloaded,
    WorkerExited,
)
from runtime.consumer.running import RunningLoad
from runtime.lostmodels import ModelLost
from runtime.process.worker import Worker

TWO = LoadParameters(instances=2)
THREE = LoadParameters(instances=3)


async def start_load(engine: Engine, parameters: LoadParameters) -> tuple[str, RunningLoad]:
    """Request a load of `adder`; its first worker is stopped, and does nothing until it is continued."""
    first = await engine.stopped_ahead()
    job_id = await engine.ask_load("adder", 1, parameters)
    await taken(engine, first)
    return job_id, engine.live("adder")


async def half_load(engine: Engine, parameters: LoadParameters) -> tuple[str, RunningLoad, Worker]:
    """Request a load of `adder`; when its first worker has loaded it, its second is stopped before that.

    Returns:
        The job, the load and the second worker.
    """
    job_id, load = await start_load(engine, parameters)
    pid = await engine.stopped_ahead()
    os.kill(load.workers[0].pid, signal.SIGCONT)
    await taken(engine, pid)
    return job_id, load, next(worker for worker in load.workers if worker.pid == pid)


async def taken(engine: Engine, pid: int) -> None:
    """Wait until a load has this worker, which has stopped."""
    loads = engine.consumer.loads
    await until(lambda: any(worker.pid == pid for load in loads.values() for worker in load.workers))
    await until(lambda: is_stopped(pid))


async def test_load_of_instances_is_one_fact_and_each_answers(engine: Engine) -> None:
    job = await engine.load("adder", 1, THREE)
    assert job.status is JobStatus.COMPLETED
    assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    _, started, fact = await engine.events(of="adder")
    load = engine.live("adder")
    assert isinstance(fact.data, ModelLoaded)
    assert fact.data.worker_ids == tuple(worker.worker_id for worker in load.workers)
    assert (len(set(fact.data.worker_ids)), fact.worker_id) == (3, None)
    assert started.worker_id == load.worker_id  # of the worker that loads alone at first
    taken = [loaded_memory(worker) for worker in load.workers]
    assert fact.data.memory_bytes == sum(each.memory_bytes for each in taken)
    assert fact.data.peak_memory_bytes == sum(each.peak_memory_bytes for each in taken)
    assert fact.data.durations.measuring_us == max(each.measuring_us for each in taken)
    assert fact.data.durations.loading_us == max(report.loading_us for report in load.reports.values())
    assert len(engine.worker_pids()) == 3
    first = load.workers[0]  # the others answer while it does not
    await freeze(first.pid)
    stuck = asyncio.create_task(engine.ask("adder", 1))
    await until(lambda: first.in_flight == 1)
    assert [await engine.ask("adder", value) for value in range(5)] == [1, 2, 3, 4, 5]
    os.kill(first.pid, signal.SIGCONT)
    assert await stuck == 2


async def test_instances_compute_side_by_side_and_drain_together(run: Run) -> None:
    async with run(drain_timeout_s=0.05) as engine:
        await engine.load("loop", parameters=TWO)
        asked = await engine.start_endless()
        loaded = [loaded_memory(worker).memory_bytes for worker in engine.workers("loop")]
        are_busy = [computing(worker.pid) for worker in engine.workers("loop")]
        await until(lambda: all(is_busy() for is_busy in are_busy))
        await engine.unload("loop")
        for task in asked:
            with pytest.raises(ModelLost):
                await task
        [unloaded] = await engine.facts(ModelUnloaded, of="loop")
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (0, 2)
        assert unloaded.freed_bytes > max(loaded)
        assert "WorkerExited" not in await engine.story()
        await engine.nothing_left()


async def test_eviction_lets_a_running_inference_end(run: Run) -> None:
    async with run(drain_timeout_s=0) as engine:
        await engine.load("loop")
        is_busy = computing(engine.worker("loop").pid)
        asked = asyncio.create_task(engine.infer("loop", trips(3_000_000)))
        await until(is_busy)
        await engine.log.submit(RequestUnload("loop", SYSTEM, cause=Cause.EVICTION))
        assert array(*await asked) == 3_000_000
        await engine.becomes("loop", ModelState.UNLOADED)
        [unloaded] = await engine.facts(ModelUnloaded, of="loop")
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (1, 0)


@pytest.mark.parametrize("which", ["first", "second"])
async def test_instance_dying_during_the_load_fails_it(engine: Engine, which: str) -> None:
    job_id, load, second = await half_load(engine, THREE if which == "second" else TWO)
    dead = load.workers[0] if which == "first" else second
    os.kill(dead.pid, signal.SIGKILL)
    error = error_of(await engine.ended(job_id))
    assert (error.code, "right after" in error.message) == ("worker_died", which == "first")
    events = await engine.events(of="adder")
    story = ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"]
    assert [event.type for event in events] == story
    assert events[2].worker_id == dead.worker_id
    await engine.nothing_left()


async def test_load_that_ends_while_an_instance_starts_takes_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, load = await start_load(engine, TWO)
    start, asked, may_start = engine.pool.start, asyncio.Event(), asyncio.Event()

    async def start_late(worker_id: str) -> Worker:
        asked.set()
        await may_start.wait()
        return await start(worker_id)

    monkeypatch.setattr(engine.pool, "start", start_late)
    os.kill(load.workers[0].pid, signal.SIGCONT)
    await asked.wait()
    os.kill(load.workers[0].pid, signal.SIGKILL)
    await until(lambda: load.killed)
    may_start.set()
    assert code_of(await engine.ended(job_id)) == "worker_died"
    assert len(load.workers) == 1
    await engine.nothing_left()


async def test_fork_server_dying_during_the_load_is_the_reason(engine: Engine) -> None:
    job_id, _, _ = await half_load(engine, TWO)
    os.kill(engine.fork_server_pid, signal.SIGKILL)
    assert code_of(await engine.ended(job_id)) == "fork_server_died"


async def test_files_replaced_between_instances_change_nothing(engine: Engine) -> None:
    job_id, load = await start_load(engine, TWO)
    os.kill(engine.fork_server_pid, signal.SIGSTOP)  # so that there is no second worker yet
    os.kill(load.workers[0].pid, signal.SIGCONT)
    await until(lambda: load.worker_id in load.reports)
    (engine.root / "adder/1/model.onnx").write_bytes(models.add(7).SerializeToString())
    os.kill(engine.fork_server_pid, signal.SIGCONT)
    assert code_of(await engine.ended(job_id)) is None
    assert [await engine.ask("adder", 1) for _ in range(4)] == [2] * 4


@pytest.mark.parametrize("end", ["timeout", "force"])
async def test_half_loaded_instances_end_with_their_load(engine: Engine, end: str) -> None:
    job_id, load, _ = await half_load(engine, LoadParameters(instances=3, timeout_s=100))
    if end == "timeout":
        engine.pass_time(100)
        assert code_of(await engine.ended(job_id)) == "timeout"
    else:
        await engine.unload("adder", force=True)
        assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
    await engine.nothing_left()
    assert len(load.workers) <= 3


async def test_degraded_model_serves_while_it_is_repaired(run: Run) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("adder", 1, TWO)
        first, second = engine.workers("adder")
        os.kill(first.pid, signal.SIGKILL)
        await engine.recorded(lambda: engine.model("adder").degraded)
        model = engine.model("adder")
        assert model.state is ModelState.LOADED
        assert model.serving is not None
        assert model.serving.worker_ids == (second.worker_id,)
        over = asyncio.Event()

        async def keep_asking() -> None:
            while not over.is_set():
                assert await engine.ask("adder", 10) == 11

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(keep_asking())
            engine.pass_time(0.5)
            await engine.recorded(lambda: not engine.model("adder").degraded)
            await until(lambda: len(engine.consumer.loads) == 1)
            over.set()
        assert len(engine.workers("adder")) == 2
        assert gone(second.pid)
        events = (await engine.events(of="adder"))[3:]
        assert [event.type for event in events] == [
            "WorkerExited", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        ]  # fmt: skip
        assert (events[0].worker_id, events[0].data) == (
            first.worker_id,
            WorkerExited(None, signal.SIGKILL, ()),
        )
        requested = events[1].data
        assert isinstance(requested, LoadRequested)
        assert (requested.cause, requested.instances, events[1].actor) == (Cause.RECOVERY, 2, "system")
