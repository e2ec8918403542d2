"""The client's pure parts: addresses, answers, lines and tensors, with what is hostile among them."""

import copy
import pickle
import re
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN
from support.playedcalls import ADDRESS, answer, bookmark, event_line, problem

import loadledger
from loadledger import answers, problems, records
from loadledger.address import Address, path, query
from loadledger.asking import LONGEST_PAUSE_S, passes, pause_s, quoted
from loadledger.exchange import Answer
from loadledger.lines import Lines, Place, message
from loadledger.problems import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    JobFailed,
    JobUnfinished,
    NotAllowed,
    NotFound,
    ServerError,
    ServerUnreachable,
)
from loadledger.records import Event, Job
from loadledger.tensors import flat, shape_of, tensors
from server.api.jobs import key_in

TOKEN = "s3cr3t-token"
NAMES = set(vars(loadledger)["__all__"])

# Addresses


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("https://example.org/loadledger/", "https://example.org/loadledger"),
        ("http://[::1]:8080//", "http://[::1]:8080"),
    ],
)
def test_a_url_is_taken_with_a_slash_at_its_end_or_a_prefix(given_url: str, url: str) -> None:
    assert Address.of(given_url).url == url


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://:80",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://host/?query",
        "http://host/#part",
        "http://ho st",
        "http://host\r\nX: y",
        "http://høst",
        "http://host\\path",
        "",
    ],
)
def test_what_is_no_url_of_a_server_is_told_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Address.of(url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="names a user") as caught:
        Address.of("http://alice:pa55word@host")
    assert "pa55word" not in str(caught.value)


@pytest.mark.parametrize("token", ["two words", "line\nend", "", "tökén"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ValueError, match="the token") as caught:
        Address.of("http://host", token)
    assert not token or token not in str(caught.value)


def test_the_token_is_in_no_text_about_the_address_or_the_client() -> None:
    with loadledger.Client("http://host/", token=TOKEN) as client:
        assert TOKEN not in repr(client) + repr(ADDRESS) + repr(
            loadledger.AsyncClient("http://h", token=TOKEN)
        )
        assert client.url == "http://host"


@PLAIN
@given(st.text(min_size=1).filter(lambda text: text not in (".", "..")))
def test_any_id_is_one_segment_of_a_path_and_comes_back(model_id: str) -> None:
    made = path("models", model_id, "load")
    assert re.fullmatch(r"/models/[A-Za-z0-9%._~-]+/load", made)
    assert unquote(made.split("/")[2]) == model_id


@pytest.mark.parametrize("segment", ["", ".", ".."])
def test_what_would_lead_elsewhere_is_no_segment(segment: str) -> None:
    with pytest.raises(ValueError, match="no id"):
        path("jobs", segment)


def test_a_query_keeps_what_is_special_in_it() -> None:
    assert query([]) == ""
    assert query([("at", "2026-01-31T14:02:00+01:00"), ("type", "a&b")]) == (
        "?at=2026-01-31T14%3A02%3A00%2B01%3A00&type=a%26b"
    )


@PLAIN
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255))
def test_a_key_is_quoted_as_the_server_reads_it(key: str) -> None:
    assert key_in(quoted(key)) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "line\nend", "ключ"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="255 printable"):
        quoted(key)


# Answers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ServerError),
        (401, NotAllowed),
        (403, NotAllowed),
        (404, NotFound),
        (409, ServerError),
        (429, Busy),
        (500, ServerError),
        (502, Busy),
        (503, Busy),
        (504, Busy),
    ],
)
def test_a_refusal_is_told_by_its_status_and_code(status: int, kind: type[ServerError]) -> None:
    error = answers.refusal(problem(status, "some_code", "because", instance="urn:uuid:1"), ADDRESS)
    assert type(error) is kind
    assert (error.status, error.code, error.detail) == (status, "some_code", "because")
    assert error.instance == "urn:uuid:1"
    assert str(error) == f"the server answered {status}: because (some_code)"


def test_what_is_archived_is_told_with_where_to_begin() -> None:
    error = answers.refusal(problem(410, "archived", oldest=9, head=20), ADDRESS)
    assert isinstance(error, Archived)
    assert (error.oldest, error.after) == (9, 8)
    for oldest in (None, "9", True, -1, 1.5):
        assert type(answers.refusal(problem(410, "archived", oldest=oldest), ADDRESS)) is ServerError


def test_a_redirect_is_told_and_names_where_it_leads() -> None:
    for status in (301, 302, 307, 308):
        error = answers.refusal(answer({}, status, location="https://evil.example/\x1b[2J"), ADDRESS)
        assert isinstance(error, ServerError)
        assert error.code == "redirected"
        assert "https://evil.example/" in str(error)
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("99999999999", 300.0),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
    ],
)
def test_when_to_come_back_is_read_in_seconds_and_has_an_end(text: str, seconds: float | None) -> None:
    assert answers.retry_after_s({"retry-after": text}) == seconds


HOSTILE = [
    b"",
    b"<html>502 Bad Gateway</html>",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"code": 5, "detail": [], "oldest": {}}',
    b'{"code": "Has Spaces\\n", "detail": "\\u001b[2J' + b"x" * 5000 + b'"}',
    b'{"code": "' + b"c" * 1000 + b'"}',
    b'"\\ud800"',
    b"\xff\xfe\x00",
    b'{"detail": "your token is s3cr3t-token"}',
    b"1e999",
    b"x" * 200_000,
    b"s3cr3t-token in no JSON",
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("status", [200, 302, 404, 410, 503, 999])
def test_whatever_the_body_is_it_is_told_in_a_line_without_the_token(status: int, body: bytes) -> None:
    with pytest.raises(ClientProblem) as caught:
        answers.value(Answer(status, {"content-type": f"x\x1b{TOKEN}"}, body), Job, ADDRESS)
    told = str(caught.value)
    assert told.isprintable()
    assert len(told) < 4500
    assert TOKEN not in told


def test_what_a_server_says_of_a_job_is_told_in_a_line_without_the_token() -> None:
    evil = f"\x1b[2J{TOKEN}\n" + "x" * 10_000
    job = Job(id=evil, kind=evil, model_id=evil, status=evil, error=records.Failure(evil, evil))
    for error in (JobFailed(job, ADDRESS.hide), JobUnfinished(job, 1.0, hide=ADDRESS.hide)):
        assert str(error).isprintable()
        assert len(str(error)) < 4500
        assert TOKEN not in str(error)


@pytest.mark.parametrize(
    "problem",
    [
        ServerUnreachable("http://a", "connection refused", sent=True),
        Busy(503, "log_unavailable", "no", retry_after_s=3.0),
        Archived(410, "archived", "gone").begin_at(4),
        JobFailed(Job(id="j", kind="load", model_id="m", status="failed")),
        JobUnfinished(Job(id="j", kind="load", model_id="m", status="pending"), 1.0),
        BadAnswer("no"),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_a_problem_crosses_from_one_process_to_another(problem: ClientProblem) -> None:
    there = pickle.loads(pickle.dumps(problem))
    assert (type(there), str(there), vars(there)) == (type(problem), str(problem), vars(problem))


def test_an_event_keeps_its_line_in_a_copy_and_in_another_process() -> None:
    event = Event.read(event_line(7))
    for there in (pickle.loads(pickle.dumps(event)), copy.copy(event)):
        assert (there, there.line) == (event, event_line(7))
    made = Event(position=1, type="T")
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made


@PLAIN
@given(st.integers(200, 599), st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_body_is_a_value_or_a_problem(status: int, body: bytes) -> None:
    try:
        answers.value(Answer(status, {}, body), Job, ADDRESS)
    except ClientProblem as error:
        assert str(error).isprintable()  # noqa: PT017 - a value is right as well


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
MEMBERS = st.sampled_from(["code", "detail", "oldest", "instance", "title", "status"])


@PLAIN
@given(st.integers(300, 599), st.dictionaries(MEMBERS, JSON))
def test_a_refusal_with_members_of_any_kind_is_told(status: int, members: dict[str, Any]) -> None:
    error = answers.refusal(Answer(status, {}, msgspec.json.encode(members)), ADDRESS)
    assert isinstance(error, ServerError)
    assert error.status == status
    assert str(error).isprintable()


def test_members_that_are_added_later_are_passed_over_and_missing_ones_have_defaults() -> None:
    body = answer({"id": "j", "kind": "load", "model_id": "m", "status": "pending", "later": {"x": 1}})
    job = answers.value(body, Job, ADDRESS)
    assert (job.id, job.stage, job.ended, job.error) == ("j", None, False, None)


# Whether to try again


def test_a_server_that_never_answered_is_not_tried_again_and_one_that_did_is() -> None:
    gone = ServerUnreachable("http://h", "connection refused")
    assert not passes(gone, reached=False)
    assert passes(gone, reached=True)
    assert not passes(BadAnswer("?"), reached=True)
    assert passes(Busy(429, "rate_limited", "slower"), reached=False)
    assert not passes(Busy(429, "too_many_streams", "close one"), reached=False)
    assert passes(Busy(429, "too_many_streams", "close one"), reached=True)
    assert not passes(ServerError(400, "beyond_head", "no"), reached=True)


@PLAIN
@given(st.integers(1, 10_000), st.floats(0, 1), st.none() | st.floats(0, 300))
def test_a_pause_grows_to_a_limit_and_is_never_shorter_than_the_server_asks(
    failures: int, chance: float, after_s: float | None
) -> None:
    problem = Busy(503, "unhealthy", "", retry_after_s=after_s)
    pause = pause_s(problem, failures, chance)
    assert 0 < pause <= max(LONGEST_PAUSE_S, after_s or 0)
    assert pause >= (after_s or 0)
    assert pause_s(None, failures, chance) <= pause_s(None, failures + 1, chance)


# Lines


@PLAIN
@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_come_out_as_they_went_in_wherever_the_chunks_end(lines: list[bytes], data: Any) -> None:
    text = b"".join(line + b"\n" for line in lines) + b"rest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cutter = Lines()
    assert [line for chunk in chunks for line in cutter.feed(chunk)] == lines


def test_a_line_without_end_is_refused_before_it_takes_the_memory() -> None:
    cutter = Lines(most=100)
    assert cutter.feed(b"x" * 100) == []
    with pytest.raises(BadAnswer, match="101 bytes"):
        cutter.feed(b"x")
    with pytest.raises(BadAnswer, match="101 bytes"):
        Lines(most=100).feed(b"y" * 101 + b"\n")


def test_lines_are_events_places_or_nothing_that_matters() -> None:
    line = event_line(7, model_id="m", data={"attempt": 2}, later=[1], line="x")
    event = message(line)
    assert isinstance(event, Event)
    assert (event.position, event.type, event.model_id, event.data) == (7, "LoadStarted", "m", {"attempt": 2})
    assert event.line == line
    assert msgspec.json.decode(msgspec.json.encode(event)).keys() == set(Event.__struct_fields__)
    assert message(bookmark(9)) == Place(9)
    for nothing in (
        b"",
        b" ",
        b'{"stream":"live","position":3}',
        b'{"stream":"stage"}',
        b'{"stream":"later"}',
    ):
        assert message(nothing) is None


@pytest.mark.parametrize(
    "line", [b"x", b"[]", b"{}", b'{"position":"1","type":"a"}', b'{"position":1}', b"[" * 10_000, b"\xff"]
)
def test_what_is_no_line_of_a_stream_is_told(line: bytes) -> None:
    with pytest.raises(BadAnswer, match="no event") as caught:
        message(line)
    assert str(caught.value).isprintable()


# Tensors


@PLAIN
@given(st.lists(st.integers(0, 3), max_size=4))
def test_nested_lists_have_the_shape_and_the_order_of_the_array_that_they_are(shape: list[int]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    nested = array.tolist()
    assert flat(nested) == array.flatten().tolist()
    if 0 not in shape:
        assert shape_of("x", nested) == shape
    made = tensors({"x": array}, {"inputs": [{"name": "x", "datatype": "INT64"}]})
    assert made == [{"name": "x", "shape": shape, "datatype": "INT64", "data": array.flatten().tolist()}]


@pytest.mark.parametrize("value", [[[1, 2], [3]], [1, [2]], [[[1]], [[1, 2]]]])
def test_lists_of_different_lengths_are_refused_by_the_inputs_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'x'.*same length"):
        tensors({"x": value}, {"inputs": [{"name": "x", "datatype": "INT64"}]})


def test_an_input_that_the_model_has_not_is_told_with_those_that_it_has() -> None:
    with pytest.raises(ValueError, match="no input 'y'; it has x, z"):
        tensors({"y": 1}, {"inputs": [{"name": "x", "datatype": "A"}, {"name": "z", "datatype": "B"}, 5, {}]})
    with pytest.raises(ValueError, match="it has none"):
        tensors({"y": 1}, {"inputs": None})


def test_whole_tensors_are_taken_as_they_are() -> None:
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.5]}
    assert (
        tensors({"x": tensor}, None) == tensors([{"name": "x", **tensor}], None) == [{"name": "x", **tensor}]
    )


# The package


def test_the_names_of_the_package_are_there_and_no_others() -> None:
    stub = (loadledger.__file__ or "").replace(".py", ".pyi")
    with open(stub, encoding="utf-8") as lines:  # noqa: PTH123
        named = re.findall(r"import (\w+) as", lines.read())
    assert set(named) == NAMES
    assert set(named) <= set(dir(loadledger))
    everything: dict[str, object] = {}
    exec("from loadledger import *", everything)
    assert set(named) <= set(everything)
    for name in named:
        assert getattr(loadledger, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = loadledger.Nothing  # type: ignore[attr-defined]


def test_every_public_problem_and_record_is_a_name_of_the_package() -> None:
    told = {
        name
        for name, kind in vars(problems).items()
        if isinstance(kind, type) and issubclass(kind, ClientProblem)
    }
    assert told <= NAMES
