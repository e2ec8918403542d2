"""Whether the files of a pending load are those that its model was loaded from."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.history import given

from events.types import LoadedFile
from runtime.consumer.comparisons import FileComparisons
from runtime.repository import Repository


def touch(folder: Path) -> None:
    os.utime(folder / "model.onnx", ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        pytest.param(lambda _: None, True, id="unchanged"),
        pytest.param(touch, False, id="other time"),
        pytest.param(shutil.rmtree, False, id="removed"),
    ],
)
async def test_comparison_with_loaded_files(
    change: Callable[[Path], None], *, is_same: bool, tmp_path: Path
) -> None:
    folder = models.save(models.identity(), tmp_path, "digits")
    repository, wakeup = Repository(tmp_path), asyncio.Event()
    files = repository.resolve("digits", 1).files
    history = given("load request_again")
    serving = history.model().serving
    assert serving is not None
    loaded = tuple(LoadedFile(file.path, file.bytes, file.mtime_ns, "ab" * 32) for file in files)
    change(folder)
    comparisons = FileComparisons(repository, wakeup.set)
    comparisons.start(history.job("L3"), replace(serving, files=loaded))
    assert comparisons.known == {"L3": None}
    await asyncio.wait_for(wakeup.wait(), 60)
    assert comparisons.known == {"L3": is_same}
    history.change_settings("L3", "L")
    comparisons.forget_ended(history.state)
    assert comparisons.known == {}
