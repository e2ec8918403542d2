"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
