"""Loading an optimised model in a real worker: the same answers, or a refusal where it is of no use."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import ModelProto
from support import models
from support.models import save
from support.optimised import describe, in_background, optimised
from support.workers import array, ask, floats, load, loaded_memory, order_of, refusal, tensor, trips

from runtime import wire
from runtime.errors import WorkerDied
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.wire import Load
from runtime.worker.loading import huge_pages_help


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a model `m` of eight layers, 2 MB."""
    save(models.weights(2), tmp_path / "models", "m")
    return tmp_path / "models"


def layers_input() -> wire.Tensor:
    return tensor("x", "FP32", np.linspace(-1, 1, 2 * 250, dtype=np.float32).reshape(2, 250))


BUILDERS: dict[str, tuple[Callable[[], ModelProto], wire.Tensor | None]] = {
    "layers": (lambda: models.weights(2), layers_input()),
    "external": (lambda: models.external("data/w.bin", count=10_000), floats("x", *[1.0] * 10_000)),
    "no_weights": (models.identity, floats("x", 1)),
    "strings": (models.strings, None),
    "default": (models.with_default, floats("x", 1)),
    "maps": (models.zip_map, None),
    "optional_input": (models.optional_input, floats("x", 1)),
    "optional_output": (models.optional_output, None),
    "scan": (models.running_total, None),
    "loop": (models.counting_loop, trips(3)),
    "folded": (lambda: models.slow_model(100, 3), None),
    "wide_table": (lambda: models.table(1), None),
}


@pytest.mark.parametrize("name", BUILDERS)
async def test_optimised_model_answers_as_the_bare_one(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    (build, given), root = BUILDERS[name], tmp_path / "models"
    folder = save(build(), root, "m")
    if name == "external":
        (folder / "data").mkdir()
        (folder / "data" / "w.bin").write_bytes(models.external_bytes(10_000))
    bare, bare_report = await load(pool, order_of(root))
    worker, report = await load(pool, order_of(root, optimised=await optimised(pool, root)))
    assert (report.inputs, report.outputs) == (bare_report.inputs, bare_report.outputs)
    if given is not None:
        assert await data_of(worker, given) == await data_of(bare, given)


async def data_of(worker: Worker, given: wire.Tensor) -> list[bytes]:
    return [bytes(output.data) for output in await ask(worker, [given])]


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


async def test_peak_memory_of_an_optimised_load_is_measured(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.weights(16, layers=1), tmp_path / "models", "m")  # packed, and then found packed in its files
    order = order_of(tmp_path / "models")
    given = await optimised(pool, tmp_path / "models")
    worker, _ = await load(pool, replace(order, optimised=given))
    assert loaded_memory(worker).memory_bytes < 12_000_000
    # At its peak 20 MB with ONNX Runtime 1.31; with 1.32 now and then 34.
    assert 15_000_000 < loaded_memory(worker).peak_memory_bytes < 45_000_000


async def test_background_load_has_low_priority(pool: WorkerPool, root: Path) -> None:
    worker, _ = await load(pool, order_of(root, background=True))
    assert in_background(worker.pid)
    worker, _ = await load(pool, order_of(root))
    assert not in_background(worker.pid)


async def test_optimised_model_is_loaded_instead(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(1), tmp_path / "models", "m")
    order = await crafted(tmp_path / "models", models.add(5))
    worker, _ = await load(pool, replace(order, memory_limit_bytes=100_000_000))
    assert array((await ask(worker, [floats("x", 1)]))[0]).tolist() == [6]


async def crafted(root: Path, model: ModelProto | bytes) -> Load:
    """Make the order to load model `m` by this optimised model."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    order, folder = order_of(root), models.save_bytes(data, root.parent / "optimised", "m")
    return replace(order, optimised=describe(folder))


UNUSABLE: dict[str, tuple[ModelProto | bytes, str]] = {
    "text": (models.TEXT, "invalid_model"),
    "empty": (b"", "invalid_model"),
    "unknown_operator": (models.unknown_operator(), "invalid_model"),
    "fails_on_zeros": (models.reshape(), "warm_up_failed"),
    "without_its_data": (models.external("nowhere"), "invalid_model"),
}


@pytest.mark.parametrize("name", UNUSABLE)
async def test_unusable_optimised_model_is_refused(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    """Whether a load without it would end better is the server's to find out."""
    save(models.add(), tmp_path / "models", "m")
    model, code = UNUSABLE[name]
    assert (await refusal(pool, await crafted(tmp_path / "models", model))).code == code


async def test_optimised_model_that_crashes_its_worker_is_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path / "models", "m")
    with pytest.raises(WorkerDied):
        await load(pool, await crafted(tmp_path / "models", models.crash_on_zeros()))


@pytest.mark.parametrize("limit", [0, 100_000])
async def test_memory_limit_holds_for_an_optimised_model(pool: WorkerPool, root: Path, limit: int) -> None:
    order = order_of(root, optimised=await optimised(pool, root), memory_limit_bytes=limit)
    assert (await refusal(pool, order)).code == "out_of_memory"


def has_huge_pages(worker: Worker) -> bool:
    return "THP_enabled:\t1\n" in status(worker.pid)


@pytest.mark.skipif("THP_enabled:\t1\n" not in status(os.getpid()), reason="this kernel has no huge pages")
async def test_huge_pages_are_used_for_copied_or_packed_weights(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.add(), root, "small")
    save(models.table(2.5), root, "m")
    assert not has_huge_pages((await load(pool, order_of(root, "small")))[0])
    order = order_of(root)
    assert has_huge_pages((await load(pool, order))[0])
    assert not has_huge_pages((await load(pool, replace(order, optimised=await optimised(pool, root))))[0])
    packed = tmp_path / "packed" / "models"
    save(models.weights(4), packed, "m")
    assert huge_pages_help(4_000_000, await optimised(pool, packed))
