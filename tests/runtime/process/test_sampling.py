"""The memory of a loading worker, as the server samples and measures it."""

import asyncio
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import models
from support.workers import hang_measurement, load, loaded_memory, order_of, until

from runtime import memory
from runtime.errors import ForkServerUnavailable
from runtime.process import worker as worker_module
from runtime.process.pool import WorkerPool
from runtime.process.worker import LoadSamples, MemorySampler

TAKEN = 32 * 2**20
CHILD = f"""
import mmap, sys
times, mapped = int(sys.argv[2]), open(sys.argv[1], "rb")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(times):
    block = mmap.mmap(-1, {TAKEN}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for place in range(0, {TAKEN}, 4096):
        block[place] = 1
    block.close()
weights = mmap.mmap(mapped.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
for place in range(0, len(weights), 4096):
    weights[place]
kept = bytearray({TAKEN})
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def child(file: Path, times: int) -> Iterator[subprocess.Popen[str]]:
    """Run a process that takes and returns memory so many times, maps a file, and takes more memory."""
    command = [sys.executable, "-I", "-c", CHILD, str(file), str(times)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            expect(process, "ready")
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str]) -> None:
    """Let the child go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def expect(process: subprocess.Popen[str], line: str) -> None:
    """Wait until the child says this."""
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of a megabyte."""
    (tmp_path / "weights").write_bytes(bytes(2**20))
    return tmp_path / "weights"


@contextmanager
def samples_of(pid: int) -> Iterator[LoadSamples]:
    """Sample a process by hand."""
    status = os.open(f"/proc/{pid}/status", os.O_RDONLY)
    try:
        yield LoadSamples(status)
    finally:
        os.close(status)


@pytest.mark.parametrize(("times", "mapped"), [(1, 2**20), (0, 2 * TAKEN), (2, 2 * TAKEN)])
def test_peak_between_two_samples_includes_returned_memory(tmp_path: Path, times: int, mapped: int) -> None:
    """Up to what mapped files may hide."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(mapped))
    with child(file, times) as process, samples_of(process.pid) as samples:
        before = samples.anonymous_bytes
        tell(process)
        expect(process, "done")
        samples.sample()
        assert TAKEN - 2**22 < samples.added_bytes < TAKEN + 2**22
        assert TAKEN - mapped - 2**22 < samples.peak_anonymous_bytes - before < TAKEN + 2**22


async def test_all_loading_workers_are_sampled_by_one_timer(weights: Path) -> None:
    sampler, seen = MemorySampler(), {"one": 0, "two": 0}
    with (
        child(weights, 1) as one,
        child(weights, 1) as two,
        sampler.watch(one.pid, lambda bytes_: seen.update(one=bytes_)),
        sampler.watch(two.pid, lambda bytes_: seen.update(two=bytes_)),
    ):
        tell(one)
        await until(lambda: seen["one"] > 0.9 * TAKEN)
        assert seen["two"] < 0.1 * TAKEN
        tell(two)
        await until(lambda: seen["two"] > 0.9 * TAKEN)
    assert not sampler._watched


def test_exited_process_keeps_its_last_sample(weights: Path) -> None:
    with child(weights, 1) as process, samples_of(process.pid) as samples:
        before = samples.anonymous_bytes
        process.send_signal(signal.SIGKILL)
        process.wait()
        samples.sample()
        assert samples.anonymous_bytes == before > 0


async def test_process_that_is_gone_can_be_watched(weights: Path) -> None:
    with child(weights, 1) as process:
        pass
    with MemorySampler().watch(process.pid, lambda _: None) as samples:
        samples.sample()
        assert samples.added_bytes == samples.peak_anonymous_bytes == 0


async def test_worker_without_a_descriptor_to_watch_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").symlink_to(tmp_path / "1")  # ELOOP, as EMFILE would
    monkeypatch.setattr(memory, "PROC", tmp_path)
    with pytest.raises(ForkServerUnavailable, match="cannot be watched"), MemorySampler().watch(1, print):
        pass


async def test_loaded_worker_is_recorded_with_what_it_takes(pool: WorkerPool, tmp_path: Path) -> None:
    models.save(models.table(8), tmp_path, "m")
    worker, _ = await load(pool, order_of(tmp_path))
    taken = loaded_memory(worker)
    assert 8e6 < taken.memory_bytes < 8e6 + 12 * 2**20
    assert taken.peak_memory_bytes >= taken.memory_bytes == worker.memory_bytes
    assert not pool._sampler._watched


async def test_stuck_measurement_counts_all_anonymous_memory(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(models.table(8), tmp_path, "m")
    worker = await pool.start("w")
    stuck = hang_measurement(tmp_path, monkeypatch, worker.pid)
    monkeypatch.setattr(worker_module, "MEASURE_LIMIT_S", 0.1)
    await worker.load(order_of(tmp_path), lambda _: None)
    assert loaded_memory(worker).memory_bytes > mmap.PAGESIZE * 1000 + 8e6  # with the fork server's pages
    with await asyncio.to_thread(stuck.open, "w") as file:
        file.write("Private_Dirty: 5 kB\n")
