"""Optimised models: made by real workers, kept in a store without a trial, or damaged on purpose."""

import asyncio
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from events.types import digest_of
from runtime.errors import Exit
from runtime.optimised.key import make_key
from runtime.optimised.store import Manifest, OptimisedStore, Useless
from runtime.process.pool import WorkerPool
from runtime.repository import Repository
from runtime.store.folder import StoredFile, hash_file
from runtime.wire import Optimise, Optimised, OptimisedModel
from runtime.worker.loading import IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT, NICENESS, SYS_IOPRIO_SET
from support.workers import LAYERS, order_of


def optimise_order(root: Path, model_id: str = "m") -> Optimise:
    """Make the order to optimise a model into a new folder beside the repository."""
    load = order_of(root, model_id)
    target = root.parent / "optimised" / model_id
    target.mkdir(parents=True, exist_ok=True)
    return Optimise(str(root), load.folder, load.bytes, 1, None, str(target), layers=LAYERS)


async def execute(pool: WorkerPool, order: Optimise) -> None:
    """Optimise a model; the worker then ends by itself."""
    worker = await pool.start("w")
    report: Optimised = await worker.execute(order)
    assert report == Optimised()
    assert await asyncio.shield(worker.ended) == Exit(0, None)


async def optimised(pool: WorkerPool, root: Path) -> OptimisedModel:
    """Optimise model `m`, and describe the result as the store does."""
    order = optimise_order(root)
    await execute(pool, order)
    return describe(order.target)


def describe(folder: Path | str) -> OptimisedModel:
    """Describe the optimised model in a folder to a worker."""
    size = sum(path.lstat().st_size for path in Path(folder).iterdir())
    return OptimisedModel(key("m"), key("m"), str(folder), size)


def found(folder: Path | str) -> tuple[StoredFile, ...]:
    """Describe the files of a folder as they are, but none in folders within."""
    paths = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
    return tuple(hash_file(path.parent, path.name) for path in paths)


def in_background(pid: int) -> bool:
    """Return whether a process has low priority, batch scheduling, and idle disk priority."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    number = SYS_IOPRIO_SET[os.uname().machine] + 1  # ioprio_get follows ioprio_set everywhere
    idle = ctypes.CDLL(None).syscall(number, 1, pid) >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_IDLE
    return int(fields[16]) == NICENESS and os.sched_getscheduler(pid) == os.SCHED_BATCH and idle


MODEL = "digits"


def key(name: str) -> str:
    """Return the key that stands for this name."""
    return hashlib.sha256(name.encode()).hexdigest()


def write(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Write files into a folder, and return it."""
    for path, content in contents.items():
        (folder / path).write_bytes(content)
    return folder


def manifest_of(name: str, *, model_id: str = MODEL, version: int = 1) -> Manifest:
    """Describe an optimised model that passed its trial, or a model without one."""
    figures = {"load_us": 1_000, "bare_load_us": 2_000}
    return Manifest(key=key(name), model_id=model_id, version=version, took_ms=2_500, figures=figures)


def keep(
    store: OptimisedStore, name: str, size: int = 10, *, model_id: str = MODEL, seed: str = ""
) -> OptimisedModel | None:
    """Keep an optimised model of this size: two files whose contents follow from name and seed."""
    draft = write(store.draft(), halves(size, name + seed))
    try:
        sealed, _ = store.seal(manifest_of(name, model_id=model_id), draft)
        store.keep(sealed, draft)
    except Useless:
        return None
    finally:
        store.discard(draft)
    return store.use(key(name))


def record(store: OptimisedStore, name: str, reason: str = "slower", **given: Any) -> None:
    """Record that the optimised model of a name is useless."""
    store.record_useless(manifest_of(name, **given), reason)


def drop(store: OptimisedStore, name: str, reason: str = "bad") -> bool:
    """Drop the optimised model of this name, if there is one."""
    used = store.use(key(name))
    return used is not None and store.drop(used, reason)


def halves(size: int, seed: str) -> dict[str, bytes]:
    """Return the contents of the two files of an optimised model of this size."""
    content = (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]
    return {"model.onnx": content[: size // 2], "weights.bin": content[size // 2 :]}


def files_of(model: OptimisedModel) -> tuple[StoredFile, ...]:
    """Return the files of an optimised model with their present identities and contents."""
    return found(model.folder)


def check_whole(store: OptimisedStore, model: OptimisedModel) -> None:
    """Check that an optimised model has exactly the recorded files with the recorded content."""
    entry = store.find(model.key)
    assert entry is not None
    assert files_of(model) == entry.files
    assert {path.name for path in Path(model.folder).parent.iterdir()} == {"files", "manifest.json"}


def opened(folder: Path, limit_bytes: int = 10**9) -> OptimisedStore:
    """Open a store in this folder."""
    store = OptimisedStore(folder, limit_bytes)
    store.open()
    return store


def key_in(root: Path, model_id: str) -> str:
    """Return the key of a model's highest version, for one thread."""
    repository = Repository(root)
    folder = repository.folder_of(model_id, repository.find_version(model_id))
    return make_key(digest_of((file.path, file.sha256) for file in found(folder)))


async def keep_untried(
    pool: WorkerPool, store: OptimisedStore, root: Path, model_id: str, *, instead: Path | None = None
) -> OptimisedModel:
    """Have a worker optimise a model's highest version, and keep the result untried.

    With `instead`, that ONNX file takes the place of the one that was made: whoever uses it loads that.
    """
    draft = store.draft()
    await execute(pool, replace(optimise_order(root, model_id), target=str(draft)))
    if instead is not None:
        shutil.copy(instead, draft / "model.onnx")
    key = key_in(root, model_id)
    sealed, _ = store.seal(Manifest(key=key, model_id=model_id, version=1), draft)
    store.keep(sealed, draft)
    kept = store.use(key)
    assert kept is not None
    return kept


KEPT_NAMES = "abcdef"
KEPT_LIMIT_BYTES = 400_000
"""Room for four of six, more or less."""
LIFE_S = 0.03
"""Longest life: long enough to keep some; most lives end while one is being kept."""


def keep_and_be_killed(folder: Path, lives: int, seed: int) -> None:
    """Keep optimised models in processes that are killed at random moments; check what each leaves.

    Prints what was seen. For a process with one thread, since it forks.
    """
    dice, seen = random.Random(seed), Counter[str]()
    for _ in range(lives):
        _live(folder, dice.random(), dice.randrange(3), dice.uniform(0, LIFE_S))
        seen["lives"] += 1
        seen["drafts"] += len(list(folder.glob("incoming/*")))
        store = opened(folder, KEPT_LIMIT_BYTES)
        check_store(store, folder)
        seen["models"] += store.kept[0]
    sys.stdout.write(json.dumps(seen))


def _live(folder: Path, seed: float, changes: int, seconds: float) -> None:
    """Kill a process this long after it has opened the store and made so many changes."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _keep_for_ever(folder, random.Random(seed), told)
        finally:
            os._exit(1)  # whatever it was: who is not killed has failed
    os.close(told)
    for _ in range(1 + changes):
        os.read(ready, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.close(ready)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _keep_for_ever(folder: Path, dice: random.Random, told: int) -> None:
    store = opened(folder, KEPT_LIMIT_BYTES)
    while True:
        os.write(told, b".")
        change_store(store, dice)


def change_store(store: OptimisedStore, dice: random.Random, beside: OptimisedStore | None = None) -> None:
    """Do what a server does to a store, or what somebody does beside it."""
    name = dice.choice(KEPT_NAMES)
    match dice.randrange(12):
        case 0:
            record(store, name, model_id=name)
        case 1:
            drop(store, name, "it killed its worker")
        case 2:
            (beside or store).clear(name)
        case 3:
            (beside or store).entries()
        case 4:
            store.use(key(name))
        case _:
            keep(store, name, dice.randrange(1, 200_000), model_id=name, seed=str(dice.random()))


def check_store(store: OptimisedStore, folder: Path) -> None:
    """Check that all entries of an open store are whole, and that there is nothing else in its folder."""
    entries = store.entries()
    assert {path.name for path in (folder / "forms").iterdir()} == {entry.key for entry in entries}
    assert list((folder / "incoming").iterdir()) == []
    assert sum(entry.bytes for entry in entries) <= store.limit_bytes
    for entry in entries:
        assert entry.key == key(entry.model_id)
        prepared = store.use(entry.key)
        assert (prepared is None) == (entry.reason is not None)
        if prepared is not None:
            assert prepared.sha256 == entry.sha256
            check_whole(store, prepared)
