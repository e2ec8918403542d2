"""`loadledger run`: what is to run, and where: on the running server, or on one of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import click

from loadledger.cli.output import exit_with_error, to_printable
from loadledger.cli.server import ServerChoice, find_chosen_target, server_options
from loadledger.profiles import PROFILE, URL

GENERIC_NAMES = frozenset({"model", "onnx"})
"""Names of files and folders in common layouts, which name no model: the folder around them does."""

MAX_NAME = 128
"""Characters of a model's name."""


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
    from loadledger.cli.local.bringup import run_on_server, serve_and_run  # noqa: PLC0415 - for a quick --help

    subject = choose_subject(model, name)
    target = find_chosen_target(where)
    if run_on_server(target, subject):
        return
    if where.url or where.profile or any(os.environ.get(each) for each in (URL, PROFILE)):
        exit_with_error(f"{to_printable(target.url)} cannot be reached; is the server running there?")
    serve_and_run(subject)


def choose_subject(given: str, name: str | None) -> Subject:
    """Return what an argument names: a file or folder if it exists, else a model."""
    path = Path(given)
    if path.exists():
        return Subject(name or name_model(path.resolve()), path)
    if name is not None or "/" in given or path.suffix:
        exit_with_error(f"there is no file or folder {to_printable(given)}")
    return Subject(given)


def name_model(path: Path) -> str:
    for part in (path.stem if path.is_file() else path.name, *(parent.name for parent in path.parents)):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("._-")[:MAX_NAME]
        if name and not name.isdecimal() and name.lower() not in GENERIC_NAMES:
            return name
    raise click.UsageError(f"{to_printable(str(path))} has no name for a model: give one with --name")
