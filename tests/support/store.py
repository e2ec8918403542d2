"""A store of model versions for the tests: taken from a repository, damaged, or killed at any line."""

import json
import os
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import runtime.store
from runtime.repository import Repository
from runtime.store.folder import OnPiece, StoredVersion, hash_files, on_no_piece
from runtime.store.store import FindNeeded, Store, verify_store
from support.workers import until

CODE = str(Path(runtime.store.__file__).parent)


def opened_store(data: Path, limit_bytes: int | None = None, find_needed: FindNeeded = lambda _: ()) -> Store:
    """Open the store of a data directory."""
    store = Store(data / "store", limit_bytes, find_needed)
    store.open()
    return store


def write_version(root: Path, files: dict[str, bytes], model_id: str = "m", version: int = 1) -> Path:
    """Write a version into a repository, and return its folder."""
    folder = root / model_id / str(version)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def take(store: Store, root: Path, folder: Path, on_piece: OnPiece = on_no_piece) -> Path:
    """Take a version of a repository, as a load does."""
    with Repository(root).open_version(folder.parent.name, int(folder.name)) as (opened, files):
        return store.take(opened, files, on_piece)


def store_version(store: Store, root: Path, folder: Path) -> StoredVersion:
    """Take a version into the store, durably; nothing holds it afterwards."""
    copy = take(store, root, folder)
    version = store.settle(copy, hash_files(copy))
    store.make_durable(version.digest)
    store.release(version.digest)
    return version


def files_of(data: Path, version: StoredVersion) -> Path:
    """Return the folder of a stored version's files in a data directory."""
    return data / "store" / "versions" / version.digest / "files"


def blobs(data: Path) -> list[str]:
    """Return the names of the blobs."""
    return sorted(path.name for path in (data / "store" / "blobs").glob("*/*"))


async def nothing_incoming(data: Path) -> None:
    """Wait until the incoming folder is empty: a manifest is written there after the end of a load."""
    await until(lambda: not list((data / "store" / "incoming").iterdir()))


def check_store(data: Path, *, loads_failed: bool = False) -> int:
    """Check that all in a store that was opened is whole, and return how many versions it has.

    A version of a load that failed late may wait for its manifest until the next start.
    """
    versions = list(verify_store(data / "store"))
    assert [each for each in versions if each.findings] == []
    assert loads_failed or len(versions) == len(list((data / "store" / "versions").iterdir()))
    assert list((data / "store" / "incoming").iterdir()) == []
    links = {path.stat().st_nlink for path in (data / "store" / "blobs").glob("*/*")}
    assert not links or min(links) > 1
    return len(versions)


def die_at_lines(root: Path, data: Path, first: int, step: int) -> None:
    """Take two versions that share a file, in processes that die at each `step`th line; check each state.

    Prints what was seen. For a process with one thread, since it forks.
    """
    seen, line = Counter[str](), first
    while True:
        pid = os.fork()
        if pid == 0:
            _take_and_die(root, data, line)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen["left in incoming"] += any((data / "store" / "incoming").iterdir())
        seen["without a manifest"] += _without_manifest(data)
        store = opened_store(data)
        seen["versions"] += check_store(data)
        store_version(store, root, root / "m" / "1")
        assert check_store(data) >= 1
        seen["lives"] += 1
        if status == 0:
            break
        store = opened_store(data, 1)  # swept for the next life
        for path in (data / "store" / "versions").iterdir():
            store._remove_version(path.name)
        line += step
    sys.stdout.write(json.dumps(seen))


def _without_manifest(data: Path) -> int:
    versions = (data / "store" / "versions").iterdir()
    return sum(not (path / "manifest.json").exists() for path in versions)


def _take_and_die(root: Path, data: Path, line: int) -> None:
    left = line

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        if event == "line":
            left -= 1
            if not left:
                os._exit(9)
        return trace

    try:
        store = opened_store(data)
        sys.settrace(trace)
        for version in (1, 2):
            store_version(store, root, root / "m" / str(version))
        sys.settrace(None)
        os._exit(0)
    finally:
        os._exit(1)
