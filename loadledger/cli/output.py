"""Output for people: tables, values with units, notes on stderr, exit codes."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pkgutil import resolve_name
from typing import Any, NoReturn

import click

COLOURS = {
    "loaded": "green",
    "serving": "green",
    "joined": "green",
    "draining": "yellow",
    "completed": "green",
    "loading": "yellow",
    "waiting": "yellow",
    "unloading": "yellow",
    "in_progress": "yellow",
    "pending": "yellow",
    "failed": "red",
    "lost": "red",
    "cancelled": "bright_black",
    "unloaded": "bright_black",
    "left": "bright_black",
}
"""Colours of states; `click.echo` omits them unless the output is a terminal."""

NOTHING = "-"
MAX_CELL_CHARACTERS = 100
"""Longest text in a cell; `--json` has all of it."""
MAX_FACT_CHARACTERS = 4096
"""Longest fact about one model or job, such as an error message, which has the same limit at the server."""
MAX_SIZE_BYTES = 2**63
"""Larger sizes are invalid; huge integers cannot even be divided as floats."""
_MB, _GB = 10**6, 10**9
_AGES = (("d", 86400), ("h", 3600), ("m", 60))

NEGATIVE_RESULT = 1
"""Exit code of a negative result: a job failed, a check found a problem."""
NO_RESULT = 2
"""Exit code without a result: a usage error, a refusal, or no answer."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, by the shells' convention: 128 and the signal's number."""
WRITE_ERROR = 1
"""Exit code when the output cannot be written, as of `cat`."""
PIPE_CLOSED = 141
"""Exit code after SIGPIPE by the same convention, such as before `| head`."""
PROBLEMS = (
    "loadledger.errors:ClientProblem",
    "loadledger.profiles:ProfileProblem",
    "events.errors:LedgerProblem",
    "events.errors:ForeignHead",
    "runtime.errors:RuntimeProblem",
    "server.auth.keys:KeyProblem",
    "server.config:ConfigError",
)
"""Exceptions that, like OSError, explain to a person why a command has no result."""


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table, the head first; columns named in `right` are aligned right.

    Cells are made printable, since a server may send control characters even as a state.
    """
    rows = [[to_printable(each) for each in cells] for cells in rows]
    widths = [max(map(display_width, column)) for column in zip(head, *rows, strict=True)]
    for number, cells in enumerate([head, *rows]):
        columns = [
            pad(cell, most, right=name in right) for name, cell, most in zip(head, cells, widths, strict=True)
        ]
        line = "  ".join(columns).rstrip()
        yield click.style(line, bold=True) if number == 0 else _colour_state(line, columns, cells)


def with_column(
    head: Sequence[str], rows: Sequence[Sequence[str]], name: str, values: Sequence[str | None]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return a table's head and rows with a further column, if any row has a value in it."""
    if not any(values):
        return head, rows
    cells = (format_cell(value, most=40) for value in values)
    return (*head, name), [(*row, cell) for row, cell in zip(rows, cells, strict=True)]


def display_width(text: str) -> int:
    """Return a text's width in terminal columns; a letter takes two, one or none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # only for letters beyond ASCII

    return cell_len(text)


def pad(text: str, columns: int, *, right: bool = False) -> str:
    spaces = " " * (columns - display_width(text))
    return spaces + text if right else text + spaces


def _colour_state(line: str, columns: Sequence[str], cells: Sequence[str]) -> str:
    """Colour the first cell that is a state."""
    for index, cell in enumerate(cells):
        if cell in COLOURS:
            start = sum(len(each) + 2 for each in columns[:index])
            return line[:start] + click.style(cell, fg=COLOURS[cell]) + line[start + len(cell) :]
    return line


def format_state(word: str) -> str:
    return click.style(to_printable(word), fg=COLOURS.get(word))


def to_printable(text: str) -> str:
    """Replace control characters, which could move the cursor."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def format_cell(text: object, *, most: int = MAX_CELL_CHARACTERS) -> str:
    """Return a cell's text: one line of bounded length, `-` if empty."""
    if text is None or text == "":
        return NOTHING
    line = to_printable(str(text))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def format_size(size_bytes: int | None) -> str:
    """Return a number of bytes in MB or GB."""
    if size_bytes is None:
        return NOTHING
    if abs(size_bytes) > MAX_SIZE_BYTES:
        return "?"
    return f"{size_bytes / _GB:,.2f} GB" if abs(size_bytes) >= _GB else f"{size_bytes / _MB:,.1f} MB"


def format_timestamp(stamp: str | None) -> str:
    """Return a timestamp to the second."""
    return NOTHING if stamp is None else f"{stamp[:19].replace('T', ' ')}Z"


def parse_timestamp(stamp: str) -> datetime | None:
    """Parse a timestamp; None if it is invalid."""
    try:
        found = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def note_moment(past: Any, at: str) -> datetime:
    """Print the moment to which an answer about the past belongs, and return it."""
    stamp = past.as_of_time if at.isdecimal() else at
    print_note(f"as of {format_timestamp(stamp)}, position {past.as_of}")
    return (stamp and parse_timestamp(stamp)) or datetime.now(UTC)


def format_age(stamp: str | None, now: datetime) -> str:
    """Return the time since a timestamp, in its largest unit."""
    then = None if stamp is None else parse_timestamp(stamp)
    return NOTHING if then is None else format_duration((now - then).total_seconds())


def format_duration(seconds: float) -> str:
    """Return a duration: `0.3s` to `9.9s`, then `10s`, `5m`, `3h` or `2d`."""
    seconds = max(seconds, 0.0)
    for unit, length in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{int(seconds)}s"  # noqa: PLR2004 - as it says above


def format_elapsed(begin: str | None, end: str | None) -> str:
    """Return the time between two timestamps, if both are known."""
    first, last = (None if stamp is None else parse_timestamp(stamp) for stamp in (begin, end))
    return NOTHING if first is None or last is None else format_duration((last - first).total_seconds())


def exit_with_error(text: str) -> NoReturn:
    """Print why the command has no result, and exit."""
    print_note(text)
    sys.exit(NO_RESULT)


def print_note(text: str) -> None:
    """Print a note on stderr, free of control characters."""
    lines = [to_printable(line) for line in f"loadledger: {text}".split("\n")]
    click.echo("\n".join(lines), err=True)


def is_dumb(environment: Mapping[str, str]) -> bool:
    """Whether the terminal cannot move its cursor, such as an editor's."""
    return environment.get("TERM", "") in {"dumb", "unknown"}


class OutputLost(Exception):
    """Nothing can be written to stdout any more: its reader has left, or the disk is full.

    It is no OSError, which would be taken for one of another file.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.error = error


class _Output(io.BufferedWriter):
    """The bytes of stdout, over the library's own file: an interrupt neither loses nor doubles a line."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputLost(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputLost(error) from None


def prepare_output() -> None:
    """Let writes to stdout raise `OutputLost`, and replace letters that its encoding lacks."""
    output = sys.stdout
    if not isinstance(output, io.TextIOWrapper):
        return
    if output is not sys.__stdout__:  # of a test
        output.reconfigure(errors="replace")
        return
    # Lines at once also for PYTHONUNBUFFERED, with which the rest of a partial write would be lost.
    by_lines = output.line_buffering or output.write_through
    file = _Output(io.FileIO(output.fileno(), "w", closefd=False))
    sys.stdout = io.TextIOWrapper(file, output.encoding, "replace", line_buffering=by_lines)


def drop_output() -> None:
    """Let what is still to be written to stdout go nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def end_without_output(error: OSError) -> NoReturn:
    """End a command whose output is lost as `cat` ends: silently if its reader has left, else with a line."""
    drop_output()
    if isinstance(error, BrokenPipeError):
        sys.exit(PIPE_CLOSED)
    print_note(f"write error: {error.strerror}")
    sys.exit(WRITE_ERROR)


@contextmanager
def report_problems() -> Iterator[None]:
    """End a command quietly after Ctrl-C, as `cat` without its output, and with the text of a problem."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)
    except OutputLost as lost:
        end_without_output(lost.error)
    except Exception as error:
        # A module that is not imported has raised no exception, and importing it takes long.
        known = [resolve_name(place) for place in PROBLEMS if place.partition(":")[0] in sys.modules]
        if not isinstance(error, (OSError, *known)):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror is not None:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            cure = ": stop what uses it, or choose another --port (LOADLEDGER_PORT)"
            text += cure if error.errno == errno.EADDRINUSE else ""
        exit_with_error(text)


@contextmanager
def cleaned_up_after_signals() -> Iterator[None]:
    """End as after an exception when a signal arrives, without interrupting the clean-up."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [each for each in ending if signal.getsignal(each) is not signal.SIG_IGN]  # as under nohup

    def end(number: int, _frame: object) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def print_json(value: Any) -> None:
    """Print a value as indented JSON; control characters are escaped."""
    import json  # here, since main.py imports this module, and json takes milliseconds

    import msgspec

    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        text = json.dumps(msgspec.to_builtins(value), indent=2)
    plain = (each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)
    click.echo(text if text.isascii() else "".join(plain))


def print_result(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo("\n".join(lines))


def format_facts(facts: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each fact that is not None, with the values in one column."""
    column = max(map(len, facts)) + 1
    for name, value in facts.items():
        if value is not None:
            yield f"  {name + ':':<{column}} {format_cell(value, most=MAX_FACT_CHARACTERS)}"


def format_parameters(parameters: Mapping[str, object]) -> str:
    values = {name: " ".join(each) if isinstance(each, list) else each for name, each in parameters.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun, whose plural ends in s or ies."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def with_names(text: str, names: Sequence[str]) -> str:
    return f"{text} by {', '.join(names)}" if names else text


def retry_message(problem: Exception) -> str:
    return f"{problem}; retrying until it is back"


def note_retry(problem: Exception) -> None:
    print_note(retry_message(problem))
