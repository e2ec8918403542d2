"""The trial of a cached model: the bare and the cached session side by side, in two fresh processes.

The workers of preparations, and so those of trials, are suspended (SIGSTOP) while others compute. A worker at
low priority still costs others: it shares caches and memory with them, on many machines a core's hardware,
and it has to leave a core before they can take it.

It compares what a client would see: declared inputs and outputs, each answer bit for bit, and once the
duration of a load and of the fastest inference.

Without given inputs the trial makes some up, the same ones each time. Where a shape leaves a length open, it
tries several.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass

from msgspec.structs import replace

from events.clock import uuid7
from runtime.errors import (
    ForkServerUnavailable,
    InferenceFailed,
    InferenceTimeout,
    InvalidInput,
    QueueFull,
    RuntimeProblem,
    WorkerDied,
)
from runtime.process.pool import WorkerPool, kill_and_wait
from runtime.process.worker import Worker
from runtime.wire import DATATYPES, CachedCopy, Load, Loaded, Outcome, Tensor, TensorSpec

LENGTHS = ((1, 8), (8, 8), (2, 8), (1, 64))
"""Lengths for open dimensions: of the first one, usually the batch dimension, and of the others."""
MAX_SAMPLE_BYTES = 10 * 2**20
"""Limit of all inputs together: two pictures of 640 by 640 as floats. A model with larger inputs is tried on
those of its `loadledger.toml`, if any."""
PERIOD = 4099
"""Period of the noise in values: small, so it is made quickly, and a prime, so that rows differ."""
_TEXT = struct.pack("<I", 1) + b"a"
_FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}


CHANGED = ("model_changed", "unsafe_file")
"""Codes of a load whose files have changed since the load before."""
RUNS = 200
"""Limit of inferences per session; at least `MIN_RUNS`, otherwise for `RUN_S`."""
MIN_RUNS = 3
RUN_S = 0.5
INFERENCE_LIMIT_S = 60.0
MADE_UP = 2
"""Shapes of made-up inputs that are compared. Kernels for one row and for several differ, and so do their
defects: with misaligned weights one row is answered, and two crash (measured with 1.31; not with 1.32)."""
MIN_RATE = 0.95
"""Least inference rate of a cached session ÷ the bare one: a smaller difference is noise."""
TICK_S = 0.005
"""Between two checks for work of others: a preparation notices their work after at most so long."""
QUIET_S = 0.05
"""Others have a gap if they did nothing for so long: the next request of a busy client comes sooner."""
TURN_S, STOPPED_S = 0.05, 1.0
"""Without any gap, a preparation computes for `TURN_S` after each `STOPPED_S`: it must not hold its memory
for ever, and a model that takes 5 s of computing time to prepare is prepared within two minutes."""


def make_samples(inputs: Iterable[TensorSpec]) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs that a model may accept, the likeliest first: for each shape noise, then zeros.

    Floats are between -1 and 1; integers are 0 or 1, a valid index of almost anything.
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


MAX_NAMED = 3
"""Outputs that a reason names."""


class TrialImpossible(Exception):
    """No trial is possible: no inputs are known, or the bare model fails on them."""


class TrialInterrupted(Exception):
    """The trial ended early for no fault of the form, and may be repeated."""


def has_outside_cause(problem: RuntimeProblem) -> bool:
    """Return whether the problem may have a cause outside of the model and its form.

    A worker is killed for its memory, or at the server's end.
    """
    if isinstance(problem, WorkerDied):
        return problem.end.exit_code is None and problem.end.signal in {None, signal.SIGKILL}
    return isinstance(problem, ForkServerUnavailable | InferenceTimeout | QueueFull)


@contextmanager
def bare_model_errors(*, passing: tuple[type[RuntimeProblem], ...] = ()) -> Iterator[None]:
    """Turn problems of the bare model into trial errors, so that no form is rejected for them.

    Args:
        passing: problems that are raised unchanged, as are those of changed files.

    Raises:
        TrialImpossible: the model itself fails.
        TrialInterrupted: limits of time or memory, or an outside cause.
    """
    try:
        yield
    except RuntimeProblem as problem:
        if isinstance(problem, passing) or problem.code in CHANGED:
            raise
        if has_outside_cause(problem) or problem.code == "out_of_memory":
            raise TrialInterrupted(f"the bare model: {problem}") from problem
        raise TrialImpossible(f"the model cannot be tried, bare as it is: {problem}") from problem


@dataclass(frozen=True, slots=True)
class Pair:
    """Measurements of a bare and a cached session: load and fastest inference of each."""

    bare_load_us: int
    load_us: int
    bare_infer_ns: int
    infer_ns: int


def verdict(pair: Pair) -> str | None:
    """Return why a form with equal answers is of no use; None if it is of use."""
    if pair.load_us >= pair.bare_load_us:
        return f"it loads no faster: {pair.load_us / 1000:.1f} ms, bare {pair.bare_load_us / 1000:.1f} ms"
    rate = pair.bare_infer_ns / pair.infer_ns if pair.infer_ns else 1.0
    return f"its inferences are slower: {rate:.2f} of the bare rate" if rate < MIN_RATE else None


@dataclass(frozen=True, slots=True)
class Pace:
    """Whether the workers of a preparation are stopped.

    Attributes:
        is_stopped: whether they are.
        until_s: when they compute again at the latest, if they are; else when they may be stopped again.
        busy_s: when others last computed.
    """

    is_stopped: bool = False
    until_s: float = 0.0
    busy_s: float = float("-inf")


def next_pace(pace: Pace, now_s: float, *, is_busy: bool) -> Pace:
    """Return the pace from now on.

    Args:
        pace: the one until now.
        now_s: on any steady clock, in seconds.
        is_busy: whether others compute now.
    """
    if is_busy:
        pace = Pace(pace.is_stopped, pace.until_s, busy_s=now_s)
    is_gap = now_s - pace.busy_s >= QUIET_S
    if pace.is_stopped and (is_gap or now_s >= pace.until_s):
        return Pace(is_stopped=False, until_s=now_s if is_gap else now_s + TURN_S, busy_s=pace.busy_s)
    if not pace.is_stopped and is_busy and now_s >= pace.until_s:
        return Pace(is_stopped=True, until_s=now_s + STOPPED_S, busy_s=pace.busy_s)
    return pace


class Pacer:
    """Starts the workers of preparations, and stops and continues their processes.

    Args:
        pool: starts the workers.
        is_busy: whether others compute now; called at each tick of a preparation.
    """

    def __init__(self, pool: WorkerPool, is_busy: Callable[[], bool]) -> None:
        self._pool = pool
        self._is_busy = is_busy
        self._workers: set[Worker] = set()

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """Start a worker, and kill it at the end, stopped or not.

        Raises:
            ForkServerUnavailable: `fork_server_unavailable`.
        """
        worker = await self._pool.fork(uuid7())
        self._workers.add(worker)
        try:
            yield worker
        finally:
            self._workers.discard(worker)
            await kill_and_wait(worker)

    async def run(self) -> None:
        """Pace the workers until cancelled; those that are left are continued then."""
        pace, stopped = Pace(), set[Worker]()
        try:
            while True:
                pace = next_pace(pace, time.monotonic(), is_busy=self._is_busy())
                if pace.is_stopped:
                    for worker in self._workers - stopped:
                        worker.suspend()
                else:
                    for worker in stopped:
                        worker.resume()
                stopped = set(self._workers) if pace.is_stopped else set()
                await asyncio.sleep(TICK_S)
        finally:
            for worker in stopped:
                worker.resume()


class Trial:
    """Trials of one version's forms.

    Args:
        pacer: starts two fresh workers each time.
        bare: the order to load the version; a trial skips its warm-up and runs in the background.
        given: inputs of its loadledger.toml; empty means that the trial makes some up.
    """

    def __init__(self, pacer: Pacer, bare: Load, given: Sequence[Tensor]) -> None:
        self._pacer = pacer
        self._bare = replace(bare, warm_up=False, background=True, max_batch_size=0, max_queue_delay_us=0)
        self._given = tuple(given)
        self._sets: list[tuple[Tensor, ...]] | None = None

    async def run(self, prepared: CachedCopy) -> tuple[str | None, Pair | None]:
        """Try a form; returns why it is of no use, or None, and the measurements if its answers were equal.

        Raises:
            TrialImpossible: no form of this model can be tried.
            TrialInterrupted: it took too long, or the bare model more memory than was reserved for it.
            RuntimeProblem: the files have changed, the form could not be loaded or run, or its worker died.
        """
        async with (
            self._load(self._bare) as (bare, bare_report),
            self._load(replace(self._bare, prepared=prepared)) as (other, report),
        ):
            if (bare_report.inputs, bare_report.outputs) != (report.inputs, report.outputs):
                return _describe_difference(bare_report, report), None
            sets = self._sets = self._sets or await self._collect_inputs(bare, bare_report)
            why_not = await _compare(bare, other, sets)
            if why_not is not None:
                return why_not, None
            quickest_ns = await _quickest_ns(bare, other, sets[0])
        pair = Pair(bare_report.loading_us, report.loading_us, *quickest_ns)
        return verdict(pair), pair

    @asynccontextmanager
    async def _load(self, order: Load) -> AsyncIterator[tuple[Worker, Loaded]]:
        async with self._pacer.worker() as worker:
            with bare_model_errors() if order.prepared is None else nullcontext():
                report = await worker.load(order, lambda _: None)
            yield worker, report

    async def _collect_inputs(self, bare: Worker, report: Loaded) -> list[tuple[Tensor, ...]]:
        """Return the inputs of the trial: the given ones, and made-up ones that the model accepts."""
        found = [self._given] if self._given else []
        shapes: set[tuple[tuple[int, ...], ...]] = set()
        refused = ""
        async for inputs in _make_inputs(report):
            shape = tuple(tensor.shape for tensor in inputs)
            if shape in shapes:
                continue
            try:
                with bare_model_errors(passing=(InvalidInput, InferenceFailed)):
                    await _ask(bare, inputs)
            except (InvalidInput, InferenceFailed) as problem:
                refused = str(problem)
                continue
            shapes.add(shape)
            found.append(inputs)
            if len(shapes) == MADE_UP:
                break
        if not found:
            advice = "give inputs that it takes as [[warm_up.inputs]] in its loadledger.toml"
            raise TrialImpossible(
                f"nothing is known that the model could be tried on: {advice}. {refused}".strip()
            )
        return found


async def _make_inputs(report: Loaded) -> AsyncIterator[tuple[Tensor, ...]]:
    """Yield made-up inputs; a thread makes them, since a large one takes a while."""
    source = make_samples(report.inputs)
    while (made := await asyncio.to_thread(next, source, None)) is not None:
        yield made


def _describe_difference(bare: Loaded, other: Loaded) -> str:
    """Return the first input or output that a form declares otherwise."""
    ours, theirs = (*bare.inputs, *bare.outputs), (*other.inputs, *other.outputs)
    for spec, changed in zip(ours, theirs, strict=False):
        if spec != changed:
            said, was = (f"{each.name!r} {each.datatype} {list(each.shape)}" for each in (changed, spec))
            return f"it declares {said}, and the model {was}"
    return f"it declares {len(theirs)} inputs and outputs, and the model {len(ours)}"


async def _compare(bare: Worker, other: Worker, sets: Iterable[tuple[Tensor, ...]]) -> str | None:
    """Return why the answers of a form do not agree with the bare model's; None if they do.

    Raises:
        TrialImpossible: the bare model does not agree with itself.
    """
    for inputs in sets:
        with bare_model_errors():
            _, expected = await _ask(bare, inputs)
        _, answered = await _ask(other, inputs)
        if _hashes(answered) == _hashes(expected):
            continue
        with bare_model_errors():
            _, again = await _ask(bare, inputs)
        if _hashes(again) != _hashes(expected):
            raise TrialImpossible("the model answers the same inputs otherwise each time")
        pairs = zip(_hashes(expected), _hashes(answered), strict=False)
        differing = [name for (name, digest), (_, other_digest) in pairs if digest != other_digest]
        return f"its answers differ: {', '.join(map(repr, differing[:MAX_NAMED]))}"
    return None


async def _quickest_ns(bare: Worker, other: Worker, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Run both in turn; returns the duration of the fastest inference of each."""
    until = time.monotonic() + 2 * RUN_S
    took: list[tuple[int, int]] = []
    while len(took) < MIN_RUNS or (len(took) < RUNS and time.monotonic() < until):
        with bare_model_errors():
            bare_outcome, _ = await _ask(bare, inputs)
        outcome, _ = await _ask(other, inputs)
        took.append((bare_outcome.infer_ns, outcome.infer_ns))
    bare_ns, other_ns = zip(*took, strict=True)
    return min(bare_ns), min(other_ns)


async def _ask(worker: Worker, inputs: tuple[Tensor, ...]) -> tuple[Outcome, tuple[Tensor, ...]]:
    """Run the model; the worker returns only the hashes of its outputs."""
    return await worker.infer(inputs, digest=True, timeout_s=INFERENCE_LIMIT_S)


def _hashes(answers: Iterable[Tensor]) -> list[tuple[str, bytes]]:
    return [(answer.name, bytes(answer.data)) for answer in answers]
