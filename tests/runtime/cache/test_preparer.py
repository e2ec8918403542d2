"""Cached models made in spare time: offered once, tried, used by later loads; a failure costs no load."""

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
from support.cache import found, keep_form, key_in, opened
from support.running import Engine, running
from support.workers import FOR_EVER_S, is_stopped, threads, trips, until

from events.jobs import JobStatus
from events.types import LoadedFile, LoadParameters, LoadStarted, ModelLoaded
from runtime.cache.manifest import Manifest
from runtime.cache.preparer import (
    KEPT,
    LEFT_OUT,
    MAX_ATTEMPTS,
    STOPPED,
    Candidate,
    PreparationRun,
    Preparer,
)
from runtime.cache.store import ModelCache
from runtime.cache.trial import Pacer, has_outside_cause
from runtime.errors import (
    Exit,
    ForkServerUnavailable,
    InferenceFailed,
    InferenceTimeout,
    RuntimeProblem,
    WorkerDied,
)
from runtime.process.pool import WorkerPool
from runtime.repository import Repository
from runtime.scheduler.view import Policy
from runtime.store.contents import ModelContents
from runtime.wire import Form

SLOW = models.slow_to_fold(side=300, depth=60)
"""ONNX Runtime takes a while to load it each time, and none to load its optimised form."""
SLOWER = models.slow_to_fold(side=400, depth=20)
"""Its preparation lasts long enough for a test to interfere with it."""
IN_SPARE_TIME_S = 600.0
"""Preparing waits until the machine has little else to do, other tests included."""


@pytest.fixture(autouse=True)
def _no_inference_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reject no form for its inference time, which `test_trial.py` tests, and measure it only shortly."""
    monkeypatch.setattr("runtime.cache.trial.MIN_RATE", 0.0)
    monkeypatch.setattr("runtime.cache.trial.RUN_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> ModelCache:
    return opened(tmp_path / "store")


def form_of(store: ModelCache, root: Path, model_id: str = "m") -> str | None:
    entry = store.find(key_in(root, model_id))
    return entry.form if entry is not None else None


# The preparer with a pool


def candidate(root: Path, model_id: str = "m", peak_bytes: int = 50 * 10**6) -> Candidate:
    files = found(root / model_id / "1")
    loaded = tuple(LoadedFile(file.path, file.bytes, file.mtime_ns, file.sha256) for file in files)
    return Candidate(f"load of {model_id}", model_id, 1, loaded, peak_bytes)


@pytest.fixture
def preparer(store: ModelCache, pool: WorkerPool, tmp_path: Path) -> Preparer:
    return Preparer(store, pool, ModelContents(Repository(tmp_path), None), lambda: None)


async def offer(preparer: Preparer, *candidates: Candidate) -> None:
    for each in candidates:  # one by one: the first whose files are read is the first offered
        preparer.offer(each)
        await asyncio.gather(*preparer._tasks)


async def test_same_files_are_offered_once(preparer: Preparer, store: ModelCache, tmp_path: Path) -> None:
    for name, constant in (("one", 1), ("two", 1), ("three", 2)):
        models.save(models.add(constant), tmp_path, name)
    await offer(preparer, *(candidate(tmp_path, name) for name in ("one", "two", "three")))
    assert set(preparer.preparable) == {"load of one", "load of three"}
    store.record_useless(Manifest(key=key_in(tmp_path, "one"), model_id="other", version=1), {})
    preparer.begin("load of one")  # settled meanwhile, and not prepared again
    await until(lambda: preparer.preparation is None)
    [entry] = store.entries()
    assert entry.model_id == "other"


async def test_preparation_stopped_repeatedly_is_given_up(
    preparer: Preparer, pool: WorkerPool, store: ModelCache, tmp_path: Path
) -> None:
    models.save(SLOWER, tmp_path, "m")
    await offer(preparer, candidate(tmp_path))
    for attempt in range(MAX_ATTEMPTS):
        preparer.begin("load of m")
        await until(lambda: bool(pool._workers))
        for worker in list(pool._workers):
            worker.kill()
        await until(lambda: preparer.preparation is None)
        assert attempt or preparer.counts.tried == {("prepacked", STOPPED): 1}
    [entry] = store.entries()
    assert entry.form is None
    assert entry.tried["prepacked"].endswith(f"{MAX_ATTEMPTS} times")
    await offer(preparer, candidate(tmp_path, peak_bytes=0))
    assert not preparer.preparable


async def test_preparation_computes_with_one_thread(
    pool: WorkerPool, store: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "threads", 3)
    models.save(models.add(1), tmp_path, "m")
    contents, pacer = ModelContents(Repository(tmp_path), None), Pacer(pool, lambda: False)
    run = PreparationRun(store, pool, contents, candidate(tmp_path), pacer)
    async with run._files() as files:
        bare, _ = await run._bare_load(files)
    assert bare.threads == 1


async def test_stop_at_any_time_leaves_nothing(preparer: Preparer, pool: WorkerPool, tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    for turns in range(40):
        preparer._candidates.clear()  # it is not the third attempt
        await offer(preparer, candidate(tmp_path))
        preparer.begin("load of m")
        for _ in range(turns):
            await asyncio.sleep(0)
        preparer.stop()
        preparer.stop()
        await until(lambda: preparer.preparation is None)
        assert list((tmp_path / "store").glob("*/*")) == []
        assert not pool._workers


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (WorkerDied(Exit(None, signal.SIGKILL)), True),
        (WorkerDied(Exit(None, None)), True),
        (InferenceTimeout(), True),
        (ForkServerUnavailable(), True),
        (WorkerDied(Exit(None, signal.SIGSEGV)), False),
        (WorkerDied(Exit(1, None)), False),
        (InferenceFailed("no"), False),
    ],
    ids=["killed", "unknown", "timeout", "no fork server", "crashed", "exited", "failed"],
)
def test_problem_with_an_outside_cause_is_a_circumstance(problem: RuntimeProblem, *, expected: bool) -> None:
    assert has_outside_cause(problem) is expected


# Loads with and without a cached model


Start = Callable[..., AbstractAsyncContextManager[Engine]]
"""Start the runtime with these models, which were loaded before and have such a form: the fixture `start`."""


@pytest_asyncio.fixture(loop_scope="module")
async def start(pool: WorkerPool, tmp_path: Path, store: ModelCache) -> Start:
    @asynccontextmanager
    async def started(
        form: Form = "optimised", others: Mapping[str, Path] = {}, **bare: ModelProto
    ) -> AsyncIterator[Engine]:
        for model_id, model in bare.items():
            models.save(model, tmp_path / "models", model_id)
        if bare:
            async with running(tmp_path, pool=pool, stops_cleanly=True) as engine:
                for model_id in bare:
                    await load(engine, model_id)
                    await engine.unload(model_id)
                    other = others.get(model_id)  # takes the place of the form
                    await keep_form(pool, store, engine.root, model_id, form, instead=other)
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


async def settled(store: ModelCache, root: Path) -> Manifest:
    """Wait until the store has an entry for model `m`."""
    key = key_in(root, "m")
    async with asyncio.timeout(IN_SPARE_TIME_S):
        while (entry := store.find(key)) is None:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
    return entry


async def form_of_load(engine: Engine, count: int) -> str | None:
    """Wait until this many loads are recorded; returns the form that the last one used."""
    position, loads = 0, list[ModelLoaded]()
    while len(loads) < count:
        await engine.recorded(lambda: engine.log.head.position > position)  # noqa: B023 - awaited at once
        position, loads = engine.log.head.position, await engine.facts(ModelLoaded)
    prepared = loads[count - 1].prepared
    return prepared.form if prepared is not None else None


def preparing_pids(engine: Engine) -> set[int]:
    """Return the processes of workers that serve no model: those that prepare one, one after the other."""
    serving = {worker.pid for load in engine.consumer.loads.values() for worker in load.alive_workers}
    return set(engine.worker_pids()) - serving


async def preparing(engine: Engine) -> int:
    """Wait until a worker prepares a model, and return its process id."""
    await until(lambda: bool(preparing_pids(engine)))
    return min(preparing_pids(engine))


async def test_preparation_stops_for_an_inference_and_still_ends(
    start: Start, tmp_path: Path, store: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    models.save(models.counting_loop(), tmp_path / "models", "endless")
    async with start() as engine:
        await load(engine, "endless")
        await until(lambda: not engine.consumer.preparer.preparable)
        await until(lambda: engine.consumer.preparer.preparation is None)
        await load(engine)
        worker = engine.worker("endless")
        inference = asyncio.ensure_future(worker.infer([trips(models.ENDLESS)], timeout_s=FOR_EVER_S))
        await until(lambda: any(is_stopped(pid) for pid in preparing_pids(engine)))
        monkeypatch.setattr("runtime.cache.trial.STOPPED_S", 0.01)
        assert (await settled(store, engine.root)).form == "prepacked"
        inference.cancel()
        await asyncio.wait([inference])


async def test_loaded_model_is_prepared_for_the_next_load(
    start: Start, tmp_path: Path, store: ModelCache
) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    async with start() as engine:
        first = await load(engine)
        answer = await engine.ask("m", 3)
        entry = await settled(store, engine.root)
        assert (first.prepared, entry.form) == (None, "prepacked"), entry
        again = await reload(engine)
        assert again.prepared is not None
        assert (again.prepared.form, again.prepared.sha256) == (entry.form, entry.sha256)
        assert again.files == first.files
        assert await engine.ask("m", 3) == answer
        assert int(entry.figures["load_us"]) < int(entry.figures["bare_load_us"])
        await engine.unload("m")
        with_threads = await load(engine, threads=3)  # a form is for any number of them
        assert (with_threads.prepared, with_threads.threads) == (again.prepared, 3)
        assert threads(engine.worker("m").pid) == 4
        assert await engine.ask("m", 3) == answer
        await until(lambda: engine.consumer.preparer.preparation is None)
        counts, (forms, size) = engine.consumer.preparer.counts, store.kept
        assert (counts.tried, forms) == ({("prepacked", KEPT): 1}, 1)
        took = counts.took_s.snapshot()
        assert (sum(took.counts), took.total_s > 0, size > 0) == (1, True, True)
        assert set(await engine.story()) == {
            "ServerStarted", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        }  # fmt: skip


async def test_cached_model_is_used_for_the_same_bytes_only(start: Start, store: ModelCache) -> None:
    async with start(m=models.add(1)) as engine:
        first = await load(engine, instances=3)
        assert first.prepared is not None
        assert first.prepared.form == "optimised"
        assert await engine.ask("m", 3) == 4
        path = engine.root / "m" / "1" / "model.onnx"
        seen = path.stat()
        path.write_bytes(models.add(5).SerializeToString())
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # other bytes of the same size and time
        again = await reload(engine)
        assert again.prepared is None
        assert again.files[0].sha256 == sha256(path.read_bytes()).hexdigest()
        assert await engine.ask("m", 3) == 8
        assert [entry.form for entry in store.entries()] == ["optimised"]  # of the bytes before
        models.save(models.add(1), engine.root, "m")
        await reload(engine)  # which hashes the new file
        assert (await reload(engine)).prepared is not None
        store.clear()
        assert (await reload(engine)).prepared is None
        assert await engine.ask("m", 3) == 4


async def test_form_that_fails_a_load_is_dropped_in_the_same_job(
    start: Start, tmp_path: Path, store: ModelCache
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
            await until(lambda model_id=model_id: form_of(store, engine.root, model_id) is None)  # type: ignore[misc]
        entry = store.find(key_in(engine.root, "deadly"))
        assert entry is not None
        assert "signal 8" in entry.tried["optimised"]
        assert "WorkerExited" not in await engine.story()


async def test_form_whose_worker_crashes_in_service_is_dropped(start: Start, store: ModelCache) -> None:
    """A worker that is killed says nothing against its form."""
    async with start(m=models.add(1)) as engine:
        assert (await load(engine)).prepared is not None
        for count, kind, kept in ((3, signal.SIGKILL, "optimised"), (4, signal.SIGSEGV, None)):
            os.kill(engine.worker("m").pid, kind)
            assert await form_of_load(engine, count) == kept
            assert form_of(store, engine.root) == kept


async def test_crash_while_preparing_costs_only_that_form(
    start: Start, tmp_path: Path, store: ModelCache
) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    async with start() as engine:
        await load(engine)
        os.kill(await preparing(engine), signal.SIGSEGV)
        entry = await settled(store, engine.root)
        assert entry.form == "optimised"
        assert "signal 11" in entry.tried["prepacked"]
        await until(lambda: engine.consumer.preparer.preparation is None)
        tried = engine.consumer.preparer.counts.tried
        assert tried == {("prepacked", LEFT_OUT): 1, ("optimised", KEPT): 1}
        assert "WorkerExited" not in await engine.story()


async def test_preparation_stops_for_a_load_and_resumes(
    start: Start, tmp_path: Path, store: ModelCache
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
        assert (await settled(store, engine.root)).form is not None


async def test_untried_model_says_what_to_do(start: Start, tmp_path: Path, store: ModelCache) -> None:
    models.save(models.reshape(7), tmp_path / "models", "m")
    defaults = tmp_path / "models" / "m" / "loadledger.toml"
    defaults.write_text("[warm_up]\nenabled = false\n")
    async with start() as engine:
        await load(engine)
        untried = await settled(store, engine.root)
        assert untried.form is None
        assert "[[warm_up.inputs]]" in untried.tried["prepacked"]
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
        await until(lambda: (entry := store.find(key)) is not None and entry.made_at != untried.made_at)
        entry = await settled(store, engine.root)
        assert entry.form is not None or "[[warm_up.inputs]]" not in entry.tried["prepacked"]


async def test_models_load_where_the_cache_is_unavailable(
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


async def test_form_beyond_the_memory_limit_is_kept(start: Start, store: ModelCache) -> None:
    """To make a prepacked session of 16 MB takes 40 MB, a bare one 24: where it does, the load is bare."""
    async with start("prepacked", m=models.weights(16, layers=2)) as engine:
        assert (await load(engine, memory_limit_bytes=32_000_000)).prepared is None
        assert form_of(store, engine.root) == "prepacked"


async def killed_while_loading(engine: Engine, parameters: LoadParameters | None = None) -> str:
    """Have another process kill the worker that is about to load `m`; returns the load's job id."""
    first = await engine.stopped_ahead()
    job_id = await engine.ask_load("m", parameters=parameters)
    await until(lambda: any(load.workers for load in engine.consumer.loads.values() if load.model_id == "m"))
    os.kill(first, signal.SIGKILL)
    return job_id


async def test_kill_while_a_form_loads_ends_the_attempt_and_keeps_the_form(
    start: Start, store: ModelCache
) -> None:
    async with start(m=models.weights(4)) as engine:
        job_id = await killed_while_loading(engine, LoadParameters(instances=3))
        job = await engine.ended(job_id)
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert await form_of_load(engine, 2) is None
        assert len(engine.workers("m")) == 3
        started = [fact for fact in await engine.events(of="m") if isinstance(fact.data, LoadStarted)][-2:]
        assert [fact.data for fact in started] == [LoadStarted(1)] * 2
        assert started[0].worker_id != started[1].worker_id
        assert "WorkerExited" not in await engine.story()
        assert form_of(store, engine.root) == "optimised"
        assert (await reload(engine)).prepared is not None


async def test_form_that_never_loads_ends_the_attempt_and_is_kept(start: Start, store: ModelCache) -> None:
    async with start(m=models.add(1)) as engine:
        await engine.stopped_ahead()
        job = await engine.load("m", parameters=LoadParameters(progress_timeout_s=1))
        assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
        assert await form_of_load(engine, 2) is None
        assert form_of(store, engine.root) == "optimised"


async def test_form_with_repeated_outside_failures_is_dropped(start: Start, store: ModelCache) -> None:
    async with start(m=models.add(1)) as engine:
        for _ in range(MAX_ATTEMPTS):
            assert form_of(store, engine.root) == "optimised"
            assert (await engine.ended(await killed_while_loading(engine))).status is JobStatus.COMPLETED
            await engine.unload("m")
        await until(lambda: form_of(store, engine.root) is None)
        entry = store.find(key_in(engine.root, "m"))
        assert entry is not None
        assert entry.tried["optimised"].endswith(f"{MAX_ATTEMPTS} times")


async def test_bare_attempt_waits_for_its_own_memory(start: Start) -> None:
    """A form takes less memory than the bare model, and so does its reservation."""
    async with start(m=models.weights(16), other=models.add(2)) as engine:
        await load(engine)
        await engine.unload("m")
        bare, form = sorted(engine.model("m").footprints, key=lambda seen: seen.form is not None)
        assert bare.peak_memory_bytes > form.peak_memory_bytes + 8 * 2**20
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
