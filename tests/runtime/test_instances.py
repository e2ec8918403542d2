"""Several workers for one version, with a real log, real workers and real models."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import models
from support.running import Engine, running, stopped_clock
from support.workers import computing, freeze, trips, until

from events.jobs import JobStatus, LoadParameters
from events.models import ModelState
from events.types import Cause, LoadRequested, ModelLoaded, ModelUnloaded, WorkerExited
from runtime.errors import WorkerDied
from runtime.live import LiveLoad
from runtime.processes.workers import Worker
from runtime.scheduling.scheduler import MAX_INCIDENTS

TWO = LoadParameters(instances=2)
THREE = LoadParameters(instances=3)
BACK_OFF_S = 60
"""More than any pause before a recovery, less than what incidents are remembered."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a place with two models: `adder` (versions 1 and 2) and `loop`."""
    root = tmp_path / "models"
    models.save(models.add(1), root, "adder", 1)
    models.save(models.add(2), root, "adder", 2)
    models.save(models.counting_loop(), root, "loop")
    return tmp_path


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def degraded(engine: Engine, model_id: str) -> None:
    """Kill one worker of a model and wait until that is recorded."""
    os.kill(engine.workers(model_id)[0].pid, signal.SIGKILL)
    await engine.recorded(lambda: engine.model(model_id).degraded)


async def whole(engine: Engine, model_id: str) -> None:
    """Wait until a model has all its workers, and nothing of an earlier load is left."""

    def is_whole() -> bool:
        model = engine.model(model_id)
        return model.phase is ModelState.LOADED and not model.degraded

    await engine.recorded(is_whole)
    await until(lambda: len(engine.consumer.live) == 1)


async def endless(engine: Engine) -> list[asyncio.Task[object]]:
    """Begin an inference that does not end by itself in each worker of `loop`."""
    asked: list[asyncio.Task[object]] = [
        asyncio.create_task(engine.infer("loop", trips(models.ENDLESS))) for _ in engine.workers("loop")
    ]
    await until(lambda: all(worker.in_flight == 1 for worker in engine.workers("loop")))
    return asked


async def begun(engine: Engine, parameters: LoadParameters) -> tuple[str, LiveLoad]:
    """Ask for a load of `adder`; its first worker is stopped, and does nothing until it is continued."""
    first = await engine.stopped_ahead()
    job_id = await engine.ask_load("adder", 1, parameters)
    await taken(engine, first)
    return job_id, engine.live("adder")


async def half_loaded(engine: Engine, parameters: LoadParameters) -> tuple[str, LiveLoad, Worker]:
    """Ask for a load of `adder`; when its first worker has loaded it, its second is stopped before that.

    Returns:
        The job, the load and the second worker.
    """
    job_id, load = await begun(engine, parameters)
    pid = await engine.stopped_ahead()
    os.kill(load.workers[0].pid, signal.SIGCONT)
    await taken(engine, pid)
    return job_id, load, next(worker for worker in load.workers if worker.pid == pid)


async def taken(engine: Engine, pid: int) -> None:
    """Wait until a load has this worker."""
    loads = engine.consumer.live
    await until(lambda: any(worker.pid == pid for load in loads.values() for worker in load.workers))


async def nothing_left(engine: Engine) -> None:
    """Wait until all is gone; a worker that was forked for nobody ends by itself, a moment later."""
    await until(lambda: engine.consumer.live == {} and engine.worker_pids() == [])


# Loading.


async def test_a_load_of_several_instances_is_one_fact_that_names_all(folder: Path) -> None:
    async with running(folder) as engine:
        job = await engine.load("adder", 1, THREE)
        assert job.status is JobStatus.COMPLETED
        assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        load, fact = engine.live("adder"), (await engine.events(of="adder"))[-1]
        assert isinstance(fact.data, ModelLoaded)
        assert fact.data.worker_ids == tuple(worker.worker_id for worker in load.workers)
        assert (len(set(fact.data.worker_ids)), fact.worker_id) == (3, None)
        reports = load.reports.values()
        assert fact.data.memory_bytes == sum(report.memory_bytes for report in reports)
        assert fact.data.peak_memory_bytes == sum(report.peak_memory_bytes for report in reports)
        assert fact.data.durations.loading_us == max(report.loading_us for report in reports)
        assert len(engine.worker_pids()) == 3


async def test_inferences_run_side_by_side_in_the_instances(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop", parameters=TWO)
        asked = await endless(engine)
        are_busy = [computing(worker.pid) for worker in engine.workers("loop")]
        await until(lambda: all(is_busy() for is_busy in are_busy))
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        await until(lambda: not any(worker.in_flight for worker in engine.workers("loop")))


async def test_a_request_goes_to_the_instance_that_has_nothing_to_do(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1, TWO)
        await freeze(engine.workers("adder")[0].pid)
        stuck = asyncio.create_task(engine.ask("adder", 1))
        await until(lambda: engine.workers("adder")[0].in_flight == 1)
        assert [await engine.ask("adder", value) for value in range(5)] == [1, 2, 3, 4, 5]
        os.kill(engine.workers("adder")[0].pid, signal.SIGCONT)
        assert await stuck == 2


async def test_an_instance_that_dies_while_it_loads_fails_the_load_and_ends_the_others(folder: Path) -> None:
    async with running(folder) as engine:
        job_id, _, second = await half_loaded(engine, THREE)
        os.kill(second.pid, signal.SIGKILL)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "worker_died"
        events = await engine.events(of="adder")
        story = ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"]
        assert [event.type for event in events] == story
        assert events[2].worker_id == second.worker_id
        await nothing_left(engine)


async def test_the_first_instance_s_death_while_others_load_fails_the_load(folder: Path) -> None:
    async with running(folder) as engine:
        job_id, load, _ = await half_loaded(engine, TWO)
        os.kill(load.workers[0].pid, signal.SIGKILL)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert (job.error.code, "right after" in job.error.message) == ("worker_died", True)
        assert (await engine.events(of="adder"))[2].worker_id == load.worker_id
        await nothing_left(engine)


@pytest.mark.parametrize(
    "change",
    [lambda path: path.unlink(), lambda path: path.write_bytes(models.add(7).SerializeToString())],
    ids=["removed", "replaced"],
)
async def test_files_that_are_changed_between_two_instances_fail_the_load(
    folder: Path, change: Callable[[Path], object]
) -> None:
    async with running(folder) as engine:
        job_id, load = await begun(engine, TWO)
        os.kill(engine.fork_server_pid, signal.SIGSTOP)  # so that there is no second worker yet
        os.kill(load.workers[0].pid, signal.SIGCONT)
        await until(lambda: load.worker_id in load.reports)
        change(folder / "models/adder/1/model.onnx")
        os.kill(engine.fork_server_pid, signal.SIGCONT)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "model_changed"
        assert "WorkerExited" not in await engine.story()
        await nothing_left(engine)


async def test_a_load_of_several_instances_is_ended_by_its_timeout(folder: Path) -> None:
    async with running(folder) as engine:
        job_id, load, _ = await half_loaded(engine, LoadParameters(instances=3, timeout_s=100))
        engine.pass_time(100)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "timeout"
        await nothing_left(engine)
        assert len(load.workers) <= 3


async def test_force_ends_a_load_of_several_instances(folder: Path) -> None:
    async with running(folder) as engine:
        job_id, _, _ = await half_loaded(engine, THREE)
        await engine.unload("adder", force=True)
        assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
        await nothing_left(engine)


# Unloading.


async def test_an_unload_drains_and_ends_all_instances_and_counts_them_together(folder: Path) -> None:
    async with running(folder, drain_timeout_s=0.05) as engine:
        await engine.load("loop", parameters=TWO)
        asked, reports = await endless(engine), engine.live("loop").reports
        await engine.unload("loop")
        for task in asked:
            with pytest.raises(WorkerDied):
                await task
        unloaded = (await engine.events(of="loop"))[-1].data
        assert isinstance(unloaded, ModelUnloaded)
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (0, 2)
        assert unloaded.freed_bytes > max(report.memory_bytes for report in reports.values())
        assert "WorkerExited" not in await engine.story()
        await nothing_left(engine)


async def test_force_ends_instances_that_are_stopped(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1, TWO)
        for worker in engine.workers("adder"):
            await freeze(worker.pid)
        assert (await engine.unload("adder", force=True)).status is JobStatus.COMPLETED
        assert "WorkerExited" not in await engine.story()
        await nothing_left(engine)


async def test_an_instance_that_dies_while_it_drains_is_recorded_with_the_end(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("loop", parameters=TWO)
        asked = await endless(engine)
        first, second = engine.workers("loop")
        unload = await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
        for worker in (first, second):
            os.kill(worker.pid, signal.SIGKILL)
        await engine.ended(unload)
        await asyncio.wait(asked)
        exits = [event.worker_id for event in await engine.events() if isinstance(event.data, WorkerExited)]
        assert sorted(filter(None, exits)) == sorted((first.worker_id, second.worker_id))


# Deaths.


async def test_a_model_that_loses_an_instance_goes_on_and_comes_back_whole(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1, TWO)
        first, second = engine.workers("adder")
        await degraded(engine, "adder")
        model = engine.model("adder")
        assert model.state is ModelState.LOADED
        assert model.serving is not None
        assert model.serving.worker_ids == (second.worker_id,)
        assert await engine.ask("adder", 1) == 2
        engine.pass_time(0.5)
        await whole(engine, "adder")
        assert await engine.ask("adder", 1) == 2
        assert len(engine.workers("adder")) == 2
        assert gone(second.pid)
        events = await engine.events(of="adder")
        assert [event.type for event in events[3:]] == [
            "WorkerExited", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        ]  # fmt: skip
        assert (events[3].worker_id, events[3].data) == (
            first.worker_id,
            WorkerExited(None, signal.SIGKILL, ()),
        )
        requested = events[4].data
        assert isinstance(requested, LoadRequested)
        assert (requested.cause, requested.instances, events[4].actor) == (Cause.RECOVERY, 2, "system")


async def test_requests_do_not_notice_that_a_model_becomes_whole_again(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1, TWO)
        await degraded(engine, "adder")
        over = asyncio.Event()

        async def keep_asking() -> None:
            while not over.is_set():
                assert await engine.ask("adder", 10) == 11

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(keep_asking())
            engine.pass_time(0.5)
            await whole(engine, "adder")
            over.set()


async def test_a_load_that_somebody_asks_for_makes_a_degraded_model_whole(folder: Path) -> None:
    async with running(folder) as engine:
        first = await engine.load("adder", 1, TWO)
        await degraded(engine, "adder")
        second = await engine.load("adder", 1, TWO)
        assert (second.id != first.id, second.status) == (True, JobStatus.COMPLETED)
        await whole(engine, "adder")
        assert engine.model("adder").error is None
        assert (await engine.submit_load("adder", 1, TWO)).existing


async def test_instances_that_die_at_once_are_one_incident(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("adder", 1, THREE)
        for worker in engine.workers("adder"):
            os.kill(worker.pid, signal.SIGKILL)
        assert len((await engine.becomes("adder", ModelState.LOST)).incidents) == 1
        engine.pass_time(0.5)
        await whole(engine, "adder")
        assert len(engine.workers("adder")) == 3
        exits = [event.worker_id for event in await engine.events() if isinstance(event.data, WorkerExited)]
        assert len(exits) == len(set(exits)) == 3


async def test_a_model_that_cannot_become_whole_goes_on_with_what_is_left(folder: Path) -> None:
    path = folder / "models/adder/2/model.onnx"
    good = path.read_bytes()
    async with running(folder) as engine:
        await engine.load("adder", 2, TWO)
        path.write_bytes(models.TEXT)
        await degraded(engine, "adder")
        for incidents in range(2, MAX_INCIDENTS + 1):
            engine.pass_time(BACK_OFF_S)
            await engine.recorded(lambda: len(engine.model("adder").incidents) == incidents)  # noqa: B023
        await until(lambda: len(engine.consumer.live) == 1)
        head = engine.log.head
        engine.pass_time(86_400)
        assert await engine.ask("adder", 1) == 3
        await engine.load("loop")
        assert engine.log.head.position == head.position + 3
        model = engine.model("adder")
        assert (model.state, model.degraded) == (ModelState.LOADED, True)
        assert model.error is not None
        assert model.error.code == "invalid_model"
        path.write_bytes(good)
        await engine.unload("loop")
        assert (await engine.load("adder", 2, TWO)).status is JobStatus.COMPLETED
        await whole(engine, "adder")


async def test_the_end_of_the_fork_server_is_not_charged_for_its_instances(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("adder", 1, TWO)
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        assert (await engine.becomes("adder", ModelState.LOST)).incidents == ()
        engine.pass_time(0.5)
        await whole(engine, "adder")
        exits = [event.data for event in await engine.events() if isinstance(event.data, WorkerExited)]
        assert exits == [WorkerExited(None, None, ())] * 2
        assert await engine.ask("adder", 1) == 2


async def test_a_load_of_instances_that_the_fork_server_ends_says_so(folder: Path) -> None:
    async with running(folder) as engine:
        job_id, _, _ = await half_loaded(engine, TWO)
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "fork_server_died"


async def test_after_a_restart_a_model_has_all_its_instances(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1, TWO)
        await degraded(engine, "adder")
    async with running(folder) as engine:
        await whole(engine, "adder")
        assert len(engine.workers("adder")) == 2


async def test_an_unload_of_a_degraded_model_does_not_wait_for_its_recovery(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("adder", 1, TWO)
        await degraded(engine, "adder")
        pid = await engine.stopped_ahead()
        engine.pass_time(0.5)
        await taken(engine, pid)  # by the recovery, which so does not end
        (recovery,) = engine.log.state.unended("adder")
        assert (await engine.unload("adder")).status is JobStatus.COMPLETED
        assert (await engine.ended(recovery.id)).status is JobStatus.CANCELLED
        assert engine.model("adder").state is ModelState.UNLOADED
        await nothing_left(engine)
