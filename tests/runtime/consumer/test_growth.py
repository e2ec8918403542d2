"""Growth of loaded workers: the rule, the limit of the kernel, and the end of the one that grew most."""

import asyncio
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN
from support.running import Engine, Run
from support.workers import computing, tensor, until

from events.models import ModelState
from events.types import WorkerExited
from runtime.consumer.growth import GrowthLimits, share_growth
from runtime.errors import InferenceFailed
from runtime.lostmodels import ModelLost
from runtime.scheduler.view import Policy

MB = 1_000_000
BUDGET = 400 * MB
WORKERS = BUDGET + BUDGET // 8


@PLAIN
@pytest.mark.parametrize("is_loading", [False, True])
@given(taken=st.integers(0, 2000), budget=st.integers(0, 1000))
def test_two_that_grow_beside_a_load_stay_within_the_sum(
    taken: int, budget: int, *, is_loading: bool
) -> None:
    workers = budget + budget // 8
    part = share_growth(workers, budget, taken, is_loading=is_loading)
    most = max(taken, budget) if is_loading else taken
    assert part == 0 or most + 2 * part <= workers
    assert part >= (workers - most) // 2


def soft_limit(engine: Engine, model_id: str) -> int:
    return resource.prlimit(engine.worker(model_id).pid, resource.RLIMIT_DATA)[0]


@pytest.fixture
def root(folder: Path) -> Path:
    root = folder / "models"
    models.save(models.memory_bomb_on_run(), root, "bomb")
    models.save(models.grown(20_000_000), root, "large")
    models.save(models.counting_loop(), root, "endless")
    return root


async def ask_bomb(engine: Engine, megabytes: int) -> None:
    await engine.infer("bomb", tensor("shape", "INT64", [megabytes * MB // 4]))


@pytest.mark.usefixtures("root")
async def test_inference_beyond_what_is_left_fails_alone_with_figures(run: Run) -> None:
    async with run(policy=Policy(loads_at_once=1, budget_bytes=BUDGET), workers_bytes=WORKERS) as engine:
        await engine.load("bomb")
        await ask_bomb(engine, 100)
        with pytest.raises(InferenceFailed, match=r"its worker may take [\d.]+ MB more"):
            await ask_bomb(engine, 300)
        await ask_bomb(engine, 100)


@pytest.mark.usefixtures("root")
async def test_load_leaves_less_to_the_growth_of_others(run: Run) -> None:
    async with run(policy=Policy(loads_at_once=1, budget_bytes=BUDGET), workers_bytes=WORKERS) as engine:
        await engine.load("bomb")
        alone = soft_limit(engine, "bomb")
        await engine.load("large")
        beside = soft_limit(engine, "bomb")
        assert beside < alone - 50 * MB
        with pytest.raises(InferenceFailed):
            await ask_bomb(engine, 190)
        await engine.unload("large")
        await engine.consumer._monitor.measure()
        await until(lambda: soft_limit(engine, "bomb") > beside)


@pytest.mark.usefixtures("root")
async def test_growth_beyond_the_sum_ends_the_worker_that_grew_most(run: Run) -> None:
    async with run(policy=Policy(loads_at_once=1, budget_bytes=BUDGET), workers_bytes=WORKERS) as engine:
        await engine.load("endless")
        worker = engine.worker("endless")
        inference = asyncio.create_task(engine.infer("endless", tensor("trips", "INT64", models.ENDLESS)))
        await until(computing(worker.pid))
        GrowthLimits(engine.consumer.loads, WORKERS, BUDGET).end_excess()
        assert not worker.ended.done()
        GrowthLimits(engine.consumer.loads, 1, BUDGET).end_excess()
        with pytest.raises(ModelLost, match="it had grown most") as lost:
            await inference
        await engine.becomes("endless", ModelState.LOST)
        assert lost.value.code == "out_of_memory"
        [exited] = await engine.facts(WorkerExited, of="endless")
        assert "killed by the server: it took" in exited.stderr[-1]


async def test_worker_is_the_kernels_first_victim(engine: Engine) -> None:
    await engine.load("adder")
    score = Path(f"/proc/{engine.worker('adder').pid}/oom_score_adj")
    assert int(await asyncio.to_thread(score.read_text)) == 1000
