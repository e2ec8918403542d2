"""The consumer with a real log, real workers and real models: what is asked for, done, and recorded of it."""

import asyncio
import hashlib
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from support import models
from support.running import Clock, Engine, job_of, running, stopped_clock
from support.workers import trips, until

from events.commands import RequestCancel
from events.errors import LogUnavailable
from events.jobs import Failure, JobStatus, LoadParameters
from events.models import ModelState
from events.types import (
    Cause,
    Data,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    UnloadRequested,
    WorkerExited,
)
from runtime.errors import WorkerDied
from runtime.scheduling.admission import MAX_SERVER_DEATHS
from runtime.scheduling.scheduler import MAX_INCIDENTS

SLOW = models.slow_model(side=800, depth=2_000).SerializeToString()
"""Loads for half a minute, if it is let; the file has 2.5 MB."""
BACK_OFF_S = 60
"""More than any pause before a recovery, less than what incidents are remembered."""

D = TypeVar("D", bound=Data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a place with three models: `adder` (versions 1 and 2), `other` and `loop`."""
    root = tmp_path / "models"
    models.save(models.add(1), root, "adder", 1)
    models.save(models.add(2), root, "adder", 2)
    models.save(models.add(100), root, "other")
    models.save(models.counting_loop(), root, "loop")
    return tmp_path


async def the(engine: Engine, kind: type[D], *, of: str) -> D:
    """Return the one fact of this kind about a model."""
    (found,) = await every(engine, kind, of=of)
    return found


async def every(engine: Engine, kind: type[D], *, of: str) -> list[D]:
    return [event.data for event in await engine.events(of=of) if isinstance(event.data, kind)]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


async def endless(engine: Engine) -> asyncio.Task[object]:
    """Load `loop` and begin an inference that does not end by itself."""
    await engine.load("loop")
    task: asyncio.Task[object] = asyncio.create_task(engine.infer("loop", trips(models.ENDLESS)))
    await until(lambda: engine.worker("loop").in_flight == 1)
    return task


# Loads.


async def test_a_load_is_recorded_with_hashes_memory_and_durations(folder: Path) -> None:
    async with running(folder) as engine:
        job = await engine.load("adder", 1)
        assert job.status is JobStatus.COMPLETED
        assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        loaded = await the(engine, ModelLoaded, of="adder")
        (file,) = loaded.files
        path = folder / "models/adder/1/model.onnx"
        content = path.read_bytes()
        assert (file.path, file.bytes) == ("model.onnx", len(content))
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.mtime_ns == path.stat().st_mtime_ns
        assert loaded.worker_ids == (engine.worker("adder").worker_id,)
        assert 0 < loaded.memory_bytes <= loaded.peak_memory_bytes
        durations = loaded.durations
        parts = (durations.waiting_us, durations.starting_us, durations.loading_us, durations.measuring_us)
        assert all(part > 0 for part in parts)
        assert sum(parts) <= durations.total_us
        assert await engine.ask("adder", 1) == 2


async def test_two_identical_loads_at_once_are_one_job(folder: Path) -> None:
    async with running(folder) as engine:
        first, second = await asyncio.gather(engine.submit_load("adder"), engine.submit_load("adder"))
        assert first.job_id == second.job_id
        assert [first.existing, second.existing] == [False, True]
        await engine.ended(job_of(first))
        assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]


async def test_a_second_load_of_a_ready_model_appends_nothing(folder: Path) -> None:
    async with running(folder) as engine:
        job = await engine.load("adder")
        head = engine.log.head
        receipt = await engine.submit_load("adder")
        assert (receipt.job_id, receipt.existing) == (job.id, True)
        assert engine.log.head == head


async def test_known_bytes_are_not_hashed_again(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        await engine.unload("adder")
        assert engine.consumer._applier._hashed["adder", 2] != ()
        await engine.load("adder")
        first, second = await every(engine, ModelLoaded, of="adder")
        assert first.files == second.files


async def test_a_pending_load_says_what_it_waits_for(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder, loads_at_once=1) as engine:
        await engine.ask_load("slow")
        await engine.loading("slow")
        waiting = await engine.ask_load("adder")
        job = engine.log.state.jobs[waiting]
        await until(lambda: engine.consumer.waiting_for(job) is not None)
        assert engine.consumer.waiting_for(job) == "a free place: of loads, 1 may run at once"
        slow = engine.log.state.jobs[engine.live("slow").job_id]
        assert (engine.consumer.stage(job), engine.consumer.stage(slow)) == (None, "loading")
        await engine.unload("slow", force=True)
        assert (await engine.ended(waiting)).status is JobStatus.COMPLETED


def unsafe(folder: Path) -> None:
    models.save(models.external("../../../../etc/passwd"), folder, "bad")


BAD: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("is corrupt", lambda root: models.save_bytes(models.CORRUPT, root, "bad"), "invalid_model", "parsing"),
    ("is empty", lambda root: models.save_bytes(b"", root, "bad"), "invalid_model", ""),
    ("is a text", lambda root: models.save_bytes(models.TEXT, root, "bad"), "invalid_model", ""),
    (
        "has an unknown operator",
        lambda root: models.save(models.unknown_operator(), root, "bad"),
        "invalid_model",
        "Frobnicate",
    ),
    ("reads files of others", unsafe, "unsafe_file", "passwd"),
    (
        "needs too much memory",
        lambda root: models.save(models.memory_bomb_on_load(), root, "bad"),
        "out_of_memory",
        "limit",
    ),
]


@pytest.mark.parametrize(("make", "code", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_a_load_fails_with_the_reason_of_a_model_that(
    folder: Path, make: Callable[[Path], object], code: str, words: str
) -> None:
    make(folder / "models")
    async with running(folder) as engine:
        await engine.load("adder")
        job = await engine.load("bad", parameters=LoadParameters(memory_limit_bytes=200_000_000))
        assert job.status is JobStatus.FAILED
        assert job.error is not None
        assert job.error.code == code
        assert words in job.error.message
        assert engine.model("bad").state is ModelState.FAILED
        assert engine.model("bad").error == job.error
        assert await engine.story(of="bad") == ["LoadRequested", "LoadStarted", "LoadFailed"]
        await until(lambda: len(engine.consumer.live) == 1)
        assert await engine.ask("adder", 1) == 3


async def test_a_model_that_has_left_the_repository_fails_to_load(folder: Path) -> None:
    async with running(folder, loads_at_once=0) as engine:
        job_id = await engine.ask_load("other")
    (folder / "models/other/1/model.onnx").unlink()
    async with running(folder) as engine:
        assert (await engine.ended(job_id)).error == Failure(
            "unknown_model", "model 'other' is not in the repository"
        )
        assert engine.consumer.live == {}


async def test_a_model_that_crashes_its_worker_fails_with_its_last_words(folder: Path) -> None:
    models.save(models.crash_on_load(), folder / "models", "crash")
    async with running(folder) as engine:
        job = await engine.load("crash")
        assert job.error is not None
        assert job.error.code == "worker_died"
        assert f"killed by signal {int(signal.SIGFPE)}" in job.error.message
        assert "Floating" in job.error.message
        exited = await the(engine, WorkerExited, of="crash")
        assert (exited.exit_code, exited.signal) == (None, signal.SIGFPE)
        assert any("Floating" in line for line in exited.stderr)


async def test_a_worker_that_is_killed_amid_the_load_fails_it(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder) as engine:
        job_id = await engine.ask_load("slow")
        load = await engine.loading("slow")
        engine.kill("slow")
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "worker_died"
        assert await engine.story(of="slow") == ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"]
        exited = (await engine.events(of="slow"))[2]
        assert exited.worker_id == load.worker_id
        assert exited.data == WorkerExited(None, signal.SIGKILL, ())
        await until(lambda: engine.consumer.live == {})


async def test_a_slow_load_is_ended_by_its_timeout(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder) as engine:
        job_id = await engine.ask_load("slow", parameters=LoadParameters(timeout_s=100))
        pid = (await engine.loading("slow")).worker
        engine.pass_time(100)
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "timeout"
        assert "100 s" in job.error.message
        assert await engine.story(of="slow") == ["LoadRequested", "LoadStarted", "LoadFailed"]
        await until(lambda: engine.consumer.live == {})
        assert pid is not None
        assert gone(pid.pid)


# Swaps.


async def test_a_swap_answers_what_the_old_version_was_asked_before_it_ends(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        draining, old = engine.live("adder"), engine.worker("adder")
        os.kill(old.pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.ask("adder", 10))
        await until(lambda: old.in_flight == 1)
        job = await engine.load("adder", 2)
        assert await engine.ask("adder", 10) == 12
        await until(lambda: draining.unloading)
        assert not asked.done()
        os.kill(old.pid, signal.SIGCONT)
        assert await asked == 11
        await until(lambda: len(engine.consumer.live) == 1)
        assert gone(old.pid)
        requested = await the(engine, UnloadRequested, of="adder")
        loaded = [event for event in await engine.events(of="adder") if isinstance(event.data, ModelLoaded)]
        assert (requested.cause, requested.cause_event_id) == (Cause.SWAP, loaded[-1].id)
        unloaded = await the(engine, ModelUnloaded, of="adder")
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (1, 0)
        model = engine.model("adder")
        assert (model.state, model.version) == (ModelState.LOADED, 2)
        assert model.serving is not None
        assert model.serving.load_job_id == job.id


async def test_requests_do_not_notice_swaps(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        answers, over = set[float](), asyncio.Event()

        async def keep_asking() -> None:
            while not over.is_set():
                answers.add(await engine.ask("adder", 10))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(keep_asking())
            for version in (2, 1, 2, 1, 2):
                await engine.load("adder", version)
            over.set()
        assert answers == {11, 12}


async def test_changed_files_are_loaded_again_by_a_swap(folder: Path) -> None:
    async with running(folder) as engine:
        first = await engine.load("adder", 2)
        models.save(models.add(7), folder / "models", "adder", 2)
        second = await engine.load("adder", 2)
        assert second.id != first.id
        assert await engine.ask("adder", 1) == 8
        before, after = await every(engine, ModelLoaded, of="adder")
        assert before.files[0].sha256 != after.files[0].sha256
        await until(lambda: len(engine.consumer.live) == 1)


async def test_a_swap_that_fails_leaves_the_old_version_serving(folder: Path) -> None:
    models.save(models.unknown_operator(), folder / "models", "adder", 3)
    async with running(folder) as engine:
        await engine.load("adder", 2)
        assert (await engine.load("adder", 3)).status is JobStatus.FAILED
        assert await engine.ask("adder", 1) == 3
        assert engine.model("adder").state is ModelState.LOADED


# Unloads.


async def test_an_unload_ends_with_the_process_and_its_bytes(folder: Path) -> None:
    models.save(models.weights(20), folder / "models", "big")
    async with running(folder) as engine:
        await engine.load("big")
        pid = engine.worker("big").pid
        job_id = await engine.ask_unload("big")
        await engine.recorded(lambda: engine.model("big").phase is ModelState.UNLOADED)
        assert gone(pid)
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
        story = await engine.story(of="big")
        assert story[-3:] == ["UnloadRequested", "UnloadStarted", "ModelUnloaded"]
        unloaded = await the(engine, ModelUnloaded, of="big")
        assert unloaded.freed_bytes > 20_000_000
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (0, 0)


async def test_nothing_is_left_when_all_is_unloaded(folder: Path) -> None:
    async with running(folder) as engine:
        await asyncio.gather(*(engine.load(name) for name in ("adder", "other", "loop")))
        assert len(engine.worker_pids()) == 3
        await engine.load("adder", 1)
        await asyncio.gather(*(engine.unload(name) for name in ("adder", "other", "loop")))
        await until(lambda: engine.consumer.live == {})
        assert engine.worker_pids() == []


async def test_an_unload_waits_for_what_runs(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        load, worker = engine.live("adder"), engine.worker("adder")
        os.kill(worker.pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.ask("adder", 10))
        await until(lambda: worker.in_flight == 1)
        job_id = await engine.ask_unload("adder")
        await until(lambda: load.unloading)
        assert engine.consumer.stage(engine.log.state.jobs[job_id]) == "draining"
        os.kill(worker.pid, signal.SIGCONT)
        assert await asked == 12
        await engine.ended(job_id)
        assert (await the(engine, ModelUnloaded, of="adder")).drained_requests == 1


async def test_an_unload_kills_what_does_not_end_in_time(folder: Path) -> None:
    async with running(folder, drain_timeout_s=0.05) as engine:
        asked = await endless(engine)
        await engine.unload("loop")
        with pytest.raises(WorkerDied):
            await asked
        unloaded = await the(engine, ModelUnloaded, of="loop")
        assert (unloaded.drained_requests, unloaded.aborted_requests) == (0, 1)
        assert "WorkerExited" not in await engine.story()


async def test_a_worker_that_dies_while_it_drains_ends_the_unload(folder: Path) -> None:
    async with running(folder) as engine:
        asked = await endless(engine)
        job_id = await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
        engine.kill("loop")
        with pytest.raises(WorkerDied):
            await asked
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
        assert (await engine.story(of="loop"))[-3:] == ["UnloadStarted", "WorkerExited", "ModelUnloaded"]
        assert engine.model("loop").state is ModelState.UNLOADED


# Force.


async def test_force_ends_a_worker_that_is_stopped(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        pid = engine.worker("adder").pid
        os.kill(pid, signal.SIGSTOP)
        assert (await engine.unload("adder", force=True)).status is JobStatus.COMPLETED
        assert gone(pid)
        assert "WorkerExited" not in await engine.story()
        assert (await the(engine, ModelUnloaded, of="adder")).freed_bytes > 0


async def test_force_ends_a_load_in_progress(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder) as engine:
        load_id = await engine.ask_load("slow")
        await engine.loading("slow")
        pid = engine.worker("slow").pid
        unload = await engine.unload("slow", force=True)
        assert unload.status is JobStatus.COMPLETED
        assert gone(pid)
        assert (await engine.ended(load_id)).status is JobStatus.CANCELLED
        story = ["UnloadRequested", "JobCancelled", "UnloadStarted", "ModelUnloaded"]
        assert (await engine.story(of="slow"))[2:] == story
        assert engine.model("slow").state is ModelState.UNLOADED


async def test_force_does_not_wait_for_a_fork_server_that_is_stopped(folder: Path) -> None:
    async with running(folder) as engine:
        fork_server = engine.fork_server_pid
        os.kill(fork_server, signal.SIGSTOP)
        await engine.ask_load("adder")
        await engine.becomes("adder", ModelState.LOADING)
        await engine.unload("adder", force=True)
        assert stopped(fork_server)
        os.kill(fork_server, signal.SIGCONT)
        await until(lambda: engine.worker_pids() == [])
        assert (await engine.load("adder")).status is JobStatus.COMPLETED


async def test_force_ends_a_drain_and_both_unloads_end_together(folder: Path) -> None:
    async with running(folder) as engine:
        asked = await endless(engine)
        unforced = await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
        forced = await engine.unload("loop", force=True)
        with pytest.raises(WorkerDied):
            await asked
        ends = [await engine.ended(unforced), forced]
        assert [job.status for job in ends] == [JobStatus.COMPLETED] * 2
        assert ends[0].position + 1 == ends[1].position
        unloads = await every(engine, ModelUnloaded, of="loop")
        assert [unload.aborted_requests for unload in unloads] == [1, 1]


async def test_force_ends_a_swap_and_what_it_was_to_replace(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "adder", 3)
    async with running(folder) as engine:
        await engine.load("adder", 2)
        swap = await engine.ask_load("adder", 3)
        await engine.loading("adder")
        await engine.unload("adder", force=True)
        assert (await engine.ended(swap)).status is JobStatus.CANCELLED
        await until(lambda: engine.consumer.live == {})
        assert engine.worker_pids() == []


async def test_a_load_after_force_is_carried_out(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        os.kill(engine.worker("adder").pid, signal.SIGSTOP)
        unload, load = await asyncio.gather(engine.ask_unload("adder", force=True), engine.ask_load("adder"))
        assert (await engine.ended(load)).status is JobStatus.COMPLETED
        assert (await engine.ended(unload)).status is JobStatus.COMPLETED
        assert await engine.ask("adder", 1) == 3


# Deaths.


async def test_a_model_whose_worker_dies_comes_back_by_itself(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        first = engine.worker("adder").worker_id
        await engine.die("adder")
        engine.pass_time(0.5)
        await engine.becomes("adder", ModelState.LOADED)
        assert await engine.ask("adder", 1) == 3
        events = await engine.events(of="adder")
        assert [event.type for event in events[3:]] == [
            "WorkerExited",
            "LoadRequested",
            "LoadStarted",
            "ModelLoaded",
        ]
        assert (events[3].worker_id, events[3].data) == (first, WorkerExited(None, signal.SIGKILL, ()))
        requested = events[4].data
        assert isinstance(requested, LoadRequested)
        assert (requested.cause, events[4].actor) == (Cause.RECOVERY, "system")


async def test_inferences_in_flight_end_with_their_worker(folder: Path) -> None:
    async with running(folder) as engine:
        asked = await endless(engine)
        await engine.die("loop")
        with pytest.raises(WorkerDied):
            await asked


async def test_a_model_that_keeps_dying_is_given_up_until_somebody_asks(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        for _ in range(MAX_INCIDENTS - 1):
            await engine.die("adder")
            engine.pass_time(BACK_OFF_S)
            await engine.becomes("adder", ModelState.LOADED)
        engine.kill("adder")
        model = await engine.becomes("adder", ModelState.FAILED)
        assert model.error is not None
        assert model.error.code == "crash_loop"
        assert "killed by signal 9" in model.error.message
        assert len(await every(engine, WorkerExited, of="adder")) == MAX_INCIDENTS
        head = engine.log.head
        engine.pass_time(86_400)
        await until(lambda: engine.consumer.live == {})
        assert engine.log.head == head
        assert (await engine.load("adder")).status is JobStatus.COMPLETED
        await engine.die("adder")
        engine.pass_time(0.5)
        await engine.becomes("adder", ModelState.LOADED)


async def test_a_recovery_that_fails_is_tried_again(folder: Path) -> None:
    path = folder / "models/other/1/model.onnx"
    async with running(folder) as engine:
        await engine.load("other")
        good = path.read_bytes()
        path.write_bytes(models.TEXT)
        await engine.die("other")
        engine.pass_time(BACK_OFF_S)
        await engine.recorded(lambda: len(engine.model("other").incidents) == 2)
        path.write_bytes(good)
        engine.pass_time(BACK_OFF_S)
        await engine.becomes("other", ModelState.LOADED)


async def test_an_unload_of_a_lost_model_ends_the_wish(folder: Path) -> None:
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("adder")
        await engine.die("adder")
        assert (await engine.unload("adder")).status is JobStatus.COMPLETED
        head = engine.log.head
        engine.pass_time(BACK_OFF_S)
        await engine.load("other")
        assert engine.model("adder").state is ModelState.UNLOADED
        assert engine.log.head.position == head.position + 3


async def test_the_end_of_the_fork_server_is_one_incident_that_no_model_is_charged_for(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder, clock=stopped_clock()) as engine:
        await asyncio.gather(engine.load("adder"), engine.load("other"))
        slow = await engine.ask_load("slow")
        await engine.loading("slow")
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        await engine.recorded(lambda: all(engine.model(m).lost_at for m in ("adder", "other")))
        job = await engine.ended(slow)
        assert job.error is not None
        assert job.error.code == "fork_server_died"
        engine.pass_time(0.5)
        for name in ("adder", "other"):
            model = await engine.becomes(name, ModelState.LOADED)
            assert model.incidents == ()
            assert await the(engine, WorkerExited, of=name) == WorkerExited(None, None, ())
        assert await engine.ask("adder", 1) == 3


async def test_a_recovery_that_the_fork_server_ends_is_not_charged_either(folder: Path) -> None:
    path = folder / "models/other/1/model.onnx"
    async with running(folder, clock=stopped_clock()) as engine:
        await engine.load("other")
        good = path.read_bytes()
        path.write_bytes(SLOW)
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        await engine.becomes("other", ModelState.LOST)
        engine.pass_time(0.5)
        await engine.loading("other")
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        await engine.becomes("other", ModelState.LOST)
        path.write_bytes(good)
        engine.pass_time(0.5)
        assert (await engine.becomes("other", ModelState.LOADED)).incidents == ()


async def test_a_load_that_waits_for_its_worker_survives_the_fork_server(folder: Path) -> None:
    async with running(folder) as engine:
        os.kill(engine.fork_server_pid, signal.SIGSTOP)
        job_id = await engine.ask_load("adder")
        await engine.becomes("adder", ModelState.LOADING)
        await until(lambda: engine.live("adder").stage == "starting")
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED


# The server ends and starts again.


async def test_after_a_restart_every_job_ends_and_models_come_back(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder, loads_at_once=1) as engine:
        await engine.load("other")
        await engine.load("adder", 1)
        in_progress = await engine.ask_load("slow")
        await engine.loading("slow")
        pending = await engine.ask_load("loop")
        pids = engine.worker_pids()
        assert len(pids) == 3
    assert all(gone(pid) for pid in pids)
    models.save(models.add(3), folder / "models", "slow")
    async with running(folder, loads_at_once=1) as engine:
        jobs = [await engine.ended(job) for job in (in_progress, pending)]
        assert [job.status for job in jobs] == [JobStatus.COMPLETED] * 2
        assert [job.attempt for job in jobs] == [2, 1]
        for name in ("adder", "other"):
            await engine.becomes(name, ModelState.LOADED)
        assert await engine.ask("adder", 1) == 2
        reloads = [
            event.model_id
            for event in await engine.events()
            if isinstance(event.data, LoadRequested) and event.data.cause is Cause.RESTART
        ]
        assert reloads == ["adder", "other"]
        active = engine.log.state.active()
        assert active is not None
        assert active.id == "loop"


async def test_after_a_restart_unloads_under_way_have_ended(folder: Path) -> None:
    async with running(folder) as engine:
        asked = await endless(engine)
        unload = await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
    with pytest.raises(WorkerDied):
        await asked
    async with running(folder) as engine:
        assert (await engine.ended(unload)).status is JobStatus.COMPLETED
        assert engine.model("loop").state is ModelState.UNLOADED
        assert engine.consumer.live == {}


async def test_after_a_restart_a_swapped_out_version_has_ended(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder", 1)
        old = engine.worker("adder")
        os.kill(old.pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.ask("adder", 10))
        await until(lambda: old.in_flight == 1)
        await engine.load("adder", 2)
    with pytest.raises(WorkerDied):
        await asked
    async with running(folder) as engine:
        await engine.recorded(lambda: not engine.log.state.unended())
        await engine.becomes("adder", ModelState.LOADED)
        assert await engine.ask("adder", 10) == 12
        assert [load.version for load in engine.consumer.live.values()] == [2]


async def test_a_load_in_progress_at_three_deaths_of_the_server_is_held_for_their_cause(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder) as engine:
        job_id = await engine.ask_load("slow")
        await engine.loading("slow")
    for _ in range(MAX_SERVER_DEATHS - 1):
        async with running(folder) as engine:
            await engine.loading("slow")
    async with running(folder) as engine:
        job = await engine.ended(job_id)
        assert job.error is not None
        assert job.error.code == "crash_loop"
        starts = await every(engine, LoadStarted, of="slow")
        assert [start.attempt for start in starts] == [1, 2, 3]


async def test_an_orderly_stop_is_not_held_against_a_load(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder, stops_cleanly=True) as engine:
        await engine.ask_load("slow")
        await engine.loading("slow")
    async with running(folder, stops_cleanly=True) as engine:
        await engine.loading("slow")
        (job,) = engine.log.state.unended()
        assert (job.attempt, job.server_deaths) == (2, 0)
        story = await engine.story()
        assert story[-3:] == ["ServerStopped", "ServerStarted", "LoadStarted"]


async def test_a_clock_that_was_set_back_does_not_keep_models_from_coming_back(folder: Path) -> None:
    ahead = Clock()
    async with running(folder, clock=ahead) as engine:
        engine.pass_time(86_400)
        await engine.load("adder")
    async with running(folder) as engine:
        await engine.becomes("adder", ModelState.LOADED)


async def test_a_clock_set_back_meanwhile_does_not_keep_a_model_from_coming_back(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("adder")
        first = engine.worker("adder").worker_id
        engine.pass_time(-86_400)
        await engine.die("adder")
        await engine.becomes("adder", ModelState.LOADED)
        assert engine.worker("adder").worker_id != first


# The ledger cannot be written.


@pytest.mark.parametrize(
    ("fact", "model"),
    [
        ("LoadStarted", "adder"),
        ("ModelLoaded", "adder"),
        ("LoadFailed", "bad"),
        ("UnloadStarted", "adder"),
        ("ModelUnloaded", "adder"),
    ],
)
async def test_what_cannot_be_recorded_is_recorded_later(
    folder: Path, fact: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    models.save_bytes(models.TEXT, folder / "models", "bad")
    async with running(folder) as engine:
        with closing(sqlite3.connect(engine.log.path, isolation_level=None)) as other:
            other.execute(
                "CREATE TRIGGER broken BEFORE INSERT ON events"
                f" WHEN json_extract(NEW.body, '$.type') = '{fact}'"
                " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
            )
            load = await engine.ask_load(model)
            unload = None
            if fact in {"UnloadStarted", "ModelUnloaded"}:
                await engine.ended(load)
                unload = await engine.ask_unload(model)
            await until(lambda: "cannot be written" in caplog.text)
            assert fact not in await engine.story()
            other.execute("DROP TRIGGER broken")
        jobs = [await engine.ended(job) for job in (load, unload) if job is not None]
        expected = JobStatus.FAILED if model == "bad" else JobStatus.COMPLETED
        assert [job.status for job in jobs] == [expected] * len(jobs)
        story = await engine.story(of=model)
        assert story.count(fact) == 1
        assert "WorkerExited" not in story
        await until(lambda: len(engine.consumer.live) == (1 if fact in {"LoadStarted", "ModelLoaded"} else 0))


async def test_a_load_whose_start_cannot_be_recorded_takes_nothing_and_is_started_once_it_can(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(folder) as engine:
        await engine.load("other")
        serving, policy = engine.worker_pids(), engine.consumer.policy
        engine.consumer.policy = replace(policy, loads_at_once=0)
        job_id = await engine.ask_load("adder")
        head = engine.log.head
        assert engine.log._database._connection is not None
        engine.log._database._connection.execute("PRAGMA busy_timeout = 20")
        with closing(sqlite3.connect(engine.log.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # nothing can be written at all
            engine.consumer.policy = policy
            engine.log.notify()
            await until(lambda: "the ledger cannot be written; StartLoad waits" in caplog.text)
            assert not engine.log.healthy
            assert [load.model_id for load in engine.consumer.live.values()] == ["other"]
            assert engine.worker_pids() == serving
            await until(lambda: "looking at a model" not in {task.get_name() for task in asyncio.all_tasks()})
            job = engine.log.state.jobs[job_id]
            assert (job.status, job.attempt, engine.log.head) == (JobStatus.PENDING, 0, head)
            assert await engine.ask("other", 1) == 101
            other.execute("ROLLBACK")
        job = await engine.ended(job_id)
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        assert len(engine.worker_pids()) == len(serving) + 1
        assert await engine.ask("adder", 1) == 3


async def test_a_load_whose_start_cannot_be_recorded_can_be_cancelled(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(folder) as engine:
        with closing(sqlite3.connect(engine.log.path, isolation_level=None)) as other:
            other.execute(
                "CREATE TRIGGER broken BEFORE INSERT ON events"
                " WHEN json_extract(NEW.body, '$.type') = 'LoadStarted'"
                " BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
            )
            job_id = await engine.ask_load("adder")
            await until(lambda: "the ledger cannot be written; StartLoad waits" in caplog.text)
            while not engine.log.state.jobs[job_id].cancelling:
                with suppress(LogUnavailable):  # it was in one group with the start, which failed them both
                    await engine.log.submit(RequestCancel(job_id, "alice"))
                    break
            assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
            other.execute("DROP TRIGGER broken")
        assert await engine.story(of="adder") == ["LoadRequested", "CancelRequested", "JobCancelled"]
        assert (engine.consumer.live, engine.worker_pids()) == ({}, [])


# The end of the consumer itself.


async def test_a_consumer_that_stops_leaves_no_effect_behind(folder: Path) -> None:
    models.save_bytes(SLOW, folder / "models", "slow")
    async with running(folder) as engine:
        await engine.ask_load("slow")
        load = await engine.loading("slow")
        head = engine.log.head
        await engine.consumer.stop()
        await asyncio.wait([engine.applying])
        assert load.tasks == set()
        assert engine.log.head == head
