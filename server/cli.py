"""The command `loadledger`: thin, and what it needs is imported by the subcommand that needs it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="loadledger")
def main() -> None:
    """Load and unload ONNX models over HTTP, each in a process of its own, with a ledger of who did what."""


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each setting; their values come from there, the environment, or the default."""
    from server.config import settings  # noqa: PLC0415 - keeps `loadledger --help` quick

    for setting in reversed(settings()):
        text = f"{setting.help} [{setting.variable}]"
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
    from events.errors import LedgerProblem  # noqa: PLC0415
    from runtime.errors import RuntimeProblem  # noqa: PLC0415
    from server import serve as server  # noqa: PLC0415
    from server.config import ConfigError, check_files, load_config  # noqa: PLC0415
    from server.keys import KeyProblem  # noqa: PLC0415

    try:
        config = load_config(flags, os.environ)
        check_files(config)
        sys.exit(server.serve(config, _announce))
    except (ConfigError, KeyProblem, LedgerProblem, RuntimeProblem, OSError) as error:
        _fail(str(error))


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
    "--role", "roles", multiple=True, required=True, help="admin, predict or audit; may be repeated."
)
@click.option("--subject", required=True, help="Who the token speaks for; the ledger names them.")
@click.option("--expires", default="12h", help="For how long it is valid: 90s, 30m, 12h, 7d.")
def token(data: Path, roles: tuple[str, ...], subject: str, expires: str) -> None:
    """Print a token; the first use creates the data directory and its keys."""
    from server.config import read_settings  # noqa: PLC0415
    from server.keys import KeyProblem, ensure_data_dir, issue_token  # noqa: PLC0415

    chosen = read_settings(["jwt_audience", "jwt_issuer"], {}, os.environ)
    try:
        ensure_data_dir(data)
        click.echo(
            issue_token(
                data,
                subject,
                roles,
                expires_s=_seconds(expires),
                audience=chosen["jwt_audience"],
                issuer=chosen["jwt_issuer"],
            ),
        )
    except (KeyProblem, OSError) as error:
        _fail(str(error))


@main.group()
def key() -> None:
    """The keys that sign tokens."""


@key.command("list")
@_data_option
def list_keys(data: Path) -> None:
    """Show the keys, newest last; the one that signs is marked."""
    from server import keys  # noqa: PLC0415

    for info in keys.list_keys(data):
        click.echo(f"{info.kid}  {info.created_at:%Y-%m-%d %H:%M:%S}Z{'  signs' if info.signs else ''}")


@key.command()
@_data_option
def rotate(data: Path) -> None:
    """Make a new key, which signs from now on; tokens of the old ones stay valid."""
    from server import keys  # noqa: PLC0415

    keys.ensure_data_dir(data)
    click.echo(keys.rotate(data))


@key.command()
@_data_option
@click.argument("kid")
def revoke(data: Path, kid: str) -> None:
    """Remove a key, and with it the validity of every token that it signed."""
    from server import keys  # noqa: PLC0415

    try:
        keys.revoke(data, kid)
    except (keys.KeyProblem, OSError) as error:
        _fail(str(error))


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


def _fail(message: str) -> NoReturn:
    click.echo(f"loadledger: {message}", err=True)
    sys.exit(2)
