"""The client's pure parts: addresses, answers, lines and tensors, hostile ones among them."""

import ast
import copy
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ml_dtypes import bfloat16
from support.answers import fill, fill_json
from support.clients import ADDRESS, answer, bookmark, event_line, problem
from support.history import PLAIN

import loadledger
from answers.errors import ErrorInfo
from loadledger import (
    BadAnswer,
    Busy,
    ClientProblem,
    EventInfo,
    JobFailed,
    JobInfo,
    JobUnfinished,
    NotAllowed,
    NotFound,
    ServerError,
    ServerUnreachable,
    errors,
    requests,
)
from loadledger.address import Address, path, query
from loadledger.inference import InputTensor, build_tensors, decode_inference, encode_inference
from loadledger.requests import HEADER_LENGTH as LENGTH
from loadledger.requests import LONGEST_BACK_OFF_S, Answer, back_off_s, body_buffer, quote_key
from loadledger.stream import LineSplitter, parse_line
from loadledger.tensors import FORMS, unpack
from loadledger.transports.http1 import ChunkedDecoder, MalformedResponse, format_fields, parse_head
from server.api.jobs import unquote_key
from server.errors import ERRORS

TOKEN = "s3cr3t-token"
ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("kind", [loadledger.Client, loadledger.AsyncClient])
def test_client_without_url_names_the_profiles(kind: Callable[[], object]) -> None:
    with pytest.raises(
        ValueError, match=r"take that of `loadledger login`: (Async)?Client\.from_profile\(\)"
    ):
        kind()


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


def test_query_is_escaped() -> None:
    assert query([]) == ""
    assert query([("at", "14:02+01:00"), ("type", "a&b")]) == "?at=14%3A02%2B01%3A00&type=a%26b"


@PLAIN
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255))
def test_idempotency_key_is_quoted_as_server_reads_it(key: str) -> None:
    assert unquote_key(quote_key(key)) == key


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *((partial(path, "jobs", segment), "no id") for segment in ("", ".", "..")),
        *((partial(quote_key, key), "255 printable") for key in ("", "x" * 256, "line\nend", "ключ")),
        (partial(format_fields, [("A", "b\r\nC: d")]), "control characters"),
    ],
)
def test_part_of_a_request_that_leads_elsewhere_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


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


REQUESTS = re.compile(
    r"\b(GET|POST|PUT|DELETE|PATCH)\b|\?\w+=|Prefer\b|Retry-After|Authorization|Idempotency-Key|Content-|curl\b"
    r"|/api/|/v2\b|openapi|\bheaders?\b"
)
"""Words of HTTP, which no message of the command line has."""
OTHER_CLIENTS = (
    # Refusals of requests that are malformed, which the client sends none of; and texts that are no refusals.
    *("server/http/", "server/api/versions.py", "server/v2/codec.py", "server/v2/tritonconfig.py"),
    *(
        "server/observability/",
        "server/v2/inference.py",
        "events/sqlite/",
        "nodes/postgres/",
        "runtime/wire.py",
    ),
)


def list_details() -> set[str]:
    """Return the texts with requests in the server's functions, and in docstrings that are details."""
    found = set()
    for package in ("server", "runtime", "events", "features", "nodes"):
        for file in (ROOT / package).rglob("*.py"):
            if not file.relative_to(ROOT).as_posix().startswith(OTHER_CLIENTS):
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    found |= set(list_texts(node))
    return {text for text in found if " " in text and REQUESTS.search(text)}


def list_texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts in a function's statements, or the docstring of an error with a code."""
    if isinstance(node, ast.ClassDef) and any(ast.unparse(each).startswith("code = ") for each in node.body):
        yield ast.get_docstring(node) or ""
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        statements = node.body[1:] if ast.get_docstring(node) else node.body
        inner = [each for statement in statements for each in ast.walk(statement)]
        parts = {part for each in inner if isinstance(each, ast.JoinedStr) for part in each.values}
        yield from (fill_text(each) for each in inner if each not in parts)


def fill_text(node: ast.AST) -> str:
    """Return a text with values in place of its expressions, or an empty one if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if not isinstance(node, ast.JoinedStr):
        return ""
    return "".join(
        fill_text(part) if isinstance(part, ast.Constant) else fill_value(part) for part in node.values
    )


def fill_value(node: ast.expr) -> str:
    name = ast.unparse(node)
    return '{"version": 3}' if "body" in name else "3" if "version" in name else "digits"


def test_details_of_server_are_in_the_words_of_commands() -> None:
    details = sorted(list_details())
    assert len(details) >= 10, details
    spoken = {
        str(requests.decode_refusal(problem(kind.status, code, detail), ADDRESS))
        for code, kind in ERRORS.items()
        for detail in (*details, "model 'digits' is as it is")
    }
    assert [text for text in sorted(spoken) if REQUESTS.search(text)] == []
    assert not any("MODEL" in text for text in spoken if "model 'digits'" in text)
    assert any("load it with `loadledger load digits/3 --wait`" in text for text in spoken)


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
            requests.decode_value(Answer(status, {"content-type": f"x\x1b{TOKEN}"}, body), JobInfo, ADDRESS)
        check_line(str(caught.value))


def test_hostile_job_is_one_line_without_token() -> None:
    evil = f"\x1b[2J{TOKEN}\n" + "x" * 10_000
    why = ErrorInfo(code=evil, message=evil)
    job = fill(JobInfo, id=evil, kind=evil, model_id=evil, status=evil, error=why)
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
        JobFailed(fill(JobInfo, id="j", kind="load", model_id="m", status="failed")),
        JobUnfinished(fill(JobInfo, id="j", kind="load", model_id="m", status="pending"), 1.0),
        BadAnswer("no"),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_problem_is_pickled_whole(problem: ClientProblem) -> None:
    there = pickle.loads(pickle.dumps(problem))
    assert (type(there), str(there), vars(there)) == (type(problem), str(problem), vars(problem))


def test_event_keeps_line_when_copied_or_pickled() -> None:
    event = EventInfo.read(event_line(7))
    for there in (pickle.loads(pickle.dumps(event)), copy.copy(event)):
        assert (there, there.line) == (event, event_line(7))
    made = fill(EventInfo, position=1, type="T")
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
        requests.decode_value(Answer(status, {}, body), JobInfo, ADDRESS)
    except ClientProblem as error:
        assert str(error).isprintable()  # noqa: PT017 - a value is right as well
        if status >= 300:
            assert getattr(error, "status", None) == status or isinstance(error, BadAnswer)  # noqa: PT017
        if isinstance(error, BadAnswer):
            assert "is not loadledger" in str(error)  # noqa: PT017


def test_unknown_members_are_ignored_and_missing_ones_default() -> None:
    body = answer(fill_json(JobInfo, id="j", kind="load", model_id="m", status="pending", later={"x": 1}))
    job = requests.decode_value(body, JobInfo, ADDRESS)
    assert (job.id, job.node, job.ended, job.error) == ("j", None, False, None)


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
    assert isinstance(event, EventInfo)
    assert (event.position, event.type, event.model_id, event.data) == (7, "LoadStarted", "m", {"attempt": 2})
    assert event.line == line
    assert msgspec.json.decode(msgspec.json.encode(event)).keys() == set(EventInfo.__struct_fields__)
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

NUMBERS = [*FORMS, "BF16"]


def unpacked(tensor: InputTensor) -> Any:
    """Return what a server that answers with its input gives back."""
    assert tensor.data is not None
    members = tensor.members
    return unpack(members["datatype"], bytes(tensor.data), members["shape"])


@PLAIN
@given(st.data(), st.lists(st.integers(0, 3), max_size=4), st.sampled_from(NUMBERS))
def test_array_of_any_shape_and_datatype_comes_back(data: Any, shape: list[int], datatype: str) -> None:
    form = FORMS.get(datatype, FORMS["FP32"])
    array = data.draw(arrays(form, tuple(shape)))
    if datatype == "BF16":
        array = array.astype(bfloat16)
    for value in (array, np.asfortranarray(array), array.tolist(), array.astype(array.dtype.newbyteorder())):
        if isinstance(value, np.ndarray) or 0 not in shape:  # an empty array's lists do not give its shape
            [tensor] = build_tensors({"x": value}, {"x": datatype})
            back = unpacked(tensor)
            assert back.dtype == form
            np.testing.assert_array_equal(back, array.astype(form))
    [guessed] = build_tensors({"x": array}, None)
    assert guessed.members == {"name": "x", "shape": shape, "datatype": datatype}


@PLAIN
@given(st.data(), st.lists(st.integers(0, 3), max_size=3))
def test_texts_of_any_shape_and_bytes_come_back(data: Any, shape: list[int]) -> None:
    texts = [data.draw(st.text() | st.binary(max_size=5)) for _ in range(math.prod(shape))]
    array = np.empty(len(texts), object)
    array[:] = texts
    [tensor] = build_tensors({"x": array.reshape(shape)}, None)
    back = unpacked(tensor)
    assert back.shape == tuple(shape)
    assert [each.encode(errors="surrogateescape") for each in back.flat] == [
        each if isinstance(each, bytes) else each.encode() for each in texts
    ]


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("BOOL", [0, 1.0], [False, True]),
        ("INT8", [1.0, -128.0], [1, -128]),
        ("INT64", [True, np.uint64(7)], [1, 7]),
        ("UINT64", [2.0**63], [2**63]),
        ("FP32", [0.1, 2**24, True], [np.float32(0.1), 2**24, 1]),
        ("FP16", [float("nan"), float("-inf")], [float("nan"), float("-inf")]),
        ("FP64", [2**62], [2.0**62]),
        ("BF16", [1.00390625, 1.01171875, 1.0040, -1.00390625], [1.0, 1.015625, 1.0078125, -1.0]),
        ("BYTES", ["ü", b"\xff"], ["ü", "\udcff"]),
        ("INT32", [], []),
        ("BYTES", [], []),
    ],
)
def test_values_are_converted_if_none_is_lost(datatype: str, value: Any, expected: Any) -> None:
    [tensor] = build_tensors({"x": value}, {"x": datatype})
    np.testing.assert_array_equal(unpacked(tensor), expected)


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *(("BOOL", 2), ("INT8", 128), ("UINT8", -1), ("INT64", 1.5), ("INT64", 2**63), ("INT64", 2.0**63)),
        *(("INT32", float("nan")), ("UINT64", np.int64(-1)), ("INT8", float("inf")), ("INT8", None)),
        *(("FP16", 7e4), ("FP32", 1e39), ("FP32", 2**24 + 1), ("FP64", 2**63 - 1), ("FP64", 2**64 - 1)),
        *(("FP64", 10**400), ("FP32", "1"), ("BF16", 3.4e38), ("BF16", 257), ("FP16", 2049)),
        *(("BYTES", 1), ("BYTES", "\ud800"), ("BYTES", None), ("FP8", 1.0)),
    ],
)
def test_value_that_does_not_fit_is_refused_by_name(datatype: str, value: Any) -> None:
    with pytest.raises(ValueError, match="input 'x'"):
        build_tensors({"x": [value]}, {"x": datatype})


RAGGED: list[Any] = [[[1, 2], [3]], [1, [2]], [[[1]], [[1, 2]]], [["a"], ["b", "c"]]]


@pytest.mark.parametrize(
    ("value", "known", "words"),
    [
        *((value, {"x": "INT64"}, r"'x'.*(same length|does not fit)") for value in RAGGED),
        *((value, {"x": "BYTES"}, r"'x'.*same length") for value in RAGGED),
        (["a", 1], {"x": "BYTES"}, "1 does not fit BYTES"),
        (1, {"y": "A", "z": "B"}, "no input 'x'; it has y, z"),
        (1, {}, "no input 'x'; it has none"),
        (np.zeros(1, complex), None, "no datatype for numpy's complex128"),
    ],
)
def test_unfit_input_is_refused_with_reason(value: Any, known: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_tensors({"x": value}, known)


@pytest.mark.parametrize(
    ("data", "datatype", "is_binary"),
    [
        ([[1.5]], "FP32", True),
        (b"\0\0\0\0", "FP32", True),
        (np.ones(1, bfloat16), "BF16", True),
        (["a"], "BYTES", True),
        ([[1], [1, 2]], "FP32", False),
        ([300], "INT8", False),
        ([1], "FP8", False),
        ([1], None, False),
        (None, "FP32", False),
    ],
)
def test_whole_tensor_is_left_to_server_if_wrong(data: Any, datatype: Any, *, is_binary: bool) -> None:
    members = {"name": "x", "shape": [1], "datatype": datatype, "data": data, "parameters": {"a": 1}}
    fields, text, payload = encode_inference(build_tensors([members], None), {})
    [head] = msgspec.json.decode(text)["inputs"]
    assert (LENGTH in fields) is bool(payload) is ("data" not in head) is is_binary
    assert head["parameters"] == {"a": 1} | ({"binary_data_size": len(payload[0])} if payload else {})


def test_outputs_are_arrays_in_binary_and_json() -> None:
    outputs = [
        {"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
        {"name": "b", "datatype": "BYTES", "shape": [0], "parameters": {"binary_data_size": 0, "c": 1}},
        {"name": "c", "datatype": "INT8", "shape": [1, 1], "data": [7]},
        {"name": "d", "datatype": "BYTES", "shape": [1], "data": ["ü"]},
        {"name": "e", "datatype": "FP32", "shape": [0, 3]},
    ]
    text = msgspec.json.encode({"model_name": "m", "model_version": "2", "id": "i", "outputs": outputs})
    told = Answer(200, {LENGTH.lower(): str(len(text))}, text + struct.pack("<2f", 0.5, 2))
    found = decode_inference(told, ADDRESS)
    assert (found.model_name, found.model_version, found.id) == ("m", "2", "i")
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [0.5, 2],
        "b": [],
        "c": [[7]],
        "d": ["ü"],
        "e": [],
    }
    assert (list(found), found["e"].shape, found.datatypes["b"]) == ([*"abcde"], (0, 3), "BYTES")
    assert repr(found) == (
        "InferenceResult(m/2: a: FP32[2], b: BYTES[0], c: INT8[1, 1], d: BYTES[1], e: FP32[0, 3])"
    )


def test_nan_and_infinities_in_json_are_numbers() -> None:
    text = (
        b'{"outputs":[{"name":"NaN","datatype":"FP32","shape":[3],"data":[NaN,Infinity,-Infinity]},'
        b'{"name":"b","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}'
    )
    found = decode_inference(Answer(200, {LENGTH.lower(): str(len(text))}, text + bytes(4)), ADDRESS)
    np.testing.assert_array_equal(found["NaN"], np.array([math.nan, math.inf, -math.inf], np.float32))
    assert found["b"].tolist() == [0]
    with pytest.raises(BadAnswer, match="is this its URL"):
        decode_inference(Answer(200, {}, b'{"outputs": [nan]}'), ADDRESS)


def test_large_outputs_are_aligned_views_of_the_body() -> None:
    output = {"name": "a", "datatype": "FP64", "shape": [2], "parameters": {"binary_data_size": 16}}
    for spaces in range(16):
        text = msgspec.json.encode({"outputs": [output]}) + b" " * spaces
        headers = {LENGTH.lower(): str(len(text))}
        body = body_buffer(headers, len(text) + 16)
        body[: len(text)], body[len(text) :] = text, struct.pack("<2d", 0.5, 2)
        array = decode_inference(Answer(200, headers, body), ADDRESS)["a"]
        assert array.flags.aligned
        assert np.shares_memory(array, np.frombuffer(body, np.uint8))
        assert array.tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("output", "payload", "length"),
    [
        ({"datatype": "FP32", "shape": [2]}, bytes(8), "9" * 30),
        ({"datatype": "FP32", "shape": [2]}, bytes(8), "-1"),
        ({"datatype": "FP32", "shape": [2]}, bytes(7), None),
        ({"datatype": "FP32", "shape": [3]}, bytes(8), None),
        ({"datatype": "FP32", "shape": [-2]}, bytes(8), None),
        ({"datatype": "FP32", "shape": [10**30, 0]}, bytes(8), None),
        ({"datatype": "FP32", "shape": "a"}, bytes(8), None),
        ({"datatype": "FP32"}, bytes(8), None),
        ({"datatype": ["FP32"], "shape": [2]}, bytes(8), None),
        ({"datatype": "FP8", "shape": [8]}, bytes(8), None),
        ({"datatype": "BYTES", "shape": [2]}, b"\1\0\0\0a\1\0\0", None),
        ({"datatype": "BYTES", "shape": [1]}, b"\xff\xff\xff\xff1234", None),
    ],
)
def test_malformed_binary_answer_is_refused(output: Any, payload: bytes, length: str | None) -> None:
    head = {"name": "y", **output, "parameters": {"binary_data_size": 8}}
    text = msgspec.json.encode({"outputs": [head]})
    told = Answer(200, {LENGTH.lower(): length or str(len(text))}, text + payload)
    with pytest.raises(BadAnswer, match="is this its URL"):
        decode_inference(told, ADDRESS)


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [("INT8", [1], [300]), ("INT8", [2], [1]), ("BYTES", [1], [1]), ("FP32", [2], [[1], [1, 2]])],
)
def test_malformed_json_answer_is_refused(datatype: str, shape: list[int], data: Any) -> None:
    output = {"name": "y", "datatype": datatype, "shape": shape, "data": data}
    with pytest.raises(BadAnswer, match="is this its URL"):
        decode_inference(answer({"outputs": [output]}), ADDRESS)


# HTTP/1.1


@PLAIN
@given(st.lists(st.binary(max_size=20)), st.data())
def test_chunks_are_decoded_wherever_they_are_cut(parts: list[bytes], data: Any) -> None:
    text = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts if part)
    text += b"0\r\nX-Trailer: y\r\n\r\nrest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    decoder = ChunkedDecoder()
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert b"".join(map(decoder.feed, pieces)) == b"".join(parts)
    assert (decoder.has_ended, bytes(decoder.rest)) == (True, b"rest")


@pytest.mark.parametrize(
    "text",
    [b"x\r\n", b"-1\r\n", b"1\r\nab\r\n", b"f" * 16 + b"\r\n", b"1" * 300, b"0\r\n" + b"x" * 70_000],
)
def test_malformed_chunks_are_refused(text: bytes) -> None:
    with pytest.raises(MalformedResponse):
        ChunkedDecoder().feed(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\nA : b",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded",
        b"HTTP/1.1 200 OK\r\nA: b\nC: d",
        b"HTTP/1.1 200 OK\r\nA: \0",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
    ],
)
def test_malformed_head_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedResponse):  # when it is read, or when its body's end is asked for
        assert (head := parse_head(text)).is_chunked or head.body_length


@pytest.mark.parametrize(
    ("version", "fields", "length", "persists"),
    [
        ("1.1", "content-length: 5", 5, True),
        ("1.1", "Content-Length:\t0 \r\nConnection: Close", 0, False),
        ("1.0", "Content-Length: 5", 5, False),
        ("1.0", "Connection: Keep-Alive", None, True),
    ],
)
def test_head_says_how_its_body_ends(
    version: str, fields: str, length: int | None, *, persists: bool
) -> None:
    head = parse_head(f"HTTP/{version} 200\r\n{fields}".encode())
    assert (head.status, head.body_length, head.is_chunked, head.persists) == (200, length, False, persists)


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
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert {name for name, kind in kinds.items() if issubclass(kind, ClientProblem)} <= NAMES
