"""What is told, in one line, of what whoever typed a command can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import click

from loadledger.cli.tables import in_one_line

FAILED = 1
"""What was asked for was done, and did not come out well: a job failed, a check found something."""
COULD_NOT = 2
"""It could not be done: it was typed wrongly, refused, or nobody answered."""
INTERRUPTED = 130
"""What shells say of a command that Ctrl-C ended: 128 and the signal's number."""
UNREAD = 141
"""What they say of one whose reader went away, as `| head` does: it is no answer of the command's."""


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
