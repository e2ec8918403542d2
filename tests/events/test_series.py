"""Histograms and the models that are told apart."""

from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from events.series import OTHERS, Histogram, Names

BOUNDS = (0.001, 0.1, 1.0, 60.0)
SECONDS = st.floats(0, 1e6) | st.sampled_from(BOUNDS)


@PLAIN
@given(st.lists(SECONDS))
def test_each_one_is_in_the_first_bucket_that_it_is_within(times: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for seconds in times:
        histogram.observe(seconds)
    seen = histogram.observed()
    for place, bound in enumerate(BOUNDS):
        assert sum(seen.counts[: place + 1]) == sum(seconds <= bound for seconds in times)
    assert sum(seen.counts) == len(times)
    assert abs(seen.total_s - sum(times)) <= 1e-6 * sum(times)


def test_what_was_seen_stays_as_it_was() -> None:
    histogram = Histogram(BOUNDS)
    before = histogram.observed()
    histogram.observe(2)
    assert before.counts == (0, 0, 0, 0, 0)
    assert histogram.observed().counts == (0, 0, 0, 1, 0)


@PLAIN
@given(st.lists(st.sampled_from("abcdefgh")), st.integers(0, 8))
def test_a_model_keeps_its_label_and_there_are_not_more_than_that(asked: list[str], most: int) -> None:
    names = Names(most)
    told = [(model_id, names.of(model_id)) for model_id in asked]
    assert all(names.of(model_id) == label for model_id, label in told)
    own = {label for _, label in told} - {OTHERS}
    assert len(own) == min(most, len(set(asked)))
    assert all(label in (model_id, OTHERS) for model_id, label in told)
