"""`loadledger run`: from a model's file to its first answer, on the running server or on one of its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from loadledger import AsyncClient, ClientProblem, NotFound, ServerUnreachable
from loadledger.cli.models import signature_lines
from loadledger.cli.output import (
    INTERRUPTED,
    NEGATIVE_RESULT,
    exit_with_error,
    print_note,
    report_problems,
    to_printable,
)
from loadledger.cli.server import ServerChoice, explain_problem, find_chosen_target, server_options
from loadledger.cli.snippets import format_curl
from loadledger.profiles import PROFILE, TOKEN, URL, ServerTarget
from loadledger.uploads import VersionSource, find_version_files

GENERIC_NAMES = frozenset({"model", "onnx"})
"""Names of files and folders in common layouts, which name no model: the folder around them does."""

MAX_NAME = 128
"""Characters of a model's name."""

LEVEL = "LOADLEDGER_LOG_LEVEL"
"""Without it the command's own server logs warnings only, since a person reads what it prints."""

TOKEN_LIFE_S = 12 * 3600
"""Of the token with which the command asks its own server; as `loadledger token` has it by default."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to run: a model by name, and where its files are if it may have to be added first."""

    name: str
    path: Path | None = None


@click.command()
@click.argument("model", metavar="FILE|FOLDER|MODEL")
@click.option("--name", metavar="NAME", help="Name of the model. [default: the file's, or its folder's]")
@server_options
def run(model: str, *, name: str | None, where: ServerChoice) -> None:
    """Load a model, and print how to send it a request.

    A file or folder is first added to the server's models, unless the model's highest version has the same
    files. If no server runs, the command serves until Ctrl-C, with the settings of `serve` from variables
    and the --config file that LOADLEDGER_CONFIG names.
    """
    subject = choose_subject(model, name)
    target = find_chosen_target(where)
    try:
        is_running = asyncio.run(_run_on(target, subject))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    if not is_running:
        if where.url or where.profile or any(os.environ.get(each) for each in (URL, PROFILE)):
            exit_with_error(f"{to_printable(target.url)} cannot be reached; is the server running there?")
        _serve_and_run(subject)


def choose_subject(given: str, name: str | None) -> Subject:
    """Return what an argument names: a file or folder if it exists, else a model."""
    path = Path(given)
    if path.exists():
        return Subject(name or name_model(path.resolve()), path)
    if name is not None or "/" in given or path.suffix:
        exit_with_error(f"there is no file or folder {to_printable(given)}")
    return Subject(given)


def name_model(path: Path) -> str:
    """Return a name for the model at an absolute path."""
    for part in (path.stem if path.is_file() else path.name, *(parent.name for parent in path.parents)):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("._-")[:MAX_NAME]
        if name and not name.isdecimal() and name.lower() not in GENERIC_NAMES:
            return name
    raise click.UsageError(f"{to_printable(str(path))} has no name for a model: give one with --name")


async def _run_on(target: ServerTarget, subject: Subject) -> bool:
    """Run a model on a server; return False if there is none."""
    word = f"${TOKEN}" if os.environ.get(TOKEN) else "$(loadledger token show)"
    async with AsyncClient(target.url, token=target.token, ca_file=target.ca) as client:
        try:
            await client.health()
        except ServerUnreachable:
            return False
        try:
            await bring_up(client, subject, word)
        except ClientProblem as problem:
            exit_with_error(explain_problem(problem, target))
    return True


def _serve_and_run(subject: Subject) -> NoReturn:
    """Serve until Ctrl-C, and run a model meanwhile; if it cannot run, the server stops."""
    from loadledger.cli.local.signin import local_subject  # noqa: PLC0415 - where it serves only
    from loadledger.cli.local.startup import announce  # noqa: PLC0415
    from server import serve as server  # noqa: PLC0415
    from server.auth.tokens import issue_recorded_token  # noqa: PLC0415
    from server.check import load_config  # noqa: PLC0415

    problems: list[str] = []

    async def announce_and_run(running: server.RunningServer) -> None:
        profile = await announce(running)
        issued = await issue_recorded_token(running.app, local_subject(), ["admin"], TOKEN_LIFE_S)
        token_word = _token_word(None if profile is None else profile.option, config.data)
        async with AsyncClient(running.url, token=issued.token) as client:
            try:
                await bring_up(client, subject, token_word)
                click.echo("\nCtrl-C stops the server; the model stays in its repository.")
            except (ClientProblem, ValueError, OSError) as problem:
                problems.append(str(problem))
                running.stop()

    with report_problems():
        config = load_config({} if LEVEL in os.environ else {"log_level": "warning"}, os.environ)
        status = server.serve(config, announce_and_run)
    for problem in problems:
        print_note(problem)
    sys.exit(status or (NEGATIVE_RESULT if problems else 0))


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
