"""`loadledger completion`: shell completion; ids of models and jobs come from the server, if it is quick."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete

from loadledger.cli.output import to_printable
from loadledger.profiles import find_target

SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
VARIABLE = "_LOADLEDGER_COMPLETE"
"""click's variable by which the shell asks for completions."""
PATIENCE_S = 1.0
"""Time limit of a completion: a person has pressed Tab and waits."""
MOST = 200
"""Largest number of offered values."""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Safe ids only: the shell puts the value into its command line."""


@click.command()
@click.argument("shell", type=click.Choice([*SHELLS]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash:  echo 'eval "$(loadledger completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(loadledger completion zsh)"' >> ~/.zshrc
    fish:  loadledger completion fish > ~/.config/fish/completions/loadledger.fish
    """  # noqa: D301 - to click, \b is one letter, before lines to keep
    click.echo(SHELLS[shell](context.find_root().command, {}, "loadledger", VARIABLE).source())


Find = Callable[[Any], Iterable[tuple[str, str]]]
"""Returns values and their descriptions, given a client."""


def completer(find: Find) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a callback that completes the values that a server has."""

    def complete(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        offered: list[CompletionItem] = []

        def ask() -> None:
            from loadledger import Client

            # Errors would disturb the shell's command line.
            with suppress(Exception):
                place = find_target(context.params.get("url"), context.params.get("profile"), os.environ)
                with Client(place.url, token=place.token, ca_file=place.ca, timeout_s=PATIENCE_S) as client:
                    offered.extend(list(_items(find(client), begun)))

        asking = threading.Thread(target=ask, daemon=True)  # does not delay the exit
        asking.start()
        asking.join(PATIENCE_S)
        return list(offered)

    return complete


models_of_server = completer(lambda client: ((model.id, model.state) for model in client.models()))
loaded_models = completer(
    lambda client: ((model.id, model.state) for model in client.models() if model.state != "unloaded")
)
latest_jobs = completer(
    lambda client: (
        (job.id, f"{job.kind} of {job.model_id}, {job.status}") for job in client.jobs(limit=MOST)
    )
)


def _items(found: Iterable[tuple[str, str]], begun: str) -> Iterator[CompletionItem]:
    fitting = ((value, text) for value, text in found if value.startswith(begun) and _PLAIN.fullmatch(value))
    return (CompletionItem(value, help=to_printable(text)) for value, text in islice(fitting, MOST))
