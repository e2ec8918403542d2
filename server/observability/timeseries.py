"""In-memory time series of memory, requests and latencies, for the last 24 hours.

Two rings: the last hour in steps of 10 s, the last 24 hours in steps of 5 min. A model's sample takes 8 bytes
while nothing changes, and some 90 bytes when the model was asked (measured in
docs/decisions/0051-charts-from-the-server.md). The samples end with the server.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from types import MappingProxyType

import msgspec

from events.log import Log
from runtime import memory
from runtime.consumer.consumer import Consumer
from runtime.consumer.running import RunningLoad
from runtime.memory import MemoryLimit
from runtime.statistics import TOOK_S, Statistics

_log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10
"""Six points in the first minute. A sample of 500 models takes the event loop some milliseconds."""
MERGED = 30
"""Samples of the short range that make one of the long one: 5 min, a pixel or two of a day."""
MAX_MODELS = 1000
"""Models with samples of their own, at most 60 MB of them. Others count only in the server's samples."""

Counts = tuple[int, ...]
"""Failed requests, then the answered ones by bucket of `TOOK_S`."""
NO_REQUESTS: Counts = (0,) * (len(TOOK_S) + 2)


@dataclass(frozen=True, slots=True)
class Range:
    """How far back samples go, and how close they are."""

    interval_s: int
    samples: int


RANGES: Mapping[str, Range] = MappingProxyType(
    {"1h": Range(SAMPLE_EVERY_S, 360), "24h": Range(SAMPLE_EVERY_S * MERGED, 288)}
)
"""The ranges of the API."""
_SHORT, _LONG = RANGES.values()


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Estimate a quantile of a histogram, as Prometheus' `histogram_quantile` does.

    Within a bucket, observations are taken to be spread evenly; beyond the last bound, it is that bound.

    Args:
        bounds: the upper bounds of the buckets, ascending.
        counts: of each bucket alone; one more than there are bounds.
        share: 0 to 1.

    Returns:
        The quantile in the bounds' unit; None without observations.
    """
    below = list(accumulate(counts))
    if not below[-1]:
        return None
    rank = share * below[-1]
    at = bisect_left(below, rank) if rank else next(i for i, count in enumerate(counts) if count)
    if at >= len(bounds):
        return bounds[-1]
    low = bounds[at - 1] if at else 0.0
    return low + (bounds[at] - low) * (rank - below[at] + counts[at]) / counts[at]


class Latencies(msgspec.Struct, frozen=True, gc=False):
    """The requests of an interval, and quantiles of the durations of those that were answered, in seconds."""

    requests: int
    failures: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, counts: Counts) -> Latencies:
        failures, *took = counts
        found = (quantile(TOOK_S, took, share) for share in (0.5, 0.95, 0.99))
        p50, p95, p99 = (None if value is None else round(value, 6) for value in found)
        return cls(sum(took), failures, p50, p95, p99)


class Memory(msgspec.Struct, frozen=True, gc=False):
    """Memory at one moment, in bytes; of a longer interval, the most of each.

    Attributes:
        server_bytes: of the server's own process, without pages of files.
        used_bytes: of the workers of loaded models.
        reserved_bytes: reserved for loads and for preparing.
        budget_bytes: what workers may take together.
    """

    server_bytes: int
    used_bytes: int
    reserved_bytes: int
    budget_bytes: int

    def most(self, other: Memory) -> Memory:
        return Memory(
            max(self.server_bytes, other.server_bytes),
            max(self.used_bytes, other.used_bytes),
            max(self.reserved_bytes, other.reserved_bytes),
            other.budget_bytes,
        )


class ModelSample(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A model's memory, in bytes, and the requests since the sample before."""

    memory_bytes: int
    counts: Counts


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ModelSample).decode
_NO_SAMPLE = ModelSample(0, NO_REQUESTS)


def merge_counts(one: Counts, other: Counts) -> Counts:
    if one is NO_REQUESTS or other is NO_REQUESTS:  # most are
        return other if one is NO_REQUESTS else one
    return tuple([a + b for a, b in zip(one, other, strict=True)])


class _ModelSeries:
    """The samples of one model in both ranges, packed; None where it had no process."""

    __slots__ = ("_last", "_merged", "_packed", "absent", "long", "short")

    def __init__(self) -> None:
        self.short = deque[bytes | None](maxlen=_SHORT.samples)
        self.long = deque[bytes | None](maxlen=_LONG.samples)
        self.absent = 0
        self._merged: ModelSample | None = None
        self._last, self._packed = _NO_SAMPLE, _encode(_NO_SAMPLE)

    def add(self, memory_bytes: int | None, counts: Counts) -> None:
        if memory_bytes is None and counts is NO_REQUESTS:
            self.absent += 1
            self.short.append(None)
            return
        self.absent = 0
        self.short.append(self._pack(memory_bytes or 0, counts))
        before = self._merged or _NO_SAMPLE
        if before.memory_bytes < (memory_bytes or 0) or counts is not NO_REQUESTS or self._merged is None:
            most = max(before.memory_bytes, memory_bytes or 0)
            self._merged = ModelSample(most, merge_counts(before.counts, counts))

    def merge(self) -> None:
        merged, self._merged = self._merged, None
        self.long.append(None if merged is None else self._pack(merged.memory_bytes, merged.counts))

    def samples(self, range_: Range, *, has_begun: bool) -> list[ModelSample | None]:
        """Return the samples, oldest first; of the long range also the one that has begun, if one has."""
        packed = self.short if range_ is _SHORT else self.long
        found = [None if each is None else _decode(each) for each in packed]
        return [*found, self._merged] if has_begun and range_ is _LONG else found

    def _pack(self, memory_bytes: int, counts: Counts) -> bytes:
        """Pack a sample; one that equals the last one takes no memory of its own."""
        last = self._last
        if memory_bytes != last.memory_bytes or counts != last.counts:
            self._last = ModelSample(memory_bytes, counts)
            self._packed = _encode(self._last)
        return self._packed


class _Counter:
    """The counts of a load at the last sample.

    It keeps the load's own statistics: at the load's end, the executor replaces them by the model's sum.
    """

    __slots__ = ("_counted", "_requests", "_statistics", "model_id")

    def __init__(self, model_id: str, statistics: Statistics) -> None:
        self.model_id = model_id
        self._statistics = statistics
        self._requests = (0, 0)
        self._counted = NO_REQUESTS

    def take(self) -> Counts:
        now = self._statistics
        requests = (now.requests, now.failures)
        if requests == self._requests:
            return NO_REQUESTS
        counted = (now.failures, *now.took)
        taken = tuple([after - before for after, before in zip(counted, self._counted, strict=True)])
        self._requests, self._counted = requests, counted
        return taken


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The server's memory, and the requests of all models since the sample before.

    Attributes:
        at: the end of the interval.
    """

    at: str
    memory: Memory
    counts: Counts

    def followed_by(self, next_: ServerSample) -> ServerSample:
        return ServerSample(next_.at, self.memory.most(next_.memory), merge_counts(self.counts, next_.counts))


class TimeSeries:
    """The samples of the server and of its models."""

    def __init__(self) -> None:
        self._short = deque[ServerSample](maxlen=_SHORT.samples)
        self._long = deque[ServerSample](maxlen=_LONG.samples)
        self._merged: ServerSample | None = None
        self._taken = 0
        self._models: dict[str, _ModelSeries] = {}
        self._counters: dict[str, _Counter] = {}

    @property
    def models(self) -> int:
        return len(self._models)

    def sample(self, at: str, now: Memory, loads: Mapping[str, RunningLoad]) -> None:
        """Add a sample.

        Args:
            at: when it was taken.
            now: the server's memory.
            loads: the running loads, by job id.
        """
        self._taken += 1
        counts, memory_bytes = self._count(loads), _memory_of(loads.values())
        sample = ServerSample(at, now, reduce(merge_counts, counts.values(), NO_REQUESTS))
        self._short.append(sample)
        self._merged = sample if self._merged is None else self._merged.followed_by(sample)
        for model_id in [*counts, *memory_bytes]:
            if model_id not in self._models and len(self._models) < MAX_MODELS:
                self._models[model_id] = _ModelSeries()
        for model_id, series in self._models.items():
            series.add(memory_bytes.get(model_id), counts.get(model_id, NO_REQUESTS))
        if self._taken % MERGED == 0:
            self._end_long_sample(self._merged)

    def of_server(self, range_: Range) -> list[ServerSample]:
        """Return the server's samples, oldest first; the last one of the long range has not ended."""
        if range_ is _SHORT:
            return list(self._short)
        return [*self._long, *([] if self._merged is None else [self._merged])]

    def of_model(self, model_id: str, range_: Range) -> list[tuple[str, ModelSample | None]]:
        """Return a model's samples with their times, oldest first; None where it had no process."""
        series = self._models.get(model_id)
        times = [sample.at for sample in self.of_server(range_)]
        found = [] if series is None else series.samples(range_, has_begun=self._merged is not None)
        return list(zip(times[len(times) - len(found) :], found, strict=True))

    def _count(self, loads: Mapping[str, RunningLoad]) -> dict[str, Counts]:
        for job_id, load in loads.items():
            if job_id not in self._counters:
                self._counters[job_id] = _Counter(load.model_id, load.statistics)
        counts: dict[str, Counts] = {}
        for job_id, counter in list(self._counters.items()):
            taken = counter.take()
            if taken is not NO_REQUESTS:
                counts[counter.model_id] = merge_counts(counts.get(counter.model_id, NO_REQUESTS), taken)
            if job_id not in loads:
                del self._counters[job_id]
        return counts

    def _end_long_sample(self, merged: ServerSample) -> None:
        self._long.append(merged)
        self._merged = None
        for model_id, series in list(self._models.items()):
            series.merge()
            if series.absent >= _LONG.samples * MERGED:
                del self._models[model_id]


def _memory_of(loads: Iterable[RunningLoad]) -> dict[str, int]:
    found: dict[str, int] = {}
    for load in loads:
        if not load.run.has_exited:
            found[load.model_id] = found.get(load.model_id, 0) + load.measured_bytes
    return found


def measure(consumer: Consumer, limit: MemoryLimit) -> Memory:
    runs = [run for load in consumer.loads.values() if not (run := load.run).has_exited]
    preparation = consumer.preparation()
    preparing_bytes = preparation.reserved_bytes if preparation is not None else 0
    return Memory(
        memory.resident_bytes(),
        memory.total_bytes(run.memory_bytes for run in runs if run.is_loaded),
        memory.total_bytes([preparing_bytes, *(run.memory_bytes for run in runs if not run.is_loaded)]),
        consumer.policy.budget_bytes or limit.bytes,
    )


async def record(series: TimeSeries, log: Log, consumer: Consumer, limit: MemoryLimit) -> None:
    """Sample until cancelled; a failure is logged, since nothing else depends on the samples."""
    while True:
        try:
            series.sample(log.now(), measure(consumer, limit), consumer.loads)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("memory and requests could not be sampled")
        await asyncio.sleep(SAMPLE_EVERY_S)
