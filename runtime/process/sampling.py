"""The memory of loading workers, sampled: while they load, at their peak, and once they have loaded."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtime import memory
from runtime.errors import ForkServerUnavailable

SAMPLE_INTERVAL_S = 0.005
"""Pause between samples. A sample costs 0.015 ms; the kernel's own peak covers most of the pause."""
MAX_SHARE = 20
"""Sampling takes at most this fraction of the event loop's time, however many workers load at once."""
_STATUS_BYTES = 64 * 2**10
"""Enough for the longest status; one read gives all of it."""


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The memory of a worker that has loaded its model, and the duration of measuring it."""

    memory_bytes: int
    peak_memory_bytes: int
    measuring_us: int


class LoadSamples:
    """The samples of one loading worker.

    The descriptor names the process and not its pid: after an exit, no other process is sampled in its place.

    Attributes:
        anonymous_bytes: memory without files, at the last sample; shared with the fork server or not.
        empty_bytes: all memory before the load, also swapped pages and page tables.
        added_bytes: the memory that the load has added to `empty_bytes` so far.
        peak_anonymous_bytes: the largest memory without files, as sampled or as proved by the kernel's peak
            between two samples. File pages read meanwhile may hide as much of that peak.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self._seen = self._first = memory.Resident(0, 0, 0)
        self.peak_anonymous_bytes = 0
        seen = self._read()
        if seen is not None:
            self._seen = self._first = seen
            self.peak_anonymous_bytes = seen.anonymous_bytes

    @property
    def anonymous_bytes(self) -> int:
        return self._seen.anonymous_bytes

    @property
    def empty_bytes(self) -> int:
        return self._first.taken_bytes

    @property
    def added_bytes(self) -> int:
        return max(0, self._seen.taken_bytes - self._first.taken_bytes)

    def sample(self) -> None:
        """Sample the memory now; a process that has exited keeps its last sample."""
        seen = self._read()
        if seen is None:
            return
        before, self._seen = self._seen, seen
        peak = seen.anonymous_bytes
        if seen.peak_bytes > before.peak_bytes:  # the peak was at some moment since the sample before
            peak = max(peak, seen.peak_bytes - max(before.file_bytes, seen.file_bytes))
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, peak)

    def loaded_memory(self, private_bytes: int | None, measuring_us: int) -> WorkerMemory:
        """Return the memory of the loaded worker, as of a sample just now.

        Args:
            private_bytes: its measured private bytes; if None, all of its memory without files counts, which
                is more.
            measuring_us: the duration of that measurement.
        """
        if private_bytes is None:
            private_bytes = self.anonymous_bytes
        shared_bytes = max(0, self.anonymous_bytes - private_bytes)
        peak_bytes = max(self.peak_anonymous_bytes - shared_bytes, private_bytes)
        return WorkerMemory(private_bytes, peak_bytes, measuring_us)

    def _read(self) -> memory.Resident | None:
        try:
            return memory.parse_resident(os.pread(self._status, _STATUS_BYTES, 0))
        except ProcessLookupError:
            return None


class MemorySampler:
    """Samples all loading workers in one timer of the event loop, which runs while there are any."""

    def __init__(self) -> None:
        self._watched: dict[LoadSamples, Callable[[int], None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watch(self, pid: int, on_sample: Callable[[int], None]) -> Iterator[LoadSamples]:
        """Sample a worker within the context.

        Args:
            pid: its process id; the worker must not have been reaped, or the caller must notice its end by
                other means.
            on_sample: called with the bytes that the load has added, after each sample.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`, there is no descriptor for watching the process.
        """
        try:
            status = os.open(f"{memory.PROC}/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # the process has exited; the load's caller hears of that
            status = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ForkServerUnavailable(f"a worker's memory cannot be watched: {error.strerror}") from None
        samples = LoadSamples(status)
        try:
            self._watched[samples] = on_sample
            self._schedule(SAMPLE_INTERVAL_S)
            yield samples
        finally:
            del self._watched[samples]
            os.close(status)

    def _schedule(self, in_s: float) -> None:
        if self._timer is None and self._watched:
            self._timer = asyncio.get_running_loop().call_later(in_s, self._sample_all)

    def _sample_all(self) -> None:
        self._timer = None
        began = time.monotonic()
        for samples, on_sample in list(self._watched.items()):
            samples.sample()
            on_sample(samples.added_bytes)
        self._schedule(max(SAMPLE_INTERVAL_S, MAX_SHARE * (time.monotonic() - began)))
