"""What the client decides: calls are played with answers from a list, and a clock that is a number."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN
from support.playedcalls import (
    NDJSON,
    OutOfAnswers,
    Played,
    answer,
    bookmark,
    event_line,
    job,
    problem,
)

from loadledger import problems
from loadledger.asking import RETRY_FOR_S
from loadledger.exchange import Answer, Request
from loadledger.problems import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    JobFailed,
    JobUnfinished,
    NotFound,
    ServerError,
    ServerUnreachable,
)
from loadledger.records import Job
from loadledger.waiting import PREFERRED_S

GONE = ServerUnreachable("http://h", "connection refused")
LOST = ServerUnreachable("http://h", "the connection was lost", sent=True)
BUSY = problem(503, "shutting_down")


def load(play: Played, **options: Any) -> Job:
    return play.play(play.calls.load("m", wait=True, **options))


def follow(play: Played, after: int | None = 0, *, follow: bool = True, **options: Any) -> None:
    play.iterate(play.calls.events(after=after, follow=follow, **options))


def lines(*positions: int) -> bytes:
    return b"".join(event_line(position) + b"\n" for position in positions)


def followed(*answers: Any, **options: Any) -> Played:
    """Follow the events, which goes on for ever, until the answers are used up."""
    played = Played(answers)
    with pytest.raises(OutOfAnswers):
        follow(played, **options)
    return played


def positions(played: Played) -> list[int]:
    return [event.position for event in played.given]


# Requests


def test_a_load_whose_connection_was_lost_is_sent_again_with_the_same_key() -> None:
    play = Played([LOST, GONE, answer(job())])
    assert play.play(play.calls.load("m")).id == "j1"
    keys = [request.headers["Idempotency-Key"] for request in play.requests]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    again = Played([answer(job())])
    again.play(again.calls.load("m"))
    assert again.requests[0].headers["Idempotency-Key"] != keys[0]


def test_a_server_that_was_never_there_is_told_at_once() -> None:
    play = Played([GONE])
    with pytest.raises(ServerUnreachable):
        play.play(play.calls.load("m"))
    assert play.pauses == []


def test_a_connection_that_is_lost_again_and_again_is_told_in_the_end() -> None:
    play = Played([LOST] * 100)
    with pytest.raises(ServerUnreachable):
        play.play(play.calls.load("m"))
    assert sum(play.pauses) <= RETRY_FOR_S


def test_a_load_that_is_lost_late_in_the_time_that_it_was_to_be_held_is_sent_again() -> None:
    play = Played([LOST, answer(job("completed"))], took_s=RETRY_FOR_S + 5.0)
    assert load(play).status == "completed"
    assert len({request.headers["Idempotency-Key"] for request in play.requests}) == 1


def test_an_inference_is_sent_once() -> None:
    play = Played([LOST])
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.5]}
    options: Any = {"version": 2, "outputs": ["y"], "parameters": None, "timeout_s": 3.0}
    with pytest.raises(ServerUnreachable):
        play.play(play.calls.infer("m", {"x": tensor}, **options))
    [request] = play.requests
    assert request.target == "/v2/models/m/versions/2/infer"
    assert request.timeout_s == 3.0
    assert request.body == (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1.5]}],"outputs":[{"name":"y"}]}'
    )


def test_what_cannot_be_asked_is_told_before_anything_is_sent() -> None:
    play = Played([])
    calls = play.calls
    unsendable: Any = {"priority": object()}
    for make in (
        lambda: calls.load(""),
        lambda: calls.load("m", **unsendable),
        lambda: calls.load("m", idempotency_key="\n"),
        lambda: calls.get("models"),
        lambda: calls.get("/v2/models/m HTTP/1.1\r\nX: y"),
        lambda: calls.get("/v2/models?limit=1"),
    ):
        with pytest.raises(ValueError, match=r"."):
            play.play(make())
    with pytest.raises(ValueError, match="limit"):
        calls.jobs(limit=0)
    with pytest.raises(ValueError, match="until"):
        calls.events(follow=True, until=5)
    with pytest.raises(TypeError, match="several"):
        calls.events(types="ModelLoaded")
    assert play.requests == []


# Waiting


def test_a_job_is_looked_at_until_it_has_ended_and_every_change_is_told_once() -> None:
    seen = [
        job(),
        job("pending", waiting_for="memory"),
        job("pending", waiting_for="memory"),
        job("in_progress", stage="loading"),
        job("completed"),
    ]
    told: list[tuple[str, str | None]] = []
    play = Played([answer(each) for each in seen])
    ended = load(play, on_stage=lambda job: told.append((job.status, job.stage or job.waiting_for)))
    assert ended.status == "completed"
    assert told == [
        ("pending", None),
        ("pending", "memory"),
        ("in_progress", "loading"),
        ("completed", None),
    ]
    assert "Prefer" not in play.requests[0].headers


def test_who_only_wants_the_end_has_the_server_hold_its_answer() -> None:
    play = Played([answer(job("completed"))])
    load(play)
    assert play.requests[0].headers["Prefer"] == f"wait={PREFERRED_S}"
    assert play.requests[0].patience_s == PREFERRED_S
    assert play.pauses == []
    play = Played([answer(job("completed"))])
    load(play, wait_s=3.7)
    assert play.requests[0].headers["Prefer"] == "wait=3"


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_job_that_does_not_complete_is_told_with_its_reason(status: str) -> None:
    error = {"code": "invalid_model", "message": "no such operator"} if status == "failed" else None
    play = Played([answer(job(status, error=error))])
    with pytest.raises(
        JobFailed, match=r"the load of m/1 (failed: no such operator|was cancelled)"
    ) as caught:
        load(play)
    assert caught.value.job.status == status
    assert caught.value.code == ("invalid_model" if status == "failed" else "cancelled")
    play = Played([answer(job(status, error=error))])
    assert play.play(play.calls.wait_for("j1")).status == status


def test_waiting_goes_on_over_an_absence_which_is_told_once() -> None:
    told: list[ClientProblem] = []
    away: list[Any] = [LOST, GONE, GONE, BUSY]
    answers = [answer(job()), *away, answer(job("in_progress")), *away, answer(job("completed"))]
    play = Played(answers)
    result = load(play, on_away=told.append)
    assert result.status == "completed"
    assert told == [LOST, LOST]


def test_waiting_ends_in_time_and_says_that_the_job_goes_on() -> None:
    for after in ([answer(job("in_progress"))] * 500, [GONE] * 500):
        play = Played([answer(job()), *after])
        with pytest.raises(JobUnfinished, match=r"it goes on") as caught:
            load(play, wait_s=7.0)
        assert caught.value.job.id == "j1"
        assert play.now == pytest.approx(107.0)
        assert all(request.timeout_s and request.timeout_s <= 7.0 for request in play.requests)
        assert ("cannot be reached" in str(caught.value)) == (after[0] is GONE)


def test_a_job_that_is_not_known_any_more_is_told() -> None:
    play = Played([answer(job()), problem(404, "unknown_job")])
    with pytest.raises(NotFound):
        load(play)


def test_who_waits_long_looks_less_often_and_is_never_late_by_much() -> None:
    play = Played([answer(job()), *[answer(job("in_progress"))] * 40, answer(job("completed"))])
    load(play)
    assert play.pauses == sorted(play.pauses)
    assert play.pauses[0] < 0.05
    assert play.pauses[-1] == 0.5


# Lists


def test_a_list_is_asked_for_page_by_page_and_no_further_than_wanted() -> None:
    first = answer({"jobs": [job(), job()], "as_of": 9, "next_cursor": 5})
    last = answer({"jobs": [job()], "as_of": 9, "next_cursor": None})
    play = Played([first, last])
    play.iterate(play.calls.jobs(model="a b", status="failed"))
    assert len(play.given) == 3
    assert [request.target for request in play.requests] == [
        "/api/v1/jobs?model=a%20b&status=failed&limit=500",
        "/api/v1/jobs?model=a%20b&status=failed&cursor=5&limit=500",
    ]
    play = Played([first])
    play.iterate(play.calls.jobs(limit=2))
    assert len(play.given) == 2
    assert play.requests[0].target.endswith("limit=2")


def test_the_pages_of_a_time_are_those_of_the_position_that_it_meant() -> None:
    model = {"id": "m", "state": "loaded"}
    pages = [
        answer({"models": [model], "as_of": 17, "next_cursor": "m"}),
        answer({"models": [model], "as_of": 17, "next_cursor": None}),
    ]
    play = Played(pages)
    play.iterate(play.calls.models(at="2026-01-31T14:02:00Z"))
    assert play.requests[1].target == "/api/v1/models?at=17&cursor=m&limit=500"


def test_a_list_is_taken_up_after_a_lost_connection_and_when_the_server_says() -> None:
    page = answer({"jobs": [], "next_cursor": None})
    slower = problem(429, "rate_limited")
    slower = answer({"code": "rate_limited", "detail": "slower"}, 429, retry_after="17")
    play = Played([slower, LOST, GONE, page])
    play.iterate(play.calls.jobs())
    assert play.pauses[0] == 17.0
    for never in (GONE, problem(429, "too_many_streams")):
        play = Played([never])
        with pytest.raises((ServerUnreachable, Busy)):
            play.iterate(play.calls.jobs())


def test_a_list_is_not_asked_for_again_where_nobody_answered_in_all_of_the_time() -> None:
    play = Played([LOST] * 100, took_s=31.0)
    with pytest.raises(ServerUnreachable):
        play.iterate(play.calls.jobs())
    assert len(play.requests) == 1


def test_a_server_that_gives_the_same_page_for_ever_is_told() -> None:
    play = Played([answer({"jobs": [], "next_cursor": 5})] * 10)
    with pytest.raises(BadAnswer, match="again and again"):
        play.iterate(play.calls.jobs())


def test_a_list_of_events_is_whole_over_an_empty_page() -> None:
    def page(cursor: int | None, *found: int) -> Any:
        events = [{"position": position, "type": "A"} for position in found]
        return answer({"events": events, "as_of": 9, "next_cursor": cursor})

    play = Played([page(3, 2, 3), page(6), page(None, 7)])
    follow(play, 1, follow=False, since="2026-01-31T14:02:00Z", until=8)
    assert positions(play) == [2, 3, 7]
    assert [request.target.partition("&after=")[2] for request in play.requests] == [
        "1&limit=500",
        "3&limit=500",
        "6&limit=500",
    ]


# Following


def test_a_stream_goes_on_where_it_was_after_its_end_an_absence_and_a_refusal() -> None:
    told: list[ClientProblem] = []
    play = followed(
        NDJSON, lines(1, 2), lines(3) + b'{"position":4,', LOST,  # half an event is none
        GONE, GONE, BUSY,
        NDJSON, bookmark(3) + b"\n" + lines(4), b'{"stream":"end","reason":"the server stops"}\n', b"",
        GONE,
        NDJSON, lines(5),
        on_away=told.append,
    )  # fmt: skip
    assert positions(play) == [1, 2, 3, 4, 5]
    assert [request.target.partition("after=")[2] for request in play.requests] == [
        "0", "3", "3", "3", "3", "4", "4",
    ]  # fmt: skip
    assert told == [LOST, GONE]
    assert play.closed == 4  # the refusal as well


def test_no_event_comes_twice_whatever_the_server_sends() -> None:
    play = followed(NDJSON, lines(1, 2, 3), b"", NDJSON, lines(1, 2, 3, 4), b"")
    assert positions(play) == [1, 2, 3, 4]


def test_an_event_that_is_missing_is_told_where_all_are_wanted() -> None:
    play = Played([NDJSON, lines(1, 2), lines(4)])
    with pytest.raises(BadAnswer, match="after position 2 the server sent 4"):
        follow(play)
    assert positions(play) == [1, 2]
    assert positions(followed(NDJSON, lines(2, 9), types=["LoadStarted"])) == [2, 9]


def test_a_bookmark_leads_on_where_events_are_chosen_and_hides_none_where_all_are_wanted() -> None:
    chosen = followed(NDJSON, bookmark(7) + b"\n", LOST, NDJSON, lines(9), types=["LoadStarted"])
    assert chosen.requests[1].target.endswith("after=7")
    assert positions(followed(NDJSON, bookmark(7) + b"\n", LOST, NDJSON, lines(1, 2))) == [1, 2]
    play = Played([NDJSON, bookmark(7) + b"\n" + lines(8)])
    with pytest.raises(BadAnswer, match="after position 0"):
        follow(play)


def test_from_now_on_begins_where_the_server_says_that_it_is() -> None:
    play = followed(NDJSON, bookmark(41) + b"\n", LOST, NDJSON, lines(42), after=None)
    assert [request.target for request in play.requests] == [
        "/api/v1/events/stream",
        "/api/v1/events/stream?after=41",
    ]
    assert positions(play) == [42]


def test_what_is_followed_since_a_moment_is_listed_first() -> None:
    page = answer({"events": [{"position": 3, "type": "A"}], "as_of": 7, "next_cursor": None})
    play = followed(page, NDJSON, lines(8), after=None, since=2)
    assert positions(play) == [3, 8]
    assert play.requests[1].target == "/api/v1/events/stream?after=7"


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (GONE, ServerUnreachable),
        (problem(410, "archived", oldest=9), Archived),
        (problem(400, "beyond_head"), ServerError),
        (problem(403, "forbidden"), problems.NotAllowed),
        (problem(429, "too_many_streams"), Busy),
        (answer({}, 302, location="http://elsewhere"), ServerError),
        (answer({}), BadAnswer),
    ],
    ids=["gone", "archived", "beyond", "forbidden", "streams", "redirect", "no stream"],
)
def test_what_waiting_would_not_mend_is_told_at_once(refusal: Any, kind: type[Exception]) -> None:
    play = Played([refusal])
    with pytest.raises(kind):
        follow(play)
    if kind in (Archived, ServerError, problems.NotAllowed, BadAnswer):  # not later either
        play = Played([NDJSON, lines(1), LOST, refusal])
        with pytest.raises(kind):
            follow(play)


def test_a_server_that_breaks_off_at_once_is_asked_less_and_less_often() -> None:
    play = followed(*[NDJSON, b""] * 12)
    assert play.pauses[0] < 0.3
    assert play.pauses[-1] == 2.0
    play = followed(*[part for number in range(1, 9) for part in (NDJSON, lines(number), b"")])
    assert set(play.pauses) == {0.2}


@PLAIN
@given(st.data(), st.integers(1, 8))
def test_over_any_losses_all_events_come_once_and_in_order(data: Any, head: int) -> None:
    """A server that has so many events cuts streams anywhere, repeats itself, and goes away."""
    play = Played(())

    def answers() -> Any:
        while True:
            if data.draw(st.integers(0, 3)) == 0 and len(play.requests) > 1:
                yield data.draw(st.sampled_from([GONE, LOST, BUSY]))
                continue
            yield NDJSON
            after = int(play.requests[-1].target.rpartition("=")[2])
            first = data.draw(st.integers(1, after + 1))
            text = lines(*range(first, head + 1))
            sent = text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
            cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=2)))
            chunks = [sent[i:j] for i, j in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
            yield from (chunk for chunk in chunks if chunk)
            if sent == text:
                return
            yield data.draw(st.sampled_from([b"", LOST]))

    play.answers = answers()
    with pytest.raises(OutOfAnswers):
        follow(play)
    assert positions(play) == list(range(1, head + 1))


# What else there is


def test_health_is_told_for_a_server_that_is_not_well_too() -> None:
    play = Played([problem(503, "unhealthy", "not well: log")])
    assert play.play(play.calls.health()).status == "not well: log"
    play = Played([answer({}, 502)])
    with pytest.raises(Busy):
        play.play(play.calls.health())


def test_an_inference_asks_for_datatypes_first_where_they_are_not_given() -> None:
    metadata = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}
    play = Played([answer(metadata), answer({"outputs": []})])
    options: Any = {"version": None, "outputs": None, "parameters": {"a": 1}, "timeout_s": None}
    assert play.play(play.calls.infer("m", {"x": [1.5]}, **options)) == {"outputs": []}
    ask, infer = play.requests
    assert ask == Request("GET", "/v2/models/m")
    assert infer.body == (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1.5]}],"parameters":{"a":1}}'
    )


NOT_LOADED = problem(503, "model_not_loaded", "m is not loaded")
MISTAKEN = problem(400, "invalid_input", "x is FP32")
METADATA = answer({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]})
DONE = answer({"outputs": []})
INFER: Any = {"version": None, "outputs": None, "parameters": None, "timeout_s": None}


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        ([1.5], "FP32"),
        ([1, 2.5], "FP32"),
        ([[1, 2]], "INT64"),
        ([True], "BOOL"),
        (["a"], "BYTES"),
        ([], "FP32"),
        (np.array([1.0]), "FP32"),
    ],
    ids=str,
)
def test_a_model_that_is_not_loaded_is_asked_with_what_values_look_like(value: Any, datatype: str) -> None:
    play = Played([NOT_LOADED, DONE])
    assert play.play(play.calls.infer("m", {"x": value}, **INFER)) == {"outputs": []}
    assert [request.method for request in play.requests] == ["GET", "POST"]
    [sent] = json.loads(play.requests[1].body or b"")["inputs"]
    assert sent == {
        "name": "x",
        "shape": list(np.shape(value)),
        "datatype": datatype,
        "data": np.ravel(value).tolist(),
    }


def test_a_guess_that_the_model_refuses_is_followed_by_its_own_datatypes() -> None:
    play = Played([NOT_LOADED, MISTAKEN, METADATA, DONE])
    assert play.play(play.calls.infer("m", {"x": [1]}, **INFER)) == {"outputs": []}
    assert [request.method for request in play.requests] == ["GET", "POST", "GET", "POST"]
    assert b'"INT64"' in (play.requests[1].body or b"")
    assert b'"FP32"' in (play.requests[3].body or b"")


@pytest.mark.parametrize(
    ("answers", "code", "asked"),
    [
        ([problem(404, "model_not_found", "there is no m")], "model_not_found", 1),
        ([NOT_LOADED, NOT_LOADED], "model_not_loaded", 2),
        ([NOT_LOADED, MISTAKEN, NOT_LOADED], "invalid_input", 3),
        ([NOT_LOADED, MISTAKEN, METADATA, MISTAKEN], "invalid_input", 4),
    ],
    ids=["no model", "not on demand", "gone again", "wrong all the same"],
)
def test_a_question_that_cannot_be_answered_ends_with_the_reason(
    answers: list[Answer], code: str, asked: int
) -> None:
    play = Played(answers)
    with pytest.raises(ServerError) as caught:
        play.play(play.calls.infer("m", {"x": [1]}, **INFER))
    assert (caught.value.code, len(play.requests)) == (code, asked)
