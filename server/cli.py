"""The command `loadledger`: thin, and what it needs is imported by the subcommand that needs it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="loadledger")
def main() -> None:
    """Load and unload ONNX models over HTTP, each in a process of its own, with a ledger of who did what."""
    os.umask(0o077)  # what is written is the ledger and keys: nobody else's to read


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each setting; their values come from there, the environment, or the default."""
    from server.config import settings  # noqa: PLC0415 - keeps `loadledger --help` quick

    for setting in reversed(settings()):
        default = "no default" if setting.default is None else f"default: {setting.default}"
        text = f"{setting.help} [{setting.variable}; {'required' if setting.required else default}]"
        option = click.option(setting.flag, setting.name, metavar=setting.kind.__name__.upper(), help=text)
        command = option(command)
    return command


class _ServeCommand(click.Command):
    """`serve`, whose options are made from the configuration when they are wanted."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            self.params = list(_made_options())
        return super().get_params(ctx)


def _made_options() -> list[click.Parameter]:
    def nothing(**_: Any) -> None: ...

    return list(reversed(getattr(_settings_options(nothing), "__click_params__", [])))


@main.command(cls=_ServeCommand)
def serve(**flags: str | None) -> None:
    """Run the server until SIGTERM."""
    from server import serve as server  # noqa: PLC0415
    from server.config import check_files, load_config  # noqa: PLC0415

    with _problems_told():
        config = load_config(flags, os.environ)
        check_files(config)
        sys.exit(server.serve(config, _announce))


def _announce(url: str) -> None:
    click.echo(f"loadledger is ready at {url}")
    sys.stdout.flush()


def _data_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--data",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="LOADLEDGER_DATA",
        required=True,
        help="Directory of the ledger and the keys.",
    )(command)


@main.command()
@_data_option
@click.option(
    "--role",
    "roles",
    multiple=True,
    envvar="LOADLEDGER_ROLE",
    required=True,
    help="admin, predict or audit; may be repeated.",
)
@click.option(
    "--subject",
    envvar="LOADLEDGER_SUBJECT",
    required=True,
    help="Who the token speaks for; the ledger names them.",
)
@click.option(
    "--expires",
    envvar="LOADLEDGER_EXPIRES",
    default="12h",
    help="For how long it is valid: 90s, 30m, 12h, 7d.",
)
@click.option("--jwt-audience", help="As given to `serve`. [LOADLEDGER_JWT_AUDIENCE]", show_default=False)
@click.option("--jwt-issuer", help="As given to `serve`. [LOADLEDGER_JWT_ISSUER]", show_default=False)
def token(data: Path, roles: tuple[str, ...], subject: str, expires: str, **claims: str | None) -> None:
    """Print a token; the first use creates the data directory and its keys."""
    from server.config import read_settings  # noqa: PLC0415
    from server.keys import ensure_data_dir, issue_token  # noqa: PLC0415

    expires_s = _seconds(expires)
    with _problems_told():
        chosen = read_settings(list(claims), claims, os.environ)
        ensure_data_dir(data)
        audience, issuer = chosen["jwt_audience"], chosen["jwt_issuer"]
        click.echo(issue_token(data, subject, roles, expires_s=expires_s, audience=audience, issuer=issuer))


@main.group()
def key() -> None:
    """The keys that sign tokens."""


@key.command("list")
@_data_option
def list_keys(data: Path) -> None:
    """Show the keys, newest last; the one that signs is marked."""
    from server import keys  # noqa: PLC0415

    if not data.is_dir():
        raise click.BadParameter(f"there is no {data}; `token` and `serve` create it", param_hint="--data")
    with _problems_told():
        for info in keys.list_keys(data):
            click.echo(f"{info.kid}  {info.created_at:%Y-%m-%d %H:%M:%S}Z{'  signs' if info.signs else ''}")


@key.command()
@_data_option
def rotate(data: Path) -> None:
    """Make a new key, which signs from now on; tokens of the old ones stay valid."""
    from server import keys  # noqa: PLC0415

    with _problems_told():
        click.echo(keys.rotate(data))


@key.command()
@_data_option
@click.argument("kid")
def revoke(data: Path, kid: str) -> None:
    """Remove a key, and with it the validity of every token that it signed."""
    from server import keys  # noqa: PLC0415

    with _problems_told():
        keys.revoke(data, kid)


@main.command()
def demo() -> None:
    """Load, ask, swap and unload a real model, and show what the ledger says of it."""
    from server.demo import run  # noqa: PLC0415

    sys.exit(run())


def _seconds(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(
            f"{text!r} is not a duration like 90s, 30m, 12h or 7d", param_hint="--expires"
        )
    return int(match[1]) * _UNITS_S[match[2]]


@contextmanager
def _problems_told() -> Iterator[None]:
    """Tell in one line, and end with 2, what whoever typed the command can mend."""
    from events.errors import LedgerProblem  # noqa: PLC0415
    from runtime.errors import RuntimeProblem  # noqa: PLC0415
    from server.config import ConfigError  # noqa: PLC0415
    from server.keys import KeyProblem  # noqa: PLC0415

    try:
        yield
    except (ConfigError, KeyProblem, LedgerProblem, RuntimeProblem, OSError) as error:
        click.echo(f"loadledger: {error}", err=True)
        sys.exit(2)
