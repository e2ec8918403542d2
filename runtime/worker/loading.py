"""How a worker loads a model: its files, and the session, from the cached model if it was given one.

One thread beside the creation of the session hashes the files.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.repository import MODEL_FILE, FoundFile, identify, open_identified
from runtime.wire import (
    CachedCopy,
    HashedFile,
    Load,
    Loaded,
    LoadStage,
    Prepare,
    Tensor,
)
from runtime.worker import sessions
from runtime.worker.sessions import ServingSession, describe_model
from runtime.worker.warmup import warm_up

HASH_BLOCK_BYTES = 2**18
"""Fits into a core's own cache: the session beside it needs the shared one."""
PR_SET_THP_DISABLE = 41
"""linux/prctl.h"""
ENOUGH_BYTES = 2_000_000
"""Least size of copied or packed weights for huge pages. With less a session is created no faster and can
take 2 MB more; with 5 MB it takes two thirds of the time, with 50 MB half (measured, decision 22)."""
NICENESS = 10
"""A tenth of the share of a core. With 19, a sixtieth, a preparation on a busy machine takes memory for
minutes, and its trial measures waiting."""
SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
"""The system call's number by machine; the C library has no function for it."""
IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE, IOPRIO_CLASS_SHIFT = 1, 3, 13
"""linux/ioprio.h"""
AUTOGROUP = Path("/proc/self/autogroup")
"""Where the kernel schedules each session (setsid) as one group, niceness counts only within it; this file
sets the group's."""
OnStage = Callable[[LoadStage], None]


class FileHashing:
    """The hashing of one folder's files; those with the identity of a known file are not hashed again."""

    def __init__(self, folder: Path, files: Sequence[FoundFile], known: Iterable[HashedFile]) -> None:
        self.folder = folder
        self.hashed: list[HashedFile] = []
        self.problem: Exception | None = None
        hashes = {_key(file): file.sha256 for file in known}
        self.files = [(file, hashes.get(_key(file))) for file in files]

    @property
    def known(self) -> tuple[HashedFile, ...] | None:
        """The hashed files if all are known; else None."""
        hashes = [_with_hash(file, sha256) for file, sha256 in self.files if sha256 is not None]
        return tuple(hashes) if len(hashes) == len(self.files) else None


class BackgroundHashing:
    """Hashes files in one thread beside the `with` block; in no thread if all files are known.

    One thread, because starting one takes some milliseconds of a load (measured).

    Args:
        hashings: the files to hash, one after the other.

    Attributes:
        hashing_us: duration of hashing in microseconds.
    """

    def __init__(self, *hashings: FileHashing) -> None:
        self.hashing_us = 0
        self._hashings = hashings
        self._all_hashed = threading.Event()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if any(hashing.known is None for hashing in self._hashings):
            self._thread = threading.Thread(target=self._hash, name="hashing")
            self._thread.start()
        else:
            self._hash()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def result(self, hashing: FileHashing) -> tuple[HashedFile, ...]:
        """Wait for the hashes.

        Raises:
            LoadRefused: `model_changed`, for a file that is no longer the one that was identified.
        """
        self._all_hashed.wait()
        if hashing.problem is not None:
            raise hashing.problem
        return tuple(hashing.hashed)

    def _hash(self) -> None:
        started = time.perf_counter_ns()
        for hashing in self._hashings:
            try:
                for file, sha256 in hashing.files:
                    hashing.hashed.append(_with_hash(file, sha256 or self._digest(hashing.folder, file)))
            except Exception as error:  # noqa: BLE001 - `result` raises it
                hashing.problem = error
        self.hashing_us = (time.perf_counter_ns() - started) // 1000
        self._all_hashed.set()

    def _digest(self, folder: Path, file: FoundFile) -> str:
        digest = hashlib.sha256()
        descriptor = open_identified(folder, file)
        try:
            block = memoryview(bytearray(HASH_BLOCK_BYTES))
            while (length := os.readv(descriptor, [block])) and not self._over.is_set():
                digest.update(block[:length])
        finally:
            os.close(descriptor)
        return digest.hexdigest()


def _key(file: FoundFile | HashedFile) -> tuple[str, int, int, int, int, int]:
    return file.path, file.dev, file.inode, file.bytes, file.mtime_ns, file.ctime_ns


def _with_hash(file: FoundFile, sha256: str) -> HashedFile:
    return HashedFile(*_key(file), sha256=sha256)


def huge_pages_help(source_bytes: int, prepared: CachedCopy | None) -> bool:
    """Return whether a session is created faster with huge pages.

    Args:
        source_bytes: the size of the repository's files.
        prepared: the cached model, if one is used. ONNX Runtime (1.31) packs weights that the form has packed
            once more to find them there; the rest it only maps.
    """
    if prepared is None or prepared.form == "optimised":
        return source_bytes >= ENOUGH_BYTES
    return sum(file.bytes for file in prepared.files) - source_bytes >= ENOUGH_BYTES


def disable_huge_pages() -> None:
    """Disable huge pages in this process, whatever malloc requests; a kernel that refuses changes nothing."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def lower_priority() -> None:
    """Lower the priority of this thread, and of those that it starts, on processor and disk, for good.

    Where the kernel refuses, nothing changes.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    number = SYS_IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)
    with contextlib.suppress(OSError):
        AUTOGROUP.write_bytes(b"%d" % NICENESS)


def load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[ServingSession, Loaded]:
    """Load the model of an order and warm it up on the given inputs; returns it and the server's report.

    Raises:
        LoadRefused: `invalid_model`, `model_changed`, `unsafe_file`, `out_of_memory`, `warm_up_failed`.
    """
    if order.background:
        lower_priority()
    try:
        return _load(order, given, on_stage)
    except MemoryError as error:
        raise sessions.out_of_memory(order.least_limit_bytes, str(error) or "MemoryError") from None
    except UnicodeDecodeError:
        raise LoadRefused("invalid_model", "an input or output has a name that is not UTF-8") from None


def identify_files(order: Load | Prepare) -> tuple[Path, Path, list[FoundFile]]:
    """Return an order's version folder, the repository's root without links, and the files' identities.

    Raises:
        LoadRefused: `unsafe_file`, or `model_changed`: these are not the files that the server found.
    """
    folder, root = Path(order.folder), Path(os.path.realpath(order.root))
    before = identify(folder, root)
    if tuple(file.path for file in before) != order.files:
        raise LoadRefused("model_changed", "the model's files are no longer those that were found")
    return folder, root, before


def check_unchanged(before: list[FoundFile], folder: Path, root: Path) -> None:
    """Refuse with `model_changed` if a file's identity has changed."""
    if identify(folder, root) != before:
        raise LoadRefused("model_changed", "the model's files changed while they were loaded")


def _load(order: Load, given: Sequence[Tensor], on_stage: OnStage) -> tuple[ServingSession, Loaded]:
    folder, root, before = identify_files(order)
    on_stage("loading")
    sources = FileHashing(folder, before, order.known)
    if not order.huge_pages or not huge_pages_help(sum(file.bytes for file in before), order.prepared):
        disable_huge_pages()
    with BackgroundHashing(sources) as hashing:
        # Now that this process has all its threads.
        sessions.limit_memory(order.memory_limit_bytes, order.load_limit_bytes)
        try:
            started_ns = time.perf_counter_ns()
            session = _create_session(order, folder, root)
            loading_us = _elapsed_us(started_ns)
            model, warming_up_us = describe_model(session, order.max_batch_size), None
            if order.warm_up:  # before it is measured: memory of an inference belongs to the model
                warming_up_us = _warm_up(order, model, given, lambda: on_stage("warming_up"))
            files = hashing.result(sources)
        finally:  # changed files are the reason for any other problem, too
            check_unchanged(before, folder, root)
    ctypes.CDLL(None).malloc_trim(0)  # in 2 ms returns what loading freed, as much as it kept
    sessions.lift_load_limit()
    report = Loaded(
        files=files,
        inputs=model.inputs,
        outputs=model.outputs,
        loading_us=loading_us,
        hashing_us=hashing.hashing_us,
        warming_up_us=warming_up_us,
    )
    return model, report


def _warm_up(
    order: Load, model: ServingSession, given: Sequence[Tensor], on_begin: Callable[[], None]
) -> int | None:
    try:
        return warm_up(model, given, on_begin)
    except LoadRefused:
        if order.warm_up_required:
            raise
        return None


def _create_session(order: Load, folder: Path, root: Path) -> ort.InferenceSession:
    """Create the session from the cached model, if there is one, else from the repository's files."""
    if order.prepared is None:
        chosen = sessions.session_options(order.threads)
        return sessions.create_checked(folder, root, chosen, order.least_limit_bytes)
    chosen = sessions.saved_graph_options(order.threads)
    model_file = str(Path(order.prepared.folder) / MODEL_FILE)
    return sessions.create_session(model_file, chosen, order.least_limit_bytes)


def _elapsed_us(started_ns: int) -> int:
    return (time.perf_counter_ns() - started_ns) // 1000
