"""Log lines to stderr: a slow reader delays nothing; dropped lines are counted and reported."""

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from server.observability import output
from server.observability.output import LAST_LINES, log_to_descriptor

LIMIT_S = 20.0
FORM = logging.Formatter()


def log(handler: logging.Handler, message: str) -> None:
    handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, message, (), None))


def notice(dropped: int) -> str:
    return f"{dropped} log lines were dropped: stderr is read too slowly"


@contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """Yield both ends of a pipe of 4 KiB; at the end, wait for its writers."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield reading, writing
    finally:
        with suppress(OSError):
            os.close(reading)  # which ends the writers
        join_writers()
        os.close(writing)


def join_writers() -> None:
    """Wait until the last lines of handlers are written."""
    for thread in threading.enumerate():
        if thread.name == LAST_LINES:
            thread.join(LIMIT_S)


def log_numbers(handler: logging.Handler, count: int) -> None:
    for number in range(count):
        log(handler, f"{number:04} {'x' * 94}")


def lines_of(reading: int, last: str) -> list[str]:
    """Read up to a line."""
    received = b""
    while not received.endswith(f"{last}\n".encode()):
        piece = os.read(reading, 2**16)
        assert piece, received
        received += piece
    return received.decode().splitlines()


def parse(lines: list[str]) -> tuple[list[int], int]:
    """Return the numbers of the lines, and how many others were reported as dropped."""
    notices = [re.match(r"(\d+) log lines were dropped", line) for line in lines]
    numbers = [int(line[:4]) for line, found in zip(lines, notices, strict=True) if found is None]
    return numbers, sum(int(found[1]) for found in notices if found is not None)


def test_lines_are_written_in_order(tmp_path: Path) -> None:
    expected = [f"{number} {'x' * (number % 9000)}" for number in range(500)]
    with (tmp_path / "log").open("wb") as file, log_to_descriptor(file.fileno(), FORM) as handler:
        for line in expected:
            log(handler, line)
    assert (tmp_path / "log").read_text().splitlines() == expected


def test_slow_reader_loses_lines_and_is_told_how_many() -> None:
    with small_pipe() as (reading, writing), log_to_descriptor(writing, FORM, max_lines=200) as handler:
        log_numbers(handler, 1000)
        received, numbers, dropped = b"", list[int](), 0
        while len(numbers) + dropped + handler.dropped < 1000:
            received += os.read(reading, 2**16)
            numbers, dropped = parse(received.decode().rpartition("\n")[0].splitlines())
        assert numbers == sorted(set(numbers))
        assert len(numbers) < 500
        lost = handler.dropped
        log(handler, "after")
        assert lines_of(reading, "after") == [*([notice(lost)] if lost else []), "after"]


def test_end_writes_queued_lines_and_the_dropped_count() -> None:
    read = list[list[str]]()
    with small_pipe() as (reading, writing):
        reader = threading.Thread(target=lambda: read.append(lines_of(reading, "the end")))
        with log_to_descriptor(writing, FORM, max_lines=90) as handler:
            log_numbers(handler, 300)
            reader.start()
        join_writers()
        os.write(writing, b"the end\n")
        reader.join(LIMIT_S)
    numbers, dropped = parse(read[0][:-1])
    assert (len(numbers) + dropped, numbers) == (300, sorted(set(numbers)))


def test_end_does_not_wait_for_a_reader_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "FLUSH_S", 0.1)
    with small_pipe() as (_, writing):
        with log_to_descriptor(writing, FORM) as handler:
            for _ in range(1000):
                log(handler, "x" * 99)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < LIMIT_S
        log(handler, "too late")


def test_closed_pipe_is_no_error() -> None:
    with small_pipe() as (reading, writing), log_to_descriptor(writing, FORM) as handler:
        os.close(reading)
        for _ in range(100):
            log(handler, "nobody reads this")


def test_non_blocking_pipe_loses_nothing() -> None:
    with small_pipe() as (reading, writing), log_to_descriptor(writing, FORM) as handler:
        os.set_blocking(writing, False)
        log_numbers(handler, 200)
        assert parse(lines_of(reading, f"0199 {'x' * 94}")) == (list(range(200)), 0)


def test_record_that_cannot_be_formatted_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with small_pipe() as (reading, writing), log_to_descriptor(writing, FORM) as handler:
        handler.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "%d", ("no number",), None))
        log(handler, "next")
        assert lines_of(reading, "next") == ["next"]
    assert "no number" in capsys.readouterr().err
