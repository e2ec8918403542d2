"""Loading a cached model in a real worker: the same answers, or a bare load where it is of no use."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import ModelProto
from support import models
from support.cache import FORMS, describe, found, in_background, load, prepared, written_by_the_runtime
from support.models import save
from support.workers import array, ask, floats, order_of, tensor

from runtime import wire
from runtime.errors import Exit, LoadRefused, WorkerDied
from runtime.process.pool import WorkerPool
from runtime.process.worker import Worker
from runtime.wire import Form, Load
from runtime.worker.loading import huge_pages_help


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a model `m` of eight layers, 2 MB."""
    save(models.weights(2), tmp_path / "models", "m")
    return tmp_path / "models"


def layers_input() -> wire.Tensor:
    return tensor("x", "FP32", np.linspace(-1, 1, 2 * 250, dtype=np.float32).reshape(2, 250))


@pytest.mark.parametrize("form", FORMS)
async def test_cached_model_answers_as_the_bare_one(pool: WorkerPool, root: Path, form: Form) -> None:
    bare, bare_report = await load(pool, order_of(root, "m"))
    given = await prepared(pool, root, form)
    worker, report = await load(pool, replace(order_of(root, "m"), prepared=given))
    assert (report.prepared, report.prepared_failure) == (given.sha256, None)
    assert (bare_report.prepared, bare_report.prepared_failure) == (None, None)
    assert (report.inputs, report.outputs) == (bare_report.inputs, bare_report.outputs)
    (expected,), (y,) = await ask(bare, [layers_input()]), await ask(worker, [layers_input()])
    assert bytes(y.data) == bytes(expected.data)
    assert report.files == bare_report.files  # with the hashes of the repository's own


BUILDERS: dict[str, Callable[[], ModelProto]] = {
    "no_weights": models.identity,
    "strings": models.strings,
    "default": models.with_default,
    "maps": models.zip_map,
    "sequence": models.sequence_input,
    "optional_input": models.optional_input,
    "optional_output": models.optional_output,
    "scan": models.running_total,
    "loop": models.counting_loop,
    "folded": lambda: models.slow_model(100, 3),
    "wide_table": lambda: models.table(1),
}


@pytest.mark.parametrize("name", BUILDERS)
async def test_models_of_all_kinds_can_be_cached(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    root = tmp_path / "models"
    save(BUILDERS[name](), root, "m")
    _, bare = await load(pool, order_of(root, "m"))
    for form in FORMS:
        given = await prepared(pool, root, form)
        _, report = await load(pool, replace(order_of(root, "m"), prepared=given))
        assert (report.prepared, report.inputs, report.outputs) == (given.sha256, bare.inputs, bare.outputs)


@pytest.mark.parametrize("form", FORMS)
async def test_external_data_is_cached_too(pool: WorkerPool, tmp_path: Path, form: Form) -> None:
    root, count = tmp_path / "models", 10_000
    folder = save(models.external("data/w.bin", count=count), root, "m")
    (folder / "data").mkdir()
    (folder / "data" / "w.bin").write_bytes(models.external_bytes(count))
    given = await prepared(pool, root, form)
    assert [source.path for source in given.sources] == ["data/w.bin", "model.onnx"]
    worker, report = await load(pool, replace(order_of(root, "m"), prepared=given))
    assert report.prepared == given.sha256
    (y,) = await ask(worker, [tensor("x", "FP32", np.ones(count, np.float32))])
    assert array(y).tolist() == [1 + number for number in range(count)]


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


async def test_peak_memory_of_a_form_is_measured(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.weights(32, layers=1), tmp_path / "models", "m")  # packed, and then found packed in the form
    order = order_of(tmp_path / "models", "m")
    _, bare = await load(pool, order)
    given = await prepared(pool, tmp_path / "models")
    _, report = await load(pool, replace(order, known=bare.files, prepared=given))
    assert report.prepared == given.sha256
    assert report.memory_bytes < 12_000_000
    assert 30_000_000 < report.peak_memory_bytes < 44_000_000


async def test_background_load_has_low_priority(pool: WorkerPool, root: Path) -> None:
    worker, _ = await load(pool, replace(order_of(root, "m"), background=True))
    assert in_background(worker.pid)
    worker, _ = await load(pool, order_of(root, "m"))
    assert not in_background(worker.pid)


async def test_form_of_other_files_is_not_used(pool: WorkerPool, root: Path) -> None:
    given = await prepared(pool, root)
    save(models.weights(2, seed=1), root, "m")
    order = replace(order_of(root, "m"), prepared=given)
    bare, _ = await load(pool, order_of(root, "m"))
    _, report = await load(pool, order)
    for known in ((), report.files):
        worker, report = await load(pool, replace(order, known=known))
        assert report.prepared is None
        assert "other files" in str(report.prepared_failure)
        (expected,), (y,) = await ask(bare, [layers_input()]), await ask(worker, [layers_input()])
        assert bytes(y.data) == bytes(expected.data)


async def test_form_is_used_for_known_files_restored_or_limited(pool: WorkerPool, root: Path) -> None:
    given, order = await prepared(pool, root), order_of(root, "m")
    copy = shutil.copytree(given.folder, root.parent / "restored")
    for changes in (
        {"prepared": given, "known": found(order.folder)},
        {"prepared": given, "memory_limit_bytes": 100_000_000},
        {"prepared": replace(given, folder=str(copy))},
    ):
        _, report = await load(pool, replace(order, **changes))
        assert report.prepared == given.sha256
        assert report.peak_memory_bytes >= report.memory_bytes > 0


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def without_weights(folder: Path) -> None:
    (folder / "weights.bin").unlink()


def cut_off(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 1000)


def overwritten(folder: Path) -> None:
    with (folder / "weights.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 8)


def linked(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "elsewhere")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")


def a_folder(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def a_fifo(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")


@pytest.mark.parametrize(
    "damage",
    [gone, without_weights, cut_off, overwritten, linked, a_folder, a_fifo],
    ids=lambda damage: damage.__name__,
)
async def test_damaged_form_is_replaced_by_a_bare_load(
    pool: WorkerPool, root: Path, damage: Callable[[Path], None]
) -> None:
    given = await prepared(pool, root)
    damage(Path(given.folder))
    worker, report = await load(pool, replace(order_of(root, "m"), prepared=given))
    assert report.prepared is None
    assert report.prepared_failure
    assert "\n" not in report.prepared_failure
    assert len(await ask(worker, [layers_input()])) == 1


async def crafted(root: Path, form: ModelProto | bytes) -> Load:
    """Make the order to load model `m` with this form, hashes included."""
    data = form if isinstance(form, bytes) else form.SerializeToString()
    order, folder = order_of(root, "m"), models.save_bytes(data, root.parent / "forms", "m")
    return replace(order, prepared=describe(folder, "optimised", found(folder), found(order.folder)))


@pytest.mark.parametrize(
    "form",
    [models.TEXT, b"", models.unknown_operator(), models.divide(), models.external("nowhere")],
    ids=["text", "empty", "unknown_operator", "fails_on_zeros", "without_its_data"],
)
async def test_unusable_form_is_replaced_by_a_bare_load(
    pool: WorkerPool, tmp_path: Path, form: ModelProto | bytes
) -> None:
    save(models.add(), tmp_path / "models", "m")
    worker, report = await load(pool, await crafted(tmp_path / "models", form))
    assert report.prepared is None
    assert report.prepared_failure
    assert array((await ask(worker, [floats("x", 1)]))[0]).tolist() == [2]


async def test_form_that_crashes_the_worker_is_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path / "models", "m")
    order = await crafted(tmp_path / "models", models.crash_on_zeros())
    worker = await pool.start("w")
    with pytest.raises(WorkerDied):
        await worker.load(order, lambda _: None)


async def rows_of(worker: Worker, count: int) -> wire.Tensor:
    """Run `models.misaligned` on so many rows."""
    x = tensor("x", "FP32", np.linspace(-1, 1, count * 250, dtype=np.float32).reshape(count, 250))
    return (await ask(worker, [x]))[0]


async def test_aligned_weights_prevent_the_runtimes_crash(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.misaligned(), root, "m")
    raw, report = await load(pool, written_by_the_runtime(root))
    assert report.prepared is not None
    with pytest.raises(WorkerDied):
        await rows_of(raw, 2)
    assert raw.ended.result() == Exit(None, signal.SIGSEGV)
    bare, _ = await load(pool, order_of(root, "m"))
    ours, _ = await load(pool, replace(order_of(root, "m"), prepared=await prepared(pool, root)))
    for count in (1, 2, 3, 64):
        assert bytes((await rows_of(ours, count)).data) == bytes((await rows_of(bare, count)).data)


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (models.divide, "warm_up_failed"),
        (models.unknown_operator, "invalid_model"),
        (lambda: models.external("nowhere"), "unsafe_file"),
    ],
    ids=["warm_up_failed", "invalid_model", "unsafe_file"],
)
async def test_problem_of_the_model_keeps_its_code(
    pool: WorkerPool, tmp_path: Path, model: Callable[[], ModelProto], code: str
) -> None:
    save(model(), tmp_path / "models", "m")
    worker = await pool.start("w")
    with pytest.raises(LoadRefused) as refused:
        await worker.load(await crafted(tmp_path / "models", models.divide()), lambda _: None)
    assert refused.value.code == code


async def test_file_changed_while_its_form_loads_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.add(), root, "m")
    order = await crafted(root, models.slow_model(1000))
    worker = await pool.start("w")

    def touch(stage: str) -> None:
        if stage == "loading":
            os.utime(Path(order.folder) / "model.onnx", ns=(1, 1))

    with pytest.raises(LoadRefused) as refused:
        await worker.load(order, touch)
    assert refused.value.code == "model_changed"


@pytest.mark.parametrize("limit", [0, 100_000])
async def test_memory_limit_holds_for_a_form(pool: WorkerPool, root: Path, limit: int) -> None:
    given = await prepared(pool, root)
    worker = await pool.start("w")
    with pytest.raises(LoadRefused) as refused:
        await worker.load(
            replace(order_of(root, "m"), prepared=given, memory_limit_bytes=limit), lambda _: None
        )
    assert refused.value.code == "out_of_memory"


def has_huge_pages(worker: Worker) -> bool:
    return "THP_enabled:\t1\n" in status(worker.pid)


@pytest.mark.skipif("THP_enabled:\t1\n" not in status(os.getpid()), reason="this kernel has no huge pages")
async def test_huge_pages_are_used_for_copied_or_packed_weights(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.add(), root, "small")
    save(models.table(4), root, "m")
    assert not has_huge_pages((await load(pool, order_of(root, "small")))[0])
    order = order_of(root, "m")
    assert has_huge_pages((await load(pool, order))[0])
    assert not has_huge_pages((await load(pool, replace(order, huge_pages=False)))[0])
    optimised, prepacked = [await prepared(pool, root, form) for form in ("optimised", "prepacked")]
    assert has_huge_pages((await load(pool, replace(order, prepared=optimised)))[0])
    assert not has_huge_pages((await load(pool, replace(order, prepared=prepacked)))[0])
    packed = tmp_path / "packed" / "models"
    save(models.weights(4), packed, "m")
    assert huge_pages_help(4_000_000, await prepared(pool, packed))
