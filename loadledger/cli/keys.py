"""`loadledger token`, `login`, `console` and `key`: tokens, profiles, sign-in links; the keys behind them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from answers.tokens import ROLES
from loadledger.cli import options, output
from loadledger.cli.ledger import ledger_key
from loadledger.profiles import DEFAULT_URL, ServerTarget, local_server, profile_path, write_profile

TOKENS_PER_REQUEST = 1000
TOKEN_HEAD = ("ID", "SUBJECT", "ROLES", "EXPIRES", "ISSUED BY", "VIA", "STATE")


class TokenGroup(click.Group):
    """`loadledger token`, which issues a token unless a subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the word `issue` before options of that subcommand."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["issue", *args]
        return super().parse_args(ctx, args)


@click.group(cls=TokenGroup)
def token() -> None:
    """Issue, list and revoke tokens.

    `loadledger token --role … --subject …` is short for `loadledger token issue`.
    """


@token.command("issue")
@options.data_option
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(ROLES),
    envvar="LOADLEDGER_ROLE",
    required=True,
    help="May be repeated.",
)
@click.option(
    "--subject",
    envvar="LOADLEDGER_SUBJECT",
    required=True,
    help="Name of the user or program; the ledger records it.",
)
@click.option(
    "--expires",
    type=options.DURATION,
    envvar="LOADLEDGER_EXPIRES",
    default="12h",
    help="Lifetime: 90s, 30m, 12h, 7d.",
)
@options.json_option
def issue_token(data: Path, roles: tuple[str, ...], subject: str, expires: int, *, as_json: bool) -> None:
    """Issue a token, record it in the ledger, and print it.

    The server that runs on the data directory issues it; its user and root need no token for that. --json
    prints `token`, `jti` (its id), `subject`, `roles`, `expires_at` and `kid`, the id of the signing key.
    """
    body = {"subject": subject, "roles": sorted(set(roles)), "expires_s": expires}
    import jwt

    with options.open_managing_client(data, options.ServerChoice()) as client:
        made = client.post("/api/v1/tokens", body)
    kid = jwt.get_unverified_header(made["token"])["kid"]
    members = {**made, "expires_at": f"{made['expires_at'][:19]}Z", "kid": kid}
    output.print_result(members, [made["token"]], as_json=as_json)


@token.command("show")
@options.server_options
def show_token(where: options.ServerChoice) -> None:
    """Print the token that commands send, of LOADLEDGER_TOKEN or the profile, for other programs."""
    target = options.find_chosen_target(where)
    if target.token is None:
        output.exit_with_error(
            f"there is no token for {output.to_printable(target.url)}: `loadledger login` saves one"
        )
    click.echo(output.to_printable(target.token))


@token.command("list")
@options.optional_data_option
@options.server_options
@options.json_option
def list_tokens(data: Path | None, where: options.ServerChoice, *, as_json: bool) -> None:
    """List the tokens that have not expired, newest first."""
    with options.open_managing_client(data, where) as client:
        found = list(_pages(client))
    rows = [_token_row(each) for each in found]
    output.print_result({"tokens": found}, output.format_table(TOKEN_HEAD, rows), as_json=as_json)


@token.command("revoke")
@options.optional_data_option
@options.server_options
@click.option(
    "--expires",
    type=options.DURATION,
    help="For a token of an identity provider: how long it is valid at most, like 12h.",
)
@click.option("--issued", is_flag=True, help="Revoke the tokens that it issued, too.")
@options.json_option
@click.argument("token_id", metavar="ID")
def revoke_token(
    token_id: str,
    data: Path | None,
    where: options.ServerChoice,
    expires: int | None,
    *,
    issued: bool,
    as_json: bool,
) -> None:
    """Revoke a token by its id; it is refused at once, and so are browsers that it signed in.

    It prints only how many tokens that it issued are not revoked; --json prints the token as `list` shows it,
    and their ids as `issued`.
    """
    from loadledger.address import path

    body = {"issued": issued} if expires is None else {"issued": issued, "expires_s": expires}
    with options.open_managing_client(data, where) as client:
        revoked = client.post(f"/api/v1{path('tokens', token_id, 'revoke')}", body)
    if as_json:
        output.print_json(revoked)
    elif left := len(revoked["issued"]):
        click.echo(
            f"tokens that it issued and that are not revoked: {left}; to revoke them: --issued {token_id}"
        )


@click.command()
@click.option(
    "--url",
    metavar="URL",
    envvar="LOADLEDGER_URL",
    default=lambda: local_server(os.environ).url,
    show_default=DEFAULT_URL,
    help="Server.",
)
@click.option("--profile", metavar="NAME|FILE", help="Profile to write. [LOADLEDGER_PROFILE]")
@click.option(
    "--ca",
    metavar="FILE",
    envvar="LOADLEDGER_CA",
    type=click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True),
    help="Certificates to trust, in PEM, instead of the system's. [LOADLEDGER_CA]",
)
@options.json_option
def login(url: str, profile: str | None, ca: Path | None, *, as_json: bool) -> None:
    """Save a server's URL and a token in a profile.

    Type the token at the prompt, or pipe it in: `loadledger token … | loadledger login`. The command first
    checks that the server accepts it. Only you can read the file.

    --json prints the server's `url` and the file's path as `profile`.
    """
    path = profile_path(profile, os.environ)
    token = _read_token()
    with options.open_client(ServerTarget(url, token, ca)) as client:
        client.resources()
        url = client.url
    from events.errors import WrongTarget

    try:
        write_profile(path, ServerTarget(url, token, ca))
    except (OSError, WrongTarget) as error:
        output.exit_with_error(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
    text = f"{output.to_printable(url)} accepts the token; saved in {path}"
    output.print_result({"url": url, "profile": str(path)}, [text], as_json=as_json)


@click.command()
@options.json_option
@options.server_options
def whoami(*, as_json: bool, where: options.ServerChoice) -> None:
    """Show who you are to the server, by your token."""
    target = options.find_chosen_target(where)
    import jwt

    try:
        claims = jwt.decode(target.token or "", options={"verify_signature": False})
    except jwt.InvalidTokenError:
        claims = {}
    roles, expires = claims.get("roles"), claims.get("exp")
    facts = {
        "server": target.url,
        "subject": claims.get("sub") or ("no token" if target.token is None else "unknown to this command"),
        "roles": ", ".join(map(str, roles)) if isinstance(roles, list) else None,
        "expires": f"{datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M:%S}Z"
        if isinstance(expires, int)
        else None,
    }
    output.print_result(facts, output.format_facts(facts), as_json=as_json)


def _read_token() -> str:
    if sys.stdin.isatty():
        text: str = click.prompt("Token", hide_input=True, err=True)
    else:
        text = sys.stdin.readline(64 * 1024)
    if not text.strip():
        output.exit_with_error("there is no token on standard input: `loadledger token … | loadledger login`")
    return text.strip()


@click.command()
@options.optional_data_option
@options.server_options
@click.option("--print", "prints", is_flag=True, help="Print the link, open no browser.")
@options.json_option
def console(data: Path | None, where: options.ServerChoice, *, prints: bool, as_json: bool) -> None:
    """Open the console, signed in.

    The link works once, within a minute, and signs in for 12 hours. On a terminal with a display it is opened
    in your browser, elsewhere it is printed. --json prints it as `link`.
    """
    with options.open_managing_client(data, where) as client:
        made = client.post("/api/v1/sign-in-links", {})
    base = client.url if client.data is None else made["server_url"]
    if not base:
        output.exit_with_error("the server does not listen yet: try again")
    link = f"{base}{made['path']}"
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not (prints or as_json) and sys.stdout.isatty() and has_display:
        import webbrowser

        if webbrowser.open(link):
            click.echo("the console was opened in your browser", err=True)
            return
    output.print_result({"link": link}, [output.to_printable(link)], as_json=as_json)


def _pages(client: Any) -> Iterable[dict[str, Any]]:
    query = {"limit": str(TOKENS_PER_REQUEST)}
    while True:
        page = client.get("/api/v1/tokens", query)
        yield from page["tokens"]
        if page["next_cursor"] is None:
            return
        query["cursor"] = str(page["next_cursor"])


def _token_row(token: Mapping[str, Any]) -> list[str]:
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    state = "revoked" if token["revoked_at"] else "expired" if token["expires_at"] <= now else "valid"
    shown = (
        token["subject"],
        ", ".join(token["roles"]),
        f"{token['expires_at'][:19]}Z",
        token["issued_by"],
        token["via"],
    )
    return [token["jti"], *(each or output.NOTHING for each in shown), state]


@click.group()
def key() -> None:
    """List, rotate and revoke keys; show the ledger's.

    To revoke one token, see `loadledger token revoke`; to revoke all that a key signed, revoke the key.
    """


@key.command("list")
@options.data_option
@options.json_option
def list_keys(data: Path, *, as_json: bool) -> None:
    """List the keys, newest last; the signing one is marked."""
    from server.auth import keys

    options.require_data(data)
    found = keys.list_keys(data)
    if as_json:
        output.print_json({"keys": found})
        return
    for info in found:
        click.echo(f"{info.kid}  {info.created_at:%Y-%m-%d %H:%M:%S}Z{'  signs' if info.signs else ''}")


@key.command()
@options.data_option
@options.json_option
def rotate(data: Path, *, as_json: bool) -> None:
    """Create a new signing key; tokens of the old ones stay valid."""
    from server.auth import keys

    kid = keys.create_key(data)
    output.print_result({"kid": kid}, [kid], as_json=as_json)


@key.command()
@options.data_option
@options.json_option
@click.argument("kid")
def revoke(data: Path, kid: str, *, as_json: bool) -> None:
    """Remove a key; every token that it signed becomes invalid.

    It prints nothing; --json prints the removed `kid`.
    """
    from server.auth import keys

    keys.revoke(data, kid)
    if as_json:
        output.print_json({"kid": kid})


key.add_command(ledger_key)
