"""Inputs made up for a model, to tell whether two sessions of it answer the same. Pure, and always the same.

Where a shape leaves a length open, any may do, or only some: who asks tries one after the other.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterable, Iterator

from runtime.wire import DATATYPES, Tensor, TensorSpec

LENGTHS = ((1, 8), (8, 8), (2, 8), (1, 64))
"""Tried where a shape leaves one open: along the first dimension, mostly the batch's, and along others."""
MAX_SAMPLE_BYTES = 10 * 2**20
"""Of all inputs together: two pictures of 640 by 640 as floats. A model that takes more is tried on what its
`loadledger.toml` gives, or not."""
PERIOD = 4099
"""Values, after which noise repeats itself: quickly made, and a prime, so that rows differ."""
_TEXT = struct.pack("<I", 1) + b"a"
_FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}


def samples(inputs: Iterable[TensorSpec]) -> Iterator[tuple[Tensor, ...]]:
    """Yield what a model with these inputs may take, the likeliest first: of each shape noise, then zeros.

    Floats are between -1 and 1; integers 0 or 1, which is an index of anything.
    """
    required = [spec for spec in inputs if not spec.optional]
    if not all(spec.datatype in DATATYPES for spec in required):
        return
    made = set[tuple[tuple[int, ...], ...]]()
    for first, other in LENGTHS:
        shapes = tuple(_shape(spec, first, other) for spec in required)
        if shapes not in made and _total(required, shapes) <= MAX_SAMPLE_BYTES:
            made.add(shapes)
            yield tuple(map(_noise, required, shapes))
            yield tuple(map(_zeros, required, shapes))


def _shape(spec: TensorSpec, first: int, other: int) -> tuple[int, ...]:
    lengths = (first if index == 0 else other for index in range(len(spec.shape)))
    return tuple(
        open_ if declared < 0 else declared for declared, open_ in zip(spec.shape, lengths, strict=True)
    )


def _total(specs: Iterable[TensorSpec], shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) * _size(spec.datatype) for spec, shape in zip(specs, shapes, strict=True))


def _size(datatype: str) -> int:
    return DATATYPES[datatype].size or len(_TEXT)


def _noise(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    values = _values(spec, min(count, PERIOD))
    times = -(-count // PERIOD)
    return Tensor(spec.name, spec.datatype, shape, (values * times)[: count * _size(spec.datatype)])


def _values(spec: TensorSpec, count: int) -> bytes:
    dice = random.Random(spec.name)  # noqa: S311 - the same each time
    if spec.datatype == "BYTES":
        return _TEXT * count
    if spec.datatype in _FLOATS:
        values = (dice.random() * 2 - 1 for _ in range(count))
        return struct.pack(f"<{count}{_FLOATS[spec.datatype]}", *values)
    if spec.datatype == "BF16":  # the upper half of a float's four bytes
        return b"".join(struct.pack("<f", dice.random() * 2 - 1)[2:] for _ in range(count))
    size = _size(spec.datatype)
    return b"".join(dice.getrandbits(1).to_bytes(size, "little") for _ in range(count))


def _zeros(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    empty = bytes(4) if spec.datatype == "BYTES" else bytes(_size(spec.datatype))
    return Tensor(spec.name, spec.datatype, shape, empty * math.prod(shape))
