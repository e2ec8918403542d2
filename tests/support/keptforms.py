"""Prepared forms, as a worker leaves them in a draft: any bytes will do for those who only keep them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from runtime.prepared.files import Figure
from runtime.prepared.store import Made, PreparedStore
from runtime.wire import Form, LoadedFile, Prepared, SourceHash

MODEL = "digits"


def key(name: str) -> str:
    """Return the key that stands for this name."""
    return hashlib.sha256(name.encode()).hexdigest()


def written(folder: Path, contents: Mapping[str, bytes]) -> tuple[LoadedFile, ...]:
    """Write files, and say of them what a worker says."""
    return tuple(_written(folder / path, content) for path, content in contents.items())


def made(files: tuple[LoadedFile, ...], *, model_id: str = MODEL, form: Form = "prepacked") -> Made:
    """Say of files what is said of a form that won."""
    sources = (SourceHash("model.onnx", "ab" * 32),)
    figures: dict[str, Figure] = {"loading_us": 1_000, "ratio": 0.5, "tolerance": "bit-equal"}
    tried: dict[Form, str] = {} if form == "prepacked" else {"prepacked": "the worker ended: signal 11"}
    return Made(form, files, sources, model_id, 1, 2_500, figures, tried)


def keep(
    store: PreparedStore,
    name: str,
    size: int = 10,
    *,
    model_id: str = MODEL,
    form: Form = "prepacked",
    seed: str = "",
) -> Prepared | None:
    """Have the store keep a form of this size: two files, the contents of which follow from name and seed."""
    draft = store.draft(key(name))
    files = written(draft, halves(size, name + seed))
    return store.keep(key(name), draft, made(files, model_id=model_id, form=form))


def halves(size: int, seed: str) -> dict[str, bytes]:
    """Return the contents of two files of a form of this size."""
    content = (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]
    return {"model.onnx": content[: size // 2], "weights.bin": content[size // 2 :]}


def check_whole(prepared: Prepared) -> None:
    """Check that a form's files hold what is said of them, and are those that are named."""
    folder = Path(prepared.folder)
    for file in prepared.files:
        assert _loaded(folder / file.path) == file
    names = {file.path for file in prepared.files} | {"manifest.json"}
    assert {path.name for path in folder.iterdir()} == names


def _written(path: Path, content: bytes) -> LoadedFile:
    path.write_bytes(content)
    return _loaded(path)


def _loaded(path: Path) -> LoadedFile:
    seen, digest = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
    return LoadedFile(
        path.name, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, digest
    )
