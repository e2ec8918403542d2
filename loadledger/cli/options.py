"""What several commands have: options, and answers in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, show_default=False, help="Print JSON.")
"""Adds `--json`, which the command gets as `as_json`."""


def data_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--data`, without which the command does not run."""
    return click.option(
        "--data",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="LOADLEDGER_DATA",
        required=True,
        help="Directory of the ledger and the keys.",
    )(command)


def print_json(value: Any) -> None:
    """Print a value of the client's, or plain ones, over as many lines as it takes.

    What would move a terminal's cursor is escaped, as JSON may have it anyway.
    """
    import msgspec  # noqa: PLC0415 - keeps `loadledger --help` quick

    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    click.echo("".join(map(_visible, text)) if not text.isascii() else text)


def _visible(letter: str) -> str:
    if letter.isprintable() or letter == "\n":
        return letter
    return json.dumps(letter)[1:-1]
