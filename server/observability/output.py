"""The server's log: lines are queued, and one thread writes them to stderr, so that nobody else waits.

Who reads stderr may be slow, or have stopped: a terminal that is held, a full pipe. Then lines are dropped,
counted, and that is said as soon as there is room again.

How a log line is written: as text for people, or as JSON for machines. One line is one line in both.

No library: `json.dumps` is all that JSON lines need, and the promises here (one line whatever is in it, no
tokens, bounded) would have to be made on top of any.

What the log lines of a request say beside their message: its id, its trace, and the job that it made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging import Formatter, LogRecord
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from threading import Thread
from uuid import uuid4

from aiohttp import web
from multidict import istr

from events.clock import format_timestamp
from events.commands import Command
from events.log import Log, Receipt
from server.config import Config

REQUEST_ID = istr("X-Request-Id")
"""The field in which a client may name its request, and is told the name."""

MAX_JOBS = 10_000
"""Unfinished jobs that are remembered with the request behind them; the earliest are forgotten first."""

_SANE = re.compile(r"[!-~]{1,128}")


@dataclass(slots=True)
class RequestContext:
    """One request.

    Attributes:
        request_id: its name, which its client chose, or we did.
        trace_id: of its trace, in hexadecimal digits; None where traces are not exported.
        carrier: the header fields that make what it causes a part of its span.
        job_id: the job that it made, or that stood for what it asked for.
        position: the head of the ledger after that was recorded.
    """

    request_id: str
    trace_id: str | None = None
    carrier: dict[str, str] = field(default_factory=dict)
    job_id: str | None = None
    position: int | None = None


CONTEXT: ContextVar[RequestContext | None] = ContextVar("request", default=None)
"""The request on whose behalf something happens; None where nobody asked."""


class RequestLog:
    """Submits the commands of requests to the event log, and remembers the request behind each unended job.

    Args:
        log: the event log.
        started_at: the position of this server's `ServerStarted`.

    Attributes:
        behind: the first request behind each job; the event log lines remove it when the job has ended.
    """

    def __init__(self, log: Log, started_at: int) -> None:
        self._log = log
        self.started_at = started_at
        self.behind: OrderedDict[str, RequestContext] = OrderedDict()

    async def submit(self, command: Command) -> Receipt:
        """Submit a command, and note its job and position in the context of the request.

        Raises:
            LedgerProblem: as `Log.submit`.
        """
        receipt = await self._log.submit(command)
        context = CONTEXT.get()
        if context is not None and receipt.job_id is not None:
            context.job_id, context.position = receipt.job_id, receipt.position
            if receipt.job_id in self._log.state.jobs:
                self.behind.setdefault(receipt.job_id, context)
            if len(self.behind) > MAX_JOBS:
                self.behind.popitem(last=False)
        return receipt


def begin_context(request: web.BaseRequest) -> RequestContext:
    """Have what is logged from here on, in this task, name the request, and return its context."""
    context = CONTEXT.get()
    if context is None:
        context = RequestContext(sane_id(request.headers.getall(REQUEST_ID, ())) or uuid4().hex)
        CONTEXT.set(context)
    return context


def sane_id(given: Sequence[str]) -> str | None:
    """Return the name that a client gave its request, if it is one, short and printable."""
    return given[0] if len(given) == 1 and _SANE.fullmatch(given[0]) else None


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
    return format_timestamp(datetime.fromtimestamp(record.created, UTC))


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


STDERR = 2
OURS = ("events", "runtime", "server")
"""The packages whose levels are set; of others, warnings are told."""

SILENT = ("aiohttp.server", "opentelemetry.trace")
"""They log what is malformed in a request, and anybody may send that; what goes wrong in our handlers is
logged where it is answered."""

MAX_LINES = 10_000
"""More than anything but a fault writes before a reader has its turn; some megabytes."""

FLUSH_S = 2.0
"""How long the end of the server waits for who reads its last lines."""

LAST_LINES = "last log lines"
"""The name of the thread that waits for them without a limit."""


class DroppingHandler(QueueHandler):
    """Queues lines as they are to be written; never waits.

    Args:
        lines: where to.
        form: how a line is written.
        max_lines: beyond this many, lines are dropped.

    Attributes:
        dropped: how many were, since the last line about that.
    """

    def __init__(self, lines: SimpleQueue[LogRecord], form: Formatter, max_lines: int = MAX_LINES) -> None:
        super().__init__(lines)
        self.setFormatter(form)
        self.dropped = 0
        self._lines = lines
        self._max_lines = max_lines

    def enqueue(self, record: LogRecord) -> None:
        """Queue a line, or drop it where there is no room."""
        if self._lines.qsize() >= self._max_lines:
            self.dropped += 1
            return
        self.report_dropped()
        self._lines.put(record)

    def report_dropped(self) -> None:
        """Queue a line that says how many were dropped, if any were."""
        if self.dropped:
            told = f"{self.dropped} log lines were dropped: who reads them is too slow"
            self.dropped = 0
            record = LogRecord(__name__, logging.WARNING, __file__, 0, told, None, None)
            self._lines.put(Context().run(self.prepare, record))  # it is about no request


class DescriptorListener(QueueListener):
    """Writes queued lines to a file descriptor, in a thread that may wait for their reader for ever.

    It does so without a handler: the end of the process would wait for that one's lock.
    """

    def __init__(self, lines: SimpleQueue[LogRecord], descriptor: int) -> None:
        super().__init__(lines)
        self._descriptor = descriptor

    def handle(self, record: LogRecord) -> None:
        """Write a line, and wait for its reader."""
        line = f"{record.msg}\n".encode("utf-8", "backslashreplace")
        with suppress(OSError):  # nobody reads any more, or the disk is full: there is nobody to be told
            while line:
                select.select([], [self._descriptor], [])  # others who share it may have made it non-blocking
                line = line[os.write(self._descriptor, line) :]


@contextmanager
def logging_to(descriptor: int, form: Formatter, max_lines: int = MAX_LINES) -> Iterator[DroppingHandler]:
    """Give a handler whose lines are written to a file descriptor, the last of them within `FLUSH_S`."""
    lines = SimpleQueue[LogRecord]()
    handler, listener = DroppingHandler(lines, form, max_lines), DescriptorListener(lines, descriptor)
    listener.start()
    try:
        yield handler
    finally:
        handler.report_dropped()
        stopping = Thread(target=listener.stop, name=LAST_LINES, daemon=True)
        stopping.start()
        stopping.join(FLUSH_S)


@contextmanager
def logging_to_stderr(config: Config) -> Iterator[None]:
    """Write log lines to stderr as configured."""
    for name in OURS:
        logging.getLogger(name).setLevel(config.log_level.upper())
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root = logging.getLogger()
    with logging_to(STDERR, FORMS[config.log_format]()) as handler:
        handler.setLevel(config.log_level.upper())
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
