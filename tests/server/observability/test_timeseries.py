"""Samples for charts: quantiles of histograms, counts between samples, and what two ranges keep."""

import pytest

from answers.samples import Latencies
from events.types import LoadParameters
from runtime.consumer.running import RunningLoad
from runtime.statistics import Statistics
from server.observability.timeseries import MERGED, RANGES, Memory, TimeSeries, estimate_latencies, quantile

BOUNDS = (0.1, 0.2, 0.4)
NOW = Memory(10, 20, 0, 100)
SHORT, LONG = RANGES.values()


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 0, 0, 0), 0.5, 0.05),
        ((10, 10, 0, 0), 0.5, 0.1),
        ((10, 10, 0, 0), 0.95, 0.19),
        ((0, 0, 4, 0), 0.0, 0.2),
        ((0, 0, 4, 0), 1.0, 0.4),
        ((1, 0, 0, 1), 0.5, 0.1),
        ((1, 0, 0, 9), 0.5, 0.4),  # beyond the last bound
    ],
)
def test_quantile_interpolates_within_a_bucket(
    counts: tuple[int, ...], share: float, expected: float | None
) -> None:
    assert quantile(BOUNDS, counts, share) == (None if expected is None else pytest.approx(expected))


def running(job_id: str, model_id: str = "m") -> RunningLoad:
    return RunningLoad(job_id, model_id, 1, LoadParameters(), lambda: None)


def answer(load: RunningLoad, *buckets: int, failures: int = 0) -> None:
    for bucket in buckets:
        load.statistics.took[bucket] += 1
        load.statistics.requests += 1
    load.statistics.failures += failures


def test_samples_count_what_lies_between() -> None:
    seen, load = TimeSeries(), running("j")
    answer(load, 4, 4, 5)
    for asked in ((), (4,), ()):
        answer(load, *asked)
        seen.sample(f"t{asked}", NOW, {"j": load})
    requests = [sum(sample.counts[1:]) for _, sample in seen.of_model("m", SHORT) if sample]
    assert requests == [3, 1, 0]
    assert [sum(sample.counts[1:]) for sample in seen.of_server(SHORT)] == [3, 1, 0]
    assert estimate_latencies(seen.of_server(SHORT)[0].counts) == Latencies(
        requests=3, failures=0, p50_s=0.00875, p95_s=0.02275, p99_s=0.02455
    )


def test_requests_of_a_load_that_ended_are_counted() -> None:
    seen, old, new = TimeSeries(), running("old"), running("new")
    seen.sample("1", NOW, {"old": old})
    answer(old, 3, failures=2)
    before, old.statistics = old.statistics, Statistics(requests=900, took=[60] * 15)  # the model's sum
    answer(new, 3)
    seen.sample("2", NOW, {"new": new})
    seen.sample("3", NOW, {"new": new})
    assert before.requests == 1
    samples = [sample.counts for _, sample in seen.of_model("m", SHORT) if sample]
    assert [(counts[0], sum(counts[1:])) for counts in samples] == [(0, 0), (2, 2), (0, 0)]


def test_long_range_merges_samples_and_shows_the_begun_one() -> None:
    seen, load = TimeSeries(), running("j")
    for number in range(MERGED + 2):
        answer(load, 1)
        seen.sample(str(number), replaced(used_bytes=number), {"j": load})
    merged, begun = seen.of_server(LONG)
    assert (merged.at, merged.memory.used_bytes, sum(merged.counts)) == ("29", 29, MERGED)
    assert (begun.at, sum(begun.counts)) == ("31", 2)
    assert [(at, sum(sample.counts)) for at, sample in seen.of_model("m", LONG) if sample] == [
        ("29", MERGED),
        ("31", 2),
    ]


def replaced(**changes: int) -> Memory:
    return Memory(**{name: changes.get(name, 1) for name in Memory.__struct_fields__})


def test_model_without_process_has_gaps_and_is_forgotten() -> None:
    seen = TimeSeries()
    seen.sample("0", NOW, {})
    seen.sample("1", NOW, {"j": running("j")})
    seen.sample("2", NOW, {})
    assert [(at, sample is None) for at, sample in seen.of_model("m", SHORT)] == [("1", False), ("2", True)]
    for _ in range(SHORT.samples):
        seen.sample("later", NOW, {})
    assert seen.of_model("m", SHORT) == []
