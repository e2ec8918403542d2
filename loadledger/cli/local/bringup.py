"""`loadledger run`: a model from its file to its first answer; added if it is new, loaded, and shown."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import click

from events.errors import LedgerProblem
from loadledger import AsyncClient, ClientProblem, NotFound, ServerUnreachable
from loadledger.cli.local.run import Subject
from loadledger.cli.local.signin import local_subject
from loadledger.cli.local.startup import announce
from loadledger.cli.models import signature_lines
from loadledger.cli.output import INTERRUPTED, NEGATIVE_RESULT, exit_with_error, print_note, report_problems
from loadledger.cli.server import explain_problem
from loadledger.cli.snippets import format_curl
from loadledger.profiles import TOKEN, ServerTarget
from loadledger.uploads import VersionSource, find_version_files
from server.auth.keys import KeyProblem
from server.auth.tokens import issue_recorded_token
from server.check import load_config
from server.errors import ServerProblem
from server.serve import RunningServer, serve

LEVEL = "LOADLEDGER_LOG_LEVEL"
"""Without it the command's own server logs warnings only, since a person reads what it prints."""

TOKEN_LIFE_S = 12 * 3600
"""Of the token with which the command asks its own server; as `loadledger token` has it by default."""


def run_on_server(target: ServerTarget, subject: Subject) -> bool:
    """Run a model on a server, and return True; False if there is none. A problem ends the command."""
    try:
        return asyncio.run(_run_on_server(target, subject))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


async def _run_on_server(target: ServerTarget, subject: Subject) -> bool:
    word = f"${TOKEN}" if os.environ.get(TOKEN) else "$(loadledger token show)"
    async with AsyncClient(target.url, token=target.token, ca_file=target.ca) as client:
        try:
            await client.health()
        except ServerUnreachable:
            return False
        try:
            await bring_up(client, subject, word)
        except (ClientProblem, ValueError, OSError) as problem:
            exit_with_error(explain_problem(problem, target))
    return True


def serve_and_run(subject: Subject) -> NoReturn:
    """Serve until Ctrl-C, and run a model meanwhile; if it cannot run, the server stops."""
    problems: list[str] = []

    async def announce_and_run(running: RunningServer) -> None:
        profile = await announce(running)
        word = _token_word(None if profile is None else profile.option, config.data)
        try:
            token = profile.token if profile is not None else await _issue_token(running)
            async with AsyncClient(running.url, token=token) as client:
                await bring_up(client, subject, word)
            click.echo("\nCtrl-C stops the server; the model stays in its repository.")
        except (ClientProblem, ServerProblem, KeyProblem, LedgerProblem, ValueError, OSError) as problem:
            problems.append(str(problem))
            running.stop()

    with report_problems():
        config = load_config({} if LEVEL in os.environ else {"log_level": "warning"}, os.environ)
        status = serve(config, announce_and_run)
    for problem in problems:
        print_note(problem)
    sys.exit(status or (NEGATIVE_RESULT if problems else 0))


async def _issue_token(running: RunningServer) -> str:
    """Issue a token for the command's own requests, without a profile."""
    return (await issue_recorded_token(running.app, local_subject(), ["admin"], TOKEN_LIFE_S)).token


def _token_word(profile_option: str | None, data: Path) -> str:
    """Return a shell word that prints a token: that of a profile, or without one a new one."""
    if profile_option is None:
        return f"$(loadledger token --data {shlex.quote(str(data))} --role predict --subject curl)"
    return f"$(loadledger token show{profile_option})"


async def bring_up(client: AsyncClient, subject: Subject, token: str) -> None:
    """Add a model if it is new, load it, and print what it takes and a command that asks it.

    Args:
        client: of the server, with the token of an admin.
        subject: the model.
        token: a word of the shell that expands to a token.

    Raises:
        ClientProblem: the server refused, or the load failed.
        ValueError: there is no model at the subject's path.
        OSError: a file cannot be read.
    """
    version = await _add_if_new(client, subject)
    await client.load(subject.name, version, wait=True)
    model = await client.model(subject.name)
    click.echo(f"{model.id} version {model.version}: loaded")
    for line in signature_lines(model):
        click.echo(line)
    command = format_curl(client.url, model, token)
    if command is not None:
        click.echo(f"\n{command}")


async def _add_if_new(client: AsyncClient, subject: Subject) -> int | None:
    """Return the version to load: the highest, after the subject's files were added if they differ."""
    if subject.path is None:
        return None
    source = await asyncio.to_thread(find_version_files, subject.path)
    try:
        versions = (await client.model(subject.name)).versions or [0]
    except NotFound:
        versions = [0]
    added_files = {}
    async for event in client.events(types=["VersionAdded"], models=[subject.name]):
        added_files[event.version] = {file["path"]: file["sha256"] for file in event.data["files"]}
    if added_files.get(versions[-1]) == await asyncio.to_thread(_hash_files, source):
        return versions[-1]
    added = await client.add(subject.name, subject.path)
    click.echo(f"{subject.name} version {added.version}: added")
    return added.version


def _hash_files(source: VersionSource) -> dict[str, str]:
    """Return the SHA-256 of each file by its path in the version's folder."""
    found = {}
    for file in source.files:
        with file.source.open("rb") as opened:
            found[file.path] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found
