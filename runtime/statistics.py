"""Counts and durations of one load's inferences, as the protocol's statistics extension has them, and rates.

The time of an answered request is divided without a rest into queue, compute (input, infer, output) and
transport. docs/metrics.md defines them for users; `InferenceTimes` has the clock readings that bound them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import exp

import msgspec

from answers.inference import BatchStatistics, DurationTotal, MemoryUsage, ModelStatistics
from runtime.wire import Outcome

MAX_SIZES = 1024
"""Execution sizes that are counted separately. The worker reports them, so their number must be bounded."""
MAX_COUNT = 2**63 - 1
"""The largest number that clients can hold; a hostile worker can report more."""
TOOK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Bounds of the buckets of `took`: from the smallest models to the default inference timeout."""
_TOOK_NS = tuple(round(bound * 1e9) for bound in TOOK_S)
_NOTHING_TOOK = [0] * (len(TOOK_S) + 1)


class InferenceTimes(msgspec.Struct, gc=False):
    """The server's readings of CLOCK_MONOTONIC during one inference, in order.

    Attributes:
        arrived_ns: when the first byte of the request was read.
        waited_ns: the duration of its wait for its model to be loaded, on demand or again.
        asked_ns: when it was sent to the worker that answered it.
        answered_ns: when the worker's answer was read.
    """

    arrived_ns: int
    waited_ns: int = 0
    asked_ns: int = 0
    answered_ns: int = 0


@dataclass(slots=True)
class Statistics:
    """The counts of one load, updated on the event loop once per inference.

    Attributes:
        requests: answered requests.
        inferences: their sum, each counted with its batch size.
        executions: runs of the model; fewer than `requests` with batching.
        failures: requests without an answer of the model.
        total_ns, failed_ns: durations of answered and failed requests, as the server saw them.
        queue_ns: part of `total_ns`: waits for the model, and for the worker while it ran other requests.
        input_ns, infer_ns, output_ns: parts of `total_ns` in the worker: decode, run, encode.
        transport_ns: the rest of `total_ns`: HTTP, JSON, frames to the worker and back, waking both sides.
        last_inference_ms: time of the last answer in milliseconds since 1970; 0 is never.
        by_size: executions and their durations, by batch size.
        took: histogram of the durations of answered requests, with the buckets of `TOOK_S` and one beyond.
    """

    requests: int = 0
    inferences: int = 0
    executions: int = 0
    failures: int = 0
    total_ns: int = 0
    failed_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    transport_ns: int = 0
    last_inference_ms: int = 0
    by_size: dict[int, list[int]] = field(default_factory=dict)
    took: list[int] = field(default_factory=_NOTHING_TOOK.copy)

    def count_success(self, outcome: Outcome, times: InferenceTimes, ended_ns: int, now_ms: int) -> None:
        """Count an answered request, and divide its time.

        The worker's durations count as far as they fit into the time that the server measured: a worker's
        report may be wrong.

        Args:
            outcome: the worker's answer.
            times: the readings until then.
            ended_ns: CLOCK_MONOTONIC when the response was handed to its connection.
            now_ms: the time, in milliseconds since 1970.
        """
        queue_ns, input_ns, infer_ns, output_ns = parts_ns = (
            outcome.queue_ns, outcome.input_ns, outcome.infer_ns, outcome.output_ns
        )  # fmt: skip
        in_worker_ns, most_ns = queue_ns + input_ns + infer_ns + output_ns, times.answered_ns - times.asked_ns
        if in_worker_ns > most_ns:
            queue_ns, input_ns, infer_ns, output_ns = _cut_down(parts_ns, most_ns)
            in_worker_ns = most_ns
        total_ns, waited_ns = ended_ns - times.arrived_ns, times.waited_ns
        self.requests += 1
        self.inferences += outcome.batch_size
        self.total_ns += total_ns
        self.took[bisect_left(_TOOK_NS, total_ns)] += 1
        self.queue_ns += queue_ns + waited_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.transport_ns += total_ns - waited_ns - in_worker_ns
        self.last_inference_ms = now_ms
        if outcome.execution_size > 0:
            self._count_execution(outcome.execution_size, input_ns, infer_ns, output_ns)

    def count_failure(self, total_ns: int) -> None:
        self.failures += 1
        self.failed_ns += total_ns

    def add(self, other: Statistics) -> None:
        """Add the counts of another load, except those by batch size."""
        self.requests += other.requests
        self.inferences += other.inferences
        self.executions += other.executions
        self.failures += other.failures
        self.total_ns += other.total_ns
        self.failed_ns += other.failed_ns
        self.queue_ns += other.queue_ns
        self.input_ns += other.input_ns
        self.infer_ns += other.infer_ns
        self.output_ns += other.output_ns
        self.transport_ns += other.transport_ns
        self.last_inference_ms = max(self.last_inference_ms, other.last_inference_ms)
        self.took = [mine + more for mine, more in zip(self.took, other.took, strict=True)]

    def as_protocol(self, model_id: str, version: int, memory_bytes: int) -> ModelStatistics:
        """Return the load's entry in `model_stats`.

        The counts of queue and compute equal that of success; perf_analyzer treats anything else as an error.
        There is no cache, so its counts are 0. `transport` is ours; Triton's clients read members by name.
        """
        requests = self.requests
        return ModelStatistics(
            name=model_id,
            version=str(version),
            last_inference=self.last_inference_ms,
            inference_count=_clamp(self.inferences),
            execution_count=self.executions,
            inference_stats={
                "success": _make_total(requests, self.total_ns),
                "fail": _make_total(self.failures, self.failed_ns),
                "queue": _make_total(requests, self.queue_ns),
                "compute_input": _make_total(requests, self.input_ns),
                "compute_infer": _make_total(requests, self.infer_ns),
                "compute_output": _make_total(requests, self.output_ns),
                "transport": _make_total(requests, self.transport_ns),
                "cache_hit": _make_total(0, 0),
                "cache_miss": _make_total(0, 0),
            },
            response_stats={},
            batch_stats=[_describe_batch(size, self.by_size[size]) for size in sorted(self.by_size)],
            memory_usage=[MemoryUsage(type="CPU", id=0, byte_size=memory_bytes)],
        )

    def _count_execution(self, size: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        self.executions += 1
        counts = self.by_size.get(size)
        if counts is None:
            if len(self.by_size) >= MAX_SIZES:
                return
            counts = self.by_size[size] = [0, 0, 0, 0]
        counts[0] += 1
        counts[1] += input_ns
        counts[2] += infer_ns
        counts[3] += output_ns


def _describe_batch(size: int, counts: list[int]) -> BatchStatistics:
    executions, input_ns, infer_ns, output_ns = counts
    return BatchStatistics(
        batch_size=size,
        compute_input=_make_total(executions, input_ns),
        compute_infer=_make_total(executions, infer_ns),
        compute_output=_make_total(executions, output_ns),
    )


def _cut_down(parts_ns: Iterable[int], most_ns: int) -> Iterator[int]:
    """Yield each part, cut to the time that the earlier parts leave."""
    for part_ns in parts_ns:
        yield (fitting_ns := min(part_ns, most_ns))
        most_ns -= fitting_ns


def _make_total(count: int, ns: int) -> DurationTotal:
    return DurationTotal(count=count, ns=_clamp(ns))


def _clamp(number: int) -> int:
    return min(number, MAX_COUNT)


RATE_DECAY_S = 1200.0
"""Time constant of request rates. With 5 and 60 minutes, evictions were as good within 2 % (simulated)."""

_LEAST_RATE = 1e-7
"""One request in four months; a lower rate is forgotten."""


class RequestRates:
    """Decayed rates of the answered requests of models. They outlive loads, since they tell the next use.

    Attributes:
        per_s: requests per second, by model.
    """

    def __init__(self) -> None:
        self.per_s: dict[str, float] = {}

    def add(self, model_id: str, requests: int) -> None:
        if requests:
            self.per_s[model_id] = self.per_s.get(model_id, 0.0) + requests / RATE_DECAY_S

    def decay(self, seconds: float) -> None:
        kept = exp(-seconds / RATE_DECAY_S)
        self.per_s = {name: rate * kept for name, rate in self.per_s.items() if rate * kept > _LEAST_RATE}
