"""JSON as commands print it."""

from __future__ import annotations

import json
from typing import Any

import click


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
