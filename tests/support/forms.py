"""Prepared forms for the tests: made by real workers, described as the store describes them."""

import asyncio
import ctypes
import hashlib
import os
from pathlib import Path
from typing import get_args

import onnxruntime as ort
from msgspec.structs import replace

from runtime.errors import Exit
from runtime.prepared.files import prepared_in
from runtime.processes.pool import WorkerPool
from runtime.processes.workers import LoadReport, PrepareReport, Worker
from runtime.wire import Form, Load, LoadedFile, Prepare, Prepared, SourceHash
from runtime.worker.background import IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT, NICENESS, SYS_IOPRIO_SET
from support.workers import order_of

FORMS: tuple[Form, ...] = get_args(Form)


def prepare_order(root: Path, form: Form = "prepacked", model_id: str = "m") -> Prepare:
    """Make the order to prepare a model into a new folder beside the repository."""
    load = order_of(root, model_id)
    target = root.parent / "forms" / form
    target.mkdir(parents=True)
    return Prepare(str(root), load.folder, load.files, 1, None, (), form, str(target))


async def made(pool: WorkerPool, order: Prepare) -> PrepareReport:
    """Prepare a model, and see the worker end by itself."""
    worker = await pool.start("w")
    report = await worker.prepare(order)
    assert await asyncio.shield(worker.ended) == Exit(0, None)
    return report


async def prepared(pool: WorkerPool, root: Path, form: Form = "prepacked") -> Prepared:
    """Prepare model `m`, and describe the form as the store does."""
    order = prepare_order(root, form)
    report = await made(pool, order)
    return describe(order.target, form, report.files, report.sources)


def describe(
    folder: Path | str, form: Form, files: tuple[LoadedFile, ...], sources: tuple[LoadedFile, ...]
) -> Prepared:
    """Describe a form of these sources."""
    return prepared_in(Path(folder), form, files, [SourceHash(file.path, file.sha256) for file in sources])


def found(folder: Path | str) -> tuple[LoadedFile, ...]:
    """Describe the files of a folder as they are."""
    files = []
    for path in sorted(Path(folder).iterdir()):
        seen, sha256 = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
        identity = seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns
        files.append(LoadedFile(path.name, *identity, sha256=sha256))
    return tuple(files)


async def load(pool: WorkerPool, order: Load) -> tuple[Worker, LoadReport]:
    """Load what is ordered into a new worker."""
    worker = await pool.start("w")
    return worker, await worker.load(order, lambda _: None)


def written_by_the_runtime(root: Path) -> Load:
    """Order model `m` with its prepacked form as ONNX Runtime writes it, and nobody has touched it."""
    order, folder = order_of(root, "m"), root.parent / "forms" / "raw"
    folder.mkdir(parents=True)
    chosen = ort.SessionOptions()
    chosen.optimized_model_filepath = str(folder / "model.onnx")
    name = "session.optimized_model_external_initializers_file_name"
    chosen.add_session_config_entry(name, "weights.bin")
    chosen.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    ort.InferenceSession(Path(order.folder) / "model.onnx", chosen, providers=["CPUExecutionProvider"])
    return replace(order, prepared=describe(folder, "prepacked", found(folder), found(order.folder)))


def in_background(pid: int) -> bool:
    """Tell whether a process gives way in its share of a core, is batch work, and idle on the disk."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    number = SYS_IOPRIO_SET[os.uname().machine] + 1  # ioprio_get follows ioprio_set everywhere
    idle = ctypes.CDLL(None).syscall(number, 1, pid) >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_IDLE
    return int(fields[16]) == NICENESS and os.sched_getscheduler(pid) == os.SCHED_BATCH and idle
