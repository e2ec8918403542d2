"""The inferences of a model over all its loads: nothing is lost or counted twice when loads come and go."""

from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from events.jobs import LoadParameters
from events.series import Names
from runtime.live import LiveLoad
from runtime.statistics import TOOK_S, Statistics
from runtime.totals import Totals
from runtime.wire import Outcome

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "fail", "end", "look"]), st.integers(0, 3), st.integers(0, 10**10))
)


def load(model_id: str) -> LiveLoad:
    return LiveLoad("job", model_id, 1, LoadParameters(), "w", lambda: None)


def figures(statistics: Statistics) -> tuple[int, ...]:
    return (
        statistics.requests,
        statistics.failures,
        statistics.total_ns,
        statistics.failed_ns,
        *statistics.took,
    )


@PLAIN
@given(STEPS)
def test_sums_are_those_of_all_that_was_asked_and_never_go_back(steps: list[Step]) -> None:
    totals, live = Totals(Names()), [load("a"), load("a"), load("b"), load("b")]
    there, expected, before = set(range(4)), {"a": Statistics(), "b": Statistics()}, dict[str, Statistics]()
    for step, number, took_ns in steps:
        each = live[number]
        if step == "ask":  # also of a load that is over: an answer may come to be counted last
            for counts in (each.statistics, expected[each.model_id]):
                counts.success(Outcome(1, (), 1, 2, 3, 4), took_ns, 5)
        elif step == "fail":
            for counts in (each.statistics, expected[each.model_id]):
                counts.failure(took_ns)
        elif step == "end":
            totals.end(each)
            there.discard(number)
        seen = totals.with_live(live[number] for number in there)
        for name, counts in seen.items():
            assert figures(counts) == figures(expected[name])
            assert all(map(int.__le__, figures(before.get(name, Statistics())), figures(counts)))
        before = seen


def test_models_beyond_those_that_are_told_apart_are_summed_up() -> None:
    totals = Totals(Names(1))
    live = [load(name) for name in ("a", "b", "c")]
    for each in live:
        each.statistics.failure(1)
    assert {name: counts.failures for name, counts in totals.with_live(live).items()} == {
        "a": 1,
        "_others": 2,
    }
    for each in live:
        totals.end(each)
    assert {name: counts.failures for name, counts in totals.with_live([]).items()} == {"a": 1, "_others": 2}


def test_an_answer_is_in_the_first_bucket_that_it_is_within() -> None:
    statistics = Statistics()
    for seconds in (*TOOK_S, 10**6):
        statistics.success(Outcome(1), round(seconds * 1e9), 1)
    assert statistics.took == [1] * (len(TOOK_S) + 1)
