"""Log output: the request of a record, its format (text or JSON), and the queue to stderr.

A record is one line in both formats, without tokens and of limited length; no library guarantees that, so the
formatters are the server's own. A queue and a thread write the records, so a slow reader of stderr delays
nothing: lines beyond the queue's limit are dropped, and a later line reports their number.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from logging import Formatter, LogRecord
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from threading import Thread
from uuid import uuid4

from aiohttp import web
from multidict import istr

from events.clock import format_timestamp
from server.config import Config

REQUEST_ID = istr("X-Request-Id")
"""The header field in which a client may name its request, and in which every answer names it."""

MAX_TEXT_CHARACTERS = 8192
"""Characters of a message, a value or a traceback: log collectors split or reject longer lines."""

MAX_LINES = 10_000
"""Queued lines, some megabytes: only a fault logs as many before a reader has its turn."""

FLUSH_S = 2.0
"""How long the end of the server waits for the last lines to be written."""

STDERR = 2
OURS = ("events", "features", "nodes", "runtime", "server")
"""The packages whose log level is set; other packages log warnings."""

SILENT = ("aiohttp.server", "opentelemetry.trace")
"""Loggers of malformed requests, which anybody can send; handlers' errors have their own lines."""

HIDDEN = "[token]"
LAST_LINES = "last log lines"
"""The name of the thread that waits, without a limit, until the last lines are written."""

_VALID_ID = re.compile(r"[!-~]{1,128}")
_TOKEN = re.compile(  # each try ends where the next one may begin: the time is linear in the text's length
    r"(?:(?<![\w.-])|(?<=%[0-9a-f]{2})|(?<=\\[nrt]))ey[\w-]{8,}\.[\w-]+\.[\w-]*"
    r"|\b(?:bearer|basic)(?:[ \t]|%20|\+)+[\w.~+/=-]{8,}",
    re.ASCII | re.IGNORECASE,
)
_UNQUOTED = re.compile(r"[^\s\"'=\\]+")
_MARGIN = "\n    | "
"""Prefix of a traceback's lines, so that none can be taken for a record."""


@dataclass(slots=True)
class RequestContext:
    """The request that log records and commands belong to.

    Attributes:
        request_id: the client's, or else the server's.
        trace_id: in hexadecimal digits; None if traces are not exported.
        carrier: the header fields that link spans to the request's span.
        job_id: the job that answers the request.
        position: the head of the ledger after the request's command was recorded.
    """

    request_id: str
    trace_id: str | None = None
    carrier: dict[str, str] = field(default_factory=dict)
    job_id: str | None = None
    position: int | None = None


REQUEST_NAME: web.RequestKey[str] = web.RequestKey("request_name", str)
"""The id of a request that got one before its context begins."""

CONTEXT: ContextVar[RequestContext | None] = ContextVar("request", default=None)
"""The request that the running task serves; None outside of requests."""


def begin_context(request: web.BaseRequest) -> RequestContext:
    """Return the context of a request; the log records of the running task have its id from here on."""
    context = CONTEXT.get()
    if context is None:
        given = request.get(REQUEST_NAME) or valid_request_id(request.headers.getall(REQUEST_ID, ()))
        context = RequestContext(given or uuid4().hex)
        CONTEXT.set(context)
    return context


_PREFIX, _NUMBERS = uuid4().hex[:16], count(1)


def choose_request_id(request: web.BaseRequest) -> str:
    """Return an id for a request: that of its context, the client's, or a new one; begins no context.

    A context takes 15 µs. A new id is random for each process, and then counts.
    """
    context = CONTEXT.get()
    if context is not None:
        return context.request_id
    given = valid_request_id(request.headers.getall(REQUEST_ID, ()))
    return f"{_PREFIX}{next(_NUMBERS):016x}" if given is None else given


def valid_request_id(values: Sequence[str]) -> str | None:
    return values[0] if len(values) == 1 and _VALID_ID.fullmatch(values[0]) else None


def make_extra(**fields: object) -> dict[str, dict[str, object]]:
    """Return the `extra` of a log record with these fields, without those that are None."""
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """A JSON object: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, in ASCII, so that no reader takes a character for the line's end."""
        line = {
            "time": _format_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _redact(record.getMessage()),
            **{name: _json_value(value) for name, value in _fields(record).items()},
        }
        if traceback := _format_traceback(self, record):
            line["exception"] = traceback
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level and message, then the fields as `name=value`; a traceback below, with a margin."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with unprintable characters escaped."""
        head = f"{_format_time(record)} {record.levelname:<8} {_escape(_redact(record.getMessage()))}"
        fields = (f" {name}={_quote(_json_value(value))}" for name, value in _fields(record).items())
        lines = [_escape(line) for line in _format_traceback(self, record).split("\n")]
        traceback = _MARGIN.join(["", *lines]) if record.exc_info or record.exc_text else ""
        return f"{head}{''.join(fields)}{traceback}"


FORMATTERS: Mapping[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


class DroppingHandler(QueueHandler):
    """Queues formatted lines, and never waits; `dropped` counts the lines beyond `max_lines`.

    The queue is a `SimpleQueue` whose size is compared here: with a full `queue.Queue`, `QueueListener.stop`
    could not add the sentinel that ends its thread.
    """

    def __init__(
        self, lines: SimpleQueue[LogRecord], formatter: Formatter, max_lines: int = MAX_LINES
    ) -> None:
        super().__init__(lines)
        self.setFormatter(formatter)
        self.dropped = 0
        self._lines = lines
        self._max_lines = max_lines

    def enqueue(self, record: LogRecord) -> None:
        if self._lines.qsize() >= self._max_lines:
            self.dropped += 1
            return
        self.report_dropped()
        self._lines.put(record)

    def report_dropped(self) -> None:
        if self.dropped:
            text = f"{self.dropped} log lines were dropped: stderr is read too slowly"
            self.dropped = 0
            record = LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
            self._lines.put(Context().run(self.prepare, record))  # outside of any request's context


class DescriptorListener(QueueListener):
    """Writes queued lines to a file descriptor, in a thread that may wait for their reader forever.

    It writes without a handler, for whose lock the end of the process would wait.
    """

    def __init__(self, lines: SimpleQueue[LogRecord], descriptor: int) -> None:
        super().__init__(lines)
        self._descriptor = descriptor

    def handle(self, record: LogRecord) -> None:
        line = f"{record.msg}\n".encode("utf-8", "backslashreplace")
        with suppress(OSError):  # without a reader or disk space there is nowhere to report it
            while line:
                select.select([], [self._descriptor], [])  # another process may have made it non-blocking
                line = line[os.write(self._descriptor, line) :]


@contextmanager
def log_to_descriptor(
    descriptor: int, formatter: Formatter, max_lines: int = MAX_LINES
) -> Iterator[DroppingHandler]:
    """Yield a handler whose lines go to a file descriptor; on leaving, wait `FLUSH_S` for the last ones."""
    lines = SimpleQueue[LogRecord]()
    handler, listener = DroppingHandler(lines, formatter, max_lines), DescriptorListener(lines, descriptor)
    listener.start()
    try:
        yield handler
    finally:
        handler.report_dropped()
        stopping = Thread(target=listener.stop, name=LAST_LINES, daemon=True)
        stopping.start()
        stopping.join(FLUSH_S)


@contextmanager
def log_to_stderr(config: Config) -> Iterator[None]:
    for name in OURS:
        logging.getLogger(name).setLevel(config.log_level.upper())
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root = logging.getLogger()
    with log_to_descriptor(STDERR, FORMATTERS[config.log_format]()) as handler:
        handler.setLevel(config.log_level.upper())
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


def _format_time(record: logging.LogRecord) -> str:
    return format_timestamp(datetime.fromtimestamp(record.created, UTC))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the record's own fields, after those of its request."""
    context, fields = CONTEXT.get(), getattr(record, "fields", {})
    if context is None:
        return dict(fields)
    return {**make_extra(request_id=context.request_id, trace_id=context.trace_id)["fields"], **fields}


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _redact(str(value))


def _format_traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = formatter.formatException(record.exc_info)
    return _redact(record.exc_text or "")


def _redact(text: str) -> str:
    """Return a text without tokens; a long text is cut in its middle, since a traceback's end says most."""
    text = _TOKEN.sub(HIDDEN, text)  # before the cut: half a token is not recognised
    half = MAX_TEXT_CHARACTERS // 2
    return text if len(text) <= MAX_TEXT_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _UNQUOTED.fullmatch(text) and text.isprintable() else json.dumps(text)


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
