"""`loadledger load | unload`: ask a server for it, and wait or not."""

from __future__ import annotations

from typing import Any

import click

from loadledger.cli.completion import loaded_models, models_of_server
from loadledger.cli.connection import Where, connected, server_options
from loadledger.cli.following import answer
from loadledger.cli.options import json_option

_wait_option = click.option(
    "--wait", "-w", is_flag=True, show_default=False, help="Follow it to its end; Ctrl-C leaves it running."
)


@click.command()
@click.argument("model", shell_complete=models_of_server)
@click.option(
    "--version", "-v", metavar="N", type=click.IntRange(min=1), help="Which; the highest if left out."
)
@_wait_option
@click.option(
    "--priority", type=click.Choice(["high", "normal", "low"]), help="Who goes first of those that wait."
)
@click.option(
    "--timeout-s",
    metavar="SECONDS",
    type=click.IntRange(min=1),
    help="After how long it fails, waiting included.",
)
@click.option(
    "--keep-alive-s",
    metavar="SECONDS",
    type=click.IntRange(min=-1),
    help="Idle seconds to its unload; -1 is never.",
)
@click.option(
    "--memory-limit-bytes", metavar="BYTES", type=click.IntRange(min=1), help="What each instance may take."
)
@click.option(
    "--strategy", type=click.Choice(["beside", "in_place", "auto"]), help="How it replaces a loaded version."
)
@click.option("--pin/--no-pin", "pinned", default=None, help="Never unload it for room or idleness.")
@click.option("--instances", metavar="N", type=click.IntRange(min=1), help="Workers side by side.")
@click.option(
    "--max-batch-size", metavar="N", type=click.IntRange(min=0), help="Run so many waiting requests together."
)
@click.option(
    "--max-queue-delay-us",
    metavar="MICROSECONDS",
    type=click.IntRange(min=0),
    help="How long one waits for others.",
)
@json_option
@server_options
def load(
    model: str, *, version: int | None, wait: bool, as_json: bool, where: Where, **parameters: Any
) -> None:
    """Load a model, or another version of a loaded one.

    What is left out is as the model's loadledger.toml or the server says. With --wait, the exit code is 1 if
    the load fails, and the reason is told.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    with connected(where) as client:
        job = client.load(model, version, **given)
        answer(client, job, wait=wait, as_json=as_json)


@click.command()
@click.argument("model", required=False, shell_complete=loaded_models)
@click.option("--force", "-f", is_flag=True, show_default=False, help="Do not wait for running requests.")
@_wait_option
@json_option
@server_options
def unload(model: str | None, *, force: bool, wait: bool, as_json: bool, where: Where) -> None:
    """Unload a model; without a name, the one that was loaded last.

    With --force, running requests are ended, a load under way is cancelled, and a stuck worker is killed.
    """
    with connected(where) as client:
        job = client.unload(model, force=force)
        answer(client, job, wait=wait, as_json=as_json)
