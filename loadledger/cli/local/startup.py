"""What `serve` prints once it is ready: the models, what is wrong with others, and the next step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from loadledger.cli.local.signin import SignedIn, sign_in_user
from loadledger.cli.output import count_of, to_printable
from runtime.filesystem import RepositoryBusy
from server.appkeys import CONFIG, REPOSITORY
from server.check import CheckFinding, CheckResult, Severity, check_repository
from server.configsources import warn_of_unknown_variables
from server.serve import RunningServer

CHECK_LIMIT_S = 60.0
"""Of the look at the repository: thousands of models on a network mount take a while."""

MAX_FINDINGS = 20
"""Findings that are printed; `loadledger check` prints all."""


async def announce(server: RunningServer) -> SignedIn | None:
    """Print that the server is ready, and what it found; on a terminal, sign its user in, and return that."""
    warn_of_unknown_variables(os.environ)  # now that logging is set up
    _print(f"loadledger is ready at {server.url}")
    _print(f"console: {server.url}/ (`loadledger console` signs you in)")
    profile = await sign_in_user(server) if sys.stdout.isatty() else None
    if profile is not None:
        _print(f"profile: {to_printable(str(profile.path))} has an admin's token{profile.hint}")
    for line in await check_models(server):
        _print(line)
    return profile


async def check_models(server: RunningServer) -> list[str]:
    """Return what a quick check of the repository finds, as lines."""
    config, result = server.app[CONFIG], CheckResult()
    look = partial(check_repository, config, result)
    try:
        await server.app[REPOSITORY].file_system.run("", look, CHECK_LIMIT_S)
    except RepositoryBusy as problem:
        return [str(problem)]
    return list(describe_models(server.app[REPOSITORY].root, result))


def describe_models(root: Path, result: CheckResult) -> Iterator[str]:
    """Yield how many models there are, what is wrong with others, and the next command."""
    shown = result.findings[:MAX_FINDINGS]
    counted = f"{count_of(result.models, 'model')} with {count_of(result.versions, 'version')}"
    yield f"models: {counted if result.models else 'none'} in {to_printable(str(root))}"
    yield from (format_finding(each) for each in shown if each.code != "empty")
    if len(result.findings) > len(shown):
        yield f"{len(result.findings) - len(shown)} more: `loadledger check --quick` prints them"
    if result.models:
        yield "next: `loadledger models` lists them, `loadledger load MODEL --wait` loads one"
    else:
        yield "next: `loadledger add NAME FILE.onnx` adds a model, `loadledger run FILE.onnx` also loads it"


def format_finding(finding: CheckFinding) -> str:
    colour = "red" if finding.severity is Severity.PROBLEM else "yellow"
    word = click.style(finding.severity.value, fg=colour)
    return f"{word}: {to_printable(f'{finding.place}: {finding.text}')} ({finding.code})"


def _print(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()
