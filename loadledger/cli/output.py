"""Output for people: tables, values with units, notes on stderr, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NoReturn

import click

COLOURS = {
    "loaded": "green",
    "serving": "green",
    "draining": "yellow",
    "completed": "green",
    "loading": "yellow",
    "unloading": "yellow",
    "in_progress": "yellow",
    "pending": "yellow",
    "failed": "red",
    "lost": "red",
    "cancelled": "bright_black",
    "unloaded": "bright_black",
}
"""Of states of models and of jobs. `click.echo` leaves colours out where no terminal shows them."""

NOTHING = "-"
MAX_CELL_CHARACTERS = 100
"""Of a text that others wrote; `--json` has all of it."""
MAX_BYTES = 2**63
"""More is no size of anything, and from some number on it is none that can be divided."""
_MB, _GB = 10**6, 10**9
_AGES = (("d", 86400), ("h", 3600), ("m", 60))


FAILED = 1
"""What was asked for was done, and did not come out well: a job failed, a check found something."""
COULD_NOT = 2
"""It could not be done: it was typed wrongly, refused, or nobody answered."""
INTERRUPTED = 130
"""What shells say of a command that Ctrl-C ended: 128 and the signal's number."""
UNREAD = 141
"""What they say of one whose reader went away, as `| head` does: it is no answer of the command's."""


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table, the head first; columns named in `right` hold numbers.

    No cell moves a terminal's cursor, whichever a server has sent: a state, too, is what it says it is.
    """
    rows = [[in_one_line(each) for each in cells] for cells in rows]
    widths = [max(map(width, column)) for column in zip(head, *rows, strict=True)]
    for number, cells in enumerate([head, *rows]):
        columns = [
            padded(cell, most, right=name in right)
            for name, cell, most in zip(head, cells, widths, strict=True)
        ]
        line = "  ".join(columns).rstrip()
        yield click.style(line, bold=True) if number == 0 else _coloured(line, columns, cells)


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: of one letter that is two, one or none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - only who is shown other letters pays for it

    return cell_len(text)


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """Return a text with the spaces that it takes to fill so many columns of a terminal."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces


def _coloured(line: str, columns: Sequence[str], cells: Sequence[str]) -> str:
    """Colour the first cell that is a state; the widths were counted without."""
    for index, cell in enumerate(cells):
        if cell in COLOURS:
            start = sum(len(each) + 2 for each in columns[:index])
            return line[:start] + click.style(cell, fg=COLOURS[cell]) + line[start + len(cell) :]
    return line


def state(word: str) -> str:
    """Return a state with its colour."""
    return click.style(in_one_line(word), fg=COLOURS.get(word))


def in_one_line(text: str) -> str:
    """Return a text in which nothing moves a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def cell(text: object, *, most: int = MAX_CELL_CHARACTERS) -> str:
    """Return what stands in a cell: one line, of bounded length, and never nothing."""
    if text is None or text == "":
        return NOTHING
    line = in_one_line(str(text))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def size(size_bytes: int | None) -> str:
    """Return a number of bytes as people say it."""
    if size_bytes is None:
        return NOTHING
    if abs(size_bytes) > MAX_BYTES:
        return "?"
    return f"{size_bytes / _GB:,.2f} GB" if abs(size_bytes) >= _GB else f"{size_bytes / _MB:,.1f} MB"


def second(stamp: str | None) -> str:
    """Return a time of the ledger to the second."""
    return NOTHING if stamp is None else f"{stamp[:19].replace('T', ' ')}Z"


def moment(stamp: str) -> datetime | None:
    """Return a time of the ledger; None if it is none."""
    try:
        found = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def age(stamp: str | None, now: datetime) -> str:
    """Return how long ago a time was, in its largest unit."""
    then = None if stamp is None else moment(stamp)
    return NOTHING if then is None else duration((now - then).total_seconds())


def duration(seconds: float) -> str:
    """Return a length of time: `0.3s` to `9.9s`, then `10s`, `5m`, `3h` or `2d`."""
    seconds = max(seconds, 0.0)
    for unit, length in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{int(seconds)}s"  # noqa: PLR2004 - as it says above


def took(begin: str | None, end: str | None) -> str:
    """Return the time between two, if both are known."""
    first, last = (None if stamp is None else moment(stamp) for stamp in (begin, end))
    return NOTHING if first is None or last is None else duration((last - first).total_seconds())


def give_up(text: str) -> NoReturn:
    """Tell why it could not be done, and end."""
    note(text)
    sys.exit(COULD_NOT)


def note(text: str) -> None:
    """Tell something beside the answer; each of its lines is one, whatever stands in it."""
    lines = [in_one_line(line) for line in f"loadledger: {text}".split("\n")]
    click.echo("\n".join(lines), err=True)


def is_dumb(environment: Mapping[str, str]) -> bool:
    """Whether the terminal is one that only prints, as that of an editor."""
    return environment.get("TERM", "") in {"dumb", "unknown"}


@contextmanager
def ends_told() -> Iterator[None]:
    """End a command that is interrupted, or that nobody reads any more, with a code that is no answer."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # what is still held for it would fail again while the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        sys.exit(UNREAD)


@contextmanager
def problems_told() -> Iterator[None]:
    """Tell what is wrong with files, keys and settings, and end."""
    from events.errors import LedgerProblem  # noqa: PLC0415 - only commands that work on files come here
    from runtime.errors import RuntimeProblem  # noqa: PLC0415
    from server.auth.keys import KeyProblem  # noqa: PLC0415
    from server.config import ConfigError  # noqa: PLC0415

    try:
        yield
    except BrokenPipeError:  # whoever reads has read enough
        raise
    except (ConfigError, KeyProblem, LedgerProblem, RuntimeProblem, OSError) as error:
        give_up(str(error))
