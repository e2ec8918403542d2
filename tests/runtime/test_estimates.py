"""How much memory a load will need: from what its files took, else from their sizes."""

import asyncio
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replace_footprint
from support import models
from support.decisions import estimate
from support.running import Engine, Run, error_of, job_of
from support.workers import LIMIT_S, until

from events.jobcommands import RequestLoad
from events.jobs import Footprint, JobStatus
from events.types import LoadedFile, LoadParameters, LoadStarted, ModelLoaded
from features.devices.room import CONTEXT_BYTES, DEVICE_BYTES_PER_FILE_BYTE, PROVIDER_BYTES, target_device
from runtime.consumer import loads
from runtime.consumer.loads import describe_failure
from runtime.repository import FoundFile
from runtime.rooms import MACHINE, Alternative
from runtime.scheduler.estimates import BYTES_PER_MODEL_BYTE, WORKER_BYTES, estimate_memory, file_sizes
from runtime.scheduler.view import MemoryEstimate, Policy


def seen(path: str, size: int, mtime_ns: int) -> LoadedFile:
    """Return a file of a version."""
    return LoadedFile(path, size, mtime_ns, "ab" * 32)


MODEL = seen("model.onnx", 1000, 1)
WEIGHTS = seen("weights.bin", 5000, 2)
BOTH = (MODEL, WEIGHTS)
PEAK = 123_456_789


def footprint(*files: LoadedFile, version: int = 1, peak: int = PEAK, threads: int | None = 1) -> Footprint:
    """Return what these files took the last time."""
    return Footprint(version, files, peak, threads)


def need(
    *footprints: Footprint,
    files: Sequence[LoadedFile] = BOTH,
    limit: int | None = None,
    instances: int = 1,
    threads: int = 1,
) -> MemoryEstimate:
    parameters = LoadParameters(memory_limit_bytes=limit, instances=instances)
    found = estimate_memory(files, 1, parameters, footprints, threads=threads)
    assert found.files == file_sizes(files)
    return replace(found, files=frozenset())


def sizes(model_bytes: int, other_bytes: int, *, proven: bool = False) -> MemoryEstimate:
    """Return the estimate from sizes alone."""
    bytes_ = WORKER_BYTES + math.ceil(2.5 * model_bytes) + other_bytes
    return estimate(bytes_, guess=True, is_proven=proven)


def known(peak: int, *, proven: bool = True) -> MemoryEstimate:
    return estimate(peak, is_proven=proven)


KNOWN, OTHER_VERSION = footprint(*BOTH), footprint(*BOTH, version=2, peak=5)
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
        # The peak with as many threads counts, else the highest with others.
        (need(KNOWN, OF_TWO), known(PEAK)),
        (need(KNOWN, OF_TWO, threads=2), known(7_000)),
        (need(UNKNOWN_THREADS, OF_TWO, threads=3), known(8_000)),
        (need(UNKNOWN_THREADS), known(8_000)),
    ],
)
def test_need_is_the_last_peak_or_an_estimate(found: object, expected: object) -> None:
    assert found == expected


# On devices

MEASURED = CONTEXT_BYTES + 700
ON_CUDA = replace_footprint(KNOWN, peak_memory_bytes=300, target_name="cuda:0", target_bytes=MEASURED)
TOO_LITTLE = replace_footprint(ON_CUDA, target_bytes=100)
UNMEASURED = replace_footprint(KNOWN, peak_memory_bytes=400, target_name="cuda:0")
ON_NPU = replace_footprint(KNOWN, peak_memory_bytes=500, target_name="npu:0")
SIZES = sizes(1000, 5000).bytes
GUESS = CONTEXT_BYTES + DEVICE_BYTES_PER_FILE_BYTE * 6000


def on_cuda(there: int, bytes_: int, *, guess: bool = False, name: str = "cuda:0") -> Alternative:
    return Alternative({name: there, MACHINE: bytes_}, target_device(name, has_memory=True), guess)


def on_npu(bytes_: int, *, guess: bool = False) -> Alternative:
    target = target_device("npu:0", has_memory=False)
    return Alternative({"npu:0": bytes_, MACHINE: bytes_}, target, guess)


CUDA_GUESS = on_cuda(GUESS, SIZES + PROVIDER_BYTES, guess=True)
OWN_LIMIT = WORKER_BYTES + 2000


def need_on(
    *footprints: Footprint, on: str, limit: int | None = None, instances: int = 1
) -> tuple[Alternative, ...]:
    """Return what a load needs on devices, of which those of CUDA have memory of their own."""
    parameters = LoadParameters(memory_limit_bytes=limit, instances=instances)
    targets = [target_device(name, has_memory=name.startswith("cuda")) for name in on.split()]
    return estimate_memory(BOTH, 1, parameters, footprints, targets=targets).alternatives


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (need_on(on="cuda:0"), [CUDA_GUESS]),
        (need_on(on="npu:0"), [on_npu(SIZES + PROVIDER_BYTES, guess=True)]),
        (need_on(on="cuda:0", instances=2), [on_cuda(2 * GUESS, 2 * CUDA_GUESS.bytes, guess=True)]),
        (need_on(ON_CUDA, on="cuda:0"), [on_cuda(MEASURED, 300)]),
        (need_on(ON_CUDA, on="cuda:0", instances=3), [on_cuda(3 * MEASURED, 900)]),
        # No worker takes less than its context; what others returned meanwhile was not taken into account.
        (need_on(TOO_LITTLE, on="cuda:0", instances=2), [on_cuda(2 * CONTEXT_BYTES, 600)]),
        (need_on(ON_NPU, on="npu:0"), [on_npu(500)]),
        # A memory that was not measured is a guess, and a memory limit does not bound it.
        (need_on(UNMEASURED, on="cuda:0"), [on_cuda(GUESS, 400, guess=True)]),
        (need_on(on="cuda:0", limit=2000), [on_cuda(GUESS, OWN_LIMIT, guess=True)]),
        (need_on(on="npu:0", limit=2000), [on_npu(OWN_LIMIT)]),
        # What files took on one device says nothing of another, or of the CPU.
        (need_on(KNOWN, ON_NPU, on="cuda:0"), [CUDA_GUESS]),
        (need_on(ON_CUDA, on="cuda:1"), [on_cuda(GUESS, CUDA_GUESS.bytes, guess=True, name="cuda:1")]),
        (need_on(ON_CUDA, KNOWN, on="cuda:0 cpu"), [on_cuda(MEASURED, 300), *known(PEAK).alternatives]),
        (need_on(ON_CUDA, on="cpu cuda:0"), [*sizes(1000, 5000).alternatives, on_cuda(MEASURED, 300)]),
        # A load on the CPU alone is as ever.
        (need_on(KNOWN, ON_CUDA, on="cpu"), list(known(PEAK).alternatives)),
        (need(KNOWN, ON_CUDA), known(PEAK)),
        (need(ON_CUDA), sizes(1000, 5000)),
    ],
)
def test_need_on_a_device_rests_on_loads_there(found: object, expected: object) -> None:
    assert (list(found) if isinstance(found, tuple) else found) == expected


@pytest.mark.parametrize(
    ("seen_there", "on", "proven"),
    [
        (ON_CUDA, "cuda:0", True),
        (ON_CUDA, "npu:0 cuda:0", True),
        (KNOWN, "cuda:0", False),
        (ON_CUDA, "cpu", False),
    ],
)
def test_files_are_proven_by_a_load_on_one_of_the_devices(
    seen_there: Footprint, on: str, *, proven: bool
) -> None:
    targets = [target_device(name, has_memory=False) for name in on.split()]
    assert estimate_memory(BOTH, 1, LoadParameters(), [seen_there], targets=targets).is_proven == proven


# Found out beside everything else


def remove_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def add_dangling_link(folder: Path) -> None:
    (folder / "weights.bin").symlink_to("nowhere")


def replace_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (remove_model, "unknown_version"),
        (replace_folder, "unknown_version"),
        (add_dangling_link, "unsafe_file"),
    ],
)
async def test_load_of_files_that_cannot_be_looked_at_fails(
    folder: Path, engine: Engine, change: Callable[[Path], None], code: str
) -> None:
    folder = models.save(models.add(1), folder / "models", "m")
    change(folder)
    receipt = await engine.log.submit(RequestLoad("m", 1, None, "alice"))
    assert error_of(await engine.ended(job_of(receipt))).code == code
    assert await engine.story(of="m") == ["LoadRequested", "LoadFailed"]


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


async def test_hanging_look_delays_others_for_a_while_only(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "ESTIMATE_WAIT_S", 0.05)
    for name in ("m", "other"):
        models.save(models.add(1), folder / "models", name)
    async with run() as engine:
        hangs = threading.Event()
        file_system = engine.repository.file_system
        hanging = asyncio.create_task(file_system.run("m", hangs.wait, LIMIT_S))
        await asyncio.sleep(0)
        job_id = await engine.ask_load("m")
        assert (await engine.load("other")).status is JobStatus.COMPLETED
        job = engine.log.state.unended_job(job_id)
        assert job is not None
        assert engine.consumer.waiting_for(job) == "the estimate of its memory"
        hangs.set()
        await hanging
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED


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
    pending = engine.consumer._loader.active
    await until(lambda: job_id in pending and pending[job_id].known_bytes is not None)
    return job_id


def open_slots(engine: Engine) -> None:
    engine.consumer.policy = replace(engine.consumer.policy, loads_at_once=1)
    engine.log.notify()


@pytest.mark.parametrize("budget_mb", [200, 40])
async def test_files_that_grew_after_their_estimate_are_estimated_anew(
    folder: Path, run: Run, budget_mb: int
) -> None:
    models.save(models.table(1), folder / "models", "m")
    policy = Policy(loads_at_once=0, budget_bytes=budget_mb * 10**6)
    async with run(policy=policy) as engine:
        job_id = await estimated(engine)
        models.save(models.table(20), folder / "models", "m")
        open_slots(engine)
        job = await engine.ended(job_id)
        story = await engine.story(of="m")
        if budget_mb == 40:
            assert error_of(job).code == "insufficient_memory"
            assert story == ["LoadRequested", "LoadStarted", "LoadFailed"]
            return
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert story == ["LoadRequested", "LoadStarted", "LoadStarted", "ModelLoaded"]
        assert engine.live("m").reserved_bytes > 50_000_000


async def test_files_that_change_with_each_attempt_fail_the_load(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save(models.table(1), folder / "models", "m")
    policy = Policy(loads_at_once=0, budget_bytes=10**9)
    async with run(policy=policy) as engine:
        job_id = await estimated(engine)
        stat = engine.versions.stat

        async def stat_and_grow(model_id: str, version: int) -> tuple[FoundFile, ...]:
            found = await stat(model_id, version)
            with (folder / "weights.bin").open("ab") as file:
                file.write(b"more")
            return found

        monkeypatch.setattr(engine.versions, "stat", stat_and_grow)
        await stat_and_grow("m", 1)
        open_slots(engine)
        assert error_of(await engine.ended(job_id)).code == "model_changed"
        assert [fact.attempt for fact in await engine.facts(LoadStarted)] == 4 * [1]


async def test_reservation_is_the_last_peak_after_a_restart_too(folder: Path, run: Run) -> None:
    file = models.save(models.table(4), folder / "models", "m") / "model.onnx"
    estimate = WORKER_BYTES + math.ceil(BYTES_PER_MODEL_BYTE * file.stat().st_size)
    policy = Policy(loads_at_once=2, budget_bytes=10**9)
    async with run(policy=policy) as engine:
        assert await reserved(engine) == estimate
        [first] = engine.model("m").footprints
        await engine.unload("m")
        assert await reserved(engine) == first.peak_memory_bytes < estimate
        await engine.unload("m")
        [last] = engine.model("m").footprints
    async with run(policy=policy) as engine:
        assert await reserved(engine) == last.peak_memory_bytes
        await engine.unload("m")
        os.utime(file, ns=(1, 1))
        assert await reserved(engine, LoadParameters(instances=2)) == 2 * estimate
        loaded = (await engine.facts(ModelLoaded))[-1]
        await engine.unload("m")
        assert await reserved(engine) == -(-loaded.peak_memory_bytes // 2)
