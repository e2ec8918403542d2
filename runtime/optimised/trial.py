"""The trial of an optimised model: the original and the optimised session, in two fresh processes.

It compares what a client would see: declared inputs and outputs, each answer bit for bit, and once the
duration of a load and of the fastest inference.

Without given inputs the trial makes some up, the same ones each time. Where a shape leaves a length open, it
tries several.
"""

from __future__ import annotations

import asyncio
import math
import random
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from runtime.errors import ForkServerUnavailable, InferenceFailed, InvalidInput, RuntimeProblem
from runtime.optimised.pacing import Pacer
from runtime.optimised.store import Useless
from runtime.process.worker import Worker
from runtime.wire import DATATYPES, Load, Loaded, OptimisedModel, ProviderNodes, Tensor, TensorSpec

RUNS = 200
"""Inferences of each session; at least `MIN_RUNS`, and for `RUN_S` at most. While the optimised model seems
slower they go on for that time: of 29 networks on a busy machine, two seemed slower in 200 runs of a
millisecond or less, and were not."""
MIN_RUNS = 3
RUN_S = 0.5
INFERENCE_LIMIT_S = 60.0
MADE_UP = 2
"""Shapes of made-up inputs that are compared. Kernels for one row and for several differ, and so do their
defects: with misaligned weights one row is answered, and two crash (measured with 1.31; not with 1.32)."""
MIN_RATE = 0.95
"""Least inference rate of the optimised session ÷ the original's: a smaller difference is noise."""
MAX_NAMED = 3
"""Outputs that a reason names."""
CHANGED = ("model_changed", "unsafe_file")
"""Codes of a load whose files have changed since the load before."""
NO_INPUTS = (
    "nothing is known that the model could be tried on: give inputs that it takes as [[warm_up.inputs]] in"
    " its loadledger.toml"
)


class InputsRefused(Useless):
    """A session does not run on these inputs."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of the original and the optimised session: load and fastest inference of each."""

    bare_load_us: int
    load_us: int
    bare_infer_ns: int
    infer_ns: int

    @property
    def rate(self) -> float:
        return self.bare_infer_ns / self.infer_ns if self.infer_ns else 1.0


def verdict(figures: Figures) -> str | None:
    """Return why an optimised model with equal answers is of no use; None if it is of use."""
    load_us, bare_load_us = figures.load_us, figures.bare_load_us
    if load_us >= bare_load_us:
        return f"it loads no faster: {load_us / 1000:.1f} ms, bare {bare_load_us / 1000:.1f} ms"
    slower = f"its inferences are slower: {figures.rate:.2f} of the bare rate"
    return slower if figures.rate < MIN_RATE else None


@contextmanager
def problems_of(worker: Worker, who: str) -> Iterator[None]:
    """Turn a worker's problem into a verdict, but not one of changed files, a full disk or the fork server.

    Raises:
        InputsRefused: it does not run on these inputs.
        Useless: whatever else went wrong.
        ForkServerUnavailable: `fork_server_unavailable`, the worker died with the fork server.
    """
    try:
        yield
    except (InvalidInput, InferenceFailed) as problem:
        raise InputsRefused(f"{who}: {problem}") from problem
    except RuntimeProblem as problem:
        if problem.code in (*CHANGED, "disk_full"):
            raise
        if worker.orphaned:
            raise ForkServerUnavailable from problem
        raise Useless(f"{who}: {problem}") from problem


class Session:
    """A model in a worker of a trial."""

    def __init__(self, worker: Worker, who: str) -> None:
        self._worker = worker
        self._who = who

    async def load(self, order: Load) -> Loaded:
        with problems_of(self._worker, self._who):
            return await self._worker.load(order, lambda _: None)

    async def infer(self, inputs: Sequence[Tensor]) -> tuple[int, dict[str, bytes]]:
        """Return the duration in nanoseconds, and the hash of each output, which the worker makes.

        A hostile model's answers can be larger than the server's memory.
        """
        with problems_of(self._worker, self._who):
            outcome, answers = await self._worker.infer(inputs, digest=True, timeout_s=INFERENCE_LIMIT_S)
        return outcome.infer_ns, {answer.name: bytes(answer.data) for answer in answers}


async def try_optimised(
    pacer: Pacer, bare: Load, optimised: OptimisedModel, given: Sequence[Tensor]
) -> tuple[Figures, tuple[ProviderNodes, ...]]:
    """Try an optimised model once, against its original; returns also where the original's nodes run.

    Args:
        pacer: starts two fresh workers.
        bare: the order to load the original; without warm-up and batching here, and in the background.
        optimised: the model.
        given: inputs of its loadledger.toml; empty means that the trial makes some up.

    Raises:
        Useless: it is not to be used.
        ForkServerUnavailable: `fork_server_unavailable`.
        LoadRefused: a code of `CHANGED`.
    """
    order = replace(bare, warm_up_required=False, background=True, max_batch_size=0, max_queue_delay_us=0)
    async with pacer.worker() as first, pacer.worker() as second:
        original = Session(first, "the model cannot be tried, bare as it is")
        session = Session(second, "prepared")
        report = await original.load(order)
        other = await session.load(replace(order, warm_up=order.device is not None, optimised=optimised))
        if _declared(report) != _declared(other):
            raise Useless(_describe_difference(report, other))
        sets = [given] if given else []
        sets += await _make_up_inputs(original, report, is_needed=not given)
        for inputs in sets:
            await _compare(original, session, inputs)
        quickest_ns = await _find_quickest_ns(original, session, sets[0])
    figures = Figures(_sum_us(report, order), _sum_us(other, order), *quickest_ns)
    if why_not := verdict(figures):
        raise Useless(why_not)
    return figures, report.placed


def _sum_us(report: Loaded, order: Load) -> int:
    """Return the duration of a load; on a device with its warm-up, in which a provider may compile."""
    return report.loading_us + (report.warming_up_us or 0 if order.device is not None else 0)


async def _make_up_inputs(original: Session, report: Loaded, *, is_needed: bool) -> list[tuple[Tensor, ...]]:
    """Return made-up inputs of `MADE_UP` shapes that the model accepts, or fewer; some if they are needed."""
    accepted = dict[tuple[tuple[int, ...], ...], tuple[Tensor, ...]]()
    refused, source = "", make_samples(report.inputs)
    while len(accepted) < MADE_UP:
        inputs = await asyncio.to_thread(next, source, None)  # a large one takes a while
        if inputs is None:
            break
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in accepted:
            try:
                await original.infer(inputs)
                accepted[shapes] = inputs
            except InputsRefused as refusal:
                refused = str(refusal)
    if is_needed and not accepted:
        raise Useless(f"{NO_INPUTS}. {refused}".strip())
    return list(accepted.values())


def _declared(report: Loaded) -> list[TensorSpec]:
    """Return inputs and outputs without examples and names of dimensions, in which they may differ."""
    return [replace(spec, dimensions=(), example=None) for spec in (*report.inputs, *report.outputs)]


def _describe_difference(bare: Loaded, other: Loaded) -> str:
    """Return the first input or output that is declared otherwise."""
    ours, theirs = _declared(bare), _declared(other)
    for spec, changed in zip(ours, theirs, strict=False):
        if spec != changed:
            said, was = (f"{each.name!r} {each.datatype} {list(each.shape)}" for each in (changed, spec))
            return f"it declares {said}, and the model {was}"
    return f"it declares {len(theirs)} inputs and outputs, and the model {len(ours)}"


async def _compare(original: Session, session: Session, inputs: Sequence[Tensor]) -> None:
    """Compare the answers to the same inputs, bit for bit."""
    _, expected = await original.infer(inputs)
    _, answered = await session.infer(inputs)
    if answered == expected:
        return
    _, again = await original.infer(inputs)
    if again != expected:
        raise Useless("the model answers the same inputs otherwise each time")
    differing = [name for name, digest in expected.items() if answered.get(name) != digest]
    raise Useless(f"its answers differ: {', '.join(map(repr, differing[:MAX_NAMED]))}")


async def _find_quickest_ns(original: Session, session: Session, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Run both in turn; returns the duration of the fastest inference of each."""
    until_s, runs = time.monotonic() + 2 * RUN_S, 0
    bare_ns = ours_ns = 2**63
    while runs < MIN_RUNS or time.monotonic() < until_s:
        bare_ns = min(bare_ns, (await original.infer(inputs))[0])
        ours_ns = min(ours_ns, (await session.infer(inputs))[0])
        runs += 1
        if runs >= RUNS and bare_ns >= MIN_RATE * ours_ns:
            break
    return bare_ns, ours_ns


LENGTHS = ((1, 8), (8, 8), (2, 8), (1, 64))
"""Lengths for open dimensions: of the first one, usually the batch dimension, and of the others, where the
input has no example."""
MAX_SAMPLE_BYTES = 10 * 2**20
"""Limit of all inputs together: two pictures of 640 by 640 as floats. A model with larger inputs is tried on
those of its `loadledger.toml`, if any."""
PERIOD = 4099
"""Period of the noise in values: small, so it is made quickly, and a prime, so that rows differ."""
_TEXT = struct.pack("<I", 1) + b"a"
_FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}


def make_samples(inputs: Iterable[TensorSpec]) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs that a model may accept, the likeliest first: for each shape noise, then zeros.

    Floats are between -1 and 1; integers are 0 or 1, a valid index of almost anything.
    """
    required = [spec for spec in inputs if not spec.optional]
    made = set[tuple[tuple[int, ...], ...]]()
    for first, other in LENGTHS:
        shapes = tuple(_shape(spec, first, other) for spec in required)
        if shapes not in made and _total(required, shapes) <= MAX_SAMPLE_BYTES:
            made.add(shapes)
            yield tuple(map(_noise, required, shapes))
            yield tuple(map(_zeros, required, shapes))


def _shape(spec: TensorSpec, first: int, other: int) -> tuple[int, ...]:
    """Return a shape: of the example that the warm-up found, with `first` for a batch of one."""
    known = [1, *(other for _ in spec.shape[1:])] if spec.example is None else list(spec.example.shape)
    if known[:1] == [1]:
        known[0] = first
    return tuple(
        length if declared < 0 else declared for declared, length in zip(spec.shape, known, strict=False)
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
