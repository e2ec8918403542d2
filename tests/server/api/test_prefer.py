"""`Prefer: wait=N`, read as RFC 7240 has it."""

import pytest

from server.api.jobs import MAX_WAIT_S, wait_s


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ([], 0),
        ([""], 0),
        (["wait=10"], 10),
        (["wait=0"], 0),
        (["WAIT=10"], 10),
        (["wait = 10"], 10),
        (['wait="10"'], 10),
        (["respond-async, wait=10"], 10),
        (["wait=10, respond-async"], 10),
        (["wait=10; x=y"], 10),
        (["wait=10;x"], 10),
        (["respond-async", "wait=10"], 10),
        (['foo="a, wait=30", wait=10'], 10),
        (['foo="\\", wait=30", wait=10'], 10),
    ],
)
def test_the_seconds_to_wait_are_found_in_any_form_that_the_rfc_allows(
    fields: list[str], seconds: int
) -> None:
    assert wait_s(fields) == seconds


@pytest.mark.parametrize("fields", [["wait=5, wait=10"], ["wait=5", "wait=10"]])
def test_the_first_of_several_counts(fields: list[str]) -> None:
    assert wait_s(fields) == 5


@pytest.mark.parametrize("text", ["wait=61", "wait=3600", "wait=99999999999999999999"])
def test_nobody_waits_longer_than_the_limit(text: str) -> None:
    assert wait_s([text]) == MAX_WAIT_S == 60


@pytest.mark.parametrize(
    "text",
    [
        "wait", "wait=", "wait=-1", "wait=1.5", "wait=x", "wait=\u0663", "await=5", "wait5", "waiting=5",
        "wait=5 6",
        'wait="5', 'wait=5"', 'foo="a, wait=30"', 'foo=", wait=30', ",,,", "=", ";", '"', "respond-async",
    ],
)  # fmt: skip
def test_what_is_no_such_preference_is_ignored(text: str) -> None:
    assert wait_s([text]) == 0
