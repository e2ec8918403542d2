"""What is loaded is prepared, tried and used; and whatever goes wrong with that costs nobody a load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from onnx import ModelProto
from support import models
from support.prepared import keep_form, key_in, opened
from support.running import Engine, running
from support.workers import until

from events.jobs import Job, JobStatus, LoadParameters
from events.types import ModelLoaded
from runtime.prepared.store import Entry, PreparedStore
from runtime.scheduling.sight import Policy
from runtime.wire import Form

SLOW = models.slow_to_fold(side=300, depth=60)
"""ONNX Runtime takes a while to load it, again and again, and none with what it made of it."""
SLOWER = models.slow_to_fold(side=600, depth=20)
"""There is time to do something to whoever prepares it."""
IN_SPARE_TIME_S = 600.0
"""What is prepared waits for whoever else wants the machine, as other tests do."""


@pytest.fixture(autouse=True)
def _no_inference_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no form turned down for its inferences: their microseconds are of whatever else the machine does.

    What is made of such figures, `test_trial.py` tells.
    """
    monkeypatch.setattr("runtime.prepared.trial.AS_QUICK", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> PreparedStore:
    return opened(tmp_path)


@asynccontextmanager
async def engine_with(
    folder: Path, store: PreparedStore, *, budget_bytes: int | None = None
) -> AsyncIterator[Engine]:
    async with running(folder, store=store, policy=Policy(2, budget_bytes=budget_bytes)) as engine:
        yield engine


@asynccontextmanager
async def engine_with_form(
    folder: Path,
    store: PreparedStore,
    model: ModelProto,
    form: Form = "optimised",
    *,
    instead: Path | None = None,
) -> AsyncIterator[Engine]:
    """Start with a model `m` that was loaded before, and of which there is a form."""
    models.save(model, folder / "models", "m")
    async with running(folder, stops_cleanly=True) as engine:
        await loaded(engine, "m")
        await engine.unload("m")
        await keep_form(engine.pool, store, engine.root, "m", form, instead=instead)
    async with engine_with(folder, store) as engine:
        yield engine


async def loaded(engine: Engine, model_id: str, **parameters: int) -> ModelLoaded:
    """Load a model again, and return what is recorded of it."""
    job = await engine.load(model_id, parameters=LoadParameters(**parameters))  # type: ignore[arg-type]
    assert job.status is JobStatus.COMPLETED, job.error
    return await recorded(engine, job)


async def recorded(engine: Engine, job: Job) -> ModelLoaded:
    [data] = [
        event.data
        for event in await engine.events()
        if event.job_id == job.id and event.type == "ModelLoaded"
    ]
    assert isinstance(data, ModelLoaded)
    return data


async def settled(store: PreparedStore, root: Path, model_id: str) -> Entry:
    """Wait until it is known what is of use for a model."""
    key = key_in(root, model_id)
    async with asyncio.timeout(IN_SPARE_TIME_S):
        while (entry := store.find(key)) is None:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
    return entry


async def test_what_was_loaded_is_prepared_and_the_next_load_uses_that_and_says_so(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(SLOW, tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        first = await loaded(engine, "m")
        answer = await engine.ask("m", 3)
        entry = await settled(store, engine.root, "m")
        assert (first.prepared, entry.form) == (None, "prepacked"), entry
        await engine.unload("m")
        again = await loaded(engine, "m")
        assert again.prepared is not None
        assert (again.prepared.form, again.prepared.sha256) == (entry.form, entry.sha256)
        assert again.files == first.files
        assert await engine.ask("m", 3) == answer
        assert int(entry.figures["load_us"]) < int(entry.figures["bare_load_us"])
        assert set(await engine.story()) == {
            "ServerStarted", "LoadRequested", "LoadStarted", "ModelLoaded",
            "UnloadRequested", "UnloadStarted", "ModelUnloaded",
        }  # fmt: skip


async def test_what_is_prepared_is_used_after_a_restart(tmp_path: Path, store: PreparedStore) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        again = await loaded(engine, "m")
        assert again.prepared is not None
        assert again.prepared.form == form_of(store, engine.root, "m") == "optimised"
        assert await engine.ask("m", 3) == 4


async def test_all_instances_use_it(tmp_path: Path, store: PreparedStore) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        assert (await loaded(engine, "m", instances=3)).prepared is not None


async def test_other_bytes_are_loaded_bare(tmp_path: Path, store: PreparedStore) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        models.save(models.add(5), engine.root, "m")
        assert (await loaded(engine, "m")).prepared is None
        assert await engine.ask("m", 3) == 8


async def test_bytes_that_changed_behind_the_same_size_and_time_are_found_out_and_loaded_bare(
    tmp_path: Path, store: PreparedStore
) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        path = engine.root / "m" / "1" / "model.onnx"
        seen = path.stat()
        path.write_bytes(models.add(5).SerializeToString())
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        assert path.stat().st_size == seen.st_size
        again = await loaded(engine, "m")
        assert again.prepared is None
        assert again.files[0].sha256 == sha256(path.read_bytes()).hexdigest()
        assert await engine.ask("m", 3) == 8
        assert [entry.form for entry in store.entries()] == ["optimised"]  # of the bytes that were there


async def test_a_form_that_a_worker_dies_of_is_dropped_and_the_load_goes_on_bare_in_the_same_job(
    tmp_path: Path, store: PreparedStore
) -> None:
    deadly = models.save(models.crash_on_load(), tmp_path / "elsewhere", "m") / "model.onnx"
    async with engine_with_form(tmp_path, store, models.add(1), instead=deadly) as engine:
        again = await loaded(engine, "m", instances=2)
        assert again.prepared is None
        assert await engine.ask("m", 3) == 4
        assert "WorkerExited" not in await engine.story()
        assert len(engine.workers("m")) == 2
        await until(lambda: form_of(store, engine.root, "m") is None)
        entry = await settled(store, engine.root, "m")
        assert "signal 8" in entry.tried["optimised"]


async def test_a_form_that_is_no_model_is_dropped_and_the_load_goes_on_bare(
    tmp_path: Path, store: PreparedStore
) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    async with engine_with_form(tmp_path, store, models.add(1), instead=tmp_path / "no.onnx") as engine:
        assert (await loaded(engine, "m")).prepared is None
        assert await engine.ask("m", 3) == 4
        await until(lambda: form_of(store, engine.root, "m") is None)


async def test_a_form_that_was_removed_costs_nobody_a_load(tmp_path: Path, store: PreparedStore) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        store.clear()
        assert (await loaded(engine, "m")).prepared is None
        assert await engine.ask("m", 3) == 4


async def test_a_form_with_which_a_worker_crashes_while_it_serves_is_dropped(
    tmp_path: Path, store: PreparedStore
) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        assert (await loaded(engine, "m")).prepared is not None
        os.kill(engine.worker("m").pid, signal.SIGSEGV)
        assert await forms_of_loads(engine, 3) == [None, "optimised", None]
        assert form_of(store, engine.root, "m") is None


async def test_a_form_whose_worker_somebody_kills_is_kept(tmp_path: Path, store: PreparedStore) -> None:
    async with engine_with_form(tmp_path, store, models.add(1)) as engine:
        await loaded(engine, "m")
        await engine.die("m")
        assert await forms_of_loads(engine, 3) == [None, "optimised", "optimised"]


async def forms_of_loads(engine: Engine, count: int) -> list[str | None]:
    """Wait until there were so many loads, and return what each used."""
    found: list[str | None] = []
    while len(found) < count:
        before = engine.log.head.position
        loads = [event.data for event in await engine.events() if isinstance(event.data, ModelLoaded)]
        found = [load.prepared.form if load.prepared is not None else None for load in loads]
        if len(found) < count:
            await engine.recorded(lambda: engine.log.head.position > before)  # noqa: B023 - awaited at once
    return found


def form_of(store: PreparedStore, root: Path, model_id: str) -> str | None:
    entry = store.find(key_in(root, model_id))
    return entry.form if entry is not None else None


async def preparing(engine: Engine) -> list[int]:
    """Wait until a worker prepares something, and return the processes that serve nothing."""
    serving = {worker.pid for load in engine.consumer.live.values() for worker in load.left}
    await until(lambda: bool(set(engine.worker_pids()) - serving))
    return sorted(set(engine.worker_pids()) - serving)


async def test_a_worker_that_crashes_while_it_prepares_costs_the_form_and_nothing_else(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        (maker,) = await preparing(engine)
        os.kill(maker, signal.SIGSEGV)
        entry = await settled(store, engine.root, "m")
        assert entry.form == "optimised"
        assert "signal 11" in entry.tried["prepacked"]
        assert "WorkerExited" not in await engine.story()


async def test_preparing_is_stopped_for_a_load_that_needs_the_memory_and_taken_up_again(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    models.save(models.weights(20), tmp_path / "models", "other")
    async with engine_with(tmp_path, store, budget_bytes=10**10) as engine:
        first = await loaded(engine, "m")
        await preparing(engine)
        use = engine.consumer.preparation()
        assert use is not None
        budget_bytes = use.reserved_bytes + first.memory_bytes + 20 * 10**6
        engine.consumer.policy = Policy(2, budget_bytes=budget_bytes)
        job = await engine.load("other")
        assert job.status is JobStatus.COMPLETED, job.error
        await until(lambda: len(engine.worker_pids()) == 2)
        await engine.unload("other")
        assert (await settled(store, engine.root, "m")).form is not None


async def test_what_is_stopped_at_the_end_leaves_no_draft(tmp_path: Path, store: PreparedStore) -> None:
    models.save(SLOWER, tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        await preparing(engine)
    assert list((tmp_path / "prepared").iterdir()) == []


async def test_a_model_that_answers_otherwise_each_time_is_not_prepared(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(models.random_numbers(), tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        entry = await settled(store, engine.root, "m")
        assert (entry.form, entry.tried) == (
            None,
            {"prepacked": "its answers differ", "optimised": "its answers differ"},
        )
        await engine.unload("m")
        assert (await loaded(engine, "m")).prepared is None


async def test_a_model_that_nothing_is_known_to_try_on_is_not_prepared_and_told_what_to_do(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(models.reshape(7), tmp_path / "models", "m")
    (tmp_path / "models" / "m" / "loadledger.toml").write_text("[warm_up]\nenabled = false\n")
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        entry = await settled(store, engine.root, "m")
        assert entry.form is None
        assert "[[warm_up.inputs]]" in entry.tried["prepacked"]


async def test_who_follows_that_advice_has_the_model_tried_at_its_next_load(
    tmp_path: Path, store: PreparedStore
) -> None:
    models.save(models.reshape(7), tmp_path / "models", "m")
    defaults = tmp_path / "models" / "m" / "loadledger.toml"
    defaults.write_text("[warm_up]\nenabled = false\n")
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        untried = await settled(store, engine.root, "m")
        given = [("x", "FP32", [7], [1, 2, 3, 4, 5, 6, 7]), ("sides", "INT64", [2], [7, 1])]
        defaults.write_text(
            "".join(
                f'[[warm_up.inputs]]\nname = "{name}"\ndatatype = "{datatype}"\n'
                f"shape = {shape}\ndata = {data}\n"
                for name, datatype, shape, data in given
            )
        )
        await engine.unload("m")
        await loaded(engine, "m")
        key = key_in(engine.root, "m")
        await until(lambda: (entry := store.find(key)) is not None and entry.made_at != untried.made_at)
        entry = await settled(store, engine.root, "m")
        assert entry.form is not None or "[[warm_up.inputs]]" not in entry.tried["prepacked"]


async def test_what_two_models_have_is_prepared_once(tmp_path: Path, store: PreparedStore) -> None:
    for name in ("m", "same"):
        models.save(SLOW, tmp_path / "models", name)
    async with engine_with(tmp_path, store) as engine:
        await loaded(engine, "m")
        await loaded(engine, "same")
        entry = await settled(store, engine.root, "m")
        await until(lambda: engine.consumer.preparation() is None and len(engine.worker_pids()) == 2)
        assert (await settled(store, engine.root, "same")).made_at == entry.made_at


async def test_where_forms_cannot_be_kept_models_load_all_the_same(
    tmp_path: Path, store: PreparedStore, caplog: pytest.LogCaptureFixture
) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    async with engine_with(tmp_path, store) as engine:
        (tmp_path / "prepared").rmdir()
        (tmp_path / "prepared").touch()
        await loaded(engine, "m")
        await until(lambda: "nothing is prepared" in caplog.text)
        await engine.unload("m")
        assert (await loaded(engine, "m")).prepared is None
        assert caplog.text.count("nothing is prepared") == 1


async def test_without_a_store_nothing_is_prepared(tmp_path: Path) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    async with running(tmp_path) as engine:
        assert (await loaded(engine, "m")).prepared is None
        assert len(engine.worker_pids()) == 1
    assert not (tmp_path / "prepared").exists()


async def test_a_form_that_takes_more_than_the_load_may_costs_nobody_that_load(
    tmp_path: Path, store: PreparedStore
) -> None:
    """To make a prepacked session of 67 MB takes 140 MB, a bare one 120: where it does, the load is bare."""
    async with engine_with_form(tmp_path, store, models.weights(67, layers=16), "prepacked") as engine:
        for _ in range(3):
            await loaded(engine, "m", memory_limit_bytes=136_000_000)
            await engine.unload("m")
        assert form_of(store, engine.root, "m") == "prepacked"


async def test_of_several_instances_one_may_have_been_loaded_bare(
    tmp_path: Path, store: PreparedStore
) -> None:
    async with engine_with_form(tmp_path, store, models.weights(20)) as engine:
        first = await engine.stopped_ahead()
        job_id = await engine.ask_load("m", parameters=LoadParameters(instances=3))
        await until(lambda: any(load.workers for load in engine.consumer.live.values()))
        load = engine.live("m")
        os.kill(first, signal.SIGKILL)
        job = await engine.ended(job_id)
        assert job.status is JobStatus.COMPLETED, job.error
        used = [load.reports[worker.worker_id].prepared is not None for worker in engine.workers("m")]
        assert used == [False, True, True]
        assert (await recorded(engine, job)).prepared is not None
        os.kill(engine.workers("m")[1].pid, signal.SIGSEGV)
        await until(lambda: form_of(store, engine.root, "m") is None)
