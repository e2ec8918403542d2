"""How much memory a load will need: from what its files took, else from their sizes."""

import asyncio
import math
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.events import PLAIN, History
from support.running import Engine, running
from support.workers import LIMIT_S

from events.jobs import Job, JobStatus, LoadParameters
from events.models import Footprint, Model
from events.types import LoadedFile, ModelLoaded
from runtime.needs import BYTES_PER_MODEL_BYTE, WORKER_BYTES, Need, Needs, need_bare, need_of
from runtime.repository import FileStat, Repository
from runtime.scheduling.sight import Policy

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
    return need_of(tuple(files), version, parameters, footprints).bytes


# The figure


def test_files_that_were_never_loaded_are_estimated_by_their_sizes() -> None:
    assert need() == ESTIMATE


def test_files_that_were_loaded_need_what_they_took_then() -> None:
    assert need(footprint(MODEL, WEIGHTS)) == PEAK


def test_the_order_in_which_files_are_named_does_not_matter() -> None:
    assert need(footprint(WEIGHTS, MODEL)) == PEAK


@pytest.mark.parametrize(
    "files",
    [
        (FileStat("model.onnx", 1000, 7), WEIGHTS),
        (FileStat("model.onnx", 1001, 1), WEIGHTS),
        (FileStat("model2.onnx", 1000, 1), WEIGHTS),
        (MODEL,),
        (MODEL, WEIGHTS, FileStat("more.bin", 0, 3)),
    ],
    ids=["touched", "larger", "renamed", "one fewer", "one more"],
)
def test_files_that_have_changed_since_are_estimated_again(files: tuple[FileStat, ...]) -> None:
    weights = sum(file.bytes * (5 if file.path == MODEL.path else 2) for file in files)
    assert need(footprint(MODEL, WEIGHTS), files=files) == WORKER_BYTES + (weights + 1) // 2


def test_what_another_version_took_says_nothing_even_of_the_same_files() -> None:
    other = footprint(MODEL, WEIGHTS, version=2, peak=5)
    assert need(other) == ESTIMATE
    assert need(other, footprint(MODEL, WEIGHTS)) == PEAK


def test_files_need_what_they_took_in_the_form_that_they_will_be_loaded_in() -> None:
    bare, prepared = footprint(MODEL), Footprint(1, footprint(MODEL).files, 20_000, "prepacked")
    for seen in ([bare, prepared], [prepared, bare]):
        found = [need_of((MODEL,), 1, LoadParameters(), seen, form).bytes for form in ("prepacked", None)]
        assert found == [20_000, PEAK]
    assert need_of((MODEL,), 1, LoadParameters(), [bare], "prepacked").bytes == PEAK
    assert need_of((MODEL,), 1, LoadParameters(), [prepared]).bytes == WORKER_BYTES + 2500
    assert need_bare(1, LoadParameters(instances=2), [prepared, bare]) == 2 * PEAK
    assert need_bare(1, LoadParameters(memory_limit_bytes=2**20), [bare]) == 2**20 + WORKER_BYTES
    assert need_bare(2, LoadParameters(), [prepared, bare]) == need_bare(1, LoadParameters(), [prepared]) == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_limit_bounds_what_is_needed_beside_what_a_worker_has_anyway(*, known: bool) -> None:
    footprints = [footprint(MODEL, WEIGHTS)] if known else []
    assert need(*footprints, limit=2000) == WORKER_BYTES + 2000
    assert need(*footprints, limit=10**12) == (PEAK if known else ESTIMATE)


@pytest.mark.parametrize(
    ("footprints", "limit", "is_estimate"),
    [((), None, True), ((), 10**12, True), ((), 2000, False), ((footprint(MODEL),), None, False)],
)
def test_what_is_known_of_sizes_alone_is_an_estimate(
    footprints: tuple[Footprint, ...],
    limit: int | None,
    is_estimate: bool,  # noqa: FBT001 - a column of the table
) -> None:
    found: Need = need_of((MODEL,), 1, LoadParameters(memory_limit_bytes=limit), footprints)
    assert found.is_estimate is is_estimate


def test_each_instance_needs_as_much() -> None:
    assert need(instances=3) == 3 * ESTIMATE
    assert need(footprint(MODEL, WEIGHTS), instances=3) == 3 * PEAK
    assert need(limit=2000, instances=3) == 3 * (WORKER_BYTES + 2000)


@PLAIN
@given(
    st.lists(st.builds(FileStat, st.text(max_size=3), st.integers(0, 2**40), st.integers(0, 9)), max_size=4),
    st.integers(2**20, 2**50) | st.none(),
    st.integers(1, 64),
)
def test_a_need_is_at_least_a_workers_own_and_at_most_the_limit(
    files: list[FileStat], limit: int | None, instances: int
) -> None:
    needed = need(files=files, limit=limit, instances=instances)
    assert needed >= WORKER_BYTES * instances
    assert limit is None or needed <= (WORKER_BYTES + limit) * instances


# Found out beside everything else


class Looking:
    """Needs over a repository, and who is woken."""

    def __init__(self, root: Path) -> None:
        self.woken = asyncio.Event()
        self.needs = Needs(Repository(root), self.woken.set)
        self.history = History()

    def ask(self, job: str = "j", of: str = "m", version: int = 1) -> Job:
        """Have a load requested, and looked into."""
        self.history.ask_load(job, of=of, version=version)
        self.needs.find(self.history.job(job), self.model(of))
        return self.history.job(job)

    def model(self, of: str) -> Model | None:
        return self.history.state.models.get(of)

    async def found(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.woken.wait()
        self.woken.clear()


async def test_a_need_is_unknown_until_its_files_were_looked_at_and_then_somebody_is_woken(
    tmp_path: Path,
) -> None:
    models.save(models.add(1), tmp_path, "m")
    looking = Looking(tmp_path)
    job = looking.ask()
    assert looking.needs.known == {job.id: None}
    await looking.found()
    size = (tmp_path / "m" / "1" / "model.onnx").stat().st_size
    assert looking.needs.known == {job.id: WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)}


@pytest.mark.parametrize("missing", ["m", "m/1", "m/1/model.onnx"])
async def test_a_load_whose_files_are_gone_needs_nothing_for_it_says_itself_what_is_wrong(
    tmp_path: Path, missing: str
) -> None:
    models.save(models.add(1), tmp_path, "m")
    gone = tmp_path / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    looking = Looking(tmp_path)
    job = looking.ask()
    await looking.found()
    assert looking.needs.known == {job.id: 0}


async def test_what_is_known_of_a_job_is_forgotten_with_it(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    looking = Looking(tmp_path)
    looking.ask("one")
    looking.ask("two", of="other")
    await looking.found()
    looking.history.fail_load("one", of="m")
    looking.history.state.forget_ended([looking.history.job("one")])
    looking.needs.forget_ended(looking.history.state)
    assert set(looking.needs.known) == {"two"}
    await asyncio.gather(*looking.needs.tasks)


async def test_others_wait_for_a_look_at_files_until_it_ends(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    looking = Looking(tmp_path)
    job = looking.ask()
    assert looking.needs.looked_at == {job.id}
    await looking.found()
    assert looking.needs.looked_at == set()


async def test_others_do_not_wait_for_a_look_that_does_not_end(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    looking, hangs = Looking(tmp_path), threading.Event()
    threads = ThreadPoolExecutor(max_workers=1)
    asyncio.get_running_loop().set_default_executor(threads)
    threads.submit(hangs.wait)
    job = looking.ask()
    await looking.found()
    assert (looking.needs.looked_at, looking.needs.known) == (set(), {job.id: None})
    hangs.set()
    await looking.found()
    assert looking.needs.known[job.id] is not None


async def test_a_job_that_ends_while_its_files_are_looked_at_is_not_remembered(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    looking = Looking(tmp_path)
    looking.ask()
    looking.history.fail_load("j", of="m")
    looking.history.state.forget_ended([looking.history.job("j")])
    looking.needs.forget_ended(looking.history.state)
    await looking.found()
    assert looking.needs.known == {}


# From the ledger


async def peak_of(engine: Engine, job: Job) -> int:
    [event] = [
        event for event in await engine.events() if event.job_id == job.id and event.type == "ModelLoaded"
    ]
    assert isinstance(event.data, ModelLoaded)
    return event.data.peak_memory_bytes


async def reserved(engine: Engine, model_id: str) -> int:
    """Ask for a load, and return what is reserved while it runs."""
    job_id = await engine.ask_load(model_id)
    await engine.recorded(lambda: job_id in engine.consumer.live)
    found = engine.live(model_id).reserved_bytes
    assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
    return found


async def test_the_second_load_of_the_same_files_reserves_what_the_first_took_after_a_restart_too(
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


async def test_two_instances_reserve_twice_what_one_took(tmp_path: Path) -> None:
    models.save(models.table(4), tmp_path / "models", "m")
    async with running(tmp_path, policy=Policy(loads_at_once=2, budget_bytes=10**9)) as engine:
        job = await engine.load("m", parameters=LoadParameters(instances=2))
        peak = await peak_of(engine, job)
        await engine.unload("m")
        assert await reserved(engine, "m") == -(-peak // 2)
