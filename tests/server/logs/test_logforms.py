"""Log lines: whatever is in one, it is one, without tokens, and not long."""

import json
import logging
import re
from contextvars import Context

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from server.logs.context import CONTEXT, RequestContext, sane_id
from server.logs.forms import HIDDEN, MAX_TEXT_CHARACTERS, JsonForm, TextForm, fields

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl-_"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (INFO|ERROR) {4,}")
HOSTILE = "a\n2026-11-20T20:33:04.748382Z INFO     forged\r\u2028\x85\x1b[31m\x00\ud800"


def record(message: str, *, level: int = logging.INFO, **named: object) -> logging.LogRecord:
    made = logging.LogRecord("server.x", level, __file__, 1, "%s", (message,), None)
    made.__dict__.update(fields(**named))
    return made


def failed(error: Exception) -> logging.LogRecord:
    information = (type(error), error, None)
    return logging.LogRecord("server.x", logging.ERROR, __file__, 1, "it failed", (), information)


def in_text(made: logging.LogRecord) -> str:
    return TextForm().format(made)


def in_json(made: logging.LogRecord) -> str:
    return JsonForm().format(made)


def test_a_line_of_text_has_time_level_message_and_fields_quoted_where_they_have_to_be() -> None:
    line = in_text(record("model loaded", model="m", position=7, reason="no such thing", stale=False, x=None))
    assert LINE.match(line)
    assert line.endswith('model loaded model=m position=7 reason="no such thing" stale=false')


def test_a_line_of_json_has_the_same_as_members() -> None:
    line = json.loads(in_json(record("model loaded", model="m", position=7, share=0.5, x=None)))
    assert line.keys() == {"time", "level", "logger", "message", "model", "position", "share"}
    assert (line["level"], line["logger"], line["message"]) == ("info", "server.x", "model loaded")
    assert (line["model"], line["position"], line["share"]) == ("m", 7, 0.5)


def test_what_happens_for_a_request_names_it() -> None:
    inside = Context()
    inside.run(CONTEXT.set, RequestContext("my-request"))
    assert inside.run(in_text, record("x", status=200)).endswith("x request_id=my-request status=200")
    inside.run(CONTEXT.set, RequestContext("my-request", trace_id="4bf9"))
    line = json.loads(inside.run(in_json, record("x")))
    assert (line["request_id"], line["trace_id"]) == ("my-request", "4bf9")


@PLAIN
@given(st.text(), st.text())
def test_no_text_makes_a_line_of_its_own(message: str, value: str) -> None:
    made = record(HOSTILE + message, value=HOSTILE + value)
    assert len(in_text(made).splitlines()) == 1
    assert in_text(made).isprintable()
    assert len(in_json(made).splitlines()) == 1
    assert in_json(made).isascii()
    assert json.loads(in_json(made))["value"] == HOSTILE + value


def test_a_traceback_stands_below_its_line_with_a_margin_that_no_line_has() -> None:
    line, *below = in_text(failed(ValueError(HOSTILE))).splitlines()
    assert LINE.match(line)
    assert any("forged" in each for each in below)
    assert all(each.startswith("    | ") and each.isprintable() for each in below)


def test_a_traceback_is_a_member_in_json() -> None:
    (line,) = in_json(failed(ValueError(HOSTILE))).splitlines()
    assert "ValueError: a\n2026-" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    "said",
    [
        TOKEN,
        f"Bearer {TOKEN}",
        "authorization: bearer c2VjcmV0LXRva2Vu",
        f"x={TOKEN}&y",
        f"/models/token%3D{TOKEN}",
        "/models/Bearer%20c2VjcmV0LXRva2Vu",
        f"'Bearer\\t{TOKEN}'",
        f"{'x' * (MAX_TEXT_CHARACTERS // 2 - 20)} {TOKEN}{' x' * MAX_TEXT_CHARACTERS}",
    ],
    ids=["alone", "credentials", "opaque", "in a query", "encoded", "opaque, encoded", "escaped", "cut"],
)
def test_a_token_is_not_told(said: str) -> None:
    made = (record(f"told {said}"), record("x", value=said), failed(ValueError(said)))
    for line in (form(each) for form in (in_text, in_json) for each in made):
        assert TOKEN.partition(".")[0] not in line
        assert "c2VjcmV0LXRva2Vu" not in line
        assert HIDDEN in line


def test_a_long_text_is_cut_in_its_middle() -> None:
    long = f"begin {'x' * 10 * MAX_TEXT_CHARACTERS} end"
    for line in (in_text(record(long, value=long)), in_json(record(long, value=long))):
        assert len(line) < 3 * MAX_TEXT_CHARACTERS
        assert line.count("begin") == line.count(" end") == 2


def test_a_field_that_is_no_plain_value_is_told_as_text() -> None:
    assert json.loads(in_json(record("x", value=["a", 1])))["value"] == "['a', 1]"


@pytest.mark.parametrize("name", ["a", "01a1faa9-a6ec-7310-b1d2-61fc5f2ba464", "x" * 128, '"{}'])
def test_a_requests_name_is_taken_if_it_is_short_and_printable(name: str) -> None:
    assert sane_id([name]) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "\u00e9", "a\x1b[31m", "\u2028"])
def test_another_is_made_for_what_is_no_name(name: str) -> None:
    assert sane_id([name]) is None
    assert sane_id(["a", "b"]) is None
