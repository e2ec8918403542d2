"""Statistics: what the protocol's clients read of them, from plain values."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from runtime.statistics import MAX_COUNT, MAX_SIZES, Statistics
from runtime.wire import Outcome

COUNT = st.integers(0, 2**63 - 1)
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    """Any answer that the wire lets through."""
    times = {name: draw(COUNT) for name in ("queue_ns", "input_ns", "infer_ns", "output_ns")}
    return Outcome(1, (), **times, batch_size=draw(COUNT), execution_size=draw(COUNT))


def told(statistics: Statistics) -> dict[str, Any]:
    return statistics.as_protocol("m", 3, 1000)


def test_a_load_that_was_asked_nothing_counts_nothing() -> None:
    none = {"count": 0, "ns": 0}
    assert told(Statistics()) == {
        "name": "m",
        "version": "3",
        "last_inference": 0,
        "inference_count": 0,
        "execution_count": 0,
        "inference_stats": {
            "success": none,
            "fail": none,
            "queue": none,
            "compute_input": none,
            "compute_infer": none,
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 1000}],
    }


def test_two_requests_that_ran_together_are_one_execution_of_their_size() -> None:
    statistics = Statistics()
    statistics.success(Outcome(1, (), 10, 20, 30, 40, batch_size=2, execution_size=5), 200, 1_000)
    statistics.success(Outcome(2, (), 1, 2, 3, 4, batch_size=3, execution_size=0), 100, 2_000)
    seen = told(statistics)
    assert (seen["inference_count"], seen["execution_count"], seen["last_inference"]) == (5, 1, 2_000)
    assert seen["inference_stats"]["success"] == {"count": 2, "ns": 300}
    assert seen["inference_stats"]["queue"] == {"count": 2, "ns": 11}
    assert [seen["inference_stats"][name]["ns"] for name in COMPUTE] == [22, 33, 44]
    assert seen["batch_stats"] == [
        {
            "batch_size": 5,
            "compute_input": {"count": 1, "ns": 20},
            "compute_infer": {"count": 1, "ns": 30},
            "compute_output": {"count": 1, "ns": 40},
        },
    ]


def test_a_failure_counts_as_nothing_but_a_failure() -> None:
    statistics = Statistics()
    statistics.failure(7)
    seen = told(statistics)
    assert seen["inference_stats"].pop("fail") == {"count": 1, "ns": 7}
    assert {counts["count"] for counts in seen["inference_stats"].values()} == {0}
    assert (seen["inference_count"], seen["last_inference"]) == (0, 0)


@PLAIN
@given(st.lists(outcomes(), max_size=20))
def test_queue_and_compute_count_what_succeeded_and_no_number_is_past_64_bits(answers: list[Outcome]) -> None:
    statistics = Statistics()
    for answer in answers:
        statistics.success(answer, answer.queue_ns, 1)
    seen = told(statistics)
    stats = seen["inference_stats"]
    assert {stats[name]["count"] for name in ("success", "queue", *COMPUTE)} == {len(answers)}
    assert all(counts["ns"] <= MAX_COUNT for counts in stats.values())
    assert seen["execution_count"] == sum(answer.execution_size > 0 for answer in answers)
    assert sum(entry["compute_infer"]["count"] for entry in seen["batch_stats"]) == seen["execution_count"]


def test_a_worker_that_makes_sizes_up_does_not_fill_the_memory() -> None:
    statistics = Statistics()
    for size in range(1, MAX_SIZES + 100):
        statistics.success(Outcome(1, (), execution_size=size), 1, 1)
    seen = told(statistics)
    assert len(seen["batch_stats"]) == MAX_SIZES
    assert seen["execution_count"] == MAX_SIZES + 99
