"""The client's pure parts: addresses, answers, lines and tensors, hostile ones among them."""

import copy
import pickle
import re
import struct
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from support.clients import ADDRESS, answer, bookmark, event_line, problem
from support.history import PLAIN

import loadledger
from loadledger import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    Event,
    Job,
    JobFailed,
    JobUnfinished,
    NotAllowed,
    NotFound,
    ServerError,
    ServerUnreachable,
    problems,
    records,
    requests,
)
from loadledger.address import Address, path, query
from loadledger.inference import HEADER_LENGTH as LENGTH
from loadledger.inference import decode_inference, encode_inference
from loadledger.requests import Answer, quote_key
from loadledger.retries import LONGEST_BACK_OFF_S, back_off_s
from loadledger.stream import LineSplitter, parse_line
from loadledger.tensors import FORMS, pack, to_tensors, unpack
from server.api.jobs import unquote_key

TOKEN = "s3cr3t-token"
NAMES = set(vars(loadledger)["__all__"])

# Addresses


@pytest.mark.parametrize("url", ["http://h:80", "https://example.org/loadledger", "http://[::1]:8080"])
def test_url_may_have_prefix_and_slashes(url: str) -> None:
    assert [Address.of(f"{url}{slashes}").url for slashes in ("", "/", "//")] == [url] * 3


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://:80", "http://host:port", ""),
        *("http://host:99999", "http://host:0", "http://host/?query", "http://host/#part"),
        *("http://ho st", "http://host\r\nX: y", "http://høst", "http://host\\path"),
    ],
)
def test_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Address.of(url)


@pytest.mark.parametrize("token", ["two words", "line\nend", "", "tökén"])
def test_secret_is_refused_without_being_repeated(token: str) -> None:
    with pytest.raises(ValueError, match="the token") as caught:
        Address.of("http://host", token)
    assert not token or token not in str(caught.value)
    with pytest.raises(ValueError, match="names a user") as caught:
        Address.of("http://alice:pa55word@host")
    assert "pa55word" not in str(caught.value)


def test_repr_of_client_hides_token() -> None:
    with loadledger.Client("http://host/", token=TOKEN) as client:
        shown = repr(client) + repr(ADDRESS) + repr(loadledger.AsyncClient("http://h", token=TOKEN))
        assert TOKEN not in shown
        assert client.url == "http://host"


@PLAIN
@given(st.text(min_size=1).filter(lambda text: text not in (".", "..")))
def test_any_id_is_one_path_segment(model_id: str) -> None:
    made = path("models", model_id, "load")
    assert re.fullmatch(r"/models/[A-Za-z0-9%._~-]+/load", made)
    assert unquote(made.split("/")[2]) == model_id


@pytest.mark.parametrize("segment", ["", ".", ".."])
def test_path_segment_that_leads_elsewhere_is_refused(segment: str) -> None:
    with pytest.raises(ValueError, match="no id"):
        path("jobs", segment)


def test_query_is_escaped() -> None:
    assert query([]) == ""
    assert query([("at", "14:02+01:00"), ("type", "a&b")]) == "?at=14%3A02%2B01%3A00&type=a%26b"


@PLAIN
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255))
def test_idempotency_key_is_quoted_as_server_reads_it(key: str) -> None:
    assert unquote_key(quote_key(key)) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "line\nend", "ключ"])
def test_invalid_idempotency_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="255 printable"):
        quote_key(key)


# Answers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, ServerError), (409, ServerError), (500, ServerError), (404, NotFound)),
        *((401, NotAllowed), (403, NotAllowed), (429, Busy), (502, Busy), (503, Busy), (504, Busy)),
    ],
)
def test_refusal_raises_by_status(status: int, kind: type[ServerError]) -> None:
    error = requests.decode_refusal(problem(status, "some_code", "because", instance="urn:uuid:1"), ADDRESS)
    assert type(error) is kind
    found = (error.status, error.code, error.detail, error.instance)
    assert found == (status, "some_code", "because", "urn:uuid:1")
    assert str(error) == f"the server answered {status}: because (some_code)"


def test_archived_refusal_has_position_to_begin_at() -> None:
    error = requests.decode_refusal(problem(410, "archived", oldest=9, head=20), ADDRESS)
    assert isinstance(error, Archived)
    assert (error.oldest, error.after) == (9, 8)
    for oldest in (None, "9", True, -1, 1.5):
        assert type(requests.decode_refusal(problem(410, "archived", oldest=oldest), ADDRESS)) is ServerError


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_refused_with_its_target(status: int) -> None:
    error = requests.decode_refusal(answer({}, status, location="https://evil.example/\x1b[2J"), ADDRESS)
    assert isinstance(error, ServerError)
    assert error.code == "redirected"
    assert "https://evil.example/" in str(error)
    assert str(error).isprintable()


def test_retry_after_is_bounded_seconds() -> None:
    texts = ("7", " 0 ", "99999999999", "-1", "1.5", "soon", "")
    seconds = [requests.parse_retry_after({"retry-after": text}) for text in texts]
    assert seconds == [7.0, 0.0, 300.0, None, None, None, None]


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


@pytest.mark.parametrize("status", [200, 302, 404, 410, 503, 999])
def test_hostile_body_is_one_line_without_token(status: int) -> None:
    for body in HOSTILE:
        with pytest.raises(ClientProblem) as caught:
            requests.decode_value(Answer(status, {"content-type": f"x\x1b{TOKEN}"}, body), Job, ADDRESS)
        check_line(str(caught.value))


def test_hostile_job_is_one_line_without_token() -> None:
    evil = f"\x1b[2J{TOKEN}\n" + "x" * 10_000
    job = Job(id=evil, kind=evil, model_id=evil, status=evil, error=records.ErrorInfo(evil, evil))
    for error in (JobFailed(job, ADDRESS.hide), JobUnfinished(job, 1.0, hide=ADDRESS.hide)):
        check_line(str(error))


def check_line(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 4500
    assert TOKEN not in text


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
def test_problem_is_pickled_whole(problem: ClientProblem) -> None:
    there = pickle.loads(pickle.dumps(problem))
    assert (type(there), str(there), vars(there)) == (type(problem), str(problem), vars(problem))


def test_event_keeps_line_when_copied_or_pickled() -> None:
    event = Event.read(event_line(7))
    for there in (pickle.loads(pickle.dumps(event)), copy.copy(event)):
        assert (there, there.line) == (event, event_line(7))
    made = Event(position=1, type="T")
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
MEMBERS = st.dictionaries(
    st.sampled_from(["code", "detail", "oldest", "instance", "title", "status"]), JSON
).map(msgspec.json.encode)


@PLAIN
@given(st.integers(200, 599), st.binary(max_size=300) | st.text(max_size=300).map(str.encode) | MEMBERS)
def test_any_body_is_value_or_printable_problem(status: int, body: bytes) -> None:
    try:
        requests.decode_value(Answer(status, {}, body), Job, ADDRESS)
    except ClientProblem as error:
        assert str(error).isprintable()  # noqa: PT017 - a value is right as well
        if status >= 300:
            assert isinstance(error, ServerError)  # noqa: PT017
            assert error.status == status  # noqa: PT017


def test_unknown_members_are_ignored_and_missing_ones_default() -> None:
    body = answer({"id": "j", "kind": "load", "model_id": "m", "status": "pending", "later": {"x": 1}})
    job = requests.decode_value(body, Job, ADDRESS)
    assert (job.id, job.stage, job.ended, job.error) == ("j", None, False, None)


# Retries


@PLAIN
@given(st.integers(1, 10_000), st.floats(0, 1), st.none() | st.floats(0, 300))
def test_back_off_grows_to_limit_and_respects_retry_after(
    failures: int, chance: float, after_s: float | None
) -> None:
    pause = back_off_s(Busy(503, "unhealthy", "", retry_after_s=after_s), failures, chance)
    assert 0 < pause <= max(LONGEST_BACK_OFF_S, after_s or 0)
    assert pause >= (after_s or 0)
    assert back_off_s(None, failures, chance) <= back_off_s(None, failures + 1, chance)


# Lines


@PLAIN
@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_whole_wherever_chunks_end(lines: list[bytes], data: Any) -> None:
    text = b"".join(line + b"\n" for line in lines) + b"rest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cutter = LineSplitter()
    assert [line for chunk in chunks for line in cutter.feed(chunk)] == lines


@pytest.mark.parametrize("parts", [[b"x" * 100, b"x"], [b"y" * 101 + b"\n"]], ids=["in parts", "at once"])
def test_endless_line_is_refused(parts: list[bytes]) -> None:
    splitter = LineSplitter(most=100)
    with pytest.raises(BadAnswer, match="101 bytes"):
        list(map(splitter.feed, parts))


def test_line_is_event_bookmark_or_ignored() -> None:
    line = event_line(7, model_id="m", data={"attempt": 2}, later=[1], line="x")
    event = parse_line(line)
    assert isinstance(event, Event)
    assert (event.position, event.type, event.model_id, event.data) == (7, "LoadStarted", "m", {"attempt": 2})
    assert event.line == line
    assert msgspec.json.decode(msgspec.json.encode(event)).keys() == set(Event.__struct_fields__)
    assert parse_line(bookmark(9)) == 9
    for ignored in (b"", b" ", b'{"stream":"live","position":3}', b'{"stream":"later"}'):
        assert parse_line(ignored) is None


@pytest.mark.parametrize(
    "line", [b"x", b"[]", b"{}", b'{"position":"1","type":"a"}', b'{"position":1}', b"[" * 10_000, b"\xff"]
)
def test_invalid_line_is_refused(line: bytes) -> None:
    with pytest.raises(BadAnswer, match="no event") as caught:
        parse_line(line)
    assert str(caught.value).isprintable()


# Tensors


@PLAIN
@given(st.lists(st.integers(0, 3), max_size=4))
def test_nested_lists_have_shape_and_order_of_array(shape: list[int]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    metadata = {"inputs": [{"name": "x", "datatype": "INT64"}]}
    tensor = {"name": "x", "shape": shape, "datatype": "INT64", "data": array.flatten().tolist()}
    assert to_tensors({"x": array}, metadata) == [{**tensor, "data": array.tobytes()}]
    assert to_tensors({"x": array.astype(">i8")}, metadata) == [tensor]
    if 0 not in shape:  # an empty array's lists do not give its shape
        assert to_tensors({"x": array.tolist()}, metadata) == [tensor]


ELEMENTS = st.sampled_from(
    [
        0, 1, -1, 255, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), True, False, 0.5, -2.25, 6e4, 1e38, 1e300,
        float("inf"), "", "a", "ü€", "\x00", "\ud800", None, [1],
    ]
)  # fmt: skip


@PLAIN
@given(st.sampled_from([*FORMS, "BYTES", "BF16", "FP8"]), st.lists(ELEMENTS, max_size=3))
def test_elements_are_packed_as_numpy_does_or_stay_json(datatype: str, values: list[Any]) -> None:
    packed = pack(datatype, values)
    if packed is None:
        return
    if datatype == "BYTES":
        assert unpack(datatype, packed) == values
    elif datatype == "BF16":
        assert packed == np.array(values, bfloat16).tobytes()
        assert unpack(datatype, packed) == np.array(values, bfloat16).astype(float).tolist()
    else:
        array = np.array(values, FORMS[datatype].numpy)
        assert (packed, unpack(datatype, packed)) == (array.tobytes(), array.tolist())


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1), ("INT8", 128), ("UINT8", -1), ("INT64", 1.0), ("INT64", True), ("INT64", 2**63),
        ("FP16", 7e4), ("FP32", 1e39), ("FP32", True), ("FP32", "1"), ("FP64", 10**400), ("BF16", 1e39),
        ("BYTES", 1), ("BYTES", "\ud800"), ("FP8", 1.0),
    ],
)  # fmt: skip
def test_element_that_does_not_fit_is_not_packed(datatype: str, value: Any) -> None:
    assert pack(datatype, [value]) is None


def test_bfloat16_is_rounded_half_to_even() -> None:
    values = [1.00390625, 1.01171875, 1.0039063, -1.00390625, 3.3895314e38, float("nan")]
    packed = pack("BF16", values)
    assert packed == np.array(values, np.float32).astype(bfloat16).tobytes()


def test_tensors_are_json_only_if_small_and_representable() -> None:
    for tensor, is_json in (
        ({"shape": [256], "datatype": "FP32", "data": [0.5] * 256}, True),
        ({"shape": [257], "datatype": "FP32", "data": [0.5] * 257}, False),
        ({"shape": [1], "datatype": "FP32", "data": [float("nan")]}, False),
        ({"shape": [1], "datatype": "FP16", "data": [0.5]}, False),
        ({"shape": [1], "datatype": "INT8", "data": b"\1"}, False),
        ({"shape": [2, 150], "datatype": "INT8", "data": [[1] * 150] * 2}, False),
        ({"shape": [150, 2], "datatype": "INT8", "data": [[1] * 150] * 2}, True),
        ({"shape": [300], "datatype": "INT8", "data": [[1] * 150, [1]]}, True),
        ({"shape": [300], "datatype": "INT8", "data": [200] * 300}, True),
    ):
        fields, body = encode_inference([{"name": "x", **tensor}], {})
        assert (LENGTH not in fields) is is_json
        head = msgspec.json.decode(body[: int(fields.get(LENGTH, len(body)))])
        assert ("data" in head["inputs"][0]) is is_json


def test_binary_outputs_become_lists_beside_json_ones() -> None:
    binary = {"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    empty = {"name": "b", "datatype": "BYTES", "shape": [0], "parameters": {"binary_data_size": 0, "c": 1}}
    plain = {"name": "d", "datatype": "INT8", "shape": [1], "data": [7]}
    text = msgspec.json.encode({"model_name": "m", "outputs": [binary, empty, plain]})
    told = Answer(200, {LENGTH.lower(): str(len(text))}, text + struct.pack("<2f", 0.5, 2))
    assert decode_inference(told, ADDRESS)["outputs"] == [
        {"name": "a", "datatype": "FP32", "shape": [2], "data": [0.5, 2]},
        {"name": "b", "datatype": "BYTES", "shape": [0], "parameters": {"c": 1}, "data": []},
        plain,
    ]


@pytest.mark.parametrize(
    ("output", "payload", "length"),
    [
        ({"datatype": "FP32", "shape": [2]}, bytes(8), "9" * 30),
        ({"datatype": "FP32", "shape": [2]}, bytes(8), "-1"),
        ({"datatype": "FP32", "shape": [2]}, bytes(7), None),
        ({"datatype": "FP32", "shape": [3]}, bytes(8), None),
        ({"datatype": "FP32", "shape": "a"}, bytes(8), None),
        ({"datatype": "FP32"}, bytes(8), None),
        ({"datatype": ["FP32"], "shape": [2]}, bytes(8), None),
        ({"datatype": "FP8", "shape": [8]}, bytes(8), None),
        ({"datatype": "BYTES", "shape": [2]}, b"\1\0\0\0a\1\0\0", None),
        ({"datatype": "BYTES", "shape": [1]}, b"\xff\xff\xff\xff1234", None),
    ],
)
def test_malformed_binary_answer_is_refused(output: Any, payload: bytes, length: str | None) -> None:
    text = msgspec.json.encode({"outputs": [{**output, "parameters": {"binary_data_size": 8}}]})
    told = Answer(200, {LENGTH.lower(): length or str(len(text))}, text + payload)
    with pytest.raises(BadAnswer, match="is this its URL"):
        decode_inference(told, ADDRESS)


@pytest.mark.parametrize("value", [[[1, 2], [3]], [1, [2]], [[[1]], [[1, 2]]]])
def test_ragged_lists_are_refused_by_input_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'x'.*same length"):
        to_tensors({"x": value}, {"inputs": [{"name": "x", "datatype": "INT64"}]})


def test_unknown_input_is_refused_with_known_ones() -> None:
    inputs = [{"name": "x", "datatype": "A"}, {"name": "z", "datatype": "B"}, 5, {}]
    for declared, known in ((inputs, "x, z"), (None, "none")):
        with pytest.raises(ValueError, match=f"no input 'y'; it has {known}"):
            to_tensors({"y": 1}, {"inputs": declared})


def test_complete_tensors_are_taken_unchanged() -> None:
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.5]}
    named = [{"name": "x", **tensor}]
    assert to_tensors({"x": tensor}, None) == to_tensors(named, None) == named


# The package


def test_package_exports_its_names_and_no_others() -> None:
    stub = (loadledger.__file__ or "").replace(".py", ".pyi")
    with open(stub, encoding="utf-8") as lines:  # noqa: PTH123
        named = set(re.findall(r"import (\w+) as", lines.read()))
    everything: dict[str, object] = {}
    exec("from loadledger import *", everything)
    assert named == NAMES
    assert named <= set(dir(loadledger)) & set(everything)
    assert all(getattr(loadledger, name).__name__ == name for name in named)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = loadledger.Nothing  # type: ignore[attr-defined]
    kinds = {name: kind for name, kind in vars(problems).items() if isinstance(kind, type)}
    assert {name for name, kind in kinds.items() if issubclass(kind, ClientProblem)} <= NAMES
