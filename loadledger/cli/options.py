"""Options that commands share, and the client of the server that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
from click.core import ParameterSource

from loadledger.cli.completion import models_of_server
from loadledger.cli.output import exit_with_error, to_printable
from loadledger.profiles import ServerTarget, find_target

Command = Callable[..., None]
FOLDER = click.Path(path_type=Path, file_okay=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
"""Adds `--json`, passed as `as_json`."""


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """The options that name a server."""

    url: str | None = None
    profile: str | None = None

    @property
    def words(self) -> list[str]:
        """The options as given, for printed commands."""
        given = {"--url": self.url, "--profile": self.profile}
        return [word for flag, value in given.items() if value is not None for word in (flag, value)]


def parse_version_name(text: str) -> tuple[str, int | None]:
    """Return model and version in an argument MODEL[/VERSION]."""
    model_id, slash, version = text.partition("/")
    if slash and not re.fullmatch("[1-9][0-9]{0,18}", version):
        raise click.UsageError(f"{version!r} is no version: give MODEL, or MODEL/VERSION such as digits/2")
    return model_id, int(version) if slash else None


def model_argument(
    *, completes: Any = models_of_server, is_required: bool = True, needs_version: bool = False
) -> Callable[[Command], Command]:
    """Add the argument MODEL[/VERSION], passed as `model` and `version`, which may be an option, too."""
    name = "MODEL/VERSION" if needs_version else "MODEL[/VERSION]"

    def add(command: Command) -> Command:
        @wraps(command)
        def call(*arguments: Any, model: str | None, version: int | str | None = None, **others: Any) -> None:
            model_id, named = (None, None) if model is None else parse_version_name(model)
            if None not in (named, version) and str(named) != str(version):
                raise click.UsageError(f"{model} names another version than {version}: give one of them")
            version = version if named is None else named
            if needs_version and version is None:
                raise click.UsageError(f"name the version, too: {model_id}/VERSION")
            command(*arguments, model=model_id, version=version, **others)

        metavar = name if is_required else f"[{name}]"
        return click.argument("model", metavar=metavar, required=is_required, shell_complete=completes)(call)

    return add


def check_version(model: Any, version: int | None, present: int | None) -> None:
    """Refuse the version of an argument MODEL/VERSION if the command would be about another one."""
    if version in (None, present):
        return
    name, command = to_printable(model.id), click.get_current_context().info_name
    is_known = version in (model.versions or ())
    files = f"; `loadledger verify-model {name}/{version}` shows its files" if is_known else ""
    other = f"; `loadledger {command} {name}` is about version {present}" if present else ""
    exit_with_error(f"version {version} of {name} is not loaded{other}{files}")


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
    """Return the server that the options, variables and profiles name."""
    return find_target(where.url, where.profile, os.environ)


def open_chosen_client(where: ServerChoice, *, timeout_s: float = 30.0) -> AbstractContextManager[Any]:
    """Open a client of the server that the options name."""
    return open_client(find_chosen_target(where), timeout_s=timeout_s)


@contextmanager
def open_client(place: ServerTarget, *, timeout_s: float = 30.0) -> Iterator[Any]:
    """Yield a client of a server; a refusal, or an argument that cannot be sent, ends the command."""
    from loadledger import Client, ServerError

    with _reported(), Client(place.url, token=place.token, ca_file=place.ca, timeout_s=timeout_s) as client:
        try:
            yield client
        except ServerError as problem:
            if problem.code == "unknown_model":
                typed = str(click.get_current_context().params.get("model")).partition("/")[0]
                problem.args = (name_similar(problem, typed, [each.id for each in client.models()]),)
            raise


def name_similar(problem: Exception, typed: str, known: Sequence[str]) -> str:
    """Return the refusal of an unknown model with similar names, if any."""
    from difflib import get_close_matches  # takes 5 ms

    from loadledger.errors import ADVICE

    similar = " or ".join(map(to_printable, get_close_matches(typed, known)))
    meant = f"did you mean {similar}?" if similar else ADVICE["unknown_model"]
    return str(problem).replace(ADVICE["unknown_model"], meant)


@contextmanager
def _reported() -> Iterator[None]:
    from loadledger import ServerError

    try:
        yield
    except (ServerError, ValueError) as problem:
        context, text = click.get_current_context(), str(problem)
        for each in context.command.params:
            value = context.params.get(each.name or "")
            text = _show_typed(
                text, each, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            )
        exit_with_error(text)


def _show_typed(text: str, parameter: click.Parameter, typed: str) -> str:
    """Return a refusal with the typed argument in place of the server's name of its parameter."""
    name = parameter.opts[0]
    if isinstance(parameter, click.Argument):
        return re.sub(rf"\bpath: (id|{name}):", lambda _: f"{typed!r}:", text)
    field = name.lstrip("-").replace("-", "_")
    return re.sub(rf"\b(body|query|path): {field}(_s|\.\d+)?:", lambda _: f"{name} {typed}:", text)


@contextmanager
def open_managing_client(data: Path | None, where: ServerChoice) -> Iterator[Any]:
    """Yield a client with the routes that the control socket has: over the socket, or over HTTP."""
    is_server_named = where.url is not None or where.profile is not None
    is_data_given = click.get_current_context().get_parameter_source("data") is ParameterSource.COMMANDLINE
    if is_server_named and is_data_given:
        exit_with_error("give --data, or a server by --url or --profile, not both")
    if is_server_named or data is None:
        with open_chosen_client(where) as client:
            yield client
        return
    from loadledger import Client

    require_data(data)
    with _reported(), Client.of_data(data) as client:
        yield client


def int_option(
    *flags: str, metavar: str, text: str, least: int = 1, **options: Any
) -> Callable[[Command], Command]:
    kind = click.IntRange(min=least)
    kind.name = "whole number" if metavar == "N" else f"number of {metavar.lower()}"
    return click.option(*flags, metavar=metavar, type=kind, help=text, **options)


class Parsed(click.ParamType[Any]):
    """A value parsed by a function, which is imported on use; its ValueError is shown to the user."""

    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self._place = place

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if ctx is not None and ctx.resilient_parsing:  # a completion needs no value
            return value
        try:
            return resolve_name(self._place)(str(value))
        except ValueError as error:
            self.fail(f"{str(value)[:64]!r} is refused. {error}", param, ctx)


MOMENT = Parsed("position|time", "loadledger.cli.times:read_moment")
DURATION = Parsed("duration", "loadledger.cli.times:parse_duration")
KEPT_HEAD = Parsed("position:hash", "events.audit.verify:parse_expected")
SIZE = Parsed("size", "server.config:parse_size")


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
        type=FOLDER,
        envvar="LOADLEDGER_DATA",
        default=own_data,
        show_default="~/.local/share/loadledger/data",
        help="Directory of the ledger and the keys.",
    )(command)


optional_data_option = click.option(
    "--data",
    type=FOLDER,
    envvar="LOADLEDGER_DATA",
    help="Data directory of a running server on this machine: no token is needed. Default: ask the server.",
)
"""Adds `--data` to commands that otherwise use a server; `--url` and `--profile` take precedence."""


def require_data(data: Path) -> None:
    if not data.is_dir():
        raise click.BadParameter(
            f"there is no directory {data}; start the server first, which creates it, or name the one that "
            "the server has (`loadledger serve --data`)",
            param_hint="--data",
        )
