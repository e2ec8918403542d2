"""The files of one load: a folder that hangs while they are copied ends the load, and nothing is left."""

import asyncio
import threading
from pathlib import Path

import pytest
from support.mounts import hanging_mounts
from support.store import nothing_incoming, opened_store, write_version
from support.workers import until

from runtime.consumer import loadfiles
from runtime.consumer.loadfiles import LoadFiles
from runtime.contents import ModelContents
from runtime.filesystem import RepositoryBusy
from runtime.repository import Repository


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


async def stored(root: Path) -> ModelContents:
    """Return the contents of a repository whose model `m` was loaded before, and is stored."""
    write_version(root / "models", {"model.onnx": b"model"})
    contents = ModelContents(Repository(root / "models"), opened_store(root))
    files = LoadFiles(contents, "m", 1)
    await files.obtain(None)
    await files.hash()
    await files.settle()
    files.close()
    await until(lambda: files.found is None)
    return contents


def held(contents: ModelContents) -> int:
    assert contents.store is not None
    return sum(contents.store._held.values())


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard before", "heard after"])
async def test_look_obtains_stored_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_heard: bool
) -> None:
    monkeypatch.setattr(loadfiles, "FRESH_S", 0.01)
    contents = await stored(tmp_path)
    files = LoadFiles(contents, "m", 1)
    look = files.make_look()
    # The event loop hears of a look in its own thread only after the files were obtained.
    (seen,) = await asyncio.to_thread(look) if is_heard else look()
    assert seen.bytes == len(b"model")
    found = files.found
    assert found is not None
    assert await files.obtain(None) is found
    await asyncio.sleep(0)  # it hears
    await until(lambda: not files._is_fresh)
    assert (files.found, held(contents)) == (found, 1)
    files.close()
    await until(lambda: held(contents) == 0)


async def test_load_that_waits_holds_nothing_and_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadfiles, "FRESH_S", 0.0)
    contents = await stored(tmp_path)
    files = LoadFiles(contents, "m", 1)
    await asyncio.to_thread(files.make_look())
    await until(lambda: files.found is None and held(contents) == 0)
    (tmp_path / "models" / "m" / "1" / "model.onnx").write_bytes(b"another model")
    assert [file.bytes for file in (await files.obtain(None)).files] == [len(b"another model")]
    files.close()
    await nothing_incoming(tmp_path)


async def test_look_that_ends_after_its_load_leaves_nothing_held(tmp_path: Path) -> None:
    contents = await stored(tmp_path)
    files = LoadFiles(contents, "m", 1)
    look = files.make_look()
    files.close()
    await asyncio.to_thread(look)
    await until(lambda: files.found is None)
    await until(lambda: held(contents) == 0)


async def test_look_beside_a_comparison_leaves_one_hold(tmp_path: Path) -> None:
    contents = await stored(tmp_path)
    files = LoadFiles(contents, "m", 1)
    await files.obtain(None)
    await asyncio.to_thread(files.make_look())
    assert held(contents) == 1
    files.close()
    await until(lambda: held(contents) == 0)


async def test_lack_of_threads_fails_the_load_and_releases_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(loadfiles, "RETRY_S", 0.01)
    write_version(tmp_path / "models", {"model.onnx": b"model"})
    contents = ModelContents(Repository(tmp_path / "models"), opened_store(tmp_path))
    files = LoadFiles(contents, "m", 1)
    await files.obtain(None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RepositoryBusy, match="can't start new thread"):
            await files.hash()
        files.close()
        assert list((tmp_path / "store" / "incoming").iterdir())
    await nothing_incoming(tmp_path)
