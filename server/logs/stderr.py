"""The server's log: lines are queued, and one thread writes them to stderr, so that nobody else waits.

Who reads stderr may be slow, or have stopped: a terminal that is held, a full pipe. Then lines are dropped,
counted, and that is said as soon as there is room again.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from logging import Formatter, LogRecord
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from threading import Thread

from server.config import Config
from server.logs.forms import FORMS

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
