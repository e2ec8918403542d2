"""The consumer's periodic upkeep: measurements of workers, and last uses noted in the ledger's file."""

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support import models
from support.running import Engine, Run
from support.workers import FOR_EVER_S, LIMIT_S, freeze, hang_measurement, loaded_memory, tensor, until

from events.errors import LogUnavailable
from events.models import ModelState
from events.types import Cause, LoadParameters, ModelUnloaded, UnloadRequested
from runtime.consumer import consumer as consumer_module
from runtime.consumer import loads
from runtime.consumer.consumer import WorkerMonitor
from runtime.errors import Exit
from runtime.scheduler.view import Policy

GROWTH_BYTES = 33_500_000
"""What the model `grows` takes when it is asked to, and keeps: ONNX Runtime's arena gives nothing back, and
takes powers of two, of 40 MB first 64, and after refusals 42."""


@pytest.fixture(autouse=True)
def _only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only the tests measure and note."""
    monkeypatch.setattr(consumer_module, "MEASURE_EVERY_S", FOR_EVER_S)
    monkeypatch.setattr(consumer_module, "MEASURE_LIMIT_S", LIMIT_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose repository has `grows`, `old` and `new`."""
    root = tmp_path / "models"
    models.save(models.memory_bomb_on_run(), root, "grows")
    models.save(models.table(4, 1), root, "old")
    models.save(models.table(4, 2), root, "new")
    return tmp_path


def upkeep(engine: Engine) -> WorkerMonitor:
    return engine.consumer._monitor


async def use(engine: Engine, model_id: str) -> None:
    """Ask a model once; `grows` takes as much memory as it can."""
    if model_id == "grows":
        await engine.infer("grows", tensor("shape", "INT64", np.array([GROWTH_BYTES // 4], np.int64)))
    else:
        await engine.infer(model_id, tensor("x", "INT64", np.array([0], np.int64)))


def noted(folder: Path) -> dict[str, str]:
    """Return when models were last used, as far as the ledger's file knows."""
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return dict(connection.execute("SELECT model_id, used_at FROM last_used"))


# Measurements


async def measure(engine: Engine) -> None:
    """Measure all workers, however long a busy machine takes."""
    while True:
        await upkeep(engine).measure()
        if not (late := [*upkeep(engine)._measuring.values()]):
            return
        await asyncio.gather(*late)


async def test_measured_growth_counts_against_the_budget(engine: Engine) -> None:
    await engine.load("grows")
    await engine.load("old", parameters=LoadParameters(instances=2))
    load, pair = engine.live("grows"), engine.live("old")
    loaded = load.memory_bytes
    await use(engine, "grows")
    assert load.memory_bytes == loaded
    await measure(engine)
    assert load.memory_bytes >= loaded + 0.9 * GROWTH_BYTES
    assert pair.memory_bytes == sum(worker.memory_bytes for worker in pair.workers) > 0
    uses = {use.model_id: use.memory_bytes for use in engine.consumer.uses()}
    assert uses == {"grows": load.memory_bytes, "old": pair.memory_bytes}


async def test_growth_beyond_the_budget_evicts(run: Run) -> None:
    budget_bytes = GROWTH_BYTES + 10_000_000
    policy = Policy(2, budget_bytes=budget_bytes, evicts=True, min_residency_s=0)
    async with run(policy=policy) as engine:
        await engine.load("old")
        await engine.load("grows")
        await use(engine, "old")
        await use(engine, "grows")
        await measure(engine)
        await until(lambda: sum(use.memory_bytes for use in engine.consumer.uses()) <= budget_bytes)
        await until(lambda: not engine.log.state.unended())
        assert [request.cause for request in await engine.facts(UnloadRequested)] == [Cause.EVICTION]
        states = [engine.model(name).state for name in ("old", "grows")]  # their loads' durations decide
        assert sorted(states) == [ModelState.LOADED, ModelState.UNLOADED]


async def test_dead_worker_is_not_measured(engine: Engine) -> None:
    await engine.load("old")
    await engine.load("new")
    engine.worker("new").memory_bytes = 0
    await freeze(engine.fork_server_pid)  # so that nobody hears of the death yet
    engine.kill("old")
    measuring = asyncio.create_task(upkeep(engine).measure())
    os.kill(engine.fork_server_pid, signal.SIGCONT)
    await measuring
    assert engine.live("new").measured_bytes > 0


async def test_stuck_measurement_delays_no_other_worker(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.load("old")
    await engine.load("new")
    stuck, well = engine.worker("old"), engine.worker("new")
    fifo = hang_measurement(folder, monkeypatch, stuck.pid, well.pid)
    monkeypatch.setattr(consumer_module, "MEASURE_LIMIT_S", 0.1)
    for _ in range(3):
        well.memory_bytes = 0
        await upkeep(engine).measure()
        await until(lambda: well.memory_bytes > 0)
    assert set(upkeep(engine)._measuring) == {stuck.worker_id}
    with await asyncio.to_thread(fifo.open, "w") as file:
        file.write("Private_Dirty: 5 kB\n")
    await until(lambda: not upkeep(engine)._measuring)
    assert engine.live("old").memory_bytes == 5 * 1024


# Last uses


async def test_only_new_uses_are_noted(engine: Engine, folder: Path) -> None:
    note_uses = upkeep(engine).note_uses
    await engine.load("old")
    await engine.load("new")
    await note_uses()
    assert noted(folder) == {}
    await use(engine, "old")
    with closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as connection:
        connection.execute("CREATE TRIGGER f BEFORE INSERT ON last_used BEGIN SELECT RAISE(ABORT, 'f'); END")
        with pytest.raises(LogUnavailable):
            await engine.log.note_last_use({"old": "x"})
        await note_uses()
        connection.execute("DROP TRIGGER f")
    await note_uses()  # now it can
    first = noted(folder)
    assert set(first) == {"old"}
    await use(engine, "new")
    await note_uses()
    assert noted(folder) == first | {"new": noted(folder)["new"]}
    assert noted(folder)["new"] > first["old"]
    position = engine.log.head.position
    await note_uses()
    assert engine.log.head.position == position


async def test_stop_notes_the_last_uses(folder: Path, run: Run) -> None:
    async with run(stops_cleanly=True) as engine:
        await engine.load("old")
        await use(engine, "old")
        assert noted(folder) == {}
    assert set(noted(folder)) == {"old"}
    async with run() as engine:
        assert engine.log.last_used == noted(folder)


async def test_upkeep_runs_periodically(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "MEASURE_EVERY_S", 0.01)
    async with run() as engine:
        await engine.load("old")
        await use(engine, "old")
        engine.worker("old").memory_bytes = 0
        await until(lambda: bool(noted(folder)) and engine.live("old").measured_bytes > 0)


async def test_unload_ends_without_a_measurement(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.load("old")
    worker = engine.worker("old")
    fifo = hang_measurement(folder, monkeypatch, worker.pid)
    monkeypatch.setattr(loads, "MEASURE_LIMIT_S", 0.05)
    monkeypatch.setattr(loads, "STOP_GRACE_S", LIMIT_S)
    await engine.unload("old")
    (unloaded,) = await engine.facts(ModelUnloaded)
    assert unloaded.freed_bytes == loaded_memory(worker).memory_bytes
    assert worker.ended.result() == Exit(0, None)
    os.close(await asyncio.to_thread(os.open, fifo, os.O_WRONLY))  # lets the thread go that reads
