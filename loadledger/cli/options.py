"""Options that commands share, and the client of the server that they name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadledger.cli.output import INTERRUPTED, exit_with_error, report_problems
from loadledger.profiles import (
    ProfileProblem,
    ServerTarget,
    find_target,
)

UNAUTHENTICATED, FORBIDDEN = 401, 403
HINTS = {
    "unknown_model": "`loadledger models` lists them",
    "unknown_version": "`loadledger models MODEL` lists its versions",
    "unknown_job": "`loadledger jobs` lists them",
    "unknown_node": "`loadledger nodes` lists them",
    "unknown_token": "`loadledger token list` lists them",
    "not_loaded": "`loadledger ps` lists loaded models",
    "nothing_loaded": "`loadledger ps` lists loaded models",
    "model_not_loaded": "`loadledger load MODEL --wait` loads it",
}
"""Advice by the server's error codes."""
Command = Callable[..., None]
json_option = click.option("--json", "as_json", is_flag=True, show_default=False, help="Print JSON.")
"""Adds `--json`, passed as `as_json`."""


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """The options that name a server."""

    url: str | None = None
    profile: str | None = None


def server_options(command: Command) -> Command:
    """Add `--url` and `--profile`, passed as `where`."""

    @wraps(command)
    def call(*arguments: Any, url: str | None, profile: str | None, **options: Any) -> None:
        command(*arguments, where=ServerChoice(url, profile), **options)

    with_profile = click.option(
        "--profile",
        metavar="NAME|FILE",
        help="Profile with URL and token, as `login` saves it. [LOADLEDGER_PROFILE]",
    )
    with_url = click.option(
        "--url",
        metavar="URL",
        help="Server, like http://127.0.0.1:8080; or several, separated by commas. [LOADLEDGER_URL]",
    )
    return with_url(with_profile(call))


def find_chosen_target(where: ServerChoice) -> ServerTarget:
    """Return the server that the options, variables and profiles name; a problem ends the command."""
    try:
        return find_target(where.url, where.profile, os.environ)
    except ProfileProblem as problem:
        exit_with_error(str(problem))


def open_chosen_client(where: ServerChoice, *, timeout_s: float = 30.0) -> AbstractContextManager[Any]:
    """Open a client of the server that the options name; problems end the command, as in `open_client`."""
    return open_client(find_chosen_target(where), timeout_s=timeout_s)


@contextmanager
def open_client(place: ServerTarget, *, timeout_s: float = 30.0) -> Iterator[Any]:
    """Give a client of a server; a problem is printed and ends the command.

    Ctrl-C ends the command silently.
    """
    from loadledger import Client, ClientProblem

    try:
        with Client(place.url, token=place.token, ca_file=place.ca, timeout_s=timeout_s) as client:
            yield client
    except ClientProblem as problem:
        exit_with_error(explain_problem(problem, place))
    except ValueError as error:  # an argument cannot be sent
        exit_with_error(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def open_managing_client(data: Path | None, where: ServerChoice) -> Iterator[Any]:
    """Give a client that may manage tokens and nodes: of a data directory, over its socket, or of a server.

    Problems end the command, as in `open_client`.
    """
    is_server_named = where.url is not None or where.profile is not None
    is_data_given = click.get_current_context().get_parameter_source("data") is ParameterSource.COMMANDLINE
    if is_server_named and is_data_given:
        exit_with_error("give --data, or a server by --url or --profile, not both")
    if is_server_named or data is None:
        with open_chosen_client(where) as client:
            yield client
        return
    from loadledger import Client, ClientProblem

    with report_problems():
        require_data(data)
    try:
        with Client.of_data(data) as client:
            yield client
    except ClientProblem as problem:
        exit_with_error(str(problem))


def explain_problem(problem: Exception, place: ServerTarget) -> str:
    status = getattr(problem, "status", None)
    if status == UNAUTHENTICATED and not place.token:
        return (
            f"{place.url} asks for a token: set LOADLEDGER_TOKEN, or save one with `loadledger login`"
            " (`loadledger token` creates one on the server's machine)"
        )
    if status == FORBIDDEN:
        return f"{problem}; use a token with that role (`loadledger token --role …`)"
    hint = HINTS.get(getattr(problem, "code", ""))
    return f"{problem}; {hint}" if hint else str(problem)


def int_option(
    *flags: str, metavar: str, text: str, least: int = 1, **options: Any
) -> Callable[[Command], Command]:
    return click.option(*flags, metavar=metavar, type=click.IntRange(min=least), help=text, **options)


class Size(click.ParamType[int]):
    """A number of bytes, as all sizes are given."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from server.config import parse_size

        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def own_data() -> Path:
    """Return the user's own data directory, which `serve` takes by default."""
    from server.configsources import default_folder

    found = default_folder("data", os.environ)
    if found is None:
        raise click.UsageError("there is no HOME: name the data directory with --data or LOADLEDGER_DATA")
    return found


def data_option(command: Command) -> Command:
    return click.option(
        "--data",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="LOADLEDGER_DATA",
        default=own_data,
        show_default="~/.local/share/loadledger/data",
        help="Directory of the ledger and the keys.",
    )(command)


optional_data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="LOADLEDGER_DATA",
    help="Data directory of a running server on this machine: no token is needed. Default: ask the server.",
)
"""Adds `--data` to commands that otherwise ask a server; `--url` and `--profile` go first."""


def require_data(data: Path) -> None:
    if not data.is_dir():
        raise click.BadParameter(
            f"there is no directory {data}; start the server first, which creates it, or name the one that "
            "the server has (`loadledger serve --data`)",
            param_hint="--data",
        )
