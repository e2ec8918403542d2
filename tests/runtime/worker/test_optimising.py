"""Making an optimised model in a worker: its files, refusals and limits."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from onnx import ModelProto, helper
from support import models
from support.models import save
from support.optimised import execute, in_background, optimise_order
from support.workers import computing, refusal, until

from runtime import wire
from runtime.errors import Exit, WorkerDied
from runtime.process.pool import WorkerPool
from runtime.worker.optimising import has_context_in


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a model `m` of eight layers, 2 MB."""
    save(models.weights(2), tmp_path / "models", "m")
    return tmp_path / "models"


def target_of(order: wire.Optimise) -> Path:
    return Path(order.target)


async def test_written_files_are_complete_and_private(pool: WorkerPool, root: Path) -> None:
    order = optimise_order(root)
    await execute(pool, order)
    assert {path.name for path in target_of(order).iterdir()} == {"model.onnx", "weights.bin"}
    assert {path.stat().st_mode & 0o777 for path in target_of(order).iterdir()} == {0o600}


async def test_target_folder_must_exist_and_be_empty(pool: WorkerPool, root: Path) -> None:
    order = optimise_order(root)
    ours = target_of(order) / "model.onnx"
    ours.write_text("ours")
    assert (await refusal(pool, order)).code == "optimise_failed"
    assert ours.read_text() == "ours"
    ours.rename(target_of(order).parent / "away")
    target_of(order).rmdir()
    refused = await refusal(pool, order)
    assert (refused.code, str(order.target) in str(refused)) == ("optimise_failed", True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of this size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("only who may mount has a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("megabytes", "spare", "fits"),
    [(40, 3, False), (40, 5, True), (8, 8, True)],
    ids=["full", "fits", "small"],
)
async def test_disk_reserve_is_kept_free(
    pool: WorkerPool, tmp_path: Path, megabytes: int, spare: int, *, fits: bool
) -> None:
    """Its weights have 2 MB, half of the room; a twentieth of the disk is reserved."""
    save(models.weights(1, layers=4), tmp_path / "models", "m")
    order = optimise_order(tmp_path / "models")
    with small_disk(target_of(order).parent, megabytes):
        target_of(order).mkdir()
        others, reserve = target_of(order).parent / "others", megabytes * 2**20 // 20
        free = os.statvfs(order.target).f_bavail * os.statvfs(order.target).f_frsize
        others.write_bytes(bytes(max(0, free - reserve - spare * 10**6)))
        if fits:
            await execute(pool, order)
        else:
            refused = await refusal(pool, order)
            assert (refused.code, "has room for files of" in str(refused)) == ("disk_full", True)
        used = os.statvfs(order.target)
        assert used.f_bavail * used.f_frsize >= reserve


REFUSED: dict[str, tuple[Callable[[], ModelProto | bytes], dict[str, Any], str, str]] = {
    "file too long": (lambda: models.weights(2), {"most_bytes": 10**6}, "optimise_failed", "1000000 bytes"),
    "folded weights too long": (models.grown, {}, "optimise_failed", "a file of it has more than"),
    "memory": (models.memory_bomb_on_load, {"memory_limit_bytes": 200_000_000}, "out_of_memory", "200000000"),
    "data outside": (lambda: models.external("../../secret"), {}, "unsafe_file", "secret"),
    "no model": (lambda: models.CORRUPT, {}, "optimise_failed", "copy it again"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_optimising_is_refused_with_code(pool: WorkerPool, tmp_path: Path, case: str) -> None:
    build, changes, code, words = REFUSED[case]
    model = build()
    models.save_bytes(
        model if isinstance(model, bytes) else model.SerializeToString(), tmp_path / "models", "m"
    )
    (tmp_path / "models" / "secret").write_bytes(models.external_bytes())
    order = replace(optimise_order(tmp_path / "models"), **changes)
    refused = await refusal(pool, order)
    assert (refused.code, words in str(refused)) == (code, True), refused
    written = [path.stat().st_size for path in target_of(order).iterdir()]
    assert max(written, default=0) <= min(order.most_bytes or 64 * 2**20, 64 * 2**20)


async def test_kill_while_optimising_is_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.slow_model(), root, "m")
    worker = await pool.start("w")
    preparing = asyncio.ensure_future(worker.execute(optimise_order(root)))
    await until(computing(worker.pid))
    await until(lambda: in_background(worker.pid))
    worker.kill()
    with pytest.raises(WorkerDied):
        await preparing
    assert worker.ended.result() == Exit(None, signal.SIGKILL)


@pytest.mark.parametrize(
    ("files", "is_own"),
    [
        (["m.bin"], True),
        (["m.bin", "m.bin"], True),
        ([], False),
        (["m.bin", "../m.bin"], False),
        (["m.bin2"], False),
    ],
    ids=["one", "several", "none", "other folder", "longer name"],
)
def test_contexts_of_provider_lie_in_one_file(files: list[str], *, is_own: bool) -> None:
    """Models as a provider of a device writes them, with one node for each part that it compiled."""
    nodes = [
        helper.make_node(
            "EPContext", ["x"], [f"y{at}"], domain="com.microsoft", embed_mode=0, ep_cache_context=file
        )
        for at, file in enumerate(files)
    ]
    outputs = [models.value("x", 1, [None]), *(models.value(f"y{at}", 1, [None]) for at in range(len(files)))]
    written = helper.make_model(helper.make_graph(nodes, "g", outputs[:1], outputs[1:]))
    assert has_context_in(written.SerializeToString(), "m.bin") == is_own
