"""What is kept up to date of workers that serve: what they take, and when models were last used."""

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support import models
from support.running import Engine, running
from support.workers import FOR_EVER_S, LIMIT_S, freeze, tensor, until

from events.errors import LogUnavailable
from events.jobs import LoadParameters
from events.models import ModelState
from events.types import Cause, UnloadRequested
from runtime import consumer as consumer_module
from runtime import memory
from runtime.consumer import Upkeep
from runtime.scheduling.sight import Policy
from runtime.wire import Tensor

GROWTH_BYTES = 40_000_000
"""What the model `grows` takes when it is asked to, and keeps: ONNX Runtime's arena gives nothing back."""


@pytest.fixture(autouse=True)
def _only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing be measured or noted but what a test asks for, however long it takes."""
    monkeypatch.setattr(consumer_module, "MEASURE_S", FOR_EVER_S)
    monkeypatch.setattr(consumer_module, "MEASURE_LIMIT_S", LIMIT_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a place with the models `grows`, `old` and `new`."""
    root = tmp_path / "models"
    models.save(models.memory_bomb_on_run(), root, "grows")
    models.save(models.table(4, 1), root, "old")
    models.save(models.table(4, 2), root, "new")
    return tmp_path


def upkeep(engine: Engine) -> Upkeep:
    return engine.consumer._upkeep


def shape() -> Tensor:
    """Have `grows` grow."""
    return tensor("shape", "INT64", np.array([GROWTH_BYTES // 4], np.int64))


def index() -> Tensor:
    return tensor("x", "INT64", np.array([0], np.int64))


def noted(folder: Path) -> dict[str, str]:
    """Return when models were last used, as far as the ledger's file knows."""
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return dict(connection.execute("SELECT model_id, used_at FROM last_used"))


async def evicted(engine: Engine) -> list[str]:
    """Return the models that the system asked to make room of, in order."""
    return [
        event.model_id or ""
        for event in await engine.events()
        if isinstance(event.data, UnloadRequested) and event.data.cause is Cause.EVICTION
    ]


# Measurements


async def test_what_an_inference_made_a_worker_keep_is_counted_from_the_next_measurement_on(
    folder: Path,
) -> None:
    async with running(folder) as engine:
        await engine.load("grows")
        loaded = engine.live("grows").memory_bytes
        await engine.infer("grows", shape())
        assert engine.live("grows").memory_bytes == loaded
        await upkeep(engine).measure()
        assert engine.live("grows").memory_bytes >= loaded + 0.9 * GROWTH_BYTES
        [use] = engine.consumer.uses()
        assert use.memory_bytes == engine.live("grows").memory_bytes


async def test_each_instance_is_measured(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("old", parameters=LoadParameters(instances=2))
        await upkeep(engine).measure()
        load = engine.live("old")
        assert set(load.measured_bytes) == {worker.worker_id for worker in load.workers}
        assert load.memory_bytes == sum(load.measured_bytes.values())


async def test_growth_beyond_the_budget_evicts_idle_models_until_it_is_kept(folder: Path) -> None:
    policy = Policy(2, budget_bytes=GROWTH_BYTES + 15_000_000, evicts=True, min_residency_s=0)
    async with running(folder, policy=policy) as engine:
        await engine.load("old")
        await engine.load("grows")
        await engine.infer("old", index())
        await engine.infer("grows", shape())
        await upkeep(engine).measure()
        await engine.becomes("old", ModelState.UNLOADED)  # the least recently used that is enough
        await until(lambda: not engine.log.state.unended())
        assert engine.model("grows").state is ModelState.LOADED
        assert await evicted(engine) == ["old"]
        assert sum(use.memory_bytes for use in engine.consumer.uses()) <= GROWTH_BYTES + 15_000_000


async def test_growth_beyond_the_budget_is_left_alone_where_nothing_is_evicted(folder: Path) -> None:
    async with running(folder, policy=Policy(2, budget_bytes=GROWTH_BYTES)) as engine:
        await engine.load("grows")
        await engine.infer("grows", shape())
        await upkeep(engine).measure()
        job_id = await engine.ask_load("old")  # whose turn comes after whatever else there is to decide
        await until(lambda: job_id in engine.consumer._decision.waiting_for)
        assert await evicted(engine) == []
        assert engine.model("grows").state is ModelState.LOADED


async def test_a_worker_that_dies_meanwhile_is_passed_over(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("old")
        await engine.load("new")
        await freeze(engine.fork_server_pid)  # so that nobody hears of the death yet
        engine.kill("old")
        measuring = asyncio.create_task(upkeep(engine).measure())
        os.kill(engine.fork_server_pid, signal.SIGCONT)
        await measuring
        assert engine.live("new").measured_bytes


async def test_a_worker_that_cannot_be_measured_holds_up_nobody_and_is_not_asked_about_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = folder / "proc"
    async with running(folder) as engine:
        await engine.load("old")
        await engine.load("new")
        stuck, well = engine.worker("old"), engine.worker("new")
        fifo = proc / str(stuck.pid) / "smaps_rollup"  # as if the kernel did not answer
        fifo.parent.mkdir(parents=True)
        os.mkfifo(fifo)
        (proc / str(well.pid)).symlink_to(f"/proc/{well.pid}")
        monkeypatch.setattr(memory, "PROC", proc)
        monkeypatch.setattr(consumer_module, "MEASURE_LIMIT_S", 0.5)
        for _ in range(3):
            engine.live("new").measured_bytes.clear()
            await upkeep(engine).measure()
            await until(lambda: bool(engine.live("new").measured_bytes))
        assert set(upkeep(engine)._measuring) == {stuck.worker_id}
        with await asyncio.to_thread(fifo.open, "w") as file:
            file.write("Private_Dirty: 5 kB\n")
        await until(lambda: not upkeep(engine)._measuring)
        assert engine.live("old").memory_bytes == 5 * 1024


# Last uses


async def test_only_what_was_asked_since_the_last_time_is_noted(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("old")
        await engine.load("new")
        await upkeep(engine).note_uses()
        assert noted(folder) == {}
        await engine.infer("old", index())
        await upkeep(engine).note_uses()
        first = noted(folder)
        assert set(first) == {"old"}
        await engine.infer("new", index())
        await upkeep(engine).note_uses()
        assert noted(folder) == first | {"new": noted(folder)["new"]}
        assert noted(folder)["new"] > first["old"]
        position = engine.log.head.position
        await upkeep(engine).note_uses()
        assert engine.log.head.position == position


async def test_an_orderly_end_notes_what_was_not_noted_yet(folder: Path) -> None:
    async with running(folder, stops_cleanly=True) as engine:
        await engine.load("old")
        await engine.infer("old", index())
        assert noted(folder) == {}
    assert set(noted(folder)) == {"old"}
    async with running(folder) as engine:
        assert engine.log.last_used == noted(folder)


async def test_uses_that_could_not_be_noted_are_noted_the_next_time(folder: Path) -> None:
    async with running(folder) as engine:
        await engine.load("old")
        await engine.infer("old", index())
        with closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as connection:
            connection.execute("ALTER TABLE last_used RENAME TO elsewhere")
            with pytest.raises(LogUnavailable):
                await engine.log.note_last_used({"old": "x"})
            await upkeep(engine).note_uses()
            connection.execute("ALTER TABLE elsewhere RENAME TO last_used")
        await upkeep(engine).note_uses()
        assert set(noted(folder)) == {"old"}


async def test_it_goes_on_by_itself_until_the_consumer_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "MEASURE_S", 0.01)
    async with running(folder) as engine:
        await engine.load("old")
        await engine.infer("old", index())
        await until(lambda: bool(noted(folder)) and bool(engine.live("old").measured_bytes))
