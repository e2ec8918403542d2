"""What a shell offers for a model or a job, as the server says it; nothing if it does not answer at once."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from loadledger.cli.profile import find_place
from loadledger.cli.tables import in_one_line

PATIENCE_S = 1.0
"""Somebody has pressed a key, and waits; the client itself would try again for longer."""
MOST = 200
"""More is no choice."""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""As ids of models and jobs are: what is offered is put into a line that a shell then runs."""


def models_of_server(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Offer the models of the repository."""
    return _offered(context, begun, lambda client: ((model.id, model.state) for model in client.models()))


def loaded_models(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Offer the models that are loaded, or about to be."""

    def found(client: Any) -> Iterator[tuple[str, str]]:
        return ((model.id, model.state) for model in client.models() if model.state != "unloaded")

    return _offered(context, begun, found)


def latest_jobs(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Offer the newest jobs."""

    def found(client: Any) -> Iterator[tuple[str, str]]:
        jobs = client.jobs(limit=MOST)
        return ((job.id, f"{job.kind} of {job.model_id}, {job.status}") for job in jobs)

    return _offered(context, begun, found)


def _offered(context: click.Context, begun: str, find: Any) -> list[CompletionItem]:
    offered: list[CompletionItem] = []

    def ask() -> None:
        from loadledger import Client  # noqa: PLC0415 - keeps `loadledger --help` quick

        # Whatever goes wrong, the shell's line is no place to say so.
        with suppress(Exception):
            place = find_place(context.params.get("url"), context.params.get("profile"), os.environ)
            with Client(place.url, token=place.token, ca_file=place.ca, timeout_s=PATIENCE_S) as client:
                offered.extend(list(_items(find(client), begun)))

    asking = threading.Thread(target=ask, daemon=True)  # the process does not wait for it
    asking.start()
    asking.join(PATIENCE_S)
    return list(offered)


def _items(found: Iterable[tuple[str, str]], begun: str) -> Iterator[CompletionItem]:
    count = 0
    for value, help_text in found:
        if value.startswith(begun) and _PLAIN.fullmatch(value) and count < MOST:
            count += 1
            yield CompletionItem(value, help=in_one_line(help_text))
