"""The files of one load: obtained, given back whatever happens, and compared with those that are served."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.history import History, given
from support.mounts import hanging_mounts
from support.store import nothing_incoming, opened_store, write_version
from support.workers import until

from events.models import Serving
from events.types import LoadedFile
from runtime.consumer import loadfiles
from runtime.consumer.loadfiles import LoadFiles, PendingFiles
from runtime.filesystem import RepositoryBusy
from runtime.repository import Repository
from runtime.store.contents import ModelContents
from runtime.store.manifest import hash_file


async def test_folder_that_hangs_beneath_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadfiles, "LOAD_LIMIT_S", 0.2)
    folder = write_version(tmp_path / "models", {"model.onnx": b"model", "data/w.bin": b"weights"})
    contents = ModelContents(Repository(tmp_path / "models"), opened_store(tmp_path))
    files = LoadFiles(contents, "m", 1)
    with hanging_mounts(folder / "data"):
        with pytest.raises(RepositoryBusy, match=r"folder of 'm' has given nothing to copy for 0\.2 s"):
            await files.obtain(None)
        files.close()
    await until(lambda: not files._running)  # the thread has ended with the mount
    assert files.found is None
    again = LoadFiles(contents, "m", 1)
    assert [file.path for file in (await again.obtain(None)).files] == ["data/w.bin", "model.onnx"]
    again.close()
    await nothing_incoming(tmp_path)


async def test_files_that_two_threads_found_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadfiles, "LOAD_LIMIT_S", 0.2)
    write_version(tmp_path / "models", {"model.onnx": b"model"})
    files, goes_on = (
        LoadFiles(ModelContents(Repository(tmp_path / "models"), opened_store(tmp_path)), "m", 1),
        threading.Event(),
    )
    monkeypatch.setattr(files, "_is_cancelled", lambda: not goes_on.wait())  # each thread hangs at a piece
    for _ in range(2):
        with pytest.raises(RepositoryBusy):
            await files.obtain(None)
    goes_on.set()
    await until(lambda: not files._running)
    assert files.found is not None
    files.close()
    await nothing_incoming(tmp_path)


async def test_lack_of_threads_fails_the_load_and_releases_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    write_version(tmp_path / "models", {"model.onnx": b"model"})
    contents = ModelContents(Repository(tmp_path / "models"), opened_store(tmp_path))
    files = LoadFiles(contents, "m", 1)
    await files.obtain(None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RepositoryBusy, match="can't start new thread"):
            await files.hash()
        files.close()
    await nothing_incoming(tmp_path)  # once a thread can start


# Comparisons with the bytes that the model serves


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
    files = PendingFiles(ModelContents(Repository(tmp_path), opened_store(tmp_path)), wakeup.set)
    files.compare(history.job("L3"), serving)
    assert files.unchanged == {"L3": None}
    await asyncio.wait_for(wakeup.wait(), 60)
    assert files.unchanged == {"L3": is_same}
    history.change_settings("L3", "L")
    files.forget_ended(history.state)
    assert files.unchanged == {}


async def test_end_of_a_job_ends_its_comparison(tmp_path: Path) -> None:
    folder, wakeup = models.save(models.identity(), tmp_path, "digits"), asyncio.Event()
    history = given("load request_again")
    files = PendingFiles(ModelContents(Repository(tmp_path), opened_store(tmp_path)), wakeup.set)
    files.compare(history.job("L3"), served_from(folder, history))
    (task,) = files.comparisons.values()
    await asyncio.sleep(0)  # it has begun
    history.change_settings("L3", "L")
    files.forget_ended(history.state)
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()
    assert (files.unchanged, files.comparisons, wakeup.is_set()) == ({}, {}, False)
    await nothing_incoming(tmp_path)
