"""The memory that a load will need, before it starts.

It is the highest peak of earlier loads of the same files, else estimated from their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from events.jobs import Footprint
from events.types import LoadedFile, LoadParameters
from runtime.onnxfile import find_model_file
from runtime.repository import SizedFile
from runtime.scheduler.view import FileSizes, MemoryEstimate

WORKER_BYTES = 8 * 2**20
"""Memory of a worker beside its model, at most."""
BYTES_PER_MODEL_BYTE = 2.5
"""ONNX Runtime parses, copies and packs weights while it loads them (measured: 2.1)."""
BYTES_PER_DATA_BYTE = 1
"""External data is mapped, which takes no memory, but copied where it is packed."""


def estimate_memory(
    files: Sequence[SizedFile],
    version: int,
    parameters: LoadParameters,
    footprints: Iterable[Footprint],
    optimised: str | None = None,
    *,
    threads: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of a load before it starts.

    The first load of an optimised model may take as much as one without. With 1 to 16 threads, peaks of four
    networks were from a fifth lower to a twentieth higher than with one. So a peak with other threads proves
    nothing, but it is nearer than file sizes: the highest one counts.

    Args:
        files: those to load.
        version: of the model.
        parameters: of the load.
        footprints: of earlier loads of the model.
        optimised: the SHA-256 of the optimised model that it will use, if any.
        threads: how many each of its workers computes with.
    """
    same = [seen for seen in footprints if seen.version == version and is_same_files(seen.files, files)]
    bare = [seen for seen in same if seen.prepared is None]
    alike = [seen for seen in same if seen.prepared == optimised] or bare
    known = [seen for seen in alike if seen.threads == threads] or alike
    one = max((seen.peak_memory_bytes for seen in known), default=_estimate_from_sizes(files))
    limit = parameters.memory_limit_bytes
    is_limited = limit is not None and limit + WORKER_BYTES <= one
    if limit is not None and is_limited:
        one = limit + WORKER_BYTES
    is_guess = not known and not is_limited
    return MemoryEstimate(one * parameters.instances, is_guess, bool(same), optimised, file_sizes(files))


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
