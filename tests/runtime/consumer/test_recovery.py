"""What the consumer does after deaths, starts of the server, and writes that failed."""

import asyncio
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from msgspec import structs
from support import models
from support.ledgers import connection_of, unwritable
from support.running import Engine, Run, code_of, gone, stopped_clock
from support.workers import freeze, until

from events.commands import OUTDATED
from events.errors import LogUnavailable, RequestRefused
from events.jobcommands import RequestCancel
from events.jobs import MAX_RETRIES, JobKind, JobStatus, UnloadParameters
from events.models import ModelState
from events.types import Cause, ClockStepped, LoadParameters, LoadRequested, LoadStarted, WorkerExited
from runtime.consumer import consumer, loads
from runtime.lostmodels import ModelLost
from runtime.repository import DEFAULTS_FILE
from runtime.scheduler.actions import (
    RELOAD_TIMEOUT_S,
    ChangeSettings,
    FailLoad,
    StartUnload,
)
from runtime.scheduler.admission import MAX_SERVER_DEATHS
from runtime.scheduler.scheduler import MAX_INCIDENTS

BACK_OFF_S = 60
"""More than any back-off, less than the time for which incidents are remembered."""


# Deaths.


async def test_dead_worker_is_replaced_after_the_back_off(engine: Engine) -> None:
    await engine.load("adder", parameters=LoadParameters(timeout_s=100))
    first = engine.worker("adder").worker_id
    engine.pass_time(-86_400)  # a clock that is set back delays nothing
    await engine.die("adder")
    engine.pass_time(0.5)
    await engine.becomes("adder", ModelState.LOADED)
    assert await engine.ask("adder", 1) == 3
    events = (await engine.events(of="adder"))[3:]
    story = ["WorkerExited", "LoadRequested", "LoadStarted", "ModelLoaded"]
    assert [event.type for event in events] == story
    assert (events[0].worker_id, events[0].data) == (first, WorkerExited(None, signal.SIGKILL, ()))
    requested = events[1].data
    assert isinstance(requested, LoadRequested)
    assert (requested.cause, events[1].actor) == (Cause.RECOVERY, "system")
    assert requested.timeout_s == RELOAD_TIMEOUT_S  # at least


async def test_fork_server_death_is_no_incident_of_a_model(run: Run) -> None:
    async with run(clock=stopped_clock()) as engine:
        await asyncio.gather(engine.load("adder"), engine.load("other"))
        slow = await engine.ask_load("slow")
        await engine.loading("slow")
        os.kill(engine.fork_server_pid, signal.SIGKILL)
        await engine.recorded(lambda: all(engine.model(m).lost_at for m in ("adder", "other")))
        assert code_of(await engine.ended(slow)) == "fork_server_died"
        engine.pass_time(0.5)
        for name in ("adder", "other"):
            model = await engine.becomes(name, ModelState.LOADED)
            assert model.incidents == ()
            assert await engine.facts(WorkerExited, of=name) == [WorkerExited(None, None, ())]
        assert await engine.ask("adder", 1) == 3


async def test_back_off_passes_while_clock_is_set_back(run: Run) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("adder")
        engine.clock.wrong = timedelta(days=-1)
        await engine.die("adder")
        engine.pass_time(0.5)
        await engine.becomes("adder", ModelState.LOADED)
        [stepped] = await engine.facts(ClockStepped)
        assert stepped.taken


async def test_load_without_worker_survives_the_fork_server(engine: Engine) -> None:
    os.kill(engine.fork_server_pid, signal.SIGSTOP)
    job_id = await engine.ask_load("adder")
    await engine.becomes("adder", ModelState.LOADING)
    await until(lambda: engine.live("adder").stage == "starting")
    os.kill(engine.fork_server_pid, signal.SIGKILL)
    assert (await engine.ended(job_id)).status is JobStatus.COMPLETED


@contextmanager
def slow_commit(engine: Engine) -> Iterator[None]:
    """Have the commit under way last until the block ends."""
    with closing(sqlite3.connect(engine.log.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("force", [False, True])
async def test_unload_before_the_back_off_ends_prevents_reload(run: Run, *, force: bool) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("adder")
        await engine.die("adder")
        with slow_commit(engine):
            unload = asyncio.create_task(engine.unload("adder", force=force))
            await asyncio.sleep(0)
            await until(lambda: engine.log.waiting == 0)  # the writer has it
            engine.pass_time(0.5)
            await until(lambda: engine.log.waiting == 1)  # the reload is decided
        assert (await unload).status is JobStatus.COMPLETED
        assert engine.model("adder").state is ModelState.UNLOADED
        story = ["WorkerExited", "UnloadRequested", "UnloadStarted", "ModelUnloaded"]
        assert (await engine.story(of="adder"))[3:] == story


async def test_cancelled_load_of_dead_worker_records_both(engine: Engine) -> None:
    job_id = await engine.ask_load("slow")
    load = await engine.loading("slow")
    with slow_commit(engine):
        cancel = asyncio.create_task(engine.log.submit(RequestCancel(job_id, "alice")))
        await asyncio.sleep(0)
        await until(lambda: engine.log.waiting == 0)
        engine.kill("slow")
        await until(lambda: engine.log.waiting == 1)  # the load's failure is decided
    await cancel
    assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
    story = ["LoadRequested", "LoadStarted", "CancelRequested", "WorkerExited", "JobCancelled"]
    assert await engine.story(of="slow") == story
    assert load.is_finished


async def test_load_whose_workers_were_ended_begins_again(engine: Engine) -> None:
    job_id = await engine.ask_load("slow")
    load = await engine.loading("slow")
    load.kill()
    await until(lambda: engine.consumer.loads.get(job_id) not in (None, load))
    assert load.is_finished
    await engine.unload("slow", force=True)
    assert await engine.story(of="slow") == [
        *("LoadRequested", "LoadStarted", "LoadStarted"),
        *("UnloadRequested", "JobCancelled", "UnloadStarted", "ModelUnloaded"),
    ]


async def test_load_with_a_defect_fails_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loads, "may_end", None)
    job = await engine.load("adder")
    assert code_of(job) == "internal"
    assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "LoadFailed"]
    await until(lambda: not engine.consumer.loads)
    assert "an effect on adder failed" in caplog.text


async def test_refused_starts_change_nothing(engine: Engine) -> None:
    ended = await engine.load("adder")
    pending = structs.replace(ended, status=JobStatus.PENDING)
    of_load = UnloadParameters(force=False, load_job_id=ended.id)
    unload = structs.replace(pending, id="U", kind=JobKind.UNLOAD, load=None, unload=of_load)
    loads, head = dict(engine.consumer.loads), engine.log.head
    for action in (
        ChangeSettings(pending, ended.id),
        StartUnload(unload, ended.id),
        FailLoad(pending, "timeout", ""),
    ):
        with pytest.raises(RequestRefused) as refused:
            await engine.consumer.execute(action)
        assert refused.value.code == OUTDATED
    assert (engine.consumer.loads, engine.log.head) == (loads, head)
    assert (engine.live("adder").draining, engine.live("adder").stage) == (False, None)
    assert await engine.ask("adder", 1) == 3


# The server ends and starts again.


async def test_restart_ends_every_job_and_reloads_models(folder: Path, run: Run) -> None:
    async with run(loads_at_once=1) as engine:
        await engine.load("loop")
        await engine.load("other", 1)
        await engine.load("adder", 1)
        [asked] = await engine.start_endless()
        old = engine.worker("other")
        await freeze(old.pid)
        asked_of_old = asyncio.create_task(engine.ask("other", 1))
        await until(lambda: old.in_flight == 1)
        models.save(models.add(200), folder / "models", "other", 2)
        await engine.load("other", 2)  # version 1 drains
        unload = await engine.ask_unload("loop")
        await engine.becomes("loop", ModelState.UNLOADING)
        in_progress = await engine.ask_load("slow")
        await engine.loading("slow")
        pending = await engine.ask_load("adder", 2)
        pids = engine.worker_pids()
        assert len(pids) == 5
    for inference in (asked, asked_of_old):
        with pytest.raises(ModelLost):
            await inference
    assert all(gone(pid) for pid in pids)
    models.save(models.add(3), folder / "models", "slow")
    async with run(loads_at_once=1) as engine:
        jobs = [await engine.ended(job) for job in (in_progress, pending, unload)]
        assert [job.status for job in jobs] == [JobStatus.COMPLETED] * 3
        assert [job.attempt for job in jobs] == [2, 1, 2]
        await engine.becomes("other", ModelState.LOADED)
        assert [load.version for load in engine.consumer.loads.values() if load.model_id == "other"] == [2]
        assert await engine.ask("other", 1) == 201
        assert await engine.ask("adder", 1) == 3
        assert engine.model("loop").state is ModelState.UNLOADED
        requests = await engine.facts(LoadRequested, of="other")
        assert [request.cause for request in requests] == [Cause.REQUEST, Cause.REQUEST, Cause.RESTART]
        active = engine.log.state.active()
        assert active is not None
        assert active.id == "adder"


@pytest.mark.parametrize(
    ("stops_cleanly", "attempts", "code"), [(False, [1, 2, 3], "crash_loop"), (True, [1, 2, 3, 4], None)]
)
async def test_load_fails_after_three_unclean_ends_only(
    folder: Path, run: Run, *, stops_cleanly: bool, attempts: list[int], code: str | None
) -> None:
    async with run(stops_cleanly=stops_cleanly) as engine:
        job_id = await engine.ask_load("slow")
        await engine.loading("slow")
    for _ in range(MAX_SERVER_DEATHS - 1):
        async with run(stops_cleanly=stops_cleanly) as engine:
            await engine.loading("slow")
    models.save(models.add(3), folder / "models", "slow")
    async with run() as engine:
        assert code_of(await engine.ended(job_id)) == code
        starts = await engine.facts(LoadStarted, of="slow")
        assert [start.attempt for start in starts] == attempts


async def test_failing_reloads_are_a_crash_loop(folder: Path, run: Run) -> None:
    defaults = models.save(models.crash_on_zeros(), folder / "models", "m").parent / DEFAULTS_FILE
    defaults.write_text("warm_up.enabled = false")
    async with run() as engine:
        for name in ("m", "adder"):
            await engine.load(name)
    defaults.unlink()
    async with run(clock=stopped_clock()) as engine:

        def failed(times: int) -> bool:
            return len(engine.model("m").incidents) == times

        for times in range(1, MAX_INCIDENTS):
            await engine.recorded(partial(failed, times))
            engine.pass_time(BACK_OFF_S)
        model = await engine.becomes("m", ModelState.FAILED)
        assert model.error is not None
        assert model.error.code == "crash_loop"
        assert "signal 8" in model.error.message
        assert await engine.ask("adder", 1) == 3
        defaults.write_text("warm_up.enabled = false")
        engine.pass_time(86_400)
        assert (await engine.load("m")).status is JobStatus.COMPLETED  # not before it was requested
        assert (await engine.story(of="m"))[-4:] == [
            "LoadFailed", "LoadRequested", "LoadStarted", "ModelLoaded",
        ]  # fmt: skip


async def test_missing_files_are_no_reason_to_give_up(folder: Path, run: Run) -> None:
    async with run(clock=stopped_clock()) as engine:
        await engine.load("other")
        await until(lambda: not engine.consumer._loader.syncs)  # which write to the store
        shutil.rmtree(folder / "store")
        (folder / "models").rename(folder / "away")
        await engine.die("other")
        for failed in range(1, MAX_INCIDENTS + 3):
            engine.pass_time(BACK_OFF_S)
            counted = partial(has_retries, engine, "other", min(failed, MAX_RETRIES))
            await engine.recorded(counted)
            assert engine.model("other").state is ModelState.LOST
        (folder / "away").rename(folder / "models")
        engine.pass_time(BACK_OFF_S)
        model = await engine.becomes("other", ModelState.LOADED)
        assert (len(model.incidents), model.retries) == (1, None)
        assert await engine.ask("other", 1) == 101


def has_retries(engine: Engine, model_id: str, count: int) -> bool:
    retries = engine.model(model_id).retries
    return retries is not None and retries.count == count


async def test_typo_in_defaults_fails_no_reload(folder: Path, run: Run) -> None:
    warm_up = "[[warm_up.inputs]]\nname = '{}'\ndatatype = '{}'\nshape = [1]\ndata = [1]"
    async with run(clock=stopped_clock()) as engine:
        await engine.load("other")
        for typo in ("this is no TOML", warm_up.format("x", "FP23"), warm_up.format("misspelt", "FP32")):
            (folder / "models" / "other" / DEFAULTS_FILE).write_text(typo)
            await engine.die("other")
            engine.pass_time(BACK_OFF_S)
            await engine.becomes("other", ModelState.LOADED)
            assert await engine.ask("other", 1) == 101
        assert "LoadFailed" not in await engine.story(of="other")


# The ledger cannot be written.


@pytest.fixture
def _retries_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "LOG_RETRY_S", 0.05)


@pytest.mark.usefixtures("_retries_soon")
async def test_unwritable_ledger_delays_each_fact(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    models.save_bytes(models.TEXT, engine.root, "bad")
    for fact, model, status in (
        ("LoadStarted", "adder", JobStatus.COMPLETED),
        ("ModelLoaded", "other", JobStatus.COMPLETED),
        ("LoadFailed", "bad", JobStatus.FAILED),
        ("UnloadStarted", "adder", JobStatus.COMPLETED),
        ("ModelUnloaded", "other", JobStatus.COMPLETED),
    ):
        caplog.clear()
        with unwritable(engine.log.path, fact):
            begin = engine.ask_unload if "Unload" in fact else engine.ask_load
            job_id = await begin(model)
            await until(lambda: "cannot be written" in caplog.text)
            assert fact not in await engine.story(of=model)
        assert (await engine.ended(job_id)).status is status
        assert (await engine.story(of=model)).count(fact) == 1
    assert "WorkerExited" not in await engine.story()
    await engine.nothing_left()


@pytest.mark.usefixtures("_retries_soon")
async def test_unwritable_ledger_starts_no_worker(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    await engine.load("other")
    serving, policy = engine.worker_pids(), engine.consumer.policy
    engine.consumer.policy = replace(policy, loads_at_once=0)
    job_id = await engine.ask_load("adder")
    head = engine.log.head
    await connection_of(engine.log).execute_fetchall("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(engine.log.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # nothing can be written at all
        engine.consumer.policy = policy
        engine.log.notify()
        await until(lambda: "the ledger cannot be written; StartLoad waits" in caplog.text)
        assert not engine.log.healthy
        assert [load.model_id for load in engine.consumer.loads.values()] == ["other"]
        assert engine.worker_pids() == serving
        job = engine.log.state.jobs[job_id]
        assert (job.status, job.attempt, engine.log.head) == (JobStatus.PENDING, 0, head)
        assert await engine.ask("other", 1) == 101
        other.execute("ROLLBACK")
    job = await engine.ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.COMPLETED, 1)
    assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert len(engine.worker_pids()) == len(serving) + 1
    assert await engine.ask("adder", 1) == 3


@pytest.mark.usefixtures("_retries_soon")
async def test_unwritable_ledger_leaves_load_cancellable(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with unwritable(engine.log.path, "LoadStarted"):
        job_id = await engine.ask_load("adder")
        await until(lambda: "the ledger cannot be written; StartLoad waits" in caplog.text)
        while not engine.log.state.jobs[job_id].cancelling:
            with suppress(LogUnavailable):  # it was in one group with the start, which failed them both
                await engine.log.submit(RequestCancel(job_id, "alice"))
                break
        assert (await engine.ended(job_id)).status is JobStatus.CANCELLED
    assert await engine.story(of="adder") == ["LoadRequested", "CancelRequested", "JobCancelled"]
    assert (engine.consumer.loads, engine.worker_pids()) == ({}, [])


# The end of the consumer itself.


async def test_stopped_consumer_leaves_no_task(engine: Engine) -> None:
    await engine.ask_load("slow")
    load = await engine.loading("slow")
    head = engine.log.head
    await engine.consumer.stop()
    await asyncio.wait([engine.applying])
    assert load.tasks == set()
    assert engine.log.head == head
