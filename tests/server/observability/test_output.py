"""Log records as lines of text or JSON: always one line, without tokens, of limited length."""

import json
import logging
import re
from contextvars import Context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from server.observability import output

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl-_"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (INFO|ERROR) {4,}")
HOSTILE = "a\n2026-11-20T20:33:04.748382Z INFO     forged\r\u2028\x85\x1b[31m\x00\ud800"


def record(message: str, *, level: int = logging.INFO, **named: object) -> logging.LogRecord:
    record = logging.LogRecord("server.x", level, __file__, 1, "%s", (message,), None)
    record.__dict__.update(output.make_extra(**named))
    return record


def failed(error: Exception) -> logging.LogRecord:
    information = (type(error), error, None)
    return logging.LogRecord("server.x", logging.ERROR, __file__, 1, "it failed", (), information)


def in_text(record: logging.LogRecord) -> str:
    return output.TextFormatter().format(record)


def in_json(record: logging.LogRecord) -> str:
    return output.JsonFormatter().format(record)


def test_text_line_has_time_level_message_and_fields() -> None:
    line = in_text(record("model loaded", model="m", position=7, reason="no such thing", stale=False, x=None))
    assert LINE.match(line)
    assert line.endswith('model loaded model=m position=7 reason="no such thing" stale=false')


def test_json_line_has_the_same_members() -> None:
    line = json.loads(in_json(record("model loaded", model="m", position=7, share=0.5, x=None)))
    assert line.keys() == {"time", "level", "logger", "message", "model", "position", "share"}
    assert (line["level"], line["logger"], line["message"]) == ("info", "server.x", "model loaded")
    assert (line["model"], line["position"], line["share"]) == ("m", 7, 0.5)


def test_line_of_a_request_has_its_id() -> None:
    inside = Context()
    inside.run(output.CONTEXT.set, output.RequestContext("my-request"))
    assert inside.run(in_text, record("x", status=200)).endswith("x request_id=my-request status=200")
    inside.run(output.CONTEXT.set, output.RequestContext("my-request", trace_id="4bf9"))
    line = json.loads(inside.run(in_json, record("x")))
    assert (line["request_id"], line["trace_id"]) == ("my-request", "4bf9")


@PLAIN
@given(st.text(), st.text())
def test_any_text_stays_within_its_line(message: str, value: str) -> None:
    line_record = record(HOSTILE + message, value=HOSTILE + value)
    assert len(in_text(line_record).splitlines()) == 1
    assert in_text(line_record).isprintable()
    assert len(in_json(line_record).splitlines()) == 1
    assert in_json(line_record).isascii()
    assert json.loads(in_json(line_record))["value"] == HOSTILE + value


def test_traceback_is_indented_in_text_and_a_member_in_json() -> None:
    line, *below = in_text(failed(ValueError(HOSTILE))).splitlines()
    assert LINE.match(line)
    assert any("forged" in each for each in below)
    assert all(each.startswith("    | ") and each.isprintable() for each in below)
    (line,) = in_json(failed(ValueError(HOSTILE))).splitlines()
    assert "ValueError: a\n2026-" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        f"Bearer {TOKEN}",
        "authorization: bearer c2VjcmV0LXRva2Vu",
        f"x={TOKEN}&y",
        f"/models/token%3D{TOKEN}",
        "/models/Bearer%20c2VjcmV0LXRva2Vu",
        f"'Bearer\\t{TOKEN}'",
        f"{'x' * (output.MAX_TEXT_CHARACTERS // 2 - 20)} {TOKEN}{' x' * output.MAX_TEXT_CHARACTERS}",
    ],
    ids=["alone", "credentials", "opaque", "in a query", "encoded", "opaque, encoded", "escaped", "cut"],
)
def test_token_is_hidden(text: str) -> None:
    records = (record(f"sent {text}"), record("x", value=text), failed(ValueError(text)))
    for line in (form(each) for form in (in_text, in_json) for each in records):
        assert TOKEN.partition(".")[0] not in line
        assert "c2VjcmV0LXRva2Vu" not in line
        assert output.HIDDEN in line


def test_long_text_is_cut_in_its_middle() -> None:
    long = f"begin {'x' * 10 * output.MAX_TEXT_CHARACTERS} end"
    for line in (in_text(record(long, value=long)), in_json(record(long, value=long))):
        assert len(line) < 3 * output.MAX_TEXT_CHARACTERS
        assert line.count("begin") == line.count(" end") == 2


VALID = ("a", "01a1faa9-a6ec-7310-b1d2-61fc5f2ba464", "x" * 128, '"{}')
INVALID = ("", "x" * 129, "a b", "a\n", "\u00e9", "a\x1b[31m", "\u2028")


@pytest.mark.parametrize("name", VALID + INVALID)
def test_request_id_of_the_client_is_kept_if_valid(name: str) -> None:
    assert output.valid_request_id([name]) == (name if name in VALID else None)
    assert output.valid_request_id([name, name]) is None


def test_packages_with_loggers_have_the_log_level() -> None:
    root = Path(output.__file__).parents[2]
    logging_modules = (path for path in root.glob("*/**/*.py") if b"getLogger(__name__)" in path.read_bytes())
    packages = {path.relative_to(root).parts[0] for path in logging_modules}
    assert packages & {"events", "features", "nodes", "runtime", "server"} == {*output.OURS}
