"""How much memory a load will need: from what its files took, else from their sizes."""

import asyncio
import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN, History
from support.running import Engine, running
from support.workers import LIMIT_S

from events.jobs import Job, JobStatus
from events.models import Footprint, Model
from events.types import LoadedFile, LoadParameters, ModelLoaded
from runtime import estimates as needs_module
from runtime.estimates import (
    BYTES_PER_MODEL_BYTE,
    WORKER_BYTES,
    MemoryEstimate,
    MemoryEstimates,
    estimate_memory,
    estimate_unprepared,
)
from runtime.repository import FileStat, Repository
from runtime.scheduler.view import Policy

MODEL = FileStat("model.onnx", 1000, 1)
WEIGHTS = FileStat("weights.bin", 5000, 2)
ESTIMATE = WORKER_BYTES + 2500 + 5000
PEAK = 123_456_789


def footprint(*files: FileStat, version: int = 1, peak: int = PEAK) -> Footprint:
    """Return what these files took the last time."""
    loaded = (LoadedFile(file.path, file.bytes, file.mtime_ns, "ab" * 32) for file in files)
    return Footprint(version, tuple(loaded), peak)


def need(
    *footprints: Footprint,
    files: Iterable[FileStat] = (MODEL, WEIGHTS),
    version: int = 1,
    limit: int | None = None,
    instances: int = 1,
) -> int:
    parameters = LoadParameters(memory_limit_bytes=limit, instances=instances)
    return estimate_memory(tuple(files), version, parameters, footprints).bytes


# The figure

KNOWN = footprint(MODEL, WEIGHTS)
TOUCHED, LARGER = FileStat("model.onnx", 1000, 7), FileStat("model.onnx", 1001, 1)
RENAMED, MORE = FileStat("model2.onnx", 1000, 1), FileStat("more.bin", 0, 3)


@pytest.mark.parametrize(
    ("footprints", "given", "expected"),
    [
        ([], {}, ESTIMATE),
        ([KNOWN], {}, PEAK),
        ([footprint(WEIGHTS, MODEL)], {}, PEAK),
        # Files that have changed since are estimated again.
        ([KNOWN], {"files": (TOUCHED, WEIGHTS)}, ESTIMATE),
        ([KNOWN], {"files": (LARGER, WEIGHTS)}, ESTIMATE + 3),
        ([KNOWN], {"files": (RENAMED, WEIGHTS)}, WORKER_BYTES + 1000 + 5000),
        ([KNOWN], {"files": (MODEL,)}, WORKER_BYTES + 2500),
        ([KNOWN], {"files": (MODEL, WEIGHTS, MORE)}, ESTIMATE),
        # What another version took says nothing, even of the same files.
        ([footprint(MODEL, WEIGHTS, version=2, peak=5)], {}, ESTIMATE),
        ([footprint(MODEL, WEIGHTS, version=2, peak=5), KNOWN], {}, PEAK),
        # A memory limit bounds the model beside its worker.
        ([KNOWN], {"limit": 2000}, WORKER_BYTES + 2000),
        ([], {"limit": 2000}, WORKER_BYTES + 2000),
        ([KNOWN], {"limit": 10**12}, PEAK),
        ([], {"limit": 10**12}, ESTIMATE),
        # Each instance needs as much.
        ([], {"instances": 3}, 3 * ESTIMATE),
        ([KNOWN], {"instances": 3}, 3 * PEAK),
        ([], {"limit": 2000, "instances": 3}, 3 * (WORKER_BYTES + 2000)),
    ],
)
def test_need_is_the_last_peak_or_an_estimate(
    footprints: list[Footprint], given: dict[str, Any], expected: int
) -> None:
    assert need(*footprints, **given) == expected


def test_need_depends_on_the_prepared_form() -> None:
    bare, prepared = footprint(MODEL), Footprint(1, footprint(MODEL).files, 20_000, "prepacked")
    for seen in ([bare, prepared], [prepared, bare]):
        found = [
            estimate_memory((MODEL,), 1, LoadParameters(), seen, form).bytes for form in ("prepacked", None)
        ]
        assert found == [20_000, PEAK]
    assert estimate_memory((MODEL,), 1, LoadParameters(), [bare], "prepacked").bytes == PEAK
    assert estimate_memory((MODEL,), 1, LoadParameters(), [prepared]).bytes == WORKER_BYTES + 2500
    assert estimate_unprepared(1, LoadParameters(instances=2), [prepared, bare]) == 2 * PEAK
    assert estimate_unprepared(1, LoadParameters(memory_limit_bytes=2**20), [bare]) == 2**20 + WORKER_BYTES
    assert (
        estimate_unprepared(2, LoadParameters(), [prepared, bare])
        == estimate_unprepared(1, LoadParameters(), [prepared])
        == 0
    )


@pytest.mark.parametrize(
    ("footprints", "limit", "is_estimate"),
    [((), None, True), ((), 10**12, True), ((), 2000, False), ((footprint(MODEL),), None, False)],
)
def test_need_from_sizes_alone_is_an_estimate(
    footprints: tuple[Footprint, ...],
    limit: int | None,
    is_estimate: bool,  # noqa: FBT001 - a column of the table
) -> None:
    found: MemoryEstimate = estimate_memory((MODEL,), 1, LoadParameters(memory_limit_bytes=limit), footprints)
    assert found.is_estimate is is_estimate


@PLAIN
@given(
    st.lists(st.builds(FileStat, st.text(max_size=3), st.integers(0, 2**40), st.integers(0, 9)), max_size=4),
    st.integers(2**20, 2**50) | st.none(),
    st.integers(1, 64),
)
def test_need_is_between_a_worker_and_the_limit(
    files: list[FileStat], limit: int | None, instances: int
) -> None:
    needed = need(files=files, limit=limit, instances=instances)
    assert needed >= WORKER_BYTES * instances
    assert limit is None or needed <= (WORKER_BYTES + limit) * instances


# Found out beside everything else


class Estimating:
    """Needs over a repository, and who is woken."""

    def __init__(self, root: Path) -> None:
        self.woken = asyncio.Event()
        self.needs = MemoryEstimates(Repository(root), self.woken.set)
        self.history = History()

    def ask(self, job: str = "j", of: str = "m", version: int = 1) -> Job:
        """Have a load requested, and looked into."""
        self.history.ask_load(job, of=of, version=version)
        self.needs.start_estimate(self.history.job(job), self.model(of))
        return self.history.job(job)

    def model(self, of: str) -> Model | None:
        return self.history.state.models.get(of)

    async def found(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.woken.wait()
        self.woken.clear()


async def test_need_is_found_in_the_background(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    estimating = Estimating(tmp_path)
    job = estimating.ask()
    assert (estimating.needs.known, estimating.needs.in_progress) == ({job.id: None}, {job.id})
    await estimating.found()
    size = (tmp_path / "m" / "1" / "model.onnx").stat().st_size
    assert estimating.needs.known == {job.id: WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)}
    assert estimating.needs.in_progress == set()


@pytest.mark.parametrize("missing", ["m", "m/1", "m/1/model.onnx"])
async def test_need_of_missing_files_is_zero(tmp_path: Path, missing: str) -> None:
    models.save(models.add(1), tmp_path, "m")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    estimating = Estimating(tmp_path)
    job = estimating.ask()
    await estimating.found()
    assert estimating.needs.known == {job.id: 0}


@pytest.mark.parametrize("is_found", [True, False])
async def test_need_is_forgotten_with_its_job(tmp_path: Path, *, is_found: bool) -> None:
    models.save(models.add(1), tmp_path, "m")
    estimating = Estimating(tmp_path)
    estimating.ask("one")
    estimating.ask("two", of="other")
    if is_found:
        await asyncio.gather(*estimating.needs.tasks)
    estimating.history.fail_load("one", of="m")
    estimating.history.state.forget_ended([estimating.history.job("one")])
    estimating.needs.forget_ended(estimating.history.state)
    await asyncio.gather(*estimating.needs.tasks)
    assert set(estimating.needs.known) == {"two"}


async def test_hanging_look_delays_others_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "ESTIMATE_WAIT_S", 0.05)
    models.save(models.add(1), tmp_path, "m")
    estimating, hangs = Estimating(tmp_path), threading.Event()
    threads = ThreadPoolExecutor(max_workers=1)
    asyncio.get_running_loop().set_default_executor(threads)
    threads.submit(hangs.wait)
    job = estimating.ask()
    await estimating.found()
    assert (estimating.needs.in_progress, estimating.needs.known) == (set(), {job.id: None})
    hangs.set()
    await estimating.found()
    assert estimating.needs.known[job.id] is not None


# From the ledger


async def reserved(engine: Engine, model_id: str) -> int:
    """Ask for a load, and return what is reserved while it runs."""
    job_id = await engine.ask_load(model_id)
    await engine.recorded(lambda: job_id in engine.consumer.loads)
    found = engine.live(model_id).reserved_bytes
    assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
    return found


async def test_reservation_is_the_last_peak_after_a_restart_too(
    tmp_path: Path,
) -> None:
    folder = models.save(models.table(4), tmp_path / "models", "m")
    size = (folder / "model.onnx").stat().st_size
    policy = Policy(loads_at_once=2, budget_bytes=10**9)
    async with running(tmp_path, policy=policy) as engine:
        estimate = WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)
        assert await reserved(engine, "m") == estimate
        [first] = engine.model("m").footprints
        await engine.unload("m")
        assert await reserved(engine, "m") == first.peak_memory_bytes < estimate
        await engine.unload("m")
        [last] = engine.model("m").footprints
    async with running(tmp_path, policy=policy) as engine:
        assert await reserved(engine, "m") == last.peak_memory_bytes
        await engine.unload("m")
        os.utime(folder / "model.onnx", ns=(1, 1))
        assert await reserved(engine, "m") == estimate


async def test_instances_reserve_the_last_peak_each(tmp_path: Path) -> None:
    models.save(models.table(4), tmp_path / "models", "m")
    async with running(tmp_path, policy=Policy(loads_at_once=2, budget_bytes=10**9)) as engine:
        await engine.load("m", parameters=LoadParameters(instances=2))
        [loaded] = await engine.facts(ModelLoaded)
        await engine.unload("m")
        assert await reserved(engine, "m") == -(-loaded.peak_memory_bytes // 2)
