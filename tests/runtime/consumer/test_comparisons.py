"""Whether the bytes of a pending load are those that its model was loaded from."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.history import History, given
from support.store import nothing_incoming, opened_store

from events.models import Serving
from events.types import LoadedFile
from runtime.consumer.comparisons import ContentComparisons
from runtime.consumer.loadfiles import PendingFiles
from runtime.contents import ModelContents
from runtime.repository import Repository
from runtime.store.identities import hash_file


def touch(folder: Path) -> None:
    os.utime(folder / "model.onnx", ns=(1, 1))


def keep_times(folder: Path) -> None:
    seen = (folder / "model.onnx").stat()
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(folder / "model.onnx", ns=(seen.st_atime_ns, seen.st_mtime_ns))


def served_from(folder: Path, history: History) -> Serving:
    serving = history.model().serving
    assert serving is not None
    file = hash_file(folder, "model.onnx")
    return replace(serving, files=(LoadedFile(file.path, file.bytes, file.mtime_ns, file.sha256),))


def pending(root: Path) -> PendingFiles:
    (root / "data").mkdir()
    return PendingFiles(ModelContents(Repository(root), opened_store(root / "data")))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        pytest.param(lambda _: None, True, id="unchanged"),
        pytest.param(touch, True, id="other time"),
        pytest.param(keep_times, False, id="same size and time"),
        pytest.param(shutil.rmtree, False, id="removed"),
    ],
)
async def test_comparison_with_loaded_bytes(
    change: Callable[[Path], None], *, is_same: bool, tmp_path: Path
) -> None:
    folder, wakeup = models.save(models.identity(), tmp_path, "digits"), asyncio.Event()
    history = given("load request_again")
    serving = served_from(folder, history)
    change(folder)
    comparisons = ContentComparisons(pending(tmp_path), wakeup.set)
    comparisons.start(history.job("L3"), serving)
    assert comparisons.known == {"L3": None}
    await asyncio.wait_for(wakeup.wait(), 60)
    assert comparisons.known == {"L3": is_same}
    history.change_settings("L3", "L")
    comparisons.forget_ended(history.state)
    assert comparisons.known == {}


async def test_end_of_a_job_ends_its_comparison(tmp_path: Path) -> None:
    folder, wakeup = models.save(models.identity(), tmp_path, "digits"), asyncio.Event()
    history, files = given("load request_again"), pending(tmp_path)
    comparisons = ContentComparisons(files, wakeup.set)
    comparisons.start(history.job("L3"), served_from(folder, history))
    (task,) = comparisons.tasks.values()
    await asyncio.sleep(0)  # it has begun
    history.change_settings("L3", "L")
    comparisons.forget_ended(history.state)
    files.forget_ended(history.state)
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()
    assert (comparisons.known, comparisons.tasks, wakeup.is_set()) == ({}, {}, False)
    await nothing_incoming(tmp_path / "data")
