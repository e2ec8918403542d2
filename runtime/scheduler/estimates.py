"""The memory that a load will need, before it starts.

It is the highest peak of earlier loads of the same files on the same device, else estimated from their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from msgspec import UNSET

from events.devices import CPU
from events.jobs import Footprint
from events.types import LoadedFile, LoadParameters
from runtime.onnxfile import find_model_file
from runtime.repository import SizedFile
from runtime.scheduler.view import DeviceNeed, FileSizes, MemoryEstimate

WORKER_BYTES = 8 * 2**20
"""Memory of a worker beside its model, at most."""
BYTES_PER_MODEL_BYTE = 2.5
"""ONNX Runtime parses, duplicates and packs weights while it loads them (measured: 2.1)."""
BYTES_PER_DATA_BYTE = 1
"""External data is mapped, which takes no memory, but copied where it is packed."""
PROVIDER_BYTES = 64 * 2**20
"""Memory of the machine that a provider's libraries take in a worker, and the code that they make for a model
(measured: 23 MB when OpenVINO is registered)."""
CONTEXT_BYTES = 500_000_000
"""Memory of a device that its driver keeps for each process (NVIDIA says 300 to 500 MB; not measured)."""
DEVICE_BYTES_PER_FILE_BYTE = 2
"""Weights are on the device once, and its allocator doubles what it asks the driver for (not measured)."""


def estimate_memory(
    files: Sequence[SizedFile],
    version: int,
    parameters: LoadParameters,
    footprints: Iterable[Footprint],
    *,
    threads: int = 1,
    devices: Sequence[tuple[str, bool]] = (),
) -> MemoryEstimate:
    """Estimate the memory of a load before it starts, for each device that it may run on.

    With 1 to 16 threads, peaks of four networks were from a fifth lower to a twentieth higher than with one.
    So a peak with other threads proves nothing, but it is nearer than file sizes: the highest one counts.

    Args:
        files: those to load.
        version: of the model.
        parameters: of the load.
        footprints: of earlier loads of the model.
        threads: how many each of its workers computes with.
        devices: the names of those that it may run on, the preferred one first, and whether each has memory
            of its own; none is the CPU.
    """
    same = [seen for seen in footprints if seen.version == version and is_same_files(seen.files, files)]

    def need_on(device: str, *, has_memory: bool) -> DeviceNeed:
        there = [seen for seen in same if (seen.device or CPU) == device]
        known = [seen for seen in there if seen.threads == threads] or there
        return _estimate_need(files, parameters, known, device, has_memory=has_memory)

    needs = [need_on(device, has_memory=has_memory) for device, has_memory in devices or [(CPU, False)]]
    names, first = {need.device for need in needs}, needs[0]
    is_proven = any((seen.device or CPU) in names for seen in same)
    on_devices = () if names == {CPU} else tuple(needs)
    return MemoryEstimate(first.bytes, first.is_guess, is_proven, file_sizes(files), devices=on_devices)


def _estimate_need(
    files: Sequence[SizedFile],
    parameters: LoadParameters,
    known: Sequence[Footprint],
    device: str,
    *,
    has_memory: bool,
) -> DeviceNeed:
    """Return what a load needs on a device, by the footprints there; memory limits bound the machine's."""
    one = max((seen.peak_memory_bytes for seen in known), default=_estimate_from_sizes(files, device))
    limit, is_guess = parameters.memory_limit_bytes, not known
    if limit is not None and limit + WORKER_BYTES <= one:
        one, is_guess = limit + WORKER_BYTES, False
    on_device = 0
    if has_memory:
        measured = [seen.device_bytes for seen in known if seen.device_bytes is not UNSET]
        weights = sum(file.bytes for file in files)
        guess = CONTEXT_BYTES + DEVICE_BYTES_PER_FILE_BYTE * weights
        on_device = max(CONTEXT_BYTES, *measured) if measured else guess
        is_guess = is_guess or not measured
    instances = parameters.instances
    return DeviceNeed(device, on_device * instances, one * instances, is_guess)


def _estimate_from_sizes(files: Iterable[SizedFile], device: str) -> int:
    sizes = {file.path: file.bytes for file in files}
    model, weights = find_model_file(sizes), {True: BYTES_PER_MODEL_BYTE, False: BYTES_PER_DATA_BYTE}
    worker_bytes = WORKER_BYTES + (PROVIDER_BYTES if device != CPU else 0)
    return worker_bytes + math.ceil(sum(size * weights[path == model] for path, size in sizes.items()))


def is_same_files(seen: Iterable[LoadedFile], files: Iterable[SizedFile]) -> bool:
    """Whether files are still those of an earlier load, by path, size and time."""
    return sorted((file.path, file.bytes, file.mtime_ns) for file in seen) == sorted(
        (file.path, file.bytes, file.mtime_ns) for file in files
    )


def file_sizes(files: Iterable[SizedFile]) -> FileSizes:
    return frozenset((file.path, file.bytes) for file in files)
