"""The client's decisions: calls played with given answers and a clock that is a number."""

import json
import struct
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers import fill, fill_json
from support.clients import NDJSON, OutOfAnswers, Played, answer, bookmark, event_lines, job, problem
from support.history import FEWER

from answers.approvals import ApprovalInfo, VersionApprovals
from answers.events import EventInfo
from answers.inference import ModelMetadata
from answers.models import ModelInfo
from answers.signatures import VerifiedVersionInfo
from loadledger import Client, errors
from loadledger.errors import (
    BadAnswer,
    Busy,
    ClientProblem,
    JobFailed,
    JobUnfinished,
    ServerError,
    ServerUnreachable,
)
from loadledger.jobs import PREFERRED_S
from loadledger.requests import RETRY_FOR_S, Answer

GONE = ServerUnreachable("http://h", "connection refused")
LOST = ServerUnreachable("http://h", "the connection was lost", sent=True)
BUSY = problem(503, "shutting_down")
COMPLETED = answer(job("completed"))
RUNNING = answer(job("in_progress"))


def followed(*answers: Any, after: int | None = 0, **options: Any) -> tuple[list[int], list[str], Played]:
    """Follow events until the answers are used up; return positions, the values of `after`, and the play."""
    play, positions = Played(answers), list[int]()
    with pytest.raises(OutOfAnswers):
        positions.extend(event.position for event in play.client.events(after=after, follow=True, **options))
    return positions, [request.target.partition("after=")[2] for request in play.requests], play


# Requests


@pytest.mark.parametrize(("answers", "limit_s"), [([GONE], 0), ([LOST] * 100, RETRY_FOR_S)])
def test_absent_server_is_not_retried_and_lost_one_within_limit(answers: list[Any], limit_s: float) -> None:
    play = Played(answers)
    with pytest.raises(ServerUnreachable):
        play.client.load("m")
    assert sum(play.pauses) <= limit_s


@pytest.mark.parametrize(
    ("call", "target", "took_s"),
    [
        (lambda client: client.load("m", wait=True, idempotency_key='a "key"'), "models/m/load", 5.0),
        (
            lambda client: client.load("m", wait=True, idempotency_key='a "key"'),
            "models/m/load",
            RETRY_FOR_S + 5.0,
        ),
        (lambda client: client.unload("m", idempotency_key='a "key"'), "models/m/unload", 5.0),
        (
            lambda client: client.unload(force=True, idempotency_key='a "key"'),
            "models/unload?force=true",
            5.0,
        ),
        (lambda client: client.cancel("j1", idempotency_key='a "key"'), "jobs/j1/cancel", 5.0),
    ],
    ids=["load", "load held back", "unload", "unload by force", "cancel"],
)
def test_job_request_lost_after_long_wait_is_resent_with_its_key(
    call: Callable[[Client], Any], target: str, took_s: float
) -> None:
    play = Played([LOST, COMPLETED], took_s=took_s)
    assert call(play.client).status == "completed"
    assert [request.target for request in play.requests] == [f"/api/v1/{target}"] * 2
    assert [request.headers["Idempotency-Key"] for request in play.requests] == ['"a \\"key\\""'] * 2


UNSENDABLE: Any = object()


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda client: client.load(""), ValueError, "no id"),
        (lambda client: client.load("m", priority=UNSENDABLE), ValueError, "JSON"),
        (lambda client: client.load("m", idempotency_key="\n"), ValueError, "printable"),
        (lambda client: client.get("models"), ValueError, "begin with /"),
        (lambda client: client.get("/v2/models/m HTTP/1.1\r\nX: y"), ValueError, "encode them"),
        (lambda client: client.get("/v2/models?limit=1"), ValueError, "query"),
        (lambda client: client.jobs(limit=0), ValueError, "limit"),
        (lambda client: client.events(follow=True, until=5), ValueError, "until"),
        (lambda client: client.events(types="ModelLoaded"), TypeError, "several"),
        (lambda client: client.infer("m", {}, outputs="y"), TypeError, "several"),
        (lambda client: client.infer("m", {}, outputs=""), TypeError, "several"),
    ],
)
def test_invalid_argument_is_refused_unsent(
    call: Callable[[Client], Any], kind: type[Exception], words: str
) -> None:
    play = Played([])
    with pytest.raises(kind, match=words):
        call(play.client)  # refused by the call itself, also where it iterates
    assert play.requests == []


# Approvals


APPROVALS = fill_json(
    VersionApprovals, model_id="m", version=2, missing=1, approvals=[fill(ApprovalInfo, version=2, by="b")]
)
VERIFIED = fill_json(
    VerifiedVersionInfo, model_id="m", digest="d", later=1, problem={"code": "no_key", "message": "no"}
)
REASONS: dict[str, Any] = {"reason": "Ticket 7", "emergency": "An outage", "digest": "d", "priority": "high"}


@pytest.mark.parametrize(
    ("call", "answered", "sent", "body"),
    [
        (lambda c: c.load("m").id, job(), "POST m/load", {}),
        (lambda c: c.load("m", 2, **REASONS).id, job(), "POST m/load", {"version": 2, **REASONS}),
        (
            lambda c: c.approve("m", 2, "d", "reviewed").approvals[0].by,
            APPROVALS,
            "PUT m/versions/2/approval",
            {"digest": "d", "reason": "reviewed"},
        ),
        (
            lambda c: c.withdraw_approval("m", 2, "it drifts").approvals[0].by,
            APPROVALS,
            "DELETE m/versions/2/approval?reason=it+drifts",
            None,
        ),
        (lambda c: c.verify_model("m").problem.code, VERIFIED, "GET m/verify", None),
        (lambda c: c.verify_model("m", 2).problem.code, VERIFIED, "GET m/verify?version=2", None),
    ],
)
def test_call_about_a_version_sends_what_is_given(
    call: Callable[[Client], str], answered: Any, sent: str, body: Any
) -> None:
    play = Played([answer(answered)])
    assert call(play.client) in ("j1", "b", "no_key")
    [request] = play.requests
    assert f"{request.method} {request.target}" == sent.replace(" ", " /api/v1/models/")
    assert (json.loads(request.body) if request.body else None) == body


# Waiting


def test_wait_reports_each_change_once() -> None:
    waits, loads = job("pending", waiting_for="memory"), job("in_progress", stage="loading")
    play, seen = Played(map(answer, [job(), waits, waits, loads, job("completed")])), list[Any]()
    ended = play.client.load("m", wait=True, on_stage=seen.append)
    assert ended.status == "completed"
    assert [(each.status, each.stage or each.waiting_for) for each in seen] == [
        ("pending", None),
        ("pending", "memory"),
        ("in_progress", "loading"),
        ("completed", None),
    ]
    assert "Prefer" not in play.requests[0].headers


@pytest.mark.parametrize(("wait_s", "preferred_s"), [(None, PREFERRED_S), (3.7, 3)])
def test_wait_without_callback_prefers_held_answer(wait_s: float | None, preferred_s: int) -> None:
    play = Played([COMPLETED])
    play.client.load("m", wait=True, wait_s=wait_s)
    [request] = play.requests
    assert (request.headers["Prefer"], request.patience_s) == (f"wait={preferred_s}", preferred_s)
    assert play.pauses == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [("failed", "invalid_model", "failed: no such operator"), ("cancelled", "cancelled", "was cancelled")],
)
def test_unsuccessful_job_raises_with_reason(status: str, code: str, words: str) -> None:
    error = {"code": code, "message": "no such operator"} if status == "failed" else None
    ended = answer(job(status, error=error))
    with pytest.raises(JobFailed, match=f"the load of m/1 {words}") as caught:
        Played([ended]).client.load("m", wait=True)
    assert (caught.value.job.status, caught.value.code) == (status, code)
    seen: list[Any] = []
    assert Played([ended]).client.wait_for("j1", on_change=seen.append).status == status
    assert [each.status for each in seen] == [status]


def test_wait_goes_on_with_the_load_that_superseded_a_job() -> None:
    after = [answer(job(status, id="j2")) for status in ("in_progress", "completed")]
    play = Played([answer(job("cancelled", superseded_by="j2")), *after])
    ended = play.client.wait_for("j1")
    assert (ended.id, ended.status) == ("j2", "completed")
    assert [request.target.rpartition("/")[2] for request in play.requests] == ["j1", "j2", "j2"]


def test_wait_reports_absence_once_and_goes_on() -> None:
    away: list[Any] = [LOST, GONE, GONE, BUSY]
    reported: list[ClientProblem] = []
    play = Played([answer(job()), *away, RUNNING, *away, COMPLETED])
    assert play.client.load("m", wait=True, on_away=reported.append).status == "completed"
    assert reported == [LOST, LOST]


@pytest.mark.parametrize(
    ("after", "wait_s"), [(RUNNING, 7.0), (GONE, 7.0), (RUNNING, 0.0)], ids=["running", "gone", "no wait"]
)
def test_wait_past_limit_raises_unfinished(after: Any, wait_s: float) -> None:
    play = Played([answer(job()), *[after] * 500])
    with pytest.raises(JobUnfinished, match="it continues") as caught:
        play.client.load("m", wait=True, wait_s=wait_s)
    assert caught.value.job.id == "j1"
    assert play.now == pytest.approx(100.0 + wait_s)
    assert all(request.timeout_s and request.timeout_s <= 7.0 for request in play.requests)
    assert ("cannot be reached" in str(caught.value)) is (after is GONE)


def test_polls_back_off_to_half_a_second() -> None:
    play = Played([answer(job()), *[RUNNING] * 40, COMPLETED])
    play.client.load("m", wait=True)
    assert play.pauses == sorted(play.pauses)
    assert play.pauses[0] < 0.05
    assert play.pauses[-1] == 0.5


# Lists


def test_list_is_paged_up_to_limit() -> None:
    first = answer({"jobs": [job(), job()], "as_of": 9, "next_cursor": 5})
    play = Played([first, answer({"jobs": [job()], "as_of": 9, "next_cursor": None})])
    assert len(list(play.client.jobs(model="a b", status="failed"))) == 3
    assert [request.target for request in play.requests] == [
        "/api/v1/jobs?model=a%20b&status=failed&limit=500",
        "/api/v1/jobs?model=a%20b&status=failed&cursor=5&limit=500",
    ]
    play = Played([first])
    assert len(list(play.client.jobs(limit=2))) == 2
    assert play.requests[0].target.endswith("limit=2")
    assert len(list(Played([first]).client.jobs(limit=1))) == 1  # of a server that sends more


def test_pages_of_a_time_keep_its_position() -> None:
    model = fill_json(ModelInfo, id="m", state="loaded")
    play = Played(answer({"models": [model], "as_of": 17, "next_cursor": cursor}) for cursor in ("m", None))
    assert len(list(play.client.models(at="2026-01-31T14:02:00Z"))) == 2
    assert play.requests[1].target == "/api/v1/models?at=17&cursor=m&limit=500"


def test_list_is_resumed_and_respects_retry_after() -> None:
    slower = answer({"code": "rate_limited", "detail": "slower"}, 429, retry_after="17")
    play = Played([slower, LOST, GONE, answer({"jobs": [], "as_of": 9, "next_cursor": None})])
    assert list(play.client.jobs()) == []
    assert play.pauses[0] == 17.0


@pytest.mark.parametrize(
    "call",
    [lambda client: client.jobs(), lambda client: client.events(after=0, follow=True)],
    ids=["list", "stream"],
)
@pytest.mark.parametrize(
    ("problem", "took_s", "kind"),
    [
        (GONE, 0.0, ServerUnreachable),
        (problem(429, "too_many_streams"), 0.0, Busy),
        (LOST, 31.0, ServerUnreachable),
    ],
    ids=["gone", "refused", "past the limit"],
)
def test_list_or_stream_that_never_began_is_not_resent(
    call: Callable[[Client], Any], problem: Any, took_s: float, kind: type[Exception]
) -> None:
    play = Played([problem] * 100, took_s=took_s)
    with pytest.raises(kind):
        list(call(play.client))
    assert len(play.requests) == 1


def test_repeated_page_is_refused() -> None:
    with pytest.raises(BadAnswer, match="repeats the same page"):
        list(Played([answer({"jobs": [], "as_of": 9, "next_cursor": 5})] * 10).client.jobs())


def test_empty_page_of_events_is_passed_over() -> None:
    def page(cursor: int | None, *found: int) -> Answer:
        events = [fill_json(EventInfo, position=position, type="A") for position in found]
        return answer({"events": events, "as_of": 9, "next_cursor": cursor})

    play = Played([page(3, 2, 3), page(6), page(None, 7)])
    events = play.client.events(after=1, since="2026-01-31T14:02:00Z", until=8)
    assert [event.position for event in events] == [2, 3, 7]
    assert [request.target.partition("&after=")[2] for request in play.requests] == [
        "1&limit=500",
        "3&limit=500",
        "6&limit=500",
    ]


# Following


def test_stream_resumes_after_end_absence_and_refusal() -> None:
    away: list[ClientProblem] = []
    positions, afters, play = followed(
        NDJSON, event_lines(1, 2), event_lines(3) + b'{"position":4,', LOST,  # half an event is none
        GONE, problem(429, "too_many_streams"), BUSY,
        NDJSON, bookmark(3) + b"\n" + event_lines(4), b'{"stream":"end","reason":"the server stops"}\n', b"",
        GONE,
        NDJSON, event_lines(5),
        on_away=away.append,
    )  # fmt: skip
    assert positions == [1, 2, 3, 4, 5]
    assert afters == ["0", "3", "3", "3", "3", "4", "4"]
    assert away == [LOST, GONE]
    assert play.closed == 5  # the refusals as well


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([event_lines(1, 2), event_lines(4)], "after position 2 the server sent 4"),
        ([event_lines(1, 2), bookmark(7) + b"\n" + event_lines(8)], "after position 2"),
    ],
    ids=["gap", "bookmark"],
)
def test_missing_event_is_refused(lines: list[bytes], words: str) -> None:
    play, positions = Played([NDJSON, *lines]), list[int]()
    with pytest.raises(BadAnswer, match=words):
        positions.extend(event.position for event in play.client.events(after=0, follow=True))
    assert positions == [1, 2]


def test_filtered_stream_may_have_gaps_and_moves_by_bookmark() -> None:
    reconnected = (NDJSON, bookmark(7) + b"\n", LOST, NDJSON)
    assert followed(NDJSON, event_lines(2, 9), types=["LoadStarted"])[0] == [2, 9]
    assert followed(*reconnected, event_lines(9), types=["LoadStarted"])[:2] == ([9], ["0", "7"])
    assert followed(*reconnected, event_lines(1, 2))[:2] == ([1, 2], ["0", "0"])  # without a filter not
    back = (NDJSON, event_lines(9) + bookmark(7) + b"\n", LOST, NDJSON, event_lines(12))
    assert followed(*back, types=["LoadStarted"])[:2] == ([9, 12], ["0", "9"])


def test_follow_begins_at_bookmark_or_after_list() -> None:
    answers = (NDJSON, bookmark(41) + b"\n", LOST, NDJSON, event_lines(42))
    assert followed(*answers, after=None)[:2] == ([42], ["", "41"])
    event = fill_json(EventInfo, position=3, type="A")
    page = answer({"events": [event], "as_of": 7, "next_cursor": None})
    assert followed(page, NDJSON, event_lines(8), after=None, since=2)[:2] == ([3, 8], ["", "7"])


@pytest.mark.parametrize("before", [[], [NDJSON, event_lines(1), LOST]], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (problem(400, "beyond_head"), ServerError),
        (problem(403, "forbidden"), errors.NotAllowed),
        (answer({}, 302, location="http://elsewhere"), ServerError),
        (answer({}), BadAnswer),
    ],
    ids=["beyond", "forbidden", "redirect", "no stream"],
)
def test_permanent_refusal_ends_stream(before: list[Any], refusal: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        list(Played([*before, refusal]).client.events(after=0, follow=True))


def test_broken_streams_back_off() -> None:
    _, _, play = followed(*[NDJSON, b""] * 12)
    assert play.pauses[0] < 0.3
    assert play.pauses[-1] == 2.0
    _, _, play = followed(*[part for number in range(1, 9) for part in (NDJSON, event_lines(number), b"")])
    assert set(play.pauses) == {0.2}


@FEWER
@given(st.data(), st.integers(1, 8))
def test_events_come_once_in_order_over_any_losses(data: Any, head: int) -> None:
    """A server that has so many events cuts streams anywhere, repeats itself, and goes away."""

    def answers() -> Any:
        while True:
            if data.draw(st.integers(0, 3)) == 0 and len(play.requests) > 1:
                yield data.draw(st.sampled_from([GONE, LOST, BUSY]))
                continue
            yield NDJSON
            after = int(play.requests[-1].target.rpartition("=")[2])
            text = event_lines(*range(data.draw(st.integers(1, after + 1)), head + 1))
            sent = text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
            cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=2)))
            chunks = [sent[i:j] for i, j in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
            yield from filter(None, chunks)
            if sent == text:
                return
            yield data.draw(st.sampled_from([b"", LOST]))

    play, positions = Played(answers()), list[int]()
    with pytest.raises(OutOfAnswers):
        positions.extend(event.position for event in play.client.events(after=0, follow=True))
    assert positions == list(range(1, head + 1))


# Health


def test_health_of_unhealthy_server() -> None:
    play = Played([problem(503, "unhealthy", "not well: log"), answer({}, 502)])
    assert play.client.health().status == "not well: log"
    with pytest.raises(Busy):
        play.client.health()


# Inference

NOT_LOADED = problem(503, "model_not_loaded", "m is not loaded")
MISTAKEN = problem(400, "invalid_input", "x is FP32")
METADATA, OTHER = (
    answer(fill_json(ModelMetadata, inputs=[{"name": "x", "datatype": datatype, "shape": [-1]}]))
    for datatype in ("FP32", "INT64")
)
DONE = answer({"outputs": []})


def datatypes_sent(play: Played) -> list[Any]:
    """Return the datatype of x in each inference, and None for each metadata that was read."""
    return [
        json.loads(request.body)["inputs"][0]["datatype"] if request.body else None
        for request in play.requests
    ]


def test_inference_is_sent_once() -> None:
    play = Played([LOST])
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.5]}
    with pytest.raises(ServerUnreachable):
        play.client.infer("m", {"x": tensor}, version=2, outputs=["y"], timeout_s=3.0)
    [request] = play.requests
    assert (request.target, request.timeout_s) == ("/v2/models/m/versions/2/infer", 3.0)
    assert request.body == (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}],'
        b'"outputs":[{"name":"y"}],"parameters":{"binary_data_output":true}}'
    )
    assert request.headers["Inference-Header-Content-Length"] == str(len(request.body))
    assert b"".join(request.attachments) == struct.pack("<f", 1.5)


@pytest.mark.parametrize("kind", [list, np.float32, np.float64, np.float16])
def test_array_is_sent_as_its_dtype_until_refused(kind: Any) -> None:
    answers = {list: [METADATA, DONE], np.float32: [DONE]}
    play = Played(answers.get(kind, [MISTAKEN, METADATA, DONE]))
    values = [0.5] * 300 if kind is list else np.full(300, 0.5, kind)
    play.client.infer("m", {"x": values}, parameters={"a": 1, "binary_data_output": False})
    request = play.requests[-1]
    assert json.loads(request.body or b"") == {
        "inputs": [
            {"name": "x", "shape": [300], "datatype": "FP32", "parameters": {"binary_data_size": 1200}}
        ],
        "parameters": {"binary_data_output": False, "a": 1},
    }
    assert b"".join(request.attachments) == struct.pack("<300f", *[0.5] * 300)


def test_large_array_is_sent_from_its_own_memory() -> None:
    play, values = Played([DONE]), np.zeros((300, 500), np.float32)
    play.client.infer("m", {"x": values})
    [sent] = play.requests[0].attachments
    assert np.shares_memory(np.frombuffer(sent, np.float32), values)


def test_datatypes_are_remembered_until_model_refuses_them() -> None:
    play = Played([METADATA, DONE, DONE, MISTAKEN, OTHER, DONE, OTHER, DONE])
    client = play.client
    for value in ([1], [1], [1], [1.5]):  # the last does not fit the INT64 that the client remembers
        with suppress(ValueError):
            client.infer("m", {"x": value})
    assert datatypes_sent(play) == [None, "FP32", "FP32", "FP32", None, "INT64", None]


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        *(([1.5], "FP32"), ([1, 2.5], "FP32"), ([[1, 2]], "INT64"), ([True], "BOOL"), (["a"], "BYTES")),
        *(([], "FP32"), (np.array([1.0]), "FP64"), (np.array(["a"]), "BYTES"), (np.uint8(3), "UINT8")),
    ],
    ids=repr,
)
def test_unloaded_model_gets_guessed_datatypes(value: Any, datatype: str) -> None:
    is_array = hasattr(value, "dtype")
    play = Played([DONE] if is_array else [NOT_LOADED, DONE])
    play.client.infer("m", {"x": value})
    assert datatypes_sent(play) == [*([] if is_array else [None]), datatype]
    assert json.loads(play.requests[-1].body or b"")["inputs"][0]["shape"] == list(np.shape(value))


WHOLE = {"data": [1], "datatype": "INT64", "shape": [1]}


@pytest.mark.parametrize(
    ("value", "answers", "sent", "code"),
    [
        ([1], [NOT_LOADED, MISTAKEN, METADATA, DONE], [None, "INT64", None, "FP32"], None),
        (np.array([1]), [MISTAKEN, METADATA, DONE], ["INT64", None, "FP32"], None),
        ([1], [problem(404, "model_not_found", "there is no m")], [None], "model_not_found"),
        ([1], [NOT_LOADED, NOT_LOADED], [None, "INT64"], "model_not_loaded"),
        ([1], [NOT_LOADED, MISTAKEN, NOT_LOADED], [None, "INT64", None], "invalid_input"),
        ([1], [NOT_LOADED, MISTAKEN, METADATA, MISTAKEN], [None, "INT64", None, "FP32"], "invalid_input"),
        (np.array([1.5], np.float32), [MISTAKEN, METADATA], ["FP32", None], "invalid_input"),
        (WHOLE, [MISTAKEN], ["INT64"], "invalid_input"),
    ],
)
def test_refused_guess_is_followed_by_metadata_once(
    value: Any, answers: list[Answer], sent: list[Any], code: str | None
) -> None:
    play, codes = Played(answers), list[str]()
    try:
        play.client.infer("m", {"x": value})
    except ServerError as error:
        codes.append(error.code)
    assert codes == ([] if code is None else [code])
    assert datatypes_sent(play) == sent


# Blocks

LOADED = answer(fill_json(ModelInfo, id="m", state="loaded", version=1, job_id="j1"))
UNLOADED = answer(fill_json(ModelInfo, id="m", state="unloaded"))
TAKEN_OVER = answer(fill_json(ModelInfo, id="m", state="loaded", version=2, job_id="j2"))
UNTIL_ASKED = "m/unload?until_asked=true"


@pytest.mark.parametrize(
    ("version", "answers", "paths"),
    [
        (None, [LOADED], ["m"]),
        (1, [LOADED], ["m"]),
        (None, [UNLOADED, COMPLETED, LOADED, LOADED, COMPLETED], ["m", "m/load", "m", "m", UNTIL_ASKED]),
        (None, [UNLOADED, COMPLETED, LOADED, TAKEN_OVER], ["m", "m/load", "m", "m"]),
        (None, [UNLOADED, COMPLETED, LOADED, UNLOADED], ["m", "m/load", "m", "m"]),
        (
            None,
            [UNLOADED, COMPLETED, LOADED, LOADED, problem(409, "not_loaded")],
            ["m", "m/load", "m", "m", UNTIL_ASKED],
        ),
        (2, [LOADED, COMPLETED, TAKEN_OVER], ["m", "m/load", "m"]),
    ],
    ids=[
        *("loaded before", "that version before", "not loaded", "loaded by another meanwhile"),
        *("unloaded meanwhile", "unloaded just now", "another version before"),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_block_unloads_only_what_it_loaded(
    version: int | None, answers: list[Answer], paths: list[str], *, fails: bool
) -> None:
    play = Played(answers)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), play.client.loaded("m", version) as m:
        assert m.state == "loaded"
        if fails:
            raise ZeroDivisionError
    assert [request.target for request in play.requests] == [f"/api/v1/models/{path}" for path in paths]
