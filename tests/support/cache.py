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
from typing import Any, get_args

from msgspec.structs import replace

from runtime.cache.key import make_key
from runtime.cache.manifest import CachedForm, Manifest
from runtime.cache.store import ModelCache
from runtime.errors import Exit
from runtime.process.pool import WorkerPool
from runtime.repository import Repository
from runtime.store.manifest import StoredFile, digest_of, hash_file
from runtime.wire import CachedCopy, Form, Prepare, PrepareDone
from runtime.worker.loading import IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT, NICENESS, SYS_IOPRIO_SET
from support.workers import LAYERS, order_of

FORMS: tuple[Form, ...] = get_args(Form)


def prepare_order(root: Path, form: Form = "prepacked", model_id: str = "m") -> Prepare:
    """Make the order to prepare a model into a new folder beside the repository."""
    load = order_of(root, model_id)
    target = root.parent / "forms" / form
    target.mkdir(parents=True, exist_ok=True)
    return Prepare(str(root), load.folder, load.bytes, 1, None, form, str(target), layers=LAYERS)


async def prepare_form(pool: WorkerPool, order: Prepare) -> PrepareDone:
    """Prepare a model; the worker then ends by itself."""
    worker = await pool.start("w")
    report: PrepareDone = await worker.execute(order)
    assert await asyncio.shield(worker.ended) == Exit(0, None)
    return report


async def prepared(pool: WorkerPool, root: Path, form: Form = "prepacked") -> CachedCopy:
    """Prepare model `m`, and describe the form as the cache does."""
    order = prepare_order(root, form)
    await prepare_form(pool, order)
    return describe(order.target, form)


def describe(folder: Path | str, form: Form) -> CachedCopy:
    """Describe the form in a folder to a worker."""
    return CachedCopy(str(folder), form, sum(path.lstat().st_size for path in Path(folder).iterdir()))


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


def manifest_of(
    name: str, *, model_id: str = MODEL, form: Form | None = "prepacked", version: int = 1
) -> Manifest:
    """Describe a form that passed its trial, or a model without one."""
    return Manifest(
        key=key(name),
        model_id=model_id,
        version=version,
        took_ms=2_500,
        form=form,
        figures={"loading_us": 1_000, "ratio": 0.5, "tolerance": "bit-equal"},
        tried={"prepacked": "the worker ended: signal 11"} if form == "optimised" else {},
    )


def keep(
    store: ModelCache,
    name: str,
    size: int = 10,
    *,
    model_id: str = MODEL,
    form: Form = "prepacked",
    seed: str = "",
) -> CachedForm | None:
    """Keep a form of this size: two files whose contents follow from name and seed."""
    draft = write(store.draft(), halves(size, name + seed))
    why_not = store.keep(manifest_of(name, model_id=model_id, form=form), draft)
    return store.use(key(name)) if why_not is None else None


def record(store: ModelCache, name: str, tried: Mapping[Form, str] = {}, **given: Any) -> None:
    """Record that no form of a model is of use."""
    store.record_useless(manifest_of(name, **given), tried)


def drop(store: ModelCache, name: str, reason: str = "bad") -> bool:
    """Drop the form of this name, if there is one."""
    used = store.use(key(name))
    return used is not None and store.drop(used, reason)


def halves(size: int, seed: str) -> dict[str, bytes]:
    """Return the contents of two files of a form of this size."""
    content = (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]
    return {"model.onnx": content[: size // 2], "weights.bin": content[size // 2 :]}


def files_of(form: CachedForm) -> tuple[StoredFile, ...]:
    """Return the files of a form with their present identities and contents."""
    return found(form.copy.folder)


def check_whole(store: ModelCache, form: CachedForm) -> None:
    """Check that a form has exactly the recorded files with the recorded content."""
    entry = store.find(form.key)
    assert entry is not None
    assert files_of(form) == entry.files
    assert {path.name for path in Path(form.copy.folder).parent.iterdir()} == {"files", "manifest.json"}


def opened(folder: Path, limit_bytes: int = 10**9) -> ModelCache:
    """Open a store in this folder."""
    store = ModelCache(folder, limit_bytes)
    store.open()
    return store


def key_in(root: Path, model_id: str) -> str:
    """Return the key of a model's highest version, for one thread."""
    repository = Repository(root)
    folder = repository.folder_of(model_id, repository.find_version(model_id))
    return make_key(digest_of((file.path, file.sha256) for file in found(folder)))


async def keep_form(
    pool: WorkerPool,
    store: ModelCache,
    root: Path,
    model_id: str,
    form: Form = "optimised",
    *,
    instead: Path | None = None,
) -> CachedForm:
    """Have a worker make a form of a model's highest version, and keep it untried.

    With `instead`, that ONNX file takes the place of the one that was made: whoever loads the form loads it.
    """
    draft = store.draft()
    await prepare_form(pool, replace(prepare_order(root, form, model_id), target=str(draft)))
    if instead is not None:
        shutil.copy(instead, draft / "model.onnx")
    key = key_in(root, model_id)
    assert store.keep(Manifest(key=key, model_id=model_id, version=1, form=form), draft) is None
    kept = store.use(key)
    assert kept is not None
    return kept


KEPT_NAMES = "abcdef"
KEPT_LIMIT_BYTES = 400_000
"""Room for four of six forms, more or less."""
LIFE_S = 0.03
"""Longest life: long enough to keep some forms; most lives end while one is being kept."""


def keep_and_be_killed(folder: Path, lives: int, seed: int) -> None:
    """Keep cached models in processes that are killed at random moments; check what each leaves.

    Prints what was seen. For a process with one thread, since it forks.
    """
    dice, seen = random.Random(seed), Counter[str]()
    for _ in range(lives):
        _live(folder, dice.random(), dice.randrange(3), dice.uniform(0, LIFE_S))
        seen["lives"] += 1
        seen["drafts"] += len(list(folder.glob("incoming/*")))
        store = opened(folder, KEPT_LIMIT_BYTES)
        check_store(store, folder)
        seen["forms"] += store.kept[0]
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


def change_store(store: ModelCache, dice: random.Random, beside: ModelCache | None = None) -> None:
    """Do what a server does to a store, or what somebody does beside it."""
    name = dice.choice(KEPT_NAMES)
    match dice.randrange(12):
        case 0:
            record(store, name, {"prepacked": "slower"}, model_id=name)
        case 1:
            drop(store, name, "it killed its worker")
        case 2:
            (beside or store).clear(name)
        case 3:
            (beside or store).entries()
        case 4:
            used = store.use(key(name))
            assert used is None or used.form == "prepacked"
        case _:
            keep(store, name, dice.randrange(1, 200_000), model_id=name, seed=str(dice.random()))


def check_store(store: ModelCache, folder: Path) -> None:
    """Check that all entries of an open store are whole, and that there is nothing else in its folder."""
    entries = store.entries()
    assert {path.name for path in (folder / "forms").iterdir()} == {entry.key for entry in entries}
    assert list((folder / "incoming").iterdir()) == []
    assert sum(entry.bytes for entry in entries) <= store.limit_bytes
    for entry in entries:
        assert entry.key == key(entry.model_id)
        prepared = store.use(entry.key)
        assert (prepared is None) == (entry.form is None)
        if prepared is not None:
            assert prepared.sha256 == entry.sha256
            check_whole(store, prepared)
