"""The server that a command talks to: its options, a client of it, and words for what goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from loadledger.cli.problems import INTERRUPTED, give_up
from loadledger.cli.profile import Place, ProfileProblem, find_place

UNAUTHENTICATED, FORBIDDEN = 401, 403

HINTS = {
    "unknown_model": "`loadledger models` lists them",
    "unknown_version": "`loadledger models MODEL` names those that there are",
    "unknown_job": "`loadledger jobs` lists them",
    "not_loaded": "`loadledger ps` lists what is loaded",
    "nothing_loaded": "`loadledger ps` lists what is loaded",
    "model_not_loaded": "`loadledger load MODEL --wait` loads it",
}
"""What to do next, by the server's codes."""


@dataclass(frozen=True, slots=True)
class Where:
    """What the options say of the server; None is nothing."""

    url: str | None = None
    profile: str | None = None

    def place(self) -> Place:
        """Return the server that is meant.

        Raises:
            ProfileProblem: the profile cannot be used.
        """
        return find_place(self.url, self.profile, os.environ)


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which server is meant; the command gets them as `where`."""

    @wraps(command)
    def called(*arguments: Any, url: str | None, profile: str | None, **options: Any) -> None:
        command(*arguments, where=Where(url, profile), **options)

    with_profile = click.option(
        "--profile",
        metavar="NAME|FILE",
        help="Which profile has URL and token, as `login` keeps them. [LOADLEDGER_PROFILE]",
    )
    with_url = click.option(
        "--url", metavar="URL", help="The server, like http://127.0.0.1:8080. [LOADLEDGER_URL]"
    )
    return with_url(with_profile(called))


@contextmanager
def connected(where: Where, *, timeout_s: float = 30.0) -> Iterator[Any]:
    """Give a client of the server that is meant; what goes wrong ends the command, as in `talking_to`."""
    try:
        place = where.place()
    except ProfileProblem as problem:
        give_up(str(problem))
    with talking_to(place, timeout_s=timeout_s) as client:
        yield client


@contextmanager
def talking_to(place: Place, *, timeout_s: float = 30.0) -> Iterator[Any]:
    """Give a client of a server; what goes wrong with it is told, and ends the command.

    Ctrl-C ends it as well, without a word: whoever has more to say then says it first.
    """
    from loadledger import Client, ClientProblem  # noqa: PLC0415 - keeps `loadledger --help` quick

    try:
        with Client(place.url, token=place.token, ca_file=place.ca, timeout_s=timeout_s) as client:
            yield client
    except ClientProblem as problem:
        give_up(told(problem, place))
    except ValueError as error:  # what was typed cannot be sent, and was not
        give_up(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def told(problem: Exception, place: Place) -> str:
    """Say what went wrong and what to do about it."""
    status = getattr(problem, "status", None)
    if status == UNAUTHENTICATED and not place.token:
        return (
            f"{place.url} asks for a token: set LOADLEDGER_TOKEN, or keep one with `loadledger login`"
            " (`loadledger token` makes one beside the server's data)"
        )
    if status == FORBIDDEN:
        return f"{problem}; use a token that has the role (`loadledger token --role …`)"
    hint = HINTS.get(getattr(problem, "code", ""))
    return f"{problem}; {hint}" if hint else str(problem)
