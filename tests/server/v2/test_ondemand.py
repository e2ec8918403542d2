"""What inferences wait for, at the runtime itself: how often it is asked, and what ends the wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support import models
from support.running import Engine, running
from support.workers import until

from events.commands import FileStat, RequestLoad
from events.models import ModelState
from events.types import Cause
from runtime.errors import InferenceTimeout, QueueFull
from server.v2.ondemand import DemandFailed, OnDemand


class Demanding:
    """Load on demand for what runs, which counts how often it looks into the repository."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine = engine
        self.looks = 0
        self.defect: Exception | None = None
        self.leases = engine.leases
        self.demand = OnDemand(
            log=engine.log,
            reader=engine.reader,
            router=engine.router,
            leases=self.leases,
            look_up=self._look_up,
            waiting_for=engine.consumer.waiting_for,
            stopping=asyncio.Event(),
            max_waiting=max_waiting,
            on=True,
        )

    async def wait(self, model_id: str, *, version: int | None = None, within_s: float = 1000) -> bool:
        """Wait for a model, and return whether it can be asked then, and is held."""
        ends_at_s = asyncio.get_running_loop().time() + within_s
        async with self.demand.loaded(model_id, version, "ann", ends_at_s):
            return self._engine.router.is_ready(model_id) and self.leases.held(model_id)

    async def waiting(self, model_id: str, count: int = 1) -> list[asyncio.Task[bool]]:
        """Begin to wait so many times."""
        tasks = [asyncio.create_task(self.wait(model_id)) for _ in range(count)]
        await until(lambda: self.demand.waiting(model_id) == count)
        return tasks

    async def _look_up(self, model_id: str, version: int | None, subject: str) -> RequestLoad:
        self.looks += 1
        if self.defect is not None:
            raise self.defect
        found = await asyncio.to_thread(self._engine.repository.resolve, model_id, version)
        files = tuple(FileStat(file.path, file.bytes, file.mtime_ns) for file in found.files)
        return RequestLoad(model_id, found.version, files, subject, cause=Cause.DEMAND)


@asynccontextmanager
async def demanding(folder: Path, max_waiting: int = 1024) -> AsyncIterator[tuple[Engine, Demanding]]:
    """Start the runtime with load on demand, and stop both."""
    async with running(folder) as engine:
        on_demand = Demanding(engine, max_waiting)
        yield engine, on_demand
        await on_demand.demand.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a place with the models `adder`, and `slow` that loads for half a minute."""
    models.save(models.add(1), tmp_path / "models", "adder")
    models.save(models.slow_model(side=800, depth=2_000), tmp_path / "models", "slow")
    return tmp_path


async def test_a_thousand_who_wait_are_one_look_into_the_repository_and_one_load(folder: Path) -> None:
    async with demanding(folder, max_waiting=1_000) as (engine, on_demand):
        waits = [asyncio.create_task(on_demand.wait("adder")) for _ in range(1_000)]
        assert all(await asyncio.gather(*waits))
        assert on_demand.looks == 1
        assert await engine.story(of="adder") == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        assert on_demand.demand.waiting("adder") == 0
        assert not on_demand.leases.held("adder")


async def test_one_more_than_may_wait_is_refused_and_a_place_that_is_left_is_free(folder: Path) -> None:
    async with demanding(folder, max_waiting=2) as (_, on_demand):
        first, second = await on_demand.waiting("slow", 2)
        with pytest.raises(QueueFull):
            await on_demand.wait("slow")
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(InferenceTimeout):
            await on_demand.wait("slow", within_s=0.05)
        assert not second.done()
        assert on_demand.looks == 1
        second.cancel()


async def test_who_has_no_time_left_is_told_so_and_leaves_nothing_behind(folder: Path) -> None:
    async with demanding(folder) as (engine, on_demand):
        with pytest.raises(InferenceTimeout, match="is not loaded yet"):
            await on_demand.wait("adder", within_s=-1)
        assert not on_demand.leases.held("adder")
        await until(lambda: not on_demand.demand._attempts)
        assert await engine.story(of="adder") == []


async def test_a_lost_model_that_is_given_up_is_not_waited_for_any_longer(folder: Path) -> None:
    async with demanding(folder) as (engine, on_demand):
        await engine.load("adder")
        models.save(models.unknown_operator(), folder / "models", "adder")
        await engine.die("adder")
        [wait] = await on_demand.waiting("adder")
        for _ in range(4):
            before = len(engine.model("adder").incidents)
            engine.pass_time(30)
            await engine.recorded(lambda count=before: len(engine.model("adder").incidents) != count)  # type: ignore[misc]
        with pytest.raises(DemandFailed) as caught:
            await wait
        assert "adder" in str(caught.value)
        assert engine.model("adder").state is ModelState.FAILED
        assert on_demand.looks == 0


async def test_a_wait_that_is_closed_ends_for_all(folder: Path) -> None:
    async with demanding(folder) as (_, on_demand):
        waits = await on_demand.waiting("slow", 3)
        await on_demand.demand.close()
        ends = await asyncio.gather(*waits, return_exceptions=True)
        assert [getattr(end, "code", None) for end in ends] == ["shutting_down"] * 3


async def test_a_defect_in_the_look_up_is_told_to_all_who_wait_and_stops_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with demanding(folder) as (_, on_demand):
        on_demand.defect = OSError("the disk is on fire")
        results = await asyncio.gather(*(on_demand.wait("adder") for _ in range(3)), return_exceptions=True)
        assert results == [on_demand.defect] * 3
        assert "the disk is on fire" in caplog.text
        on_demand.defect = None
        assert await on_demand.wait("adder")
