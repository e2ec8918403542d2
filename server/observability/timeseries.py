"""In-memory time series of memory, requests and latencies, for the last 24 hours.

Two rings: the last hour in steps of 10 s, the last 24 hours in steps of 5 min. A model with a process takes
some 40 bytes of a sample while nothing changes, and 100 with requests (measured in
docs/decisions/0051-charts-from-the-server.md). The samples end with the server.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, dropwhile
from types import MappingProxyType

import msgspec

from answers.samples import Latencies
from events.log import Log
from runtime import memory
from runtime.consumer.consumer import Consumer
from runtime.consumer.running import RunningLoad
from runtime.memory import MemoryLimit
from runtime.statistics import TOOK_S

_log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10
"""Six points in the first minute. A sample of 500 models takes the event loop some milliseconds."""
MERGED = 30
"""Samples of the short range in one of the long range: 5 min, a pixel or two of a day."""

Counts = tuple[int, ...]
"""Failed requests, then answered ones by bucket of `TOOK_S`."""
NO_REQUESTS: Counts = (0,) * (len(TOOK_S) + 2)


@dataclass(frozen=True, slots=True)
class Range:
    """Length and step of samples."""

    interval_s: int
    samples: int


RANGES: Mapping[str, Range] = MappingProxyType(
    {"1h": Range(SAMPLE_EVERY_S, 360), "24h": Range(SAMPLE_EVERY_S * MERGED, 288)}
)
"""The ranges of the API."""
_SHORT, _LONG = RANGES.values()


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Estimate a quantile of a histogram, as Prometheus' `histogram_quantile` does.

    Within a bucket, observations are assumed to be spread evenly; beyond the last bound, it is that bound.

    Args:
        bounds: the upper bounds of the buckets, ascending.
        counts: observations of each bucket alone; one bucket more than bounds.
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


def estimate_latencies(counts: Counts) -> Latencies:
    """Return the requests of an interval, and quantiles of the durations of answered ones."""
    failures, *took = counts
    found = (quantile(TOOK_S, took, share) for share in (0.5, 0.95, 0.99))
    p50, p95, p99 = (None if value is None else round(value, 6) for value in found)
    return Latencies(requests=sum(took), failures=failures, p50_s=p50, p95_s=p95, p99_s=p99)


class Memory(msgspec.Struct, frozen=True, gc=False):
    """Memory at one moment, in bytes; for a longer interval, the maximum of each.

    Attributes:
        server_bytes: memory of the server's own process, without pages of files.
        used_bytes: memory of the workers of loaded models.
        reserved_bytes: memory reserved for loads.
        budget_bytes: memory that workers may take together.
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


def merge_counts(one: Counts, other: Counts) -> Counts:
    return tuple([a + b for a, b in zip(one, other, strict=True)])


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's memory, the requests of all models since the sample before, and the models' samples.

    Attributes:
        at: the end of the interval.
        models: samples of models with a process or requests; packed, since they take most of the memory.
    """

    at: str
    memory: Memory
    counts: Counts
    models: Mapping[str, bytes]

    def of_model(self, model_id: str) -> ModelSample | None:
        packed = self.models.get(model_id)
        return None if packed is None else _decode(packed)

    def followed_by(self, later: Sample) -> Sample:
        """Return the sample of both intervals together."""
        models = {**self.models, **later.models}
        for model_id in self.models.keys() & later.models.keys():
            first, second = _decode(self.models[model_id]), _decode(later.models[model_id])
            most_bytes = max(first.memory_bytes, second.memory_bytes)
            models[model_id] = _encode(ModelSample(most_bytes, merge_counts(first.counts, second.counts)))
        return Sample(
            later.at, self.memory.most(later.memory), merge_counts(self.counts, later.counts), models
        )


class _LoadCounts:
    """The counts of a load at the last sample.

    It keeps the load's own statistics: at the load's end, the model's sum replaces them.
    """

    def __init__(self, load: RunningLoad) -> None:
        self.model_id = load.model_id
        self._statistics = load.statistics
        self._counted = NO_REQUESTS

    def take(self) -> Counts:
        """Return the requests since the last call."""
        before, self._counted = self._counted, (self._statistics.failures, *self._statistics.took)
        if self._counted == before:  # the usual case
            return NO_REQUESTS
        return tuple([after - counted for after, counted in zip(self._counted, before, strict=True)])


class TimeSeries:
    """The samples of the server and of its models."""

    def __init__(self) -> None:
        self._short = deque[Sample](maxlen=_SHORT.samples)
        self._long = deque[Sample](maxlen=_LONG.samples)
        self._begun: Sample | None = None
        self._taken = 0
        self._loads: dict[str, _LoadCounts] = {}

    def sample(self, at: str, now: Memory, loads: Mapping[str, RunningLoad]) -> None:
        """Add a sample.

        Args:
            at: the time of the sample.
            now: the server's memory.
            loads: the running loads, by job id.
        """
        counts, memory_bytes = self._count(loads), _memory_of(loads.values())
        last = self._short[-1].models if self._short else {}
        models: dict[str, bytes] = {}
        for model_id in counts.keys() | memory_bytes.keys():
            sample = ModelSample(memory_bytes.get(model_id, 0), counts.get(model_id, NO_REQUESTS))
            packed = _encode(sample)
            known = last.get(model_id)
            models[model_id] = known if known is not None and known == packed else packed  # one while equal
        whole = Sample(at, now, reduce(merge_counts, counts.values(), NO_REQUESTS), models)
        self._short.append(whole)
        self._begun = whole if self._begun is None else self._begun.followed_by(whole)
        self._taken += 1
        if self._taken % MERGED == 0:
            self._long.append(self._begun)
            self._begun = None

    def of_server(self, range_: Range) -> list[Sample]:
        """Return the samples, oldest first; the last one of the long range is not complete."""
        if range_ is _SHORT:
            return list(self._short)
        return [*self._long, *([] if self._begun is None else [self._begun])]

    def of_model(self, model_id: str, range_: Range) -> list[tuple[str, ModelSample | None]]:
        """Return a model's samples with their times, from its first one on; None without a process."""
        samples = [(sample.at, sample.of_model(model_id)) for sample in self.of_server(range_)]
        return list(dropwhile(lambda each: each[1] is None, samples))

    def _count(self, loads: Mapping[str, RunningLoad]) -> dict[str, Counts]:
        """Return the requests since the last call by model, without models that had none."""
        for job_id, load in loads.items():
            if job_id not in self._loads:
                self._loads[job_id] = _LoadCounts(load)
        counts: dict[str, Counts] = {}
        for each in self._loads.values():
            taken = each.take()
            if taken is not NO_REQUESTS:
                counts[each.model_id] = merge_counts(counts.get(each.model_id, NO_REQUESTS), taken)
        self._loads = {job_id: each for job_id, each in self._loads.items() if job_id in loads}
        return counts


def _memory_of(loads: Iterable[RunningLoad]) -> dict[str, int]:
    found: dict[str, int] = {}
    for load in loads:
        if not load.has_exited:
            found[load.model_id] = found.get(load.model_id, 0) + load.measured_bytes
    return found


def measure(consumer: Consumer, limit: MemoryLimit) -> Memory:
    loads = [load for load in consumer.loads.values() if not load.has_exited]
    return Memory(
        memory.resident_bytes(),
        memory.total_bytes(load.memory_bytes for load in loads if load.report is not None),
        memory.total_bytes(load.memory_bytes for load in loads if load.report is None),
        consumer.policy.budget_bytes or limit.bytes,
    )


async def record(
    series: TimeSeries, log: Log, consumer: Consumer, limit: MemoryLimit, count_waits: Callable[[], None]
) -> None:
    """Sample until cancelled; a failure is logged, since nothing else depends on the samples."""
    while True:
        try:
            count_waits()
            series.sample(log.now(), measure(consumer, limit), consumer.loads)
        except OSError as error:  # no descriptor is left, for example
            _log.warning("memory and requests could not be sampled: %s", error)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("memory and requests could not be sampled")
        await asyncio.sleep(SAMPLE_EVERY_S)
