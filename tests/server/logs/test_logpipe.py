"""Lines on their way to stderr: nobody waits for who reads them, and what is dropped is counted and said."""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from server.logs import pipe as logpipe
from server.logs.pipe import LinePipe

LIMIT_S = 20.0


def dropped(count: int) -> str:
    return f"{count} dropped"


def tell(pipe: LinePipe, message: str) -> None:
    pipe.handle(logging.LogRecord("x", logging.INFO, __file__, 1, message, (), None))


@contextmanager
def piped(max_bytes: int = 2**20) -> Iterator[tuple[int, LinePipe]]:
    """Give a pipe's end to read from, and what writes to it."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    pipe = LinePipe(writing, dropped, max_bytes)
    try:
        yield reading, pipe
    finally:
        for descriptor in (reading, writing):
            with suppress(OSError):
                os.close(descriptor)


def lines_of(reading: int, last: str) -> list[str]:
    """Read until a line has come."""
    received = b""
    while not received.endswith(f"{last}\n".encode()):
        piece = os.read(reading, 2**16)
        assert piece, received
        received += piece
    return received.decode().splitlines()


def test_lines_come_in_their_order_and_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        pipe = LinePipe(file.fileno(), dropped)
        expected = [f"{number} {'x' * (number % 9000)}" for number in range(500)]
        for line in expected:
            tell(pipe, line)
        pipe.close()
    assert (tmp_path / "log").read_text().splitlines() == expected


def told(received: bytes) -> tuple[list[int], int]:
    """Return the numbers of whole lines, and how many others are said to have been dropped."""
    lines = received.decode().rpartition("\n")[0].splitlines()
    notices = [int(line.split()[0]) for line in lines if line.endswith(" dropped")]
    return [int(line[:4]) for line in lines if not line.endswith(" dropped")], sum(notices)


def test_who_does_not_read_holds_nobody_up_and_is_told_what_was_dropped() -> None:
    with piped(max_bytes=20_000) as (reading, pipe):
        for number in range(1000):
            tell(pipe, f"{number:04} {'x' * 94}")
        received, (numbers, said) = b"", told(b"")
        while len(numbers) + said + pipe.dropped < 1000:
            received += os.read(reading, 2**16)
            numbers, said = told(received)
        assert numbers == sorted(set(numbers))
        assert len(numbers) < 500
        lost = pipe.dropped
        tell(pipe, "after")
        assert lines_of(reading, "after") == [*([f"{lost} dropped"] if lost else []), "after"]
        pipe.close()


def test_at_the_end_what_is_queued_is_written_and_what_was_dropped_is_said() -> None:
    with piped(max_bytes=9000) as (reading, pipe):
        for number in range(300):
            tell(pipe, f"{number:04} {'x' * 94}")
        last = f"{pipe.dropped} dropped" if pipe.dropped else f"0299 {'x' * 94}"
        read = list[list[str]]()
        reader = threading.Thread(target=lambda: read.append(lines_of(reading, last)))
        reader.start()
        pipe.close()
        reader.join(LIMIT_S)
        numbers, said = told("\n".join([*read[0], ""]).encode())
        assert (len(numbers) + said, numbers) == (300, sorted(set(numbers)))


def test_the_end_does_not_wait_for_ever_for_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logpipe, "FLUSH_S", 0.1)
    with piped() as (_, pipe):
        for _ in range(1000):
            tell(pipe, "x" * 99)
        began_s = time.monotonic()
        pipe.close()
        assert time.monotonic() - began_s < LIMIT_S
        tell(pipe, "too late")  # and harms nobody


def test_a_reader_that_has_gone_is_no_error() -> None:
    with piped() as (reading, pipe):
        os.close(reading)
        for _ in range(100):
            tell(pipe, "nobody reads this")
        pipe.close()


def test_a_pipe_that_others_made_non_blocking_loses_nothing() -> None:
    with piped() as (reading, pipe):
        os.set_blocking(pipe._descriptor, False)
        for number in range(200):
            tell(pipe, f"{number:03} {'x' * 95}")
        assert [line[:3] for line in lines_of(reading, f"199 {'x' * 95}")] == [f"{n:03}" for n in range(200)]
        pipe.close()


def test_a_line_that_cannot_be_made_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with piped() as (reading, pipe):
        pipe.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "%d", ("no number",), None))
        tell(pipe, "next")
        assert lines_of(reading, "next") == ["next"]
        pipe.close()
    assert "no number" in capsys.readouterr().err
