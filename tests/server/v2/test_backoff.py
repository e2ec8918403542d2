"""After a load on demand failed: longer pauses, until something else happens to the model."""

import pytest

from events.models import Model
from server.v2.ondemand import LONGEST_PAUSE_S, MAX_FAILURES, BackOff, DemandFailed

WISH = ("m", None)


def failed(back_off: BackOff, wish: tuple[str, int | None], before: Model | None, now_s: float) -> Model:
    """Fail once, at the earliest moment, and return the model as it is recorded then."""
    back_off.check(wish, before, now_s)
    after = Model(wish[0])
    back_off.note(wish, "because", before, after, now_s)
    return after


def test_what_failed_rests_and_says_why_and_for_how_long() -> None:
    back_off = BackOff()
    model = failed(back_off, WISH, None, 10.0)
    with pytest.raises(DemandFailed, match="because") as caught:
        back_off.check(WISH, model, 10.25)
    assert caught.value.retry_after_s == 0.25
    back_off.check(WISH, model, 10.5)


def test_each_pause_is_twice_the_last_up_to_half_a_minute() -> None:
    back_off, now_s, model, pauses = BackOff(), 0.0, None, list[float]()
    for _ in range(9):
        back_off.check(WISH, model, now_s)
        before, model = model, Model("m")
        pauses.append(back_off.note(WISH, "because", before, model, now_s))
        now_s += pauses[-1]
    assert pauses == [0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_what_else_happens_to_the_model_ends_the_pause_and_the_doubling() -> None:
    back_off = BackOff()
    failed(back_off, WISH, None, 0.0)
    touched = Model("m")
    back_off.check(WISH, touched, 0.0)
    assert back_off.note(WISH, "because", touched, Model("m"), 0.0) == 0.5


def test_the_failure_of_another_version_neither_holds_a_version_up_nor_ends_its_pause() -> None:
    back_off = BackOff()
    model = failed(back_off, ("m", 1), None, 0.0)
    model = failed(back_off, ("m", 2), model, 0.0)
    for version in (1, 2):
        with pytest.raises(DemandFailed):
            back_off.check(("m", version), model, 0.4)
    back_off.check(("m", None), model, 0.4)
    back_off.check(("other", 1), None, 0.4)


def test_only_so_many_failures_are_remembered() -> None:
    back_off = BackOff()
    seen = {number: failed(back_off, (f"m{number}", None), None, 0.0) for number in range(MAX_FAILURES + 1)}
    back_off.check(("m0", None), seen[0], 0.1)
    for number in (1, MAX_FAILURES):
        with pytest.raises(DemandFailed):
            back_off.check((f"m{number}", None), seen[number], 0.1)
