"""Log lines on their way to stderr: a bounded queue, and one thread that writes, so that nobody else waits.

Who reads stderr may be slow, or have stopped: a terminal that is held, a full pipe. Then lines are dropped,
counted, and that is said as soon as there is room again. The standard library's `QueueListener` has neither a
bound in bytes nor an end in time: its `stop` waits for the writer, which may wait for ever.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

MAX_QUEUED_BYTES = 4 * 2**20
"""Some ten thousand lines: more than anything but a fault writes before a reader has its turn."""

FLUSH_S = 2.0
"""How long the end of the server waits for who reads its last lines."""

WRITE_BYTES = select.PIPE_BUF
"""So much goes into a pipe without blocking when the kernel says that it takes something (pipe(7))."""


class LinePipe(logging.Handler):
    """A handler whose lines a thread writes to a file descriptor.

    Args:
        descriptor: where to; it is not closed.
        notice: makes a line that says how many were dropped.
    """

    def __init__(
        self, descriptor: int, notice: Callable[[int], str], max_bytes: int = MAX_QUEUED_BYTES
    ) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._notice = notice
        self._max_bytes = max_bytes
        self._lines = deque[bytes]()
        self._queued_bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._closing = False
        self._until = float("inf")
        self._thread = threading.Thread(target=self._write_lines, name="log lines", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines were dropped since the last that was said of it."""
        return self._dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line, or drop it where there is no room; never waits."""
        try:
            line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        except Exception:  # noqa: BLE001 - as handlers do: a line that cannot be made must not fail its caller
            self.handleError(record)
            return
        with self._changed:
            self._queue(line)

    def close(self) -> None:
        """Write what is queued, within `FLUSH_S`, and end the thread."""
        with self._changed:
            self._closing, self._until = True, time.monotonic() + FLUSH_S
            self._changed.notify()
        self._thread.join(FLUSH_S + 1)
        super().close()

    def _queue(self, line: bytes) -> None:
        if self._closing or self._queued_bytes + len(line) > self._max_bytes:
            self._dropped += 1
            return
        if self._dropped:
            told = f"{self._notice(self._dropped)}\n".encode()
            self._dropped = 0
            self._append(told)
        self._append(line)
        self._changed.notify()

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._queued_bytes += len(line)

    def _write_lines(self) -> None:
        while (line := self._next()) is not None:
            for start in range(0, len(line), WRITE_BYTES):
                if not self._write(line[start : start + WRITE_BYTES]):
                    return

    def _next(self) -> bytes | None:
        """Wait for lines, and return as many as are written at once; None at the end."""
        with self._changed:
            while not self._lines:
                if self._closing:
                    return self._last_words()
                self._changed.wait()
            taken = self._lines.popleft()
            while self._lines and len(taken) + len(self._lines[0]) <= WRITE_BYTES:
                taken += self._lines.popleft()
            self._queued_bytes -= len(taken)
            return taken

    def _last_words(self) -> bytes | None:
        dropped, self._dropped = self._dropped, 0
        return f"{self._notice(dropped)}\n".encode() if dropped else None

    def _write(self, part: bytes) -> bool:
        """Write when it can be done without waiting for ever; False when nothing more can be written."""
        while part:
            if not self._is_writable():
                return False
            try:
                with suppress(BlockingIOError):  # somebody has made it so, for whoever shares it
                    part = part[os.write(self._descriptor, part) :]
            except OSError:  # nobody reads any more, or the disk is full: there is nobody to be told
                return not self._closing
        return True

    def _is_writable(self) -> bool:
        """Wait until the kernel takes something; False when time is up."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while not poll.poll(100):
            if time.monotonic() > self._until:
                return False
        return True
