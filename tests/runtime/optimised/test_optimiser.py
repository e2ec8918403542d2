"""Optimised models made in spare time: offered once, tried, used by later loads; a failure costs no load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import pytest_asyncio
from onnx import ModelProto
from support import models
from support.optimised import found, keep_untried, key_in, opened
from support.running import Engine, running
from support.workers import FOR_EVER_S, fork_server_of, is_stopped, threads, trips, until

from events.jobs import JobStatus
from events.types import LoadedFile, LoadParameters, LoadStarted, ModelLoaded
from runtime.memory import has_order
from runtime.optimised.optimiser import KEPT, LEFT_OUT, STOPPED, Candidate, Optimiser
from runtime.optimised.store import Manifest, OptimisedStore
from runtime.process.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler.view import Policy
from runtime.store.versions import Versions

SLOW = models.slow_to_fold(side=300, depth=20)
"""ONNX Runtime takes a while to load it each time, and none to load its optimised model."""
SLOWER = models.slow_to_fold(side=400, depth=20)
"""An attempt lasts long enough for a test to interfere with it."""
IN_SPARE_TIME_S = 600.0
"""An attempt waits until the machine has little else to do, other tests included."""


@pytest.fixture(autouse=True)
def _no_inference_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reject nothing for its inference time, which `test_trial.py` tests, and measure it only shortly."""
    monkeypatch.setattr("runtime.optimised.trial.MIN_RATE", 0.0)
    monkeypatch.setattr("runtime.optimised.trial.RUN_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> OptimisedStore:
    return opened(tmp_path / "store")


def is_optimised(store: OptimisedStore, root: Path, model_id: str = "m") -> bool:
    entry = store.find(key_in(root, model_id))
    return entry is not None and entry.reason is None


# The optimiser with a pool


def candidate(root: Path, model_id: str = "m", peak_bytes: int = 50 * 10**6) -> Candidate:
    files = found(root / model_id / "1")
    loaded = tuple(LoadedFile(file.path, file.bytes, file.mtime_ns, file.sha256) for file in files)
    return Candidate(model_id, 1, loaded, peak_bytes)


@pytest.fixture
def optimiser(store: OptimisedStore, pool: WorkerPool, tmp_path: Path) -> Optimiser:
    return Optimiser(store, pool, Versions(Repository(tmp_path), None), lambda: None)


async def offer(optimiser: Optimiser, *candidates: Candidate) -> None:
    for each in candidates:  # one by one: the first whose files are read is the first offered
        optimiser.offer(each)
        await asyncio.gather(*optimiser._tasks)


async def attempted(optimiser: Optimiser) -> None:
    """Make an attempt with the next candidate."""
    optimiser.allow(allowed=True)
    await until(lambda: optimiser.running is None)


async def test_same_files_are_offered_once(
    optimiser: Optimiser, store: OptimisedStore, tmp_path: Path
) -> None:
    for name, constant in (("one", 1), ("two", 1), ("three", 2)):
        models.save(models.add(constant), tmp_path, name)
    await offer(optimiser, *(candidate(tmp_path, name) for name in ("one", "two", "three")))
    assert [each.model_id for each in optimiser._queue.values()] == ["one", "three"]
    other = Manifest(key=key_in(tmp_path, "one"), model_id="other", version=1)
    store.record_useless(other, "settled meanwhile")
    await attempted(optimiser)
    [entry] = store.entries()
    assert entry.model_id == "other"


async def test_interrupted_candidate_is_tried_again(
    optimiser: Optimiser, pool: WorkerPool, store: OptimisedStore, tmp_path: Path
) -> None:
    """The candidate that needs the least memory comes first, so that what waits for more delays no other."""
    models.save(models.add(), tmp_path, "m")
    models.save(SLOWER, tmp_path, "n")
    await offer(optimiser, candidate(tmp_path), candidate(tmp_path, "n", peak_bytes=0))
    need_bytes = optimiser.need_bytes
    assert need_bytes is not None
    optimiser.allow(allowed=True)
    optimiser.allow(allowed=True)
    assert optimiser.running is not None
    assert optimiser.running.model_id == "n"
    await until(lambda: bool(pool._workers))
    assert (optimiser.memory_bytes, optimiser.is_stopping) == (need_bytes, False)
    optimiser.allow(allowed=False)
    optimiser.allow(allowed=False)
    assert (optimiser.memory_bytes, optimiser.is_stopping) == (need_bytes, True)
    await until(lambda: optimiser.running is None)
    assert (optimiser.memory_bytes, pool._workers) == (0, set())
    assert optimiser.counts.attempts == {STOPPED: 1}
    assert {each.model_id for each in optimiser._queue.values()} == {"m", "n"}
    assert store.entries() == []
    for _ in range(2):
        await attempted(optimiser)
    assert {entry.model_id for entry in store.entries()} == {"m", "n"}
    assert optimiser.need_bytes is None


async def test_stop_at_any_time_leaves_nothing(
    optimiser: Optimiser, pool: WorkerPool, tmp_path: Path
) -> None:
    models.save(models.add(1), tmp_path, "m")
    await offer(optimiser, candidate(tmp_path))
    for turns in range(40):
        optimiser.allow(allowed=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        optimiser.allow(allowed=False)
        await until(lambda: optimiser.running is None)
        assert list((tmp_path / "store").glob("*/*")) == []
        assert not pool._workers


async def test_candidate_without_time_left_is_useless(
    optimiser: Optimiser, store: OptimisedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(models.add(1), tmp_path, "m")
    await offer(optimiser, candidate(tmp_path))
    monkeypatch.setattr("runtime.optimised.optimiser.LIMIT_S", 0.0)
    await attempted(optimiser)
    [entry] = store.entries()
    assert "more than" in (entry.reason or "")
    await offer(optimiser, candidate(tmp_path))
    assert optimiser.need_bytes is None


async def test_attempt_that_loses_its_fork_server_is_repeated_once(
    optimiser: Optimiser,
    pool: WorkerPool,
    store: OptimisedStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models.save(SLOWER, tmp_path, "m")
    await offer(optimiser, candidate(tmp_path))
    for attempts in (1, 2):
        optimiser.allow(allowed=True)
        await until(lambda: bool(pool._workers))
        os.kill(fork_server_of(pool).pid, signal.SIGKILL)
        await until(lambda: optimiser.running is None)
        assert (optimiser.counts.attempts, store.entries()) == ({STOPPED: attempts}, [])
        assert optimiser.need_bytes is None  # for now
        monkeypatch.setattr(optimiser, "_paused_until", 0.0)
    assert optimiser.need_bytes is None  # until a later load offers it


async def test_attempt_computes_with_one_thread(
    optimiser: Optimiser, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "threads", 3)
    models.save(models.add(1), tmp_path, "m")
    async with optimiser._versions.version("m", 1) as files:
        bare, _ = await optimiser._build_load(candidate(tmp_path), files)
    assert bare.threads == 1


async def test_full_disk_pauses_all_attempts(
    optimiser: Optimiser,
    store: OptimisedStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, constant in (("m", 1), ("n", 2)):
        models.save(models.add(constant), tmp_path, name)
    await offer(optimiser, candidate(tmp_path), candidate(tmp_path, "n"))
    monkeypatch.setattr("runtime.optimised.store.free_disk_bytes", lambda _: 0)
    await attempted(optimiser)
    assert (optimiser.need_bytes, len(optimiser._queue), store.entries()) == (None, 1, [])
    assert "nothing is prepared for 10 minutes" in caplog.text


# Loads with and without an optimised model


Start = Callable[..., AbstractAsyncContextManager[Engine]]
"""Start the runtime with these models, which were loaded before and are optimised: the fixture `start`."""


@pytest_asyncio.fixture(loop_scope="module")
async def start(pool: WorkerPool, tmp_path: Path, store: OptimisedStore) -> Start:
    @asynccontextmanager
    async def started(others: Mapping[str, Path] = {}, **bare: ModelProto) -> AsyncIterator[Engine]:
        for model_id, model in bare.items():
            models.save(model, tmp_path / "models", model_id)
        if bare:
            async with running(tmp_path, pool=pool, stops_cleanly=True) as engine:
                for model_id in bare:
                    await load(engine, model_id)
                    await engine.unload(model_id)
                    other = others.get(model_id)  # takes the place of the optimised model
                    await keep_untried(pool, store, engine.root, model_id, instead=other)
        async with running(tmp_path, pool=pool, store=store) as engine:
            yield engine

    return started


async def load(engine: Engine, model_id: str = "m", **parameters: int) -> ModelLoaded:
    """Load a model; returns the recorded outcome."""
    job = await engine.load(model_id, parameters=LoadParameters(**parameters))  # type: ignore[arg-type]
    assert job.status is JobStatus.COMPLETED, job.error
    return (await engine.facts(ModelLoaded, of=model_id))[-1]


async def reload(engine: Engine, model_id: str = "m") -> ModelLoaded:
    await engine.unload(model_id)
    return await load(engine, model_id)


async def settled(store: OptimisedStore, root: Path) -> Manifest:
    """Wait until the store has an entry for model `m`."""
    key = key_in(root, "m")
    async with asyncio.timeout(IN_SPARE_TIME_S):
        while (entry := store.find(key)) is None:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
    return entry


async def is_load_optimised(engine: Engine, count: int) -> bool:
    """Wait until this many loads are recorded; returns whether the last one used an optimised model."""
    position, loads = 0, list[ModelLoaded]()
    while len(loads) < count:
        await engine.recorded(lambda: engine.log.head.position > position)  # noqa: B023 - awaited at once
        position, loads = engine.log.head.position, await engine.facts(ModelLoaded)
    return loads[count - 1].prepared is not None


def preparing_pids(engine: Engine) -> set[int]:
    """Return the processes of workers that serve no model: those that prepare one, one after the other."""
    serving = {worker.pid for load in engine.consumer.loads.values() for worker in load.alive_workers}
    return set(engine.worker_pids()) - serving


async def preparing(engine: Engine) -> int:
    """Wait until a worker prepares a model, and return its process id."""
    await until(lambda: any(map(has_order, preparing_pids(engine))))
    return min(preparing_pids(engine))


async def test_preparation_stops_for_an_inference_and_still_ends(
    start: Start, tmp_path: Path, store: OptimisedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    models.save(models.counting_loop(), tmp_path / "models", "endless")
    async with start() as engine:
        await load(engine, "endless")
        await until(lambda: engine.consumer.optimiser.need_bytes is None)
        await until(lambda: engine.consumer.optimiser.running is None)
        await load(engine)
        worker = engine.worker("endless")
        inference = asyncio.ensure_future(worker.infer([trips(models.ENDLESS)], timeout_s=FOR_EVER_S))
        await until(lambda: any(is_stopped(pid) for pid in preparing_pids(engine)))
        monkeypatch.setattr("runtime.optimised.pacing.STOPPED_S", 0.01)
        assert (await settled(store, engine.root)).reason is None
        inference.cancel()
        await asyncio.wait([inference])


async def test_loaded_model_is_prepared_for_the_next_load(
    start: Start, tmp_path: Path, store: OptimisedStore
) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    async with start() as engine:
        first = await load(engine)
        answer = await engine.ask("m", 3)
        entry = await settled(store, engine.root)
        assert (first.prepared, entry.reason) == (None, None)
        again = await reload(engine)
        assert again.prepared is not None
        assert again.prepared.sha256 == entry.sha256
        assert again.files == first.files
        assert await engine.ask("m", 3) == answer
        assert int(entry.figures["load_us"]) < int(entry.figures["bare_load_us"])
        await engine.unload("m")
        with_threads = await load(engine, threads=3)  # it is for any number of them
        assert (with_threads.prepared, with_threads.threads) == (again.prepared, 3)
        assert threads(engine.worker("m").pid) == 4
        assert await engine.ask("m", 3) == answer
        await until(lambda: engine.consumer.optimiser.running is None)
        counts, (number, size) = engine.consumer.optimiser.counts, store.kept
        assert (counts.attempts, number) == ({KEPT: 1}, 1)
        took = counts.took_s.snapshot()
        assert (sum(took.counts), took.total_s > 0, size > 0) == (1, True, True)
        assert set(await engine.story()) == {
            "ServerStarted", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        }  # fmt: skip


async def test_optimised_model_is_used_for_the_same_bytes_only(start: Start, store: OptimisedStore) -> None:
    async with start(m=models.add(1)) as engine:
        first = await load(engine, instances=3)
        assert first.prepared is not None
        assert await engine.ask("m", 3) == 4
        path = engine.root / "m" / "1" / "model.onnx"
        seen = path.stat()
        path.write_bytes(models.add(5).SerializeToString())
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # other bytes of the same size and time
        again = await reload(engine)
        assert again.prepared is None
        assert again.files[0].sha256 == sha256(path.read_bytes()).hexdigest()
        assert await engine.ask("m", 3) == 8
        assert [entry.reason for entry in store.entries()] == [None]  # of the bytes before
        models.save(models.add(1), engine.root, "m")
        await reload(engine)  # which hashes the new file
        assert (await reload(engine)).prepared is not None
        store.clear()
        assert (await reload(engine)).prepared is None
        assert await engine.ask("m", 3) == 4


async def test_model_that_fails_a_load_is_dropped_in_the_same_job(
    start: Start, tmp_path: Path, store: OptimisedStore
) -> None:
    deadly = models.save(models.crash_on_load(), tmp_path / "elsewhere", "m") / "model.onnx"
    (tmp_path / "no.onnx").write_bytes(b"no model")
    others, bare = (
        {"deadly": deadly, "none": tmp_path / "no.onnx"},
        {"deadly": models.add(1), "none": models.add(2)},
    )
    async with start(others=others, **bare) as engine:
        for model_id, answer in (("deadly", 4), ("none", 5)):
            assert (await load(engine, model_id, instances=2)).prepared is None
            assert await engine.ask(model_id, 3) == answer
            assert len(engine.workers(model_id)) == 2
            await until(lambda model_id=model_id: not is_optimised(store, engine.root, model_id))  # type: ignore[misc]
        entry = store.find(key_in(engine.root, "deadly"))
        assert entry is not None
        assert "signal 8" in (entry.reason or "")
        assert "WorkerExited" not in await engine.story()


async def test_model_whose_worker_crashes_in_service_is_dropped(start: Start, store: OptimisedStore) -> None:
    """A worker that is killed says nothing against its optimised model."""
    async with start(m=models.add(1)) as engine:
        assert (await load(engine)).prepared is not None
        for count, kind, kept in ((3, signal.SIGKILL, True), (4, signal.SIGSEGV, False)):
            os.kill(engine.worker("m").pid, kind)
            assert await is_load_optimised(engine, count) is kept
            assert is_optimised(store, engine.root) is kept


@pytest.mark.parametrize("kind", [signal.SIGSEGV, signal.SIGKILL])
async def test_crash_in_an_attempt_is_remembered(
    start: Start, tmp_path: Path, store: OptimisedStore, kind: signal.Signals
) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    async with start() as engine:
        await load(engine)
        os.kill(await preparing(engine), kind)
        entry = await settled(store, engine.root)
        assert f"signal {kind}" in (entry.reason or "")
        await until(lambda: engine.consumer.optimiser.running is None)
        assert engine.consumer.optimiser.counts.attempts == {LEFT_OUT: 1}
        assert (await reload(engine)).prepared is None
        assert engine.consumer.optimiser.need_bytes is None
        assert "WorkerExited" not in await engine.story()


async def test_preparation_stops_for_a_load_and_resumes(
    start: Start, tmp_path: Path, store: OptimisedStore
) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    models.save(models.weights(8), tmp_path / "models", "other")
    async with start() as engine:
        first = await load(engine)
        await preparing(engine)
        use = engine.consumer.preparation()
        assert use is not None
        budget_bytes = use.reserved_bytes + first.memory_bytes + 8 * 10**6
        engine.consumer.policy = Policy(2, budget_bytes=budget_bytes)
        await load(engine, "other")
        await until(lambda: len(engine.worker_pids()) == 2)
        await engine.unload("other")
        assert (await settled(store, engine.root)).reason is None


async def test_untried_model_says_what_to_do(start: Start, tmp_path: Path, store: OptimisedStore) -> None:
    models.save(models.reshape(7), tmp_path / "models", "m")
    defaults = tmp_path / "models" / "m" / "loadledger.toml"
    defaults.write_text("[warm_up]\nenabled = false\n")
    async with start() as engine:
        await load(engine)
        untried = await settled(store, engine.root)
        assert "[[warm_up.inputs]]" in (untried.reason or "")
        given = [("x", "FP32", [7], [1, 2, 3, 4, 5, 6, 7]), ("sides", "INT64", [2], [7, 1])]
        defaults.write_text(
            "".join(
                f'[[warm_up.inputs]]\nname = "{name}"\ndatatype = "{datatype}"\n'
                f"shape = {shape}\ndata = {data}\n"
                for name, datatype, shape, data in given
            )
        )
        store.clear("m")
        await reload(engine)
        key = key_in(engine.root, "m")
        await until(lambda: (entry := store.find(key)) is not None and entry.made_ns != untried.made_ns)
        entry = await settled(store, engine.root)
        assert "[[warm_up.inputs]]" not in (entry.reason or "")


async def test_models_load_where_the_store_is_unavailable(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    async with start() as engine:
        (tmp_path / "store" / "forms").rmdir()
        (tmp_path / "store" / "forms").touch()
        await load(engine)
        await until(lambda: "nothing is prepared" in caplog.text)
        assert (await reload(engine)).prepared is None
        assert caplog.text.count("nothing is prepared") == 1


async def test_load_limit_below_its_need_fails_one_attempt(start: Start, store: OptimisedStore) -> None:
    """To make an optimised session of 16 MB takes 40 MB, a bare one 24: where it does, the load is bare."""
    async with start(m=models.weights(16, layers=2)) as engine:
        assert (await load(engine, memory_limit_bytes=32_000_000)).prepared is None
        await until(lambda: not is_optimised(store, engine.root))
        before = len(await engine.facts(LoadStarted))
        assert (await reload(engine)).prepared is None
        assert len(await engine.facts(LoadStarted)) == before + 1


async def killed_while_loading(engine: Engine, parameters: LoadParameters | None = None) -> str:
    """Have another process kill the worker that is about to load `m`; returns the load's job id."""
    first = await engine.stopped_ahead()
    job_id = await engine.ask_load("m", parameters=parameters)
    await until(lambda: any(load.workers for load in engine.consumer.loads.values() if load.model_id == "m"))
    os.kill(first, signal.SIGKILL)
    return job_id


async def test_kill_in_an_optimised_load_ends_the_attempt_only(start: Start, store: OptimisedStore) -> None:
    async with start(m=models.weights(4)) as engine:
        job_id = await killed_while_loading(engine, LoadParameters(instances=3))
        job = await engine.ended(job_id)
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert not await is_load_optimised(engine, 2)
        assert len(engine.workers("m")) == 3
        started = [fact for fact in await engine.events(of="m") if isinstance(fact.data, LoadStarted)][-2:]
        assert [fact.data for fact in started] == [LoadStarted(1)] * 2
        assert started[0].worker_id != started[1].worker_id
        assert "WorkerExited" not in await engine.story()
        assert is_optimised(store, engine.root)
        assert (await reload(engine)).prepared is not None


async def test_optimised_load_without_progress_ends_the_attempt(start: Start, store: OptimisedStore) -> None:
    async with start(m=models.add(1)) as engine:
        await engine.stopped_ahead()
        job = await engine.load("m", parameters=LoadParameters(progress_timeout_s=1))
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert not await is_load_optimised(engine, 2)
        await until(lambda: not is_optimised(store, engine.root))


async def test_bare_attempt_waits_for_its_own_memory(start: Start) -> None:
    """An optimised model takes less memory than the bare one, and so does its reservation."""
    async with start(m=models.weights(16), other=models.add(2)) as engine:
        await load(engine)
        await engine.unload("m")
        footprints = sorted(engine.model("m").footprints, key=lambda seen: seen.prepared is not None)
        bare, optimised = footprints
        assert bare.peak_memory_bytes > optimised.peak_memory_bytes + 8 * 2**20
        await load(engine, "other")
        budget_bytes = bare.peak_memory_bytes + 2**20
        engine.consumer.policy = Policy(2, budget_bytes=budget_bytes)
        job_id = await killed_while_loading(engine)
        job = engine.log.state.unended_job(job_id)
        assert job is not None
        await until(lambda: "of memory" in (engine.consumer.waiting_for(job) or ""))
        assert job_id not in engine.consumer.loads
        await engine.unload("other")
        assert (await engine.ended(job_id)).status is JobStatus.COMPLETED
        assert (await engine.facts(ModelLoaded, of="m"))[-1].prepared is None
