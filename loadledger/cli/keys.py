"""`loadledger token` and `loadledger key`: create tokens; list, rotate and revoke their keys."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import click

from loadledger.cli.local.ledger import ledger_key
from loadledger.cli.output import print_json, print_result, report_problems
from loadledger.cli.server import data_option, json_option, require_data

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


@click.command()
@data_option
@click.option(
    "--role",
    "roles",
    multiple=True,
    envvar="LOADLEDGER_ROLE",
    required=True,
    help="admin, predict or audit. May be repeated.",
)
@click.option(
    "--subject",
    envvar="LOADLEDGER_SUBJECT",
    required=True,
    help="Name of the user or program; the ledger records it.",
)
@click.option("--expires", envvar="LOADLEDGER_EXPIRES", default="12h", help="Lifetime: 90s, 30m, 12h, 7d.")
@click.option("--jwt-audience", help="As given to `serve`. [LOADLEDGER_JWT_AUDIENCE]", show_default=False)
@click.option("--jwt-issuer", help="As given to `serve`. [LOADLEDGER_JWT_ISSUER]", show_default=False)
@json_option
def token(
    data: Path, roles: tuple[str, ...], subject: str, expires: str, *, as_json: bool, **claims: str | None
) -> None:
    """Create a token and print it.

    The first use creates the data directory and the keys. --json prints `token`, `subject`, `roles`,
    `expires_at` and `kid`, the id of the signing key.
    """
    from server.auth.keys import ensure_data_dir, issue_token  # noqa: PLC0415 - keeps `--help` quick
    from server.configsources import raise_mistakes, read_settings  # noqa: PLC0415

    expires_s = _seconds(expires)
    with report_problems():
        chosen, mistakes = read_settings(claims, os.environ, only=claims)
        raise_mistakes(mistakes)
        ensure_data_dir(data)
        audience, issuer = chosen["jwt_audience"], chosen["jwt_issuer"]
        made = issue_token(data, subject, roles, expires_s=expires_s, audience=audience, issuer=issuer)
    print_result(_token_members(made), [made], as_json=as_json)


@click.group()
def key() -> None:
    """List, rotate and revoke keys; show the ledger's.

    To revoke tokens, revoke the key that signed them.
    """


@key.command("list")
@data_option
@json_option
def list_keys(data: Path, *, as_json: bool) -> None:
    """List the keys, newest last; the signing one is marked."""
    from server.auth import keys  # noqa: PLC0415 - as above

    with report_problems():
        require_data(data)
        found = keys.list_keys(data)
    if as_json:
        print_json({"keys": found})
        return
    for info in found:
        click.echo(f"{info.kid}  {info.created_at:%Y-%m-%d %H:%M:%S}Z{'  signs' if info.signs else ''}")


@key.command()
@data_option
@json_option
def rotate(data: Path, *, as_json: bool) -> None:
    """Create a new signing key; tokens of the old ones stay valid."""
    from server.auth import keys  # noqa: PLC0415 - as above

    with report_problems():
        kid = keys.rotate(data)
    print_result({"kid": kid}, [kid], as_json=as_json)


@key.command()
@data_option
@json_option
@click.argument("kid")
def revoke(data: Path, kid: str, *, as_json: bool) -> None:
    """Remove a key; every token that it signed becomes invalid.

    It prints nothing; --json prints the removed `kid`.
    """
    from server.auth import keys  # noqa: PLC0415 - as above

    with report_problems():
        keys.revoke(data, kid)
    if as_json:
        print_json({"kid": kid})


key.add_command(ledger_key)


def _token_members(made: str) -> dict[str, object]:
    """Return a new token with its claims."""
    import jwt  # noqa: PLC0415 - as above

    whole = jwt.decode_complete(made, options={"verify_signature": False})
    claims = whole["payload"]
    return {
        "token": made,
        "subject": claims["sub"],
        "roles": claims["roles"],
        "expires_at": datetime.fromtimestamp(claims["exp"], UTC),
        "kid": whole["header"]["kid"],
    }


def _seconds(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(
            f"{text!r} is not a duration: use one like 90s, 30m, 12h or 7d", param_hint="--expires"
        )
    return int(match[1]) * _UNITS_S[match[2]]
