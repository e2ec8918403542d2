"""What goes on beside the creation of a session: hashing files, and watching the memory that it takes."""

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from runtime import memory
from runtime.repository import FileIdentity, open_identified
from runtime.wire import LoadedFile

HASH_BLOCK_BYTES = 2**18
"""What stays in a core's own cache: the session beside it needs what the cores share."""
HASHED_BLOCKS_A_SAMPLE = 16
"""2.5 ms of hashing, after which the memory is looked at."""
SAMPLE_INTERVAL_S = 0.005
"""Of the memory taken meanwhile. A sample costs 0.03 ms; walking the mappings would cost 0.7 ms, and hold
up the session when it maps memory: 10 ms more for a load of 60 (measured)."""


class Hashing:
    """Files of one folder, and their hashes once these are there.

    Args:
        folder: where they are.
        files: what is to be hashed.
        known: files that are not hashed again, if they still are those.
    """

    def __init__(self, folder: Path, files: Sequence[FileIdentity], known: Iterable[LoadedFile]) -> None:
        self.folder = folder
        self.hashed: list[LoadedFile] = []
        self.problem: Exception | None = None
        hashes = {_key(file): file.sha256 for file in known}
        self.files = [(file, hashes.get(_key(file))) for file in files]

    @property
    def known(self) -> tuple[LoadedFile, ...] | None:
        """The files, if none of them is to be read."""
        hashes = [_loaded(file, sha256) for file, sha256 in self.files if sha256 is not None]
        return tuple(hashes) if len(hashes) == len(self.files) else None


class Beside:
    """Hashes files and watches the process's memory in one thread, beside what is in the `with` block.

    One thread, because starting one takes some milliseconds of a load (measured); none, if nothing is to be
    hashed and nobody asked for the memory to be watched all the time.

    Args:
        hashings: what is to be hashed, one after the other.
        watched: whether the memory is watched all the time, and not only by `sample`.

    Attributes:
        hashing_us: for how long it hashed, in microseconds.
        peak_anonymous_bytes: the most memory of no file that was seen, or that there must have been from one
            look to the next. Files of which pages were read meanwhile may hide as much of that.
    """

    def __init__(self, *hashings: Hashing, watched: bool = True) -> None:
        self.hashing_us = 0
        self.peak_anonymous_bytes = 0
        self._seen = memory.resident()
        self._looking = threading.Lock()
        self._hashings = hashings
        self._watched = watched
        self._all_hashed = threading.Event()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._watched or any(hashing.known is None for hashing in self._hashings):
            self.watch()
        else:
            self._hash()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def watch(self) -> None:
        """Watch the memory all the time from here on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hashing and sampling")
            self._thread.start()

    def result(self, hashing: Hashing) -> tuple[LoadedFile, ...]:
        """Wait for the hashes.

        Raises:
            LoadRefused: `model_changed`, for a file that is no longer the one that was identified.
        """
        self._all_hashed.wait()
        if hashing.problem is not None:
            raise hashing.problem
        return tuple(hashing.hashed)

    def sample(self) -> None:
        """Look at the memory now."""
        with contextlib.suppress(MemoryError), self._looking:  # then the peak is known well enough
            before, self._seen = self._seen, memory.resident()
            peak = self._seen.anonymous_bytes
            if self._seen.peak_bytes > before.peak_bytes:  # at some moment since then
                peak = max(peak, self._seen.peak_bytes - max(_of_files(before), _of_files(self._seen)))
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, peak)

    def _run(self) -> None:
        if not self._all_hashed.is_set():
            self._hash()
        while not self._over.wait(SAMPLE_INTERVAL_S):
            self.sample()

    def _hash(self) -> None:
        started = time.perf_counter_ns()
        for hashing in self._hashings:
            try:
                for file, sha256 in hashing.files:
                    hashing.hashed.append(_loaded(file, sha256 or self._digest(hashing.folder, file)))
            except Exception as error:  # noqa: BLE001 - whatever it is, who waits for the hashes has to know
                hashing.problem = error
        self.hashing_us = (time.perf_counter_ns() - started) // 1000
        self._all_hashed.set()

    def _digest(self, folder: Path, file: FileIdentity) -> str:
        digest = hashlib.sha256()
        descriptor = open_identified(folder, file)
        try:
            block = memoryview(bytearray(HASH_BLOCK_BYTES))
            for number in itertools.count(1):
                length = os.readv(descriptor, [block])
                if not length or self._over.is_set():
                    break
                digest.update(block[:length])
                if number % HASHED_BLOCKS_A_SAMPLE == 0:
                    self.sample()
        finally:
            os.close(descriptor)
        return digest.hexdigest()


def _of_files(seen: memory.Resident) -> int:
    return seen.all_bytes - seen.anonymous_bytes


def _key(file: FileIdentity | LoadedFile) -> tuple[str, int, int, int, int, int]:
    return file.path, file.dev, file.inode, file.bytes, file.mtime_ns, file.ctime_ns


def _loaded(file: FileIdentity, sha256: str) -> LoadedFile:
    return LoadedFile(*_key(file), sha256=sha256)
