"""Held versions: found, taken, hashed and given back whatever happens; comparisons with given contents."""

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from support.mounts import hanging_mounts
from support.store import blobs, nothing_incoming, opened_store, write_version
from support.workers import until

from events.types import Contents, LoadedFile
from runtime.errors import LoadRefused
from runtime.repository import Repository, RepositoryBusy
from runtime.store import versions as module
from runtime.store.folder import HASH_BLOCK_BYTES
from runtime.store.store import Store
from runtime.store.versions import HeldVersion, Versions

FILES = {"data/w.bin": b"weights", "model.onnx": b"model"}


def contents(files: dict[str, bytes]) -> Contents:
    return tuple((path, sha256(content).hexdigest()) for path, content in sorted(files.items()))


def loaded(files: dict[str, bytes]) -> list[LoadedFile]:
    return [LoadedFile(path, len(files[path]), 0, digest) for path, digest in contents(files)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of version 1 of `m`, with `FILES`."""
    return write_version(tmp_path / "models", FILES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store without a limit."""
    return opened_store(tmp_path)


@pytest.fixture
def versions(folder: Path, store: Store) -> Versions:
    """Versions of the repository and the store of `tmp_path`."""
    return Versions(Repository(folder.parent.parent), store)


async def take(versions: Versions) -> tuple[LoadedFile, ...]:
    """Take the version into the store, as a load does that is completed."""
    async with versions.version("m", 1) as held:
        await held.hash()
        await held.settle()
        await held.make_durable()
        return held.loaded_files


async def nothing_held(store: Store) -> None:
    """Wait until all that was held is given back."""
    await until(lambda: not store._held)
    await nothing_incoming(store.path.parent)


async def test_version_moves_from_its_copy_to_the_store(
    versions: Versions, store: Store, folder: Path
) -> None:
    async with versions.version("m", 1) as held:
        assert held.folder.parent.parent == store.path / "incoming"
        assert (held.sha256s, held.contents, held.digest) == (None, None, None)
        with pytest.raises(LoadRefused, match="is a text and no model"):
            await versions.stat("m", 1)
        assert await held.hash() == contents(FILES) == held.contents
        await held.settle()
        assert held.root == held.folder == store.folder_of(held.digest or "")
        assert store._held
    assert versions.known_contents("m", 1) == contents(FILES)
    shutil.rmtree(store.path / "incoming")
    async with versions.version("m", 1) as again:  # nothing is copied or hashed
        assert (again.folder, again.copying_us, again.hashing_us) == (held.folder, None, 0)
        assert again.loaded_files == held.loaded_files
    assert not versions.has_changed("m", 1, held.loaded_files)
    os.utime(folder / "model.onnx")
    assert versions.has_changed("m", 1, held.loaded_files)
    assert [*versions.changed] == [("m", 1)]
    shutil.rmtree(store.path / "sources")  # then only what is certain counts
    assert not versions.has_changed("m", 1, held.loaded_files)
    assert not versions.changed
    (folder / "model.onnx").write_bytes(b"longer" * 99)
    assert versions.has_changed("m", 1, held.loaded_files)


@pytest.mark.parametrize("has_store", [True, False])
async def test_bundle_beside_is_of_the_version(versions: Versions, folder: Path, *, has_store: bool) -> None:
    if not has_store:
        versions.store = None
    bundle = folder.parent / "1.sig"
    for content in (b"first", b"other"):
        files, before = {**FILES, "1.sig": content}, await take(versions)
        bundle.write_bytes(content)
        assert versions.has_changed("m", 1, before)
        async with versions.version("m", 1) as held:
            assert await held.hash() == contents(files)
            await held.settle()
            folder_of_bundle = held.folder if has_store else folder.parent
            assert (folder_of_bundle / "1.sig").read_bytes() == content
        assert versions.known_contents("m", 1) == contents(files)
        assert await versions.has_bytes_of("m", 1, loaded(files))
    bundle.unlink()
    assert await versions.has_bytes_of("m", 1, loaded(FILES))


async def test_folder_exchanged_while_it_is_taken_is_not_known(versions: Versions, folder: Path) -> None:
    other = write_version(folder.parent.parent, {"model.onnx": b"other"}, "m", 2)

    def exchange() -> None:
        with contextlib.suppress(OSError):
            folder.rename(folder.parent / "aside")
            other.rename(folder)

    async with versions.version("m", 1, on_piece=exchange) as held:
        await held.hash()
        await held.settle()
        assert held.contents == contents(FILES)
    assert versions.known_contents("m", 1) is None


async def test_expected_files_come_from_the_store_though_all_hangs(
    versions: Versions, store: Store, folder: Path
) -> None:
    loaded = await take(versions)
    with hanging_mounts(folder.parent):
        async with versions.version("m", 1, loaded) as held:
            assert held.loaded_files == loaded
            assert held.folder == store.folder_of(held.digest or "")
    await nothing_held(store)


# What is given back


async def test_folder_that_hangs_beneath_a_model_that_answers(
    versions: Versions, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOAD_LIMIT_S", 0.2)
    with hanging_mounts(folder / "data"):
        with pytest.raises(RepositoryBusy, match=r"folder of 'm' has given nothing to copy for 0\.2 s"):
            async with versions.version("m", 1):
                pass
        assert not await versions.has_bytes_of("m", 1, loaded(FILES))
    await until(lambda: all(each.name != module.THREAD for each in threading.enumerate()))
    await take(versions)
    await nothing_held(store)


@pytest.mark.parametrize("what", ["a copy", "a stored version"])
async def test_thread_gives_back_what_it_finds_when_nobody_waits(
    versions: Versions, store: Store, what: str
) -> None:
    loaded, began, goes_on = None, threading.Event(), threading.Event()
    if what == "a stored version":
        loaded = await take(versions)
        for path in store.path.glob("versions/*/files/model.onnx"):
            os.utime(path)  # so that it is hashed again

    def hang() -> None:
        began.set()
        goes_on.wait()

    async def hold() -> None:
        async with versions.version("m", 1, loaded, hang):
            raise AssertionError

    holding = asyncio.create_task(hold())
    await until(began.is_set)
    holding.cancel()
    await asyncio.wait([holding], timeout=60)
    assert holding.cancelled()  # without waiting for the thread
    goes_on.set()
    await nothing_held(store)


async def test_leaving_while_it_is_hashed_ends_the_thread(versions: Versions, store: Store) -> None:
    pieces, goes_on = list[int](), threading.Event()
    goes_on.set()

    def count() -> None:
        pieces.append(1)
        goes_on.wait()

    async with versions.version("m", 1, on_piece=count) as held:
        goes_on.clear()
        copied = len(pieces)
        hashing = asyncio.create_task(held.hash())
        await until(lambda: len(pieces) > copied)
        hashing.cancel()
    goes_on.set()
    await nothing_held(store)
    assert len(pieces) == copied + 1


async def test_leaving_while_it_is_settled_ends_the_hold(versions: Versions, store: Store) -> None:
    async with contextlib.AsyncExitStack() as stack:
        held = await stack.enter_async_context(versions.version("m", 1))
        await held.hash()
        with store._lock:  # the thread waits for it
            settling = asyncio.create_task(held.settle())
            await asyncio.sleep(0)
            settling.cancel()
            await asyncio.wait([settling], timeout=60)
            await stack.aclose()
    await until(lambda: versions.known_contents("m", 1) is not None)
    await nothing_held(store)


async def test_lack_of_threads_fails_the_load_and_releases_its_files(
    versions: Versions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        async with versions.version("m", 1) as held:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RepositoryBusy, match="can't start new thread"):
                await held.hash()
    await nothing_held(store)  # once a thread can start


# Comparisons


def keep_times(path: Path, content: bytes) -> None:
    seen = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


@pytest.mark.parametrize("has_store", [True, False])
@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        pytest.param(lambda _: None, True, id="unchanged"),
        pytest.param(lambda folder: os.utime(folder / "model.onnx", ns=(1, 1)), True, id="other time"),
        pytest.param(
            lambda folder: keep_times(folder / "model.onnx", b"MODEL"), False, id="same size and time"
        ),
        pytest.param(lambda folder: (folder / "more").touch(), False, id="more files"),
        pytest.param(lambda folder: (folder / "data" / "w.bin").unlink(), False, id="fewer files"),
        pytest.param(shutil.rmtree, False, id="removed"),
    ],
)
@pytest.mark.parametrize("is_known", [True, False])
async def test_comparison_copies_nothing_and_is_known_then(
    change: Callable[[Path], None],
    versions: Versions,
    folder: Path,
    tmp_path: Path,
    *,
    is_same: bool,
    is_known: bool,
    has_store: bool,
) -> None:
    if not has_store:
        versions.store = None
    if is_known:
        await take(versions)
    had = blobs(tmp_path)
    change(folder)
    assert await versions.has_bytes_of("m", 1, loaded(FILES)) is is_same
    assert await versions.has_bytes_of("m", 1, loaded({"model.onnx": b"other"})) is False
    assert blobs(tmp_path) == had
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
    if is_same:
        assert versions.known_contents("m", 1) == (contents(FILES) if is_known or not has_store else None)


OLD = {"data/w.bin": b"w" * 2 * HASH_BLOCK_BYTES, "model.onnx": b"model"}
NEW = {"data/w.bin": b"W" * 2 * HASH_BLOCK_BYTES, "model.onnx": b"MODEL"}
TORN_FILES = {**OLD, "model.onnx": b"MODEL"}
TORN_FILE = {**NEW, "data/w.bin": b"w" * HASH_BLOCK_BYTES + b"W" * HASH_BLOCK_BYTES}


@pytest.mark.parametrize("at_piece", [1, 2, 3])
@pytest.mark.parametrize("how", ["overwritten", "replaced", "exchanged", "folder exchanged"])
@pytest.mark.parametrize("expected", [OLD, TORN_FILES, TORN_FILE, NEW])
def test_comparison_refuses_files_that_change_meanwhile(
    versions: Versions, folder: Path, expected: dict[str, bytes], how: str, at_piece: int
) -> None:
    write_version(folder.parent.parent, OLD)
    other, left = write_version(folder.parent.parent, NEW, "m", 2), [at_piece]

    def change() -> None:
        left[0] -= 1
        if left[0]:
            return
        match how:
            case "overwritten":
                for path, content in NEW.items():
                    keep_times(folder / path, content)
            case "replaced":
                for path in NEW:
                    (other / path).replace(folder / path)
            case _:
                name = "data" if how == "folder exchanged" else "."
                (folder / name).resolve().rename(folder.parent / "aside")
                (other / name).resolve().rename((folder / name).resolve())

    with contextlib.suppress(LoadRefused):
        is_same = HeldVersion(versions, "m", 1, change)._compare(loaded(expected))
        # An exchanged folder is compared as it was when it was opened.
        assert is_same is (how == "exchanged" and expected == OLD)
