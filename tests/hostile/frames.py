"""Frames that neither a server nor a worker should send: mutated, cut off, in a wrong order or channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec
from hostile.mutations import EDGES, mutate_bytes
from support.workers import floats, tensor

from runtime import wire
from runtime.errors import LoadCode
from runtime.wire import (
    Cancel,
    Infer,
    InferenceFailure,
    Load,
    Loaded,
    LoadFailure,
    Message,
    Outcome,
    Probed,
    StageReached,
    Tensor,
    TensorSpec,
    WantedOutput,
    heads,
)

BOMBS = (
    b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 elements
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xdb\xff\xff\xff\xff",  # a text
    b"\x91" * 5000,  # arrays in arrays
    b"\x81\xa0" * 5000,  # maps in maps
    b"\xc9\xff\xff\xff\xff\x01",  # an extension
    b"\xc1",  # no type
)
"""Headers that make a careless msgpack decoder allocate or recurse."""
CODES: tuple[LoadCode, ...] = ("invalid_model", "unsafe_file", "warm_up_failed")


PLACES = (0, 1, 2**20, 2**25 - 8, 2**25, 2**62)
"""In shared memory, and beyond it."""
VALUES: tuple[Any, ...] = (
    "", "x" * 5000, "Infer", "INT64", None, True, 1.5, b"\xff", [], {}, [[]], [[0]] * 500,
)  # fmt: skip


def frame(message: Message, tensors: Sequence[Tensor] = ()) -> bytes:
    """Return a frame as the contract has it."""
    return b"".join(map(bytes, wire.encode(message, tensors)))


def raw_frame(header: bytes, payload: bytes = b"") -> bytes:
    """Return a frame of any bytes, with right lengths."""
    return wire.PREFIX.pack(len(header), len(payload)) + header + payload


def mutate_frame(rng: Random, good: bytes) -> bytes:
    """Return a frame with something wrong in it; now and then with nothing."""
    header_bytes, payload_bytes = wire.PREFIX.unpack_from(good)
    body = good[wire.PREFIX.size :]
    header, payload = body[:header_bytes], body[header_bytes:]
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: good,
        lambda: mutate_bytes(rng, good),
        lambda: raw_frame(mutate_bytes(rng, header), payload),
        lambda: raw_frame(_mutate_fields(rng, header), payload),
        lambda: raw_frame(_mutate_fields(rng, header), payload),
        lambda: raw_frame(header, mutate_bytes(rng, payload)),
        lambda: raw_frame(rng.choice(BOMBS) + header, payload),
        lambda: _prefix(rng.choice(EDGES), payload_bytes) + body,
        lambda: _prefix(header_bytes, rng.choice(EDGES)) + body,
        lambda: good[: rng.randrange(len(good))],
        lambda: raw_frame(b""),
        lambda: rng.randbytes(rng.choice((1, 12, 100, 70_000))),
    )
    return rng.choice(makers)()


def _prefix(header_bytes: int, payload_bytes: int) -> bytes:
    return wire.PREFIX.pack(header_bytes % 2**32, payload_bytes % 2**64)


def _mutate_fields(rng: Random, header: bytes) -> bytes:
    """Replace a field of a message by something of another type or size."""
    fields: Any = msgspec.msgpack.decode(header)
    place: Any = fields
    while True:
        index = rng.randrange(len(place)) if isinstance(place, list) and place else None
        if index is None:
            return header
        if not isinstance(place[index], list) or not place[index] or rng.random() < 0.3:
            break
        place = place[index]
    place[index] = rng.choice((*EDGES, *VALUES))
    return msgspec.msgpack.encode(fields)


def to_worker(rng: Random, load: Load) -> list[tuple[str, bytes]]:
    """Return frames for a worker with their channels, `data` or `control`; most often a load goes first."""
    frames = [("data", frame(load))] if rng.random() < 0.8 else []
    for number in range(rng.choice((1, 2, 8))):
        tensors = (floats("x", 1, 2),) if rng.random() < 0.8 else (tensor("x", "INT64", [1]),)
        good = rng.choice(
            (
                frame(Infer(number, heads(tensors), (), rng.random() < 0.5), tensors),
                frame(Infer(number, heads(tensors), (WantedOutput("y"),)), tensors),
                frame(
                    Infer(
                        number,
                        heads(tensors, [rng.choice(PLACES)]),
                        answer_region=(rng.choice(PLACES), 2**20),
                    )
                ),
                frame(load),
                frame(Cancel(number)),
                frame(Outcome(number)),
            )
        )
        channel = "control" if rng.random() < 0.2 else "data"
        frames.append((channel, mutate_frame(rng, good) if rng.random() < 0.6 else good))
    return frames


SPECS = (TensorSpec("y", "FP32", (-1,)),)
Y = floats("y", 1, 2)


def reports(rng: Random) -> list[tuple[str, bytes]]:
    """Return frames of a worker that was asked to load, most often with one wrong."""
    loaded = frame(Loaded((), SPECS, rng.choice((0, 5, 2**63 - 1))))
    right = [frame(StageReached("loading")), frame(StageReached("warming_up")), loaded]
    others = (
        frame(Probed(0, (), ())),
        frame(LoadFailure(rng.choice(CODES), "x" * rng.choice((0, 4096)))),
        frame(Outcome(0)),
        frame(Cancel(0)),
    )
    return _one_wrong(rng, right, others)


def replies(rng: Random, *, numbers: int) -> list[tuple[str, bytes]]:
    """Return frames of a worker that was asked so many inferences, most often with one wrong."""
    right = [
        frame(Outcome(number, heads((Y,))), (Y,))
        if rng.random() < 0.7
        else frame(InferenceFailure(number, rng.choice(("invalid_input", "no such code")), "no"))
        for number in range(numbers)
    ]
    rng.shuffle(right)
    double, other = (Y, Y), (floats("z", 1),)
    others = (
        frame(Outcome(numbers)),
        frame(Outcome(0, heads(double)), double),
        frame(Outcome(0, heads(other)), other),
        frame(Outcome(0, heads((Y,)), *(2**63 - 1,) * 6), (Y,)),
        frame(Outcome(0, heads((Y,), [rng.choice(PLACES)]))),
        frame(StageReached("loading")),
        frame(Loaded((), SPECS, 1)),
    )
    return _one_wrong(rng, right, others)


def _one_wrong(rng: Random, right: list[bytes], others: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Return frames of which one is repeated, missing, replaced, mutated, or sent on the other channel."""
    frames = [("data", each) for each in right]
    index = rng.randrange(len(frames))
    _, good = frames[index]
    changed: Sequence[list[tuple[str, bytes]]] = (
        *([("data", good)],) * 5,
        [("data", good)] * rng.choice((0, 2, 100)),
        [("data", rng.choice(others))],
        [("data", good), ("data", rng.choice(others))],
        [("data", mutate_frame(rng, good))],
        [("data", mutate_frame(rng, good)), ("data", good)],
        [("control", good)],
    )
    return [*frames[:index], *rng.choice(changed), *frames[index + 1 :]]
