"""The consumer with a real log, real workers and real models: one test per effect."""

import asyncio
import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import ModelProto
from support import models
from support.running import Engine, Run, error_of, gone
from support.workers import computing, freeze, is_stopped, threads, until

from events.jobs import Failure, JobStatus
from events.models import ModelState
from events.types import Cause, LoadParameters, ModelLoaded, ModelUnloaded, UnloadRequested, WorkerExited
from runtime.lostmodels import ModelLost
from runtime.scheduler.view import Phase, Policy

# Loads.


async def test_load_records_hashes_memory_and_durations(engine: Engine) -> None:
    job = await engine.load("adder", 1)
    assert job.status is JobStatus.COMPLETED
    assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    [loaded] = await engine.facts(ModelLoaded, of="adder")
    (file,) = loaded.files
    path = engine.root / "adder/1/model.onnx"
    content = path.read_bytes()
    assert (file.path, file.bytes) == ("model.onnx", len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.mtime_ns == path.stat().st_mtime_ns
    assert loaded.worker_ids == (engine.worker("adder").worker_id,)
    events = await engine.events(of="adder")
    assert [event.worker_id for event in events] == [None, *loaded.worker_ids, *loaded.worker_ids]
    assert 0 < loaded.memory_bytes <= loaded.peak_memory_bytes
    durations = loaded.durations
    parts = (durations.waiting_us, durations.starting_us, durations.loading_us, durations.measuring_us)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= durations.total_us
    assert await engine.ask("adder", 1) == 2
    assert engine.live("adder").pieces > 0
    await engine.unload("adder")
    await engine.load("adder", 1)  # from the store
    assert [each.files for each in await engine.facts(ModelLoaded, of="adder")] == [(file,)] * 2
    first, again = await engine.facts(ModelLoaded, of="adder")
    assert (first.verified, again.verified) == (True, True)
    assert (first.durations.copying_us is None, again.durations.copying_us) == (False, None)
    assert (first.durations.copying_us or 0) > 0
    assert first.durations.hashing_us > again.durations.hashing_us == 0


async def test_jobs_report_stage_and_what_they_wait_for(run: Run) -> None:
    async with run(loads_at_once=1) as engine:
        slow = await engine.ask_load("slow")
        await engine.loading("slow")
        waiting = await engine.ask_load("adder")
        jobs = engine.log.state.jobs
        slots = "a free load slot: at most 1 may run at once"
        await until(lambda: engine.consumer.waiting_for(jobs[waiting]) == slots)
        assert [engine.consumer.stage(jobs[job]) for job in (waiting, slow)] == [None, "loading"]
        await engine.unload("slow", force=True)
        assert (await engine.ended(waiting)).status is JobStatus.COMPLETED


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        pytest.param(models.CORRUPT, "invalid_model", "ends after", id="corrupt"),  # no worker is started
        pytest.param(models.unknown_operator(), "invalid_model", "Frobnicate", id="unknown operator"),
        pytest.param(models.external("../../../../etc/passwd"), "unsafe_file", "passwd", id="data of others"),
        pytest.param(models.memory_bomb_on_load(), "out_of_memory", "limit", id="memory bomb"),
    ],
)
async def test_bad_model_fails_its_load_with_the_reason(
    engine: Engine, content: bytes | ModelProto, code: str, words: str
) -> None:
    data = content if isinstance(content, bytes) else content.SerializeToString()
    models.save_bytes(data, engine.root, "bad")
    await engine.load("adder")
    job = await engine.load("bad", parameters=LoadParameters(memory_limit_bytes=200_000_000))
    assert (job.status, error_of(job).code) == (JobStatus.FAILED, code)
    assert words in error_of(job).message
    assert (engine.model("bad").state, engine.model("bad").error) == (ModelState.FAILED, job.error)
    started = ["LoadStarted"] if content is not models.CORRUPT else []
    assert await engine.story(of="bad") == ["LoadRequested", *started, "LoadFailed"]
    await until(lambda: len(engine.consumer.loads) == 1)
    assert await engine.ask("adder", 1) == 3


async def test_load_of_removed_model_fails(folder: Path, run: Run) -> None:
    async with run(loads_at_once=0) as engine:
        job_id = await engine.ask_load("other")
        (folder / "models/other/1/model.onnx").unlink()
        engine.consumer.policy = replace(engine.consumer.policy, loads_at_once=1)
        engine.log.notify()
        reason = "is not complete: its model.onnx cannot be looked at: No such file or directory"
        failure = Failure("unknown_version", f"version 1 of model 'other' {reason}")
        assert (await engine.ended(job_id)).error == failure
        await engine.nothing_left()


async def test_workers_have_threads_of_pool_or_load(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.pool, "threads", 3)
    await engine.load("adder")
    await engine.load("loop", parameters=LoadParameters(threads=2))
    assert [threads(engine.worker(name).pid) for name in ("adder", "loop")] == [4, 3]  # and control


async def test_load_that_cannot_be_recorded_fails_alone(engine: Engine) -> None:
    pid = await engine.stopped_ahead()
    job_id = await engine.ask_load("adder", 1)
    await until(lambda: is_stopped(pid))
    load = engine.live("adder")
    load.starting_us = 2**64
    os.kill(pid, signal.SIGCONT)
    error = error_of(await engine.ended(job_id))
    assert error.code == "not_encodable"
    assert "the integer does not fit into 64 bits" in error.message
    assert (await engine.load("other")).status is JobStatus.COMPLETED
    await until(lambda: len(engine.consumer.loads) == 1)


async def test_crash_during_load_records_the_last_words(engine: Engine) -> None:
    models.save(models.crash_on_load(), engine.root, "crash")
    error = error_of(await engine.load("crash"))
    assert error.code == "worker_died"
    assert f"killed by signal {int(signal.SIGFPE)}" in error.message
    assert "Floating" in error.message
    [exited] = await engine.facts(WorkerExited, of="crash")
    assert (exited.exit_code, exited.signal) == (None, signal.SIGFPE)
    assert any("Floating" in line for line in exited.stderr)


async def test_worker_killed_during_load_fails_it(engine: Engine) -> None:
    job_id = await engine.ask_load("slow")
    load = await engine.loading("slow")
    job, phases = engine.log.state.unended_job(job_id), list[Phase]()
    load.workers[0].ended.add_done_callback(lambda _: phases.append(load.to_view(job).phase))
    engine.kill("slow")
    error = error_of(await engine.ended(job_id))
    assert error == Failure("worker_died", "the worker was killed by signal 9 while it loaded the model")
    assert phases == [Phase.LOADING]  # the exit comes before its reason
    assert await engine.story(of="slow") == ["LoadRequested", "LoadStarted", "WorkerExited", "LoadFailed"]
    exited = (await engine.events(of="slow"))[2]
    assert (exited.worker_id, exited.data) == (load.worker_id, WorkerExited(None, signal.SIGKILL, ()))
    await engine.nothing_left()


async def test_load_without_progress_fails_and_frees_its_memory(folder: Path, run: Run) -> None:
    """The worker computes all the time, which is no progress: an endless loop does so, too."""
    models.save(models.endless(), folder / "models", "m")
    async with run(policy=Policy(loads_at_once=1, budget_bytes=10**9)) as engine:
        job_id = await engine.ask_load("m", None, LoadParameters(progress_timeout_s=1))
        await until(lambda: any(load.stage == "warming_up" for load in engine.consumer.loads.values()))
        worker = engine.worker("m")
        await until(computing(worker.pid))
        error = error_of(await engine.ended(job_id))
        assert error.code == "no_progress"
        assert "for 1 s: all that time its stage was 'warming_up'" in error.message
        assert "greater progress_timeout_s" in error.message
        await asyncio.shield(worker.ended)
        await until(lambda: not engine.consumer.loads)
        assert await engine.story(of="m") == ["LoadRequested", "LoadStarted", "LoadFailed"]


# Swaps.


async def test_swap_drains_the_old_version(engine: Engine) -> None:
    await engine.load("adder", 1)
    draining, old = engine.live("adder"), engine.worker("adder")
    os.kill(old.pid, signal.SIGSTOP)
    asked = asyncio.create_task(engine.ask("adder", 10))
    await until(lambda: old.in_flight == 1)
    await engine.load("adder", 2)
    assert await engine.ask("adder", 10) == 12
    await until(lambda: draining.unloading)
    assert not asked.done()
    os.kill(old.pid, signal.SIGCONT)
    assert await asked == 11
    await until(lambda: len(engine.consumer.loads) == 1)
    assert gone(old.pid)
    [requested] = await engine.facts(UnloadRequested, of="adder")
    loaded = [event for event in await engine.events(of="adder") if isinstance(event.data, ModelLoaded)]
    assert (requested.cause, requested.cause_event_id) == (Cause.SWAP, loaded[-1].id)
    [unloaded] = await engine.facts(ModelUnloaded, of="adder")
    assert (unloaded.drained_requests, unloaded.aborted_requests) == (1, 0)
    assert (engine.model("adder").state, engine.model("adder").version) == (ModelState.LOADED, 2)


# Unloads.


async def test_unload_returns_the_memory_of_the_process(engine: Engine) -> None:
    models.save(models.weights(20), engine.root, "big")
    await engine.load("big")
    pid = engine.worker("big").pid
    assert (await engine.unload("big")).status is JobStatus.COMPLETED
    assert gone(pid)
    story = await engine.story(of="big")
    assert story[-3:] == ["UnloadRequested", "UnloadStarted", "ModelUnloaded"]
    [unloaded] = await engine.facts(ModelUnloaded, of="big")
    assert unloaded.freed_bytes > 20_000_000
    assert (unloaded.drained_requests, unloaded.aborted_requests) == (0, 0)
    await engine.nothing_left()


async def test_worker_dying_in_a_drain_ends_the_unload(engine: Engine) -> None:
    await engine.load("loop")
    [asked] = await engine.start_endless()
    job_id = await engine.ask_unload("loop")
    await engine.becomes("loop", ModelState.UNLOADING)
    assert engine.consumer.stage(engine.log.state.jobs[job_id]) == "draining"
    engine.kill("loop")
    with pytest.raises(ModelLost):
        await asked
    assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
    assert (await engine.story(of="loop"))[-3:] == ["UnloadStarted", "WorkerExited", "ModelUnloaded"]
    assert engine.model("loop").state is ModelState.UNLOADED


# Force.


async def test_unload_force_kills_stopped_worker(engine: Engine) -> None:
    await engine.load("adder")
    pid = engine.worker("adder").pid
    os.kill(pid, signal.SIGSTOP)
    unload, load = await asyncio.gather(engine.ask_unload("adder", force=True), engine.ask_load("adder"))
    assert (await engine.ended(unload)).status is JobStatus.COMPLETED
    assert gone(pid)
    assert "WorkerExited" not in await engine.story()
    [unloaded] = await engine.facts(ModelUnloaded, of="adder")
    assert unloaded.freed_bytes > 0
    assert (await engine.ended(load)).status is JobStatus.COMPLETED


async def test_unload_force_ends_a_load_in_progress(engine: Engine) -> None:
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


async def test_unload_force_does_not_wait_for_stopped_fork_server(engine: Engine) -> None:
    fork_server = engine.fork_server_pid
    await freeze(fork_server)
    await engine.ask_load("adder")
    await engine.becomes("adder", ModelState.LOADING)
    await engine.unload("adder", force=True)
    assert is_stopped(fork_server)
    os.kill(fork_server, signal.SIGCONT)
    await engine.nothing_left()
    assert (await engine.load("adder")).status is JobStatus.COMPLETED


async def test_unload_force_ends_a_drain_and_both_jobs(engine: Engine) -> None:
    await engine.load("loop")
    [asked] = await engine.start_endless()
    unforced = await engine.ask_unload("loop")
    await engine.becomes("loop", ModelState.UNLOADING)
    forced = await engine.unload("loop", force=True)
    with pytest.raises(ModelLost):
        await asked
    ends = [await engine.ended(unforced), forced]
    assert [job.status for job in ends] == [JobStatus.COMPLETED] * 2
    assert ends[0].position + 1 == ends[1].position
    unloads = await engine.facts(ModelUnloaded, of="loop")
    assert [unload.aborted_requests for unload in unloads] == [1, 1]
