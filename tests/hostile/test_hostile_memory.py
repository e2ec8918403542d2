"""A model that has taken over its serving worker, and takes memory that its limit does not count."""

import asyncio
from pathlib import Path

import pytest
from support.http import ONE, LocalApi, local_server
from support.models import add
from support.patching import patch_runtime
from support.workers import LAYERS, LIMIT_S

from events.types import WorkerExited
from runtime import memory
from runtime.consumer import consumer as consumer_module

MB = 10**6
LIMIT_BYTES = 60 * MB
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


@pytest.fixture
def _taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if LAYERS != ("landlock", "seccomp"):
        pytest.skip("this kernel cannot confine a worker")
    patch_runtime(tmp_path, monkeypatch, {"execution": TAKES.format(name=request.param)})
    monkeypatch.setattr(consumer_module, "MEASURE_EVERY_S", 0.05)


@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", ["fill_page_tables"], indirect=True)
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


@pytest.mark.usefixtures("_taken_over")
@pytest.mark.parametrize("_taken_over", ["take_all_stacks"], indirect=True)
async def test_stack_and_mappings_stay_within_the_limit(tmp_path: Path) -> None:
    """The kernel refuses memory made of a page of the stack, and 600 GiB to read only; the model answers."""
    async with local_server(tmp_path) as api:
        api.save(add(), "m")
        await api.load("m", memory_limit_bytes=LIMIT_BYTES)
        worker = api.worker("m")
        before = memory.taken_bytes(worker.pid)
        async with asyncio.timeout(LIMIT_S):
            assert await ask(api) == 200
        assert memory.taken_bytes(worker.pid) - before < LIMIT_BYTES
        assert await api.data_of(WorkerExited) == []
