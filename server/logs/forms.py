"""How a log line is written: as text for people, or as JSON for machines. One line is one line in both.

No library: `json.dumps` is all that JSON lines need, and the promises here (one line whatever is in it, no
tokens, bounded) would have to be made on top of any.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from events.clock import stamp
from server.logs.context import CONTEXT

MAX_TEXT_CHARACTERS = 8192
"""Of a message, a value or a traceback: a line is never long enough to be in anybody's way."""

HIDDEN = "[token]"

_TOKEN = re.compile(  # each try ends where the next one may begin: no text takes longer than its length
    r"(?:(?<![\w.-])|(?<=%[0-9a-f]{2})|(?<=\\[nrt]))ey[\w-]{8,}\.[\w-]+\.[\w-]*"
    r"|\b(?:bearer|basic)(?:[ \t]|%20|\+)+[\w.~+/=-]{8,}",
    re.ASCII | re.IGNORECASE,
)
_PLAIN = re.compile(r"[^\s\"'=\\]+")
_MARGIN = "\n    | "
"""Before each line of a traceback, so that none can pass for a line of its own."""


def fields(**named: object) -> dict[str, dict[str, object]]:
    """Return the fields of a line, for `extra`; those that are None are left out."""
    return {"fields": {name: value for name, value in named.items() if value is not None}}


class JsonForm(logging.Formatter):
    """A JSON object: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, in ASCII, so that nothing in it ends it for any reader."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _bounded(record.getMessage()),
            **{name: _value(value) for name, value in _fields(record).items()},
        }
        if told := _traceback(self, record):
            line["exception"] = told
        return json.dumps(line)


class TextForm(logging.Formatter):
    """Time, level and message, then the fields as `name=value`; a traceback below, with a margin."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what is not printable in it is escaped."""
        head = f"{_time(record)} {record.levelname:<8} {_printable(_bounded(record.getMessage()))}"
        named = (f" {name}={_quoted(_value(value))}" for name, value in _fields(record).items())
        lines = (_printable(line) for line in _traceback(self, record).split("\n"))
        told = _MARGIN.join(["", *lines]) if record.exc_info or record.exc_text else ""
        return f"{head}{''.join(named)}{told}"


FORMS: Mapping[str, type[logging.Formatter]] = {"text": TextForm, "json": JsonForm}


def _time(record: logging.LogRecord) -> str:
    return stamp(datetime.fromtimestamp(record.created, UTC))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the record's own fields, and those of the request that it was written for."""
    context, named = CONTEXT.get(), getattr(record, "fields", {})
    if context is None:
        return dict(named)
    return {**fields(request_id=context.request_id, trace_id=context.trace_id)["fields"], **named}


def _value(value: object) -> object:
    """Return a value that JSON has."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return _bounded(str(value))


def _traceback(form: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = form.formatException(record.exc_info)
    return _bounded(record.exc_text or "")


def _bounded(text: str) -> str:
    """Return a text without tokens, cut where it is too long: the end of it says more of a traceback."""
    text = _TOKEN.sub(HIDDEN, text)  # first: half a token is not known for one
    half = MAX_TEXT_CHARACTERS // 2
    return text if len(text) <= MAX_TEXT_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _quoted(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
