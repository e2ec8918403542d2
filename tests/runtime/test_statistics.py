"""What is counted of inferences: one load's statistics, a model's totals, and the requests that wait."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from events.counters import ModelLabels
from events.types import LoadParameters
from runtime.consumer.consumer import PendingDemand
from runtime.consumer.running import RunningLoad
from runtime.consumer.usage import InferenceTotals
from runtime.statistics import MAX_COUNT, MAX_SIZES, TOOK_S, InferenceTimes, Statistics
from runtime.wire import Outcome

COUNT = st.integers(0, 2**63 - 1)
COMPUTE = ("compute_input", "compute_infer", "compute_output")
PARTS = ("queue", *COMPUTE, "transport")
STATS = ("success", "fail", *PARTS, "cache_hit", "cache_miss")
SPAN_NS = st.integers(0, 10**12)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    """Any answer that the wire lets through."""
    times = {name: draw(COUNT) for name in ("queue_ns", "input_ns", "infer_ns", "output_ns")}
    return Outcome(1, (), **times, batch_size=draw(COUNT), execution_size=draw(COUNT))


@st.composite
def spans(draw: st.DrawFn) -> tuple[InferenceTimes, int]:
    """The server's readings for one request, which can only be in order, and that of its end."""
    before_ns, waited_ns, worker_ns, after_ns = (draw(SPAN_NS) for _ in range(4))
    arrived_ns = draw(SPAN_NS)
    asked_ns = arrived_ns + before_ns + waited_ns
    times = InferenceTimes(arrived_ns, waited_ns, asked_ns, asked_ns + worker_ns)
    return times, times.answered_ns + after_ns


def count(statistics: Statistics, outcome: Outcome, total_ns: int, now_ms: int = 1) -> None:
    """Count a request of which the worker had the whole time."""
    statistics.count_success(outcome, InferenceTimes(1000, 0, 1000, 1000 + total_ns), 1000 + total_ns, now_ms)


def protocol(statistics: Statistics) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(statistics.as_protocol("m", 3, 1000))
    return shown


def test_statistics_of_idle_load_are_zero() -> None:
    assert protocol(Statistics()) == {
        "name": "m",
        "version": "3",
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": {name: {"count": 0, "ns": 0} for name in STATS},
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 1000}],
    }


def test_requests_of_one_batch_are_one_execution() -> None:
    statistics = Statistics()
    count(statistics, Outcome(1, (), 10, 20, 30, 40, batch_size=2, execution_size=5), 200, 1_000)
    count(statistics, Outcome(2, (), 1, 2, 3, 4, batch_size=3, execution_size=0), 100, 2_000)
    seen = protocol(statistics)
    assert (seen["inference_count"], seen["execution_count"], seen["last_inference"]) == (5, 1, 2_000)
    assert seen["inference_stats"]["success"] == {"count": 2, "ns": 300}
    assert seen["inference_stats"]["queue"] == {"count": 2, "ns": 11}
    assert [seen["inference_stats"][name]["ns"] for name in COMPUTE] == [22, 33, 44]
    compute = {name: {"count": 1, "ns": ns} for name, ns in zip(COMPUTE, (20, 30, 40), strict=True)}
    assert seen["batch_stats"] == [{"batch_size": 5, **compute}]


def test_time_of_request_is_divided_by_who_had_it() -> None:
    statistics = Statistics()
    times = InferenceTimes(arrived_ns=1_000, waited_ns=500, asked_ns=1_700, answered_ns=1_900)
    statistics.count_success(Outcome(1, (), 10, 20, 30, 40), times, 2_000, 1)
    seen = protocol(statistics)["inference_stats"]
    assert [seen[name]["ns"] for name in ("success", *PARTS)] == [1_000, 510, 20, 30, 40, 400]


@PLAIN
@given(st.lists(st.tuples(outcomes(), spans()), max_size=5))
def test_parts_add_up_whatever_a_worker_says(
    requests: list[tuple[Outcome, tuple[InferenceTimes, int]]],
) -> None:
    statistics, before = Statistics(), [0] * len(PARTS)
    for outcome, (times, ended_ns) in requests:
        statistics.count_success(outcome, times, ended_ns, 1)
        seen = protocol(statistics)["inference_stats"]
        parts = [seen[name]["ns"] for name in PARTS]
        assert sum(parts) == seen["success"]["ns"] == statistics.total_ns
        assert all(map(int.__le__, before, parts))
        before = parts
    in_worker = sum(times.answered_ns - times.asked_ns for _, (times, _) in requests)
    waited = sum(times.waited_ns for _, (times, _) in requests)
    assert sum(before[:-1]) <= in_worker + waited


@PLAIN
@given(st.lists(outcomes(), max_size=20))
def test_statistics_count_successes_within_64_bits(answers: list[Outcome]) -> None:
    statistics = Statistics()
    for answer in answers:
        count(statistics, answer, answer.queue_ns)
    seen = protocol(statistics)
    stats = seen["inference_stats"]
    assert {stats[name]["count"] for name in ("success", *PARTS)} == {len(answers)}
    assert all(counts["ns"] <= MAX_COUNT for counts in stats.values())
    assert seen["execution_count"] == sum(answer.execution_size > 0 for answer in answers)
    assert sum(entry["compute_infer"]["count"] for entry in seen["batch_stats"]) == seen["execution_count"]


def test_invented_batch_sizes_are_bounded() -> None:
    statistics = Statistics()
    for size in range(1, MAX_SIZES + 100):
        count(statistics, Outcome(1, (), execution_size=size), 1)
    seen = protocol(statistics)
    assert (len(seen["batch_stats"]), seen["execution_count"]) == (MAX_SIZES, MAX_SIZES + 99)


def test_durations_fall_into_the_first_bucket_that_holds_them() -> None:
    statistics = Statistics()
    for seconds in (*TOOK_S, 10**6):
        count(statistics, Outcome(1), round(seconds * 1e9))
    assert statistics.took == [1] * (len(TOOK_S) + 1)


# Totals of a model over its loads.


def load(model_id: str) -> RunningLoad:
    return RunningLoad("job", model_id, 1, LoadParameters(), lambda: None)


def figures(counts: Statistics) -> tuple[int, ...]:
    parts = (counts.queue_ns, counts.input_ns, counts.infer_ns, counts.output_ns, counts.transport_ns)
    return (counts.requests, counts.failures, counts.total_ns, counts.failed_ns, *parts, *counts.took)


@PLAIN
@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "fail", "end", "look"]), st.integers(0, 3), st.integers(0, 10**10))
    )
)
def test_totals_never_lose_or_repeat_an_inference(steps: list[tuple[str, int, int]]) -> None:
    totals, live = InferenceTotals(ModelLabels()), [load("a"), load("a"), load("b"), load("b")]
    there, expected, before = set(range(4)), {"a": Statistics(), "b": Statistics()}, dict[str, Statistics]()
    for step, number, took_ns in steps:
        each = live[number]
        for counts in (each.statistics, expected[each.model_id]):
            if step == "ask":  # also of a load that is over: an answer may come to be counted last
                count(counts, Outcome(1, (), 1, 2, 3, 4), took_ns)
            elif step == "fail":
                counts.count_failure(took_ns)
        if step == "end":
            totals.end(each)
            there.discard(number)
        seen = totals.with_live(live[number] for number in there)
        for name, counts in seen.items():
            assert figures(counts) == figures(expected[name])
            assert all(map(int.__le__, figures(before.get(name, Statistics())), figures(counts)))
        before = seen


def test_totals_sum_up_models_beyond_the_limit() -> None:
    totals = InferenceTotals(ModelLabels(1))
    live = [load(name) for name in ("a", "b", "c")]
    for each in live:
        each.statistics.count_failure(1)
    expected = {"a": 1, "_others": 2}
    assert {name: counts.failures for name, counts in totals.with_live(live).items()} == expected
    for each in live:
        totals.end(each)
    for listed in ([], live):  # an ended load may still be listed, under its other job id
        assert {name: counts.failures for name, counts in totals.with_live(listed).items()} == expected


# Requests that wait for a model.


def test_model_is_held_until_its_last_request_ends() -> None:
    ended = list[str]()
    demand = PendingDemand(lambda: ended.append("end"))
    with demand.hold("m"):
        with suppress(KeyboardInterrupt), demand.hold("m"), demand.hold("n"):
            assert set(demand.models) == {"m", "n"}
            raise KeyboardInterrupt
        assert (demand.has("m"), demand.has("n"), ended) == (True, False, ["end"])
    assert ended == ["end", "end"]
    assert not demand.models


async def test_demand_of_who_gave_up_is_kept_until_the_next_use() -> None:
    ended = asyncio.Event()
    demand = PendingDemand(ended.set)
    demand.keep("m")
    assert (set(demand.models), demand.has("m"), demand.has("n")) == ({"m"}, True, False)
    assert not demand.has("m", time.monotonic_ns() + 1)
    demand.kept_s = 0
    demand.keep("m")
    async with asyncio.timeout(60):
        await ended.wait()
    assert not demand.models
