"""Prepared forms for the tests: made by real workers, kept without a trial, or spoilt on purpose."""

import shutil
from pathlib import Path

from runtime.prepared.key import key_of
from runtime.prepared.store import Made, PreparedStore
from runtime.processes.pool import WorkerPool
from runtime.repository import Repository
from runtime.wire import Form, Prepare, Prepared, SourceHash
from support.forms import found

LIMIT_BYTES = 10**9


def opened(folder: Path, limit_bytes: int = LIMIT_BYTES) -> PreparedStore:
    """Open a store in the data directory `folder`."""
    store = PreparedStore(folder / "prepared", limit_bytes)
    store.open()
    return store


def key_in(root: Path, model_id: str) -> str:
    """Return the key of a model's highest version, for one thread."""
    return key_of(_sources(root, model_id), 1)


async def keep_form(
    pool: WorkerPool,
    store: PreparedStore,
    root: Path,
    model_id: str,
    form: Form = "optimised",
    *,
    instead: Path | None = None,
) -> Prepared:
    """Have a worker make a form of a model's highest version, and keep it untried.

    With `instead`, that ONNX file takes the place of the one that was made: whoever loads the form loads it.
    """
    version, key = Repository(root).resolve(model_id, None), key_in(root, model_id)
    draft = store.draft(key)
    files = tuple(file.path for file in version.files)
    order = Prepare(str(root), str(version.folder), files, 1, None, (), form, str(draft))
    own = (await (await pool.start("maker")).prepare(order)).files
    if instead is not None:
        shutil.copy(instead, draft / "model.onnx")
        own = found(draft)
    kept = store.keep(key, draft, Made(form, own, _sources(root, model_id), model_id, version.version, 1))
    assert kept is not None
    return kept


def _sources(root: Path, model_id: str) -> tuple[SourceHash, ...]:
    folder = Repository(root).resolve(model_id, None).folder
    return tuple(SourceHash(file.path, file.sha256) for file in found(folder))
