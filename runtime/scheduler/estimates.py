"""The memory that a load will need, before it starts.

It is the highest peak of earlier loads of the same files on the same target, else estimated from their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from events.jobs import Footprint
from events.types import LoadedFile, LoadParameters
from runtime.onnxfile import find_model_file
from runtime.repository import SizedFile
from runtime.rooms import CPU_TARGET, Alternative, Target
from runtime.scheduler.view import FileSizes, MemoryEstimate

WORKER_BYTES = 8 * 2**20
"""Memory of a worker beside its model, at most."""
BYTES_PER_MODEL_BYTE = 2.5
"""ONNX Runtime parses, duplicates and packs weights while it loads them (measured: 2.1)."""
BYTES_PER_DATA_BYTE = 1
"""External data is mapped, which takes no memory, but copied where it is packed."""


def estimate_memory(
    files: Sequence[SizedFile],
    version: int,
    parameters: LoadParameters,
    footprints: Iterable[Footprint],
    *,
    threads: int = 1,
    targets: Sequence[Target] = (CPU_TARGET,),
) -> MemoryEstimate:
    """Estimate the memory of a load before it starts, for each target on which it may run.

    With 1 to 16 threads, peaks of four networks were from a fifth lower to a twentieth higher than with one.
    So a peak with other threads proves nothing, but it is nearer than file sizes: the highest one counts.

    Args:
        files: those to load.
        version: the model's version.
        parameters: the load's parameters.
        footprints: those of earlier loads of the model.
        threads: how many each of its workers computes with.
        targets: those on which it may run, the preferred one first.
    """
    same = [seen for seen in footprints if seen.version == version and is_same_files(seen.files, files)]

    def estimate_on(target: Target) -> Alternative:
        there = [seen for seen in same if seen.target == target.name]
        known = [seen for seen in there if seen.threads == threads] or there
        return _estimate_needs(files, parameters, known, target)

    is_proven = not {seen.target for seen in same}.isdisjoint(target.name for target in targets)
    return MemoryEstimate(tuple(map(estimate_on, targets)), is_proven, file_sizes(files))


def _estimate_needs(
    files: Sequence[SizedFile], parameters: LoadParameters, known: Sequence[Footprint], target: Target
) -> Alternative:
    """Return a load's needs on a target, by its footprints there; memory limits bound the machine's part."""
    guess = _estimate_from_sizes(files) + target.worker_bytes
    one = max((seen.peak_memory_bytes for seen in known), default=guess)
    limit, is_guess = parameters.memory_limit_bytes, not known
    if limit is not None and limit + WORKER_BYTES <= one:
        one, is_guess = limit + WORKER_BYTES, False
    instances = parameters.instances
    needs, rests_on_sizes = target.list_needs(one * instances, instances, files, known)
    return Alternative(needs, target, is_guess or rests_on_sizes)


def _estimate_from_sizes(files: Iterable[SizedFile]) -> int:
    sizes = {file.path: file.bytes for file in files}
    model, weights = find_model_file(sizes), {True: BYTES_PER_MODEL_BYTE, False: BYTES_PER_DATA_BYTE}
    return WORKER_BYTES + math.ceil(sum(size * weights[path == model] for path, size in sizes.items()))


def is_same_files(seen: Iterable[LoadedFile], files: Iterable[SizedFile]) -> bool:
    """Whether files are still those of an earlier load, by path, size and time."""
    return sorted((file.path, file.bytes, file.mtime_ns) for file in seen) == sorted(
        (file.path, file.bytes, file.mtime_ns) for file in files
    )


def file_sizes(files: Iterable[SizedFile]) -> FileSizes:
    return frozenset((file.path, file.bytes) for file in files)
