"""A model that has taken over its serving worker, and takes memory that its limit does not count."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fleet import soak_only
from support.http import ONE, Json, LocalApi, local_server
from support.models import add
from support.openvino import DEVICE, visible_devices
from support.patching import patch_runtime
from support.workers import LAYERS, LIMIT_S

from events.types import WorkerExited
from features.devices.names import CPU
from runtime import memory
from runtime.consumer import consumer as consumer_module
from runtime.worker import privileges

MB = 10**6
LIMIT_BYTES = 60 * MB
LARGE_LIMIT_BYTES = 2**30
WAITS = "scatter_pages_and_wait"
TAKES = """

import takeover as _takeover
_run = InferenceExecutor.run


def _take_and_run(self, requests):
    _takeover.{name}()
    _run(self, requests)


InferenceExecutor.run = _take_and_run
"""


async def ask(api: LocalApi) -> int:
    return (await api.post("/v2/models/m/infer", json={"inputs": [ONE]})).status


@pytest.fixture(scope="module", params=[CPU, DEVICE])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json]:
    """Settings of a server, and parameters of a load, for the CPU and for a device without a driver."""
    if request.param == CPU:
        yield {"settings": {}, "load": {}}
    else:
        with visible_devices([DEVICE], tmp_path_factory.mktemp("openvino")) as settings:
            yield {"settings": settings, "load": {"devices": [DEVICE]}}


@pytest.fixture
def _taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if LAYERS != ("landlock", "seccomp"):
        pytest.skip("this kernel cannot confine a worker")
    changed = {"execution": TAKES.format(name=request.param)}
    if request.param == WAITS:  # as on a kernel without mseal(2)
        changed["privileges"] = "SYS_MSEAL = 9999\n"
    patch_runtime(tmp_path, monkeypatch, changed)
    monkeypatch.setattr(consumer_module, "MEASURE_EVERY_S", 0.05)


@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", [WAITS], indirect=True)
async def test_serving_worker_with_more_than_its_limit_is_ended(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        api.save(add(), "m")
        await api.load("m", memory_limit_bytes=LIMIT_BYTES)
        async with asyncio.timeout(LIMIT_S):
            assert await ask(api) == 503
            while not (found := await api.data_of(WorkerExited)):  # noqa: ASYNC110 - events are read over HTTP
                await asyncio.sleep(0.01)
        [exited] = found
        assert exited.signal == 9
        assert any("with swapped pages and page tables, and may take" in line for line in exited.stderr)


async def take(folder: Path, device: Json, limit_bytes: int) -> int:
    """Have a worker with this limit take what it can, and answer; returns how much memory that added."""
    async with local_server(folder, **device["settings"]) as api:
        api.save(add(), "m")
        await api.load("m", memory_limit_bytes=limit_bytes, **device["load"])
        worker = api.worker("m")
        before = memory.taken_bytes(worker.pid)
        async with asyncio.timeout(LIMIT_S):
            assert await ask(api) == 200
        added = memory.taken_bytes(worker.pid) - before
        assert await api.data_of(WorkerExited) == []
        return added


@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", ["take_all_stacks"], indirect=True)
async def test_stack_and_mappings_stay_within_the_limit(tmp_path: Path) -> None:
    """The kernel refuses memory made of a page of the stack, and 600 GiB to read only; the model answers."""
    assert await take(tmp_path, {"settings": {}, "load": {}}, LIMIT_BYTES) < LIMIT_BYTES


def require_seals() -> None:
    if privileges._seal(privileges.SYS_MSEAL, 0, 0, 0) != 0:
        pytest.skip("this kernel cannot seal addresses")


@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", ["read_reserved", "scatter_pages", "leave_pages"], indirect=True)
async def test_page_tables_stay_below_a_tenth_of_the_limit(
    tmp_path: Path, device: Json, request: pytest.FixtureRequest
) -> None:
    """Of addresses that are mapped at once, of pages far apart, and of those that are left of mappings."""
    if request.node.callspec.params["_taken_over"] != "read_reserved":
        require_seals()
    assert await take(tmp_path, device, 2 * LIMIT_BYTES) < LIMIT_BYTES // 5


@soak_only
@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", ["take_everything"], indirect=True)
async def test_all_memory_stays_within_a_tenth_of_the_limit(tmp_path: Path, device: Json) -> None:
    require_seals()
    assert await take(tmp_path, device, LARGE_LIMIT_BYTES) < 1.1 * LARGE_LIMIT_BYTES
