"""How much memory a load will need: from what its files took, else from their sizes."""

import asyncio
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN, History
from support.running import Engine, error_of, running
from support.workers import LIMIT_S, until

from events.jobs import Failure, Footprint, JobStatus
from events.types import LoadedFile, LoadParameters, LoadStarted, ModelLoaded
from runtime import estimates
from runtime.estimates import (
    BYTES_PER_MODEL_BYTE,
    WORKER_BYTES,
    MemoryEstimates,
    describe_failure,
    estimate_memory,
    file_sizes,
)
from runtime.process.pool import WorkerPool
from runtime.repository import Repository, SizedFile
from runtime.scheduler.view import MemoryEstimate, Policy


def seen(path: str, size: int, mtime_ns: int) -> LoadedFile:
    """Return a file of a version."""
    return LoadedFile(path, size, mtime_ns, "ab" * 32)


MODEL = seen("model.onnx", 1000, 1)
WEIGHTS = seen("weights.bin", 5000, 2)
BOTH = (MODEL, WEIGHTS)
PEAK = 123_456_789


def footprint(
    *files: LoadedFile, version: int = 1, peak: int = PEAK, form: str | None = None, threads: int | None = 1
) -> Footprint:
    """Return what these files took the last time."""
    return Footprint(version, files, peak, form, threads)


def need(
    *footprints: Footprint,
    files: Sequence[LoadedFile] = BOTH,
    limit: int | None = None,
    instances: int = 1,
    form: str | None = None,
    threads: int = 1,
) -> MemoryEstimate:
    parameters = LoadParameters(memory_limit_bytes=limit, instances=instances)
    found = estimate_memory(files, 1, parameters, footprints, form, threads=threads)
    assert (found.form, found.files) == (form, file_sizes(files))
    return replace(found, form=None, files=frozenset())


def sizes(model_bytes: int, other_bytes: int, *, proven: bool = False) -> MemoryEstimate:
    """Return the estimate from sizes alone."""
    bytes_ = WORKER_BYTES + math.ceil(2.5 * model_bytes) + other_bytes
    return MemoryEstimate(bytes_, is_guess=True, is_proven=proven)


def known(peak: int, *, proven: bool = True) -> MemoryEstimate:
    return MemoryEstimate(peak, is_guess=False, is_proven=proven)


KNOWN, OTHER_VERSION = footprint(*BOTH), footprint(*BOTH, version=2, peak=5)
PREPACKED = footprint(*BOTH, peak=20_000, form="prepacked")
OF_TWO, UNKNOWN_THREADS = footprint(*BOTH, peak=7_000, threads=2), footprint(*BOTH, peak=8_000, threads=None)
TOUCHED, LARGER = seen("model.onnx", 1000, 7), seen("model.onnx", 1001, 1)
RENAMED, MORE = seen("model2.onnx", 1000, 1), seen("more.bin", 0, 3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (need(), sizes(1000, 5000)),
        (need(KNOWN), known(PEAK)),
        (need(footprint(WEIGHTS, MODEL)), known(PEAK)),
        # Files that have changed since are estimated again.
        (need(KNOWN, files=(TOUCHED, WEIGHTS)), sizes(1000, 5000)),
        (need(KNOWN, files=(LARGER, WEIGHTS)), sizes(1001, 5000)),
        (need(KNOWN, files=(RENAMED, WEIGHTS)), sizes(1000, 5000)),
        (need(KNOWN, files=(MODEL,)), sizes(1000, 0)),
        (need(KNOWN, files=(*BOTH, MORE)), sizes(1000, 5000)),
        # What another version took says nothing, even of the same files.
        (need(OTHER_VERSION), sizes(1000, 5000)),
        (need(OTHER_VERSION, KNOWN), known(PEAK)),
        # A memory limit bounds the model beside its worker.
        (need(KNOWN, limit=2000), known(WORKER_BYTES + 2000)),
        (need(limit=2000), known(WORKER_BYTES + 2000, proven=False)),
        (need(KNOWN, limit=10**12), known(PEAK)),
        (need(limit=10**12), sizes(1000, 5000)),
        # Each instance needs as much.
        (need(instances=3).bytes, 3 * sizes(1000, 5000).bytes),
        (need(KNOWN, instances=3), known(3 * PEAK)),
        (need(limit=2000, instances=3), known(3 * (WORKER_BYTES + 2000), proven=False)),
        # A prepared form takes what it took, and the first time as much as the files without it.
        (need(KNOWN, PREPACKED, form="prepacked"), known(20_000)),
        (need(PREPACKED, KNOWN, form="prepacked"), known(20_000)),
        (need(KNOWN, PREPACKED), known(PEAK)),
        (need(PREPACKED, KNOWN), known(PEAK)),
        (need(KNOWN, form="prepacked"), known(PEAK)),
        (need(PREPACKED), sizes(1000, 5000, proven=True)),
        # The peak with as many threads counts, else the highest with others.
        (need(KNOWN, OF_TWO), known(PEAK)),
        (need(KNOWN, OF_TWO, threads=2), known(7_000)),
        (need(UNKNOWN_THREADS, OF_TWO, threads=3), known(8_000)),
        (need(UNKNOWN_THREADS), known(8_000)),
        (need(PREPACKED, OF_TWO, form="prepacked", threads=2), known(20_000)),
        (need(KNOWN, OF_TWO, form="prepacked", threads=2), known(7_000)),
    ],
)
def test_need_is_the_last_peak_or_an_estimate(found: object, expected: object) -> None:
    assert found == expected


@PLAIN
@given(
    st.lists(st.builds(seen, st.text(max_size=3), st.integers(0, 2**40), st.integers(0, 9)), max_size=4),
    st.integers(2**20, 2**50) | st.none(),
    st.integers(1, 64),
)
def test_need_is_between_a_worker_and_the_limit(
    files: list[LoadedFile], limit: int | None, instances: int
) -> None:
    needed = need(files=files, limit=limit, instances=instances).bytes
    assert needed >= WORKER_BYTES * instances
    assert limit is None or needed <= (WORKER_BYTES + limit) * instances


# Found out beside everything else


class Estimating:
    """Estimates over a repository with the model `m`, and what wakes the consumer."""

    def __init__(self, root: Path) -> None:
        models.save(models.add(1), root, "m")
        self.woken = asyncio.Event()
        self.repository = Repository(root)
        self.estimates = MemoryEstimates(self.repository, self.woken.set)
        self.history = History()

    def ask(self, job: str = "j", of: str = "m") -> None:
        """Have a load requested and estimated."""
        self.history.ask_load(job, of=of)
        self.estimates.start_estimate(self.history.job(job), self.history.state.models.get(of))

    async def found(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.woken.wait()
        self.woken.clear()


@pytest.fixture
def estimating(tmp_path: Path) -> Estimating:
    return Estimating(tmp_path)


async def test_need_is_found_in_the_background(estimating: Estimating, tmp_path: Path) -> None:
    estimating.ask()
    assert (estimating.estimates.known, estimating.estimates.in_progress) == ({"j": None}, {"j"})
    await estimating.found()
    size = (tmp_path / "m" / "1" / "model.onnx").stat().st_size
    found = estimating.estimates.find("j")
    assert found is not None
    assert found.bytes == WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * size)
    assert estimating.estimates.in_progress == set()


def remove_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def add_dangling_link(folder: Path) -> None:
    (folder / "weights.bin").symlink_to("nowhere")


def replace_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize(
    ("change", "code"),
    [(remove_model, "unknown_model"), (replace_folder, "unknown_model"), (add_dangling_link, "unsafe_file")],
)
async def test_need_of_files_that_cannot_be_looked_at_is_unknown(
    estimating: Estimating, tmp_path: Path, change: Callable[[Path], None], code: str
) -> None:
    change(tmp_path / "m/1")
    estimating.ask()
    await estimating.found()
    failure = estimating.estimates.known["j"]
    assert isinstance(failure, Failure)
    assert failure.code == code


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), "repository_unreadable", "Input/output error"),
        (MemoryError(), "repository_unreadable", "too little memory"),
        (ZeroDivisionError(), "internal", "log"),
    ],
)
def test_failed_look_says_why(error: Exception, code: str, words: str) -> None:
    failure = describe_failure(error)
    assert failure.code == code
    assert words in failure.message


@pytest.mark.parametrize("is_found", [True, False])
async def test_need_is_forgotten_with_its_job(estimating: Estimating, *, is_found: bool) -> None:
    estimating.ask("one")
    estimating.ask("two", of="other")
    if is_found:
        await asyncio.gather(*estimating.estimates.tasks)
    estimating.history.fail_load("one", of="m")
    estimating.history.state.forget_ended([estimating.history.job("one")])
    estimating.estimates.forget_ended(estimating.history.state)
    await asyncio.gather(*estimating.estimates.tasks)
    assert set(estimating.estimates.known) == {"two"}


async def test_hanging_look_delays_others_for_a_while_only(
    estimating: Estimating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "ESTIMATE_WAIT_S", 0.05)
    hangs = threading.Event()
    hanging = asyncio.create_task(estimating.repository.file_system.run("m", hangs.wait, LIMIT_S))
    await asyncio.sleep(0)
    estimating.ask()
    await estimating.found()
    assert (estimating.estimates.in_progress, estimating.estimates.known) == (set(), {"j": None})
    hangs.set()
    await hanging
    await estimating.found()
    assert estimating.estimates.find("j") is not None


# From the ledger


async def reserved(engine: Engine, parameters: LoadParameters | None = None) -> int:
    """Load `m`, and return what was reserved meanwhile."""
    job_id = await engine.ask_load("m", parameters=parameters)
    await engine.recorded(lambda: job_id in engine.consumer.loads)
    found = engine.live("m").reserved_bytes
    assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
    return found


async def estimated(engine: Engine) -> str:
    """Request a load of `m` that is estimated and waits for a slot; returns the job."""
    job_id = await engine.ask_load("m")
    await until(lambda: engine.consumer._executor.estimates.find(job_id) is not None)
    return job_id


def open_slots(engine: Engine) -> None:
    engine.consumer.policy = replace(engine.consumer.policy, loads_at_once=1)
    engine.log.notify()


@pytest.mark.parametrize("budget_mb", [200, 50])
async def test_files_that_grew_after_their_estimate_are_estimated_anew(
    tmp_path: Path, shared_pool: WorkerPool, budget_mb: int
) -> None:
    models.save(models.table(1), tmp_path / "models", "m")
    policy = Policy(loads_at_once=0, budget_bytes=budget_mb * 10**6)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        job_id = await estimated(engine)
        models.save(models.table(40), tmp_path / "models", "m")
        open_slots(engine)
        job = await engine.ended(job_id)
        story = await engine.story(of="m")
        if budget_mb == 50:
            assert error_of(job).code == "insufficient_memory"
            assert story == ["LoadRequested", "LoadStarted", "LoadFailed"]
            return
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert story == ["LoadRequested", "LoadStarted", "LoadStarted", "ModelLoaded"]
        assert engine.live("m").reserved_bytes > 100_000_000


async def test_files_that_change_with_each_attempt_fail_the_load(
    tmp_path: Path, shared_pool: WorkerPool
) -> None:
    folder = models.save(models.table(1), tmp_path / "models", "m")
    policy = Policy(loads_at_once=0, budget_bytes=10**9)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        job_id = await estimated(engine)
        estimates = engine.consumer._executor.estimates
        look = estimates._form_of

        def grow(files: Sequence[SizedFile], footprints: Iterable[Footprint]) -> str | None:
            with (folder / "weights.bin").open("ab") as file:
                file.write(b"more")
            return look(files, footprints)

        estimates._form_of = grow
        grow((), ())
        open_slots(engine)
        assert error_of(await engine.ended(job_id)).code == "model_changed"
        assert [fact.attempt for fact in await engine.facts(LoadStarted)] == 4 * [1]


async def test_reservation_is_the_last_peak_after_a_restart_too(
    tmp_path: Path, shared_pool: WorkerPool
) -> None:
    file = models.save(models.table(4), tmp_path / "models", "m") / "model.onnx"
    estimate = WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * file.stat().st_size)
    policy = Policy(loads_at_once=2, budget_bytes=10**9)
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        assert await reserved(engine) == estimate
        [first] = engine.model("m").footprints
        await engine.unload("m")
        assert await reserved(engine) == first.peak_memory_bytes < estimate
        await engine.unload("m")
        [last] = engine.model("m").footprints
    async with running(tmp_path, policy=policy, pool=shared_pool) as engine:
        assert await reserved(engine) == last.peak_memory_bytes
        await engine.unload("m")
        os.utime(file, ns=(1, 1))
        assert await reserved(engine, LoadParameters(instances=2)) == 2 * estimate
        loaded = (await engine.facts(ModelLoaded))[-1]
        await engine.unload("m")
        assert await reserved(engine) == -(-loaded.peak_memory_bytes // 2)
