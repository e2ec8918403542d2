"""Cached models made in spare time: offered once, tried, used by later loads; a failure costs no load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from onnx import ModelProto
from support import models
from support.cache import found, keep_form, key_in, opened
from support.running import Engine, running
from support.workers import until

from events.jobs import Job, JobStatus
from events.types import LoadParameters, ModelLoaded
from runtime.cache.manifest import Entry
from runtime.cache.preparer import KEPT, LEFT_OUT, MAX_ATTEMPTS, STOPPED, Candidate, Preparer
from runtime.cache.store import ModelCache
from runtime.cache.trial import has_outside_cause
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
from runtime.wire import Form

SLOW = models.slow_to_fold(side=300, depth=60)
"""ONNX Runtime takes a while to load it each time, and none to load its optimised form."""
SLOWER = models.slow_to_fold(side=600, depth=20)
"""Its preparation lasts long enough for a test to interfere with it."""
IN_SPARE_TIME_S = 600.0
"""Preparing waits until the machine has little else to do, other tests included."""


@pytest.fixture(autouse=True)
def _no_inference_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reject no form for its inference time: microseconds depend on what else the machine does.

    `test_trial.py` tests the verdict on such figures.
    """
    monkeypatch.setattr("runtime.cache.trial.MIN_RATE", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> ModelCache:
    return opened(tmp_path)


def form_of(store: ModelCache, root: Path, model_id: str = "m") -> str | None:
    entry = store.find(key_in(root, model_id))
    return entry.form if entry is not None else None


# The preparer with a pool


def candidate(root: Path, model_id: str, load_job_id: str, peak_bytes: int = 50 * 10**6) -> Candidate:
    return Candidate(load_job_id, model_id, 1, found(root / model_id / "1"), peak_bytes)


def preparer_of(store: ModelCache, pool: WorkerPool, root: Path) -> Preparer:
    return Preparer(store, pool, Repository(root), lambda: None)


async def offer(preparer: Preparer, *candidates: Candidate) -> None:
    for each in candidates:  # one by one: the first whose files are read is the first offered
        preparer.offer(each)
        await asyncio.gather(*preparer._tasks)


async def test_same_files_are_offered_once(pool: WorkerPool, store: ModelCache, tmp_path: Path) -> None:
    for name, constant in (("one", 1), ("two", 1), ("three", 2)):
        models.save(models.add(constant), tmp_path, name)
    preparer = preparer_of(store, pool, tmp_path)
    await offer(preparer, *(candidate(tmp_path, name, name) for name in ("one", "two", "three")))
    assert set(preparer.preparable) == {"one", "three"}
    store.record_useless(key_in(tmp_path, "one"), {}, model_id="other", version=1)
    preparer.begin("one")  # settled meanwhile, and not prepared again
    await until(lambda: preparer.preparation is None)
    [entry] = store.entries()
    assert entry.model_id == "other"


async def test_preparation_stopped_repeatedly_is_given_up(
    pool: WorkerPool, store: ModelCache, tmp_path: Path
) -> None:
    models.save(SLOWER, tmp_path, "m")
    preparer = preparer_of(store, pool, tmp_path)
    await offer(preparer, candidate(tmp_path, "m", "a1"))
    for attempt in range(MAX_ATTEMPTS):
        assert set(preparer.preparable) == {"a1"}
        preparer.begin("a1")
        await until(lambda: bool(pool._workers))
        for worker in list(pool._workers):
            worker.kill()
        await until(lambda: preparer.preparation is None)
        assert attempt or preparer.counts.tried == {("prepacked", STOPPED): 1}
    assert not preparer.preparable
    entry = store.find(key_in(tmp_path, "m"))
    assert entry is not None
    assert entry.form is None
    assert entry.tried["prepacked"].endswith(f"{MAX_ATTEMPTS} times")
    await offer(preparer, candidate(tmp_path, "m", "a2", peak_bytes=0))
    assert not preparer.preparable


async def test_stop_at_any_time_leaves_nothing(pool: WorkerPool, store: ModelCache, tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path, "m")
    for turns in range(40):
        preparer = preparer_of(store, pool, tmp_path)
        await offer(preparer, candidate(tmp_path, "m", "a1"))
        preparer.begin("a1")
        for _ in range(turns):
            await asyncio.sleep(0)
        preparer.stop()
        preparer.stop()
        await until(lambda preparer=preparer: preparer.preparation is None)  # type: ignore[misc]
        assert list((tmp_path / "prepared").iterdir()) == []
        assert not store._folder._drafts
        assert not pool._workers


async def test_preparations_are_counted_by_outcome(
    pool: WorkerPool, store: ModelCache, tmp_path: Path
) -> None:
    models.save(models.add(), tmp_path, "m")
    preparer = preparer_of(store, pool, tmp_path)
    await offer(preparer, candidate(tmp_path, "m", "a1"))
    preparer.begin("a1")
    await until(lambda: preparer.preparation is None)
    assert {outcome for _, outcome in preparer.counts.tried} <= {KEPT, LEFT_OUT}
    took = preparer.counts.took_s.snapshot()
    assert (sum(took.counts), took.total_s > 0) == (1, True)
    forms, size = store.kept
    assert forms == sum(count for (_, outcome), count in preparer.counts.tried.items() if outcome == KEPT)
    assert (size > 0) == (forms > 0)
    await preparer.close()


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


@asynccontextmanager
async def engine_with(
    folder: Path, store: ModelCache, *, budget_bytes: int | None = None
) -> AsyncIterator[Engine]:
    async with running(folder, store=store, policy=Policy(2, budget_bytes=budget_bytes)) as engine:
        yield engine


@asynccontextmanager
async def engine_with_form(
    folder: Path, store: ModelCache, form: Form = "optimised", **bare: ModelProto
) -> AsyncIterator[Engine]:
    """Start with these models, which were loaded before and have this form."""
    async with engine_with_other_forms(folder, store, {}, form, **bare) as engine:
        yield engine


@asynccontextmanager
async def engine_with_other_forms(
    folder: Path, store: ModelCache, others: Mapping[str, Path], form: Form, **bare: ModelProto
) -> AsyncIterator[Engine]:
    """Start with these models, and other files in place of their cached models."""
    for model_id, model in bare.items():
        models.save(model, folder / "models", model_id)
    async with running(folder, stops_cleanly=True) as engine:
        for model_id in bare:
            await load(engine, model_id)
            await engine.unload(model_id)
            other = others.get(model_id)
            await keep_form(engine.pool, store, engine.root, model_id, form, instead=other)
    async with engine_with(folder, store) as engine:
        yield engine


async def load(engine: Engine, model_id: str = "m", **parameters: int) -> ModelLoaded:
    """Load a model; returns the recorded outcome."""
    job = await engine.load(model_id, parameters=LoadParameters(**parameters))  # type: ignore[arg-type]
    assert job.status is JobStatus.COMPLETED, job.error
    return await recorded(engine, job)


async def reload(engine: Engine, model_id: str = "m") -> ModelLoaded:
    await engine.unload(model_id)
    return await load(engine, model_id)


async def recorded(engine: Engine, job: Job) -> ModelLoaded:
    events = [event for event in await engine.events() if event.job_id == job.id]
    [data] = [event.data for event in events if isinstance(event.data, ModelLoaded)]
    return data


async def settled(store: ModelCache, root: Path) -> Entry:
    """Wait until the store has an entry for model `m`."""
    key = key_in(root, "m")
    async with asyncio.timeout(IN_SPARE_TIME_S):
        while (entry := store.find(key)) is None:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
    return entry


async def forms_of_loads(engine: Engine, count: int) -> list[str | None]:
    """Wait until this many loads are recorded; returns the form that each used."""
    found: list[str | None] = []
    while len(found) < count:
        before = engine.log.head.position
        loads = [event.data for event in await engine.events() if isinstance(event.data, ModelLoaded)]
        found = [load.prepared.form if load.prepared is not None else None for load in loads]
        if len(found) < count:
            await engine.recorded(lambda: engine.log.head.position > before)  # noqa: B023 - awaited at once
    return found


async def preparing(engine: Engine) -> int:
    """Wait until a worker prepares a model, and return its process id."""
    serving = {worker.pid for load in engine.consumer.loads.values() for worker in load.alive_workers}
    await until(lambda: bool(set(engine.worker_pids()) - serving))
    return min(set(engine.worker_pids()) - serving)


async def test_loaded_model_is_prepared_for_the_next_load(tmp_path: Path, store: ModelCache) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
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
        assert set(await engine.story()) == {
            "ServerStarted", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        }  # fmt: skip


async def test_cached_model_is_used_for_the_same_bytes_only(tmp_path: Path, store: ModelCache) -> None:
    async with engine_with_form(tmp_path, store, m=models.add(1)) as engine:
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


async def test_form_that_fails_a_load_is_dropped_in_the_same_job(tmp_path: Path, store: ModelCache) -> None:
    deadly = models.save(models.crash_on_load(), tmp_path / "elsewhere", "m") / "model.onnx"
    (tmp_path / "no.onnx").write_bytes(b"no model")
    others, bare = (
        {"deadly": deadly, "none": tmp_path / "no.onnx"},
        {"deadly": models.add(1), "none": models.add(2)},
    )
    async with engine_with_other_forms(tmp_path, store, others, "optimised", **bare) as engine:
        for model_id, answer in (("deadly", 4), ("none", 5)):
            assert (await load(engine, model_id, instances=2)).prepared is None
            assert await engine.ask(model_id, 3) == answer
            assert len(engine.workers(model_id)) == 2
            await until(lambda model_id=model_id: form_of(store, engine.root, model_id) is None)  # type: ignore[misc]
        entry = store.find(key_in(engine.root, "deadly"))
        assert entry is not None
        assert "signal 8" in entry.tried["optimised"]
        assert "WorkerExited" not in await engine.story()


@pytest.mark.parametrize("kind", [signal.SIGSEGV, signal.SIGKILL])
async def test_form_whose_worker_crashes_in_service_is_dropped(
    tmp_path: Path, store: ModelCache, kind: signal.Signals
) -> None:
    """A worker that is killed says nothing against its form."""
    async with engine_with_form(tmp_path, store, m=models.add(1)) as engine:
        assert (await load(engine)).prepared is not None
        os.kill(engine.worker("m").pid, kind)
        kept = "optimised" if kind == signal.SIGKILL else None
        assert await forms_of_loads(engine, 3) == [None, "optimised", kept]
        assert form_of(store, engine.root) == kept


async def test_crash_while_preparing_costs_only_that_form(tmp_path: Path, store: ModelCache) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        await load(engine)
        os.kill(await preparing(engine), signal.SIGSEGV)
        entry = await settled(store, engine.root)
        assert entry.form == "optimised"
        assert "signal 11" in entry.tried["prepacked"]
        assert "WorkerExited" not in await engine.story()


async def test_preparation_stops_for_a_load_and_resumes(tmp_path: Path, store: ModelCache) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    models.save(models.weights(20), tmp_path / "models", "other")
    async with engine_with(tmp_path, store, budget_bytes=10**10) as engine:
        first = await load(engine)
        await preparing(engine)
        use = engine.consumer.preparation()
        assert use is not None
        budget_bytes = use.reserved_bytes + first.memory_bytes + 20 * 10**6
        engine.consumer.policy = Policy(2, budget_bytes=budget_bytes)
        await load(engine, "other")
        await until(lambda: len(engine.worker_pids()) == 2)
        await engine.unload("other")
        assert (await settled(store, engine.root)).form is not None


async def test_untried_model_says_what_to_do_and_is_tried_then(tmp_path: Path, store: ModelCache) -> None:
    models.save(models.reshape(7), tmp_path / "models", "m")
    defaults = tmp_path / "models" / "m" / "loadledger.toml"
    defaults.write_text("[warm_up]\nenabled = false\n")
    async with engine_with(tmp_path, store) as engine:
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
        await reload(engine)
        key = key_in(engine.root, "m")
        await until(lambda: (entry := store.find(key)) is not None and entry.made_at != untried.made_at)
        entry = await settled(store, engine.root)
        assert entry.form is not None or "[[warm_up.inputs]]" not in entry.tried["prepacked"]


async def test_models_load_where_the_cache_is_unavailable(
    tmp_path: Path, store: ModelCache, caplog: pytest.LogCaptureFixture
) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        (tmp_path / "prepared").rmdir()
        (tmp_path / "prepared").touch()
        await load(engine)
        await until(lambda: "nothing is prepared" in caplog.text)
        assert (await reload(engine)).prepared is None
        assert caplog.text.count("nothing is prepared") == 1


async def test_form_beyond_the_memory_limit_is_kept(tmp_path: Path, store: ModelCache) -> None:
    """To make a prepacked session of 67 MB takes 140 MB, a bare one 120: where it does, the load is bare."""
    async with engine_with_form(tmp_path, store, "prepacked", m=models.weights(67, layers=16)) as engine:
        for _ in range(2):
            await load(engine, memory_limit_bytes=136_000_000)
            await engine.unload("m")
        assert form_of(store, engine.root) == "prepacked"


async def test_one_instance_may_load_bare(tmp_path: Path, store: ModelCache) -> None:
    async with engine_with_form(tmp_path, store, m=models.weights(20)) as engine:
        first = await engine.stopped_ahead()
        job_id = await engine.ask_load("m", parameters=LoadParameters(instances=3))
        await until(lambda: any(load.workers for load in engine.consumer.loads.values()))
        load = engine.live("m")
        os.kill(first, signal.SIGKILL)
        job = await engine.ended(job_id)
        assert job.status is JobStatus.COMPLETED, job.error
        used = [load.reports[worker.worker_id].prepared is not None for worker in engine.workers("m")]
        assert used == [False, True, True]
        assert (await recorded(engine, job)).prepared is not None
        os.kill(engine.workers("m")[1].pid, signal.SIGSEGV)
        await until(lambda: form_of(store, engine.root) is None)
