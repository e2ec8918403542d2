"""The client's decisions: calls played with listed answers and a clock that is a number."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clients import NDJSON, OutOfAnswers, Played, answer, bookmark, event_line, job, problem
from support.history import PLAIN

from loadledger import problems
from loadledger.jobs import PREFERRED_S
from loadledger.operations import Operations
from loadledger.problems import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    JobFailed,
    JobUnfinished,
    ServerError,
    ServerUnreachable,
)
from loadledger.records import Job
from loadledger.requests import Answer, Request
from loadledger.retries import RETRY_FOR_S

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


def test_absent_server_is_not_retried_and_lost_one_within_limit() -> None:
    for answers, longest in (([GONE], 0), ([LOST] * 100, RETRY_FOR_S)):
        play = Played(answers)
        with pytest.raises(ServerUnreachable):
            play.play(play.calls.load("m"))
        assert sum(play.pauses) <= longest


def test_load_lost_after_long_wait_is_resent() -> None:
    play = Played([LOST, answer(job("completed"))], took_s=RETRY_FOR_S + 5.0)
    assert load(play).status == "completed"
    assert len({request.headers["Idempotency-Key"] for request in play.requests}) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda calls, key: calls.load("m", idempotency_key=key),
        lambda calls, key: calls.unload("m", idempotency_key=key),
        lambda calls, key: calls.cancel("j1", idempotency_key=key),
    ],
    ids=["load", "unload", "cancel"],
)
def test_given_idempotency_key_is_sent_quoted(make: Callable[[Operations, str], Any]) -> None:
    play = Played([LOST, answer(job("completed"))])
    assert play.play(make(play.calls, 'a "key"')).id == "j1"
    assert [request.headers["Idempotency-Key"] for request in play.requests] == ['"a \\"key\\""'] * 2


def test_inference_is_sent_once() -> None:
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


def test_invalid_argument_is_refused_unsent() -> None:
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


def test_wait_reports_each_change_once() -> None:
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


def test_wait_without_callback_prefers_held_answer() -> None:
    play = Played([answer(job("completed"))])
    load(play)
    assert play.requests[0].headers["Prefer"] == f"wait={PREFERRED_S}"
    assert play.requests[0].patience_s == PREFERRED_S
    assert play.pauses == []
    play = Played([answer(job("completed"))])
    load(play, wait_s=3.7)
    assert play.requests[0].headers["Prefer"] == "wait=3"


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_unsuccessful_job_raises_with_reason(status: str) -> None:
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


def test_wait_reports_absence_once_and_goes_on() -> None:
    told: list[ClientProblem] = []
    away: list[Any] = [LOST, GONE, GONE, BUSY]
    answers = [answer(job()), *away, answer(job("in_progress")), *away, answer(job("completed"))]
    play = Played(answers)
    result = load(play, on_away=told.append)
    assert result.status == "completed"
    assert told == [LOST, LOST]


def test_wait_past_limit_raises_unfinished() -> None:
    for after in ([answer(job("in_progress"))] * 500, [GONE] * 500):
        play = Played([answer(job()), *after])
        with pytest.raises(JobUnfinished, match=r"it continues") as caught:
            load(play, wait_s=7.0)
        assert caught.value.job.id == "j1"
        assert play.now == pytest.approx(107.0)
        assert all(request.timeout_s and request.timeout_s <= 7.0 for request in play.requests)
        assert ("cannot be reached" in str(caught.value)) == (after[0] is GONE)


def test_polls_back_off_to_half_a_second() -> None:
    play = Played([answer(job()), *[answer(job("in_progress"))] * 40, answer(job("completed"))])
    load(play)
    assert play.pauses == sorted(play.pauses)
    assert play.pauses[0] < 0.05
    assert play.pauses[-1] == 0.5


# Lists


def test_list_is_paged_up_to_limit() -> None:
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


def test_pages_of_a_time_keep_its_position() -> None:
    model = {"id": "m", "state": "loaded"}
    pages = [
        answer({"models": [model], "as_of": 17, "next_cursor": "m"}),
        answer({"models": [model], "as_of": 17, "next_cursor": None}),
    ]
    play = Played(pages)
    play.iterate(play.calls.models(at="2026-01-31T14:02:00Z"))
    assert play.requests[1].target == "/api/v1/models?at=17&cursor=m&limit=500"


def test_list_is_resumed_and_respects_retry_after() -> None:
    page = answer({"jobs": [], "next_cursor": None})
    slower = answer({"code": "rate_limited", "detail": "slower"}, 429, retry_after="17")
    play = Played([slower, LOST, GONE, page])
    play.iterate(play.calls.jobs())
    assert play.pauses[0] == 17.0
    for never in (GONE, problem(429, "too_many_streams")):
        play = Played([never])
        with pytest.raises((ServerUnreachable, Busy)):
            play.iterate(play.calls.jobs())


def test_list_past_retry_limit_is_not_resent() -> None:
    play = Played([LOST] * 100, took_s=31.0)
    with pytest.raises(ServerUnreachable):
        play.iterate(play.calls.jobs())
    assert len(play.requests) == 1


def test_repeated_page_is_refused() -> None:
    play = Played([answer({"jobs": [], "next_cursor": 5})] * 10)
    with pytest.raises(BadAnswer, match="repeats the same page"):
        play.iterate(play.calls.jobs())


def test_empty_page_of_events_is_passed_over() -> None:
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


def test_stream_resumes_after_end_absence_and_refusal() -> None:
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


def test_missing_event_is_refused_unless_filtered() -> None:
    play = Played([NDJSON, lines(1, 2), lines(4)])
    with pytest.raises(BadAnswer, match="after position 2 the server sent 4"):
        follow(play)
    assert positions(play) == [1, 2]
    assert positions(followed(NDJSON, lines(2, 9), types=["LoadStarted"])) == [2, 9]


def test_bookmark_moves_filtered_stream_only() -> None:
    chosen = followed(NDJSON, bookmark(7) + b"\n", LOST, NDJSON, lines(9), types=["LoadStarted"])
    assert chosen.requests[1].target.endswith("after=7")
    assert positions(followed(NDJSON, bookmark(7) + b"\n", LOST, NDJSON, lines(1, 2))) == [1, 2]
    play = Played([NDJSON, bookmark(7) + b"\n" + lines(8)])
    with pytest.raises(BadAnswer, match="after position 0"):
        follow(play)


def test_follow_from_now_begins_at_bookmark() -> None:
    play = followed(NDJSON, bookmark(41) + b"\n", LOST, NDJSON, lines(42), after=None)
    assert [request.target for request in play.requests] == [
        "/api/v1/events/stream",
        "/api/v1/events/stream?after=41",
    ]
    assert positions(play) == [42]


def test_follow_since_lists_first() -> None:
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
def test_permanent_refusal_ends_stream(refusal: Any, kind: type[Exception]) -> None:
    play = Played([refusal])
    with pytest.raises(kind):
        follow(play)
    if kind in (Archived, ServerError, problems.NotAllowed, BadAnswer):  # not later either
        play = Played([NDJSON, lines(1), LOST, refusal])
        with pytest.raises(kind):
            follow(play)


def test_broken_streams_back_off() -> None:
    play = followed(*[NDJSON, b""] * 12)
    assert play.pauses[0] < 0.3
    assert play.pauses[-1] == 2.0
    play = followed(*[part for number in range(1, 9) for part in (NDJSON, lines(number), b"")])
    assert set(play.pauses) == {0.2}


@PLAIN
@given(st.data(), st.integers(1, 8))
def test_events_come_once_in_order_over_any_losses(data: Any, head: int) -> None:
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


def test_health_of_unhealthy_server() -> None:
    play = Played([problem(503, "unhealthy", "not well: log")])
    assert play.play(play.calls.health()).status == "not well: log"
    play = Played([answer({}, 502)])
    with pytest.raises(Busy):
        play.play(play.calls.health())


def test_inference_reads_datatypes_from_metadata() -> None:
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
def test_unloaded_model_gets_guessed_datatypes(value: Any, datatype: str) -> None:
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


def test_refused_guess_is_followed_by_metadata() -> None:
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
def test_failed_inference_ends_with_reason(answers: list[Answer], code: str, asked: int) -> None:
    play = Played(answers)
    with pytest.raises(ServerError) as caught:
        play.play(play.calls.infer("m", {"x": [1]}, **INFER))
    assert (caught.value.code, len(play.requests)) == (code, asked)
