"""A load that makes no progress ends: what counts as progress, and what is left of such a load."""

import asyncio
from pathlib import Path

from support import models
from support.running import error_of, running
from support.workers import computing, until

from events.jobs import JobStatus
from events.types import LoadParameters
from runtime.process.pool import WorkerPool
from runtime.scheduler.view import Policy


async def test_load_without_progress_fails_and_frees_its_memory(
    tmp_path: Path, shared_pool: WorkerPool
) -> None:
    """The worker computes all the time, which is no progress: an endless loop does so, too."""
    models.save(models.endless(), tmp_path / "models", "m")
    policy = Policy(loads_at_once=1, budget_bytes=10**9)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
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


async def test_model_that_loaded_before_loads_beside_loads_that_never_end(
    tmp_path: Path, shared_pool: WorkerPool
) -> None:
    for name, model in (("endless", models.endless()), ("known", models.add(1)), ("new", models.add(1))):
        models.save(model, tmp_path / "models", name)
    policy = Policy(loads_at_once=1, budget_bytes=10**9)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        await engine.load("known")
        await engine.unload("known")
        await engine.ask_load("endless")
        await until(lambda: any(load.stage == "warming_up" for load in engine.consumer.loads.values()))
        new = engine.log.state.unended_job(await engine.ask_load("new"))
        assert new is not None
        assert (await engine.load("known")).status is JobStatus.COMPLETED
        assert engine.consumer.waiting_for(new) == "a free load slot: at most 1 may run at once"


async def test_stage_is_progress_once_for_each_worker(tmp_path: Path, shared_pool: WorkerPool) -> None:
    models.save(models.add(), tmp_path / "models", "m")
    async with running(tmp_path, pool=shared_pool) as engine:
        await engine.load("m")
        load = engine.live("m")
        before = load.progress
        assert load.pieces > 0
        load.reach_stage("loading", load.worker_id)
        assert load.progress == before
        load.reach_stage("loading", "another")
        assert load.progress > before
