"""`loadledger login`: keeps a server's URL and token in a profile, so that nobody types them again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from loadledger.cli.connection import talking_to
from loadledger.cli.options import json_option
from loadledger.cli.problems import give_up
from loadledger.cli.profile import DEFAULT_URL, Place, Profile, ProfileProblem, profile_path, write_profile
from loadledger.cli.tables import in_one_line


@click.command()
@click.option("--url", metavar="URL", envvar="LOADLEDGER_URL", default=DEFAULT_URL, help="The server.")
@click.option("--profile", metavar="NAME|FILE", help="Under which name it is kept. [LOADLEDGER_PROFILE]")
@click.option(
    "--ca",
    metavar="FILE",
    envvar="LOADLEDGER_CA",
    type=click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True),
    help="Certificates to trust, in PEM, instead of the system's. [LOADLEDGER_CA]",
)
@json_option
def login(url: str, profile: str | None, ca: Path | None, *, as_json: bool) -> None:
    """Keep a server's URL and a token in a profile.

    The token is asked for, or read from standard input: `loadledger token … | loadledger login`. The server
    is asked whether it takes it before anything is written. Nobody else can read the file.

    With --json, `url` is the server's, and `profile` the file.
    """
    try:
        path = profile_path(profile, os.environ)
    except ProfileProblem as problem:
        give_up(str(problem))
    token = _token()
    with talking_to(Place(url, token, ca)) as client:
        client.resources()
        url = client.url
    try:
        write_profile(path, Profile(url, token, ca))
    except OSError as error:
        give_up(f"{path} cannot be written: {error.strerror}")
    if as_json:
        click.echo(json.dumps({"url": url, "profile": str(path)}, indent=2))  # whatever bytes a path has
    else:
        click.echo(f"{in_one_line(url)} takes the token; kept in {path}")


def _token() -> str:
    if sys.stdin.isatty():
        text: str = click.prompt("Token", hide_input=True, err=True)
    else:
        text = sys.stdin.readline(64 * 1024)
    if not text.strip():
        give_up("there is no token on standard input: `loadledger token … | loadledger login`")
    return text.strip()
