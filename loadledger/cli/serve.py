"""`loadledger run | serve | check | demo`: run a model or a server, check a configuration, demonstrate it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import click

from loadledger.cli.chosenmodel import ChosenModel, choose_model
from loadledger.cli.options import (
    ServerChoice,
    find_chosen_target,
    json_option,
    parse_version_name,
    server_options,
)
from loadledger.cli.output import NEGATIVE_RESULT, count_of, print_result
from loadledger.profiles import PROFILE, URL, ServerTarget

LISTS_ALL = "loadledger.lists_all"


MOST_USED = {"repository", "data", "host", "port", "ledger", "memory_budget", "keep_alive_s", "on_demand"}
MOST_USED |= {"tls_cert", "tls_key", "log_level"}
"""The settings that `--help` lists; `--help-all` lists all."""


class SettingsCommand(click.Command):
    """A command with an option for each setting of the server."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options of the settings, then the command's own."""
        return [*_settings_options(), *super().get_params(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[LISTS_ALL] = "--help-all" in args
        return super().parse_args(ctx, ["--help"] if ctx.meta[LISTS_ALL] else args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then those of the settings in sections."""
        from server.config import SECTIONS

        rows = {each.name: each.get_help_record(ctx) for each in self.get_params(ctx)}
        listed = rows.keys() | () if ctx.meta[LISTS_ALL] else MOST_USED
        sections = {
            title: [row for name in names if (row := rows.pop(name)) and name in listed]
            for title, names in SECTIONS.items()
        }
        own = [*filter(None, rows.values()), ("--help-all", "Show this message with all settings and exit.")]
        for title, found in {"Options": own, **sections}.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)


@cache
def _settings_options() -> list[click.Option]:
    from server.config import settings

    text = "TOML file with settings by name; options and variables override it."
    options = [click.Option(["--config"], metavar="FILE", help=f"{text} [LOADLEDGER_CONFIG]")]
    for setting in settings():
        default = "no default" if setting.default is None else f"default: {setting.default}"
        text = f"{setting.help} [{setting.variable}; {default}]"
        names = [setting.flag, setting.name]
        options.append(click.Option(names, metavar=setting.kind.__name__.upper(), help=text))
    return options


@click.command()
@click.argument("model", metavar="FILE|FOLDER|SOURCE|MODEL[/VERSION]")
@click.option(
    "--name", metavar="NAME", help="Name of the model. [default: of the file, folder or repository]"
)
@click.option("--digest", metavar="sha256:HEX", help="SHA-256 that a SOURCE must have.")
@server_options
def run(model: str, *, name: str | None, digest: str | None, where: ServerChoice) -> None:
    """Load a model, and print how to send it a request.

    A file or folder is first added to the server's models, unless a version of the model has the same files,
    or it lies in the server's repository. If its name is taken by a model with other inputs or outputs, or is
    only that of a folder around it, the command asks first, and without a terminal wants a --name.

    A SOURCE is a name with ://, as of `add`: it is downloaded here and then added, unless a version of the
    model was added from what the name means now.

    If no server runs, the command serves until Ctrl-C, with the settings of `serve` from variables and the
    --config file that LOADLEDGER_CONFIG names.
    """
    import asyncio

    from loadledger.cli.startup import run_on_server, serve_and_run

    chosen = choose_model(model, name, digest)
    target = find_chosen_target(where)
    is_chosen = where.url or where.profile or any(os.environ.get(each) for each in (URL, PROFILE))
    with _download_source(chosen, target, may_be_absent=not is_chosen) as chosen:
        if not asyncio.run(run_on_server(target, chosen, where.words, may_be_absent=not is_chosen)):
            serve_and_run(chosen)


@contextmanager
def _download_source(
    chosen: ChosenModel, target: ServerTarget, *, may_be_absent: bool
) -> Iterator[ChosenModel]:
    """Give a model whose source is downloaded, unless the server has a version of what its name means.

    Here, and not once a server runs in this process: Ctrl-C ends it at once.
    """
    if chosen.source is None:
        yield chosen
        return
    from loadledger.sources.downloads import Downloads
    from loadledger.sources.fetch import resolve_source
    from loadledger.sources.terminal import download_version

    named = resolve_source(chosen.source, chosen.digest)
    version = _find_version(chosen.name, named.resolved, target, may_be_absent=may_be_absent)
    if version is not None:
        yield replace(chosen, version=version)
        return
    with Downloads() as downloads:
        yield replace(chosen, local=download_version(chosen.name, named, downloads))


def _find_version(
    name: str, resolved: str | None, target: ServerTarget, *, may_be_absent: bool
) -> int | None:
    """Return the version of a model that was added from a resolved name, or None."""
    from loadledger import BadAnswer, Client, NotFound, ServerUnreachable

    try:
        with Client(target.url, token=target.token, ca_file=target.ca) as client:
            model = client.model(name)
    except NotFound:
        return None
    except (ServerUnreachable, BadAnswer):
        if not may_be_absent:
            raise
        return None
    return next((each.version for each in reversed(model.sources) if each.resolved == resolved), None)


@click.command(cls=SettingsCommand)
@click.option(
    "--accept-rollback",
    is_flag=True,
    help="Serve a ledger without the last signed head, as after a restore, or a new ledger; recorded.",
)
def serve(*, accept_rollback: bool, **flags: str | None) -> None:
    """Run the server until SIGTERM.

    A setting's option overrides its variable, which overrides the --config file, which overrides the default.
    """
    from loadledger.cli.startup import announce
    from server import serve as server
    from server.check import load_config

    config = load_config(flags, os.environ)
    sys.exit(server.serve(config, announce, accepts_rollback=accept_rollback))


@click.command(cls=SettingsCommand)
@click.argument("model", metavar="[MODEL[/VERSION]]", required=False)
@json_option
def check(*, model: str | None, as_json: bool, **flags: str | None) -> None:
    """Check a configuration and a model repository.

    It takes the options and variables of `serve` and changes nothing; a server may be running. It loads no
    model, and reads what the file of each version declares. Of models with a max_batch_size it says whether
    requests of several clients are joined in batches, or which operator forbids that. Of a --ledger it checks
    the schema, the role and the clock. --data is optional. Of a policy for loads it prints what that does to
    each model's highest version, which it hashes, and to the models that the ledger in --data has as loaded.

    With MODEL it checks one version of that instead, by default the highest. It also loads it in a process of
    its own, within the memory budget and its timeout_s, and warms it up.

    Exit code: 0 without problems (notes do not count), 1 with problems, 2 if nothing could be checked.
    """
    from loadledger.cli.startup import format_finding
    from nodes.check import check_ledger
    from server import check as checks

    named = parse_version_name(model) if model is not None else None
    result = checks.CheckResult(lambda each: None if as_json else click.echo(format_finding(each)))
    config = checks.check_configuration(flags, os.environ, result)
    check_ledger(config, result)
    state = checks.read_ledger(config, result)
    if named is None:
        loadable = checks.check_repository(config, result, state.is_removed)
        checks.check_references(config, result, loadable)
        checks.check_rows(config, result, loadable, state)
        checks.check_changes(config, result, state)
        checks.check_workers(config, result)
        checks.check_policy(config, result, state)
    else:
        loadable = checks.check_version(config, result, state.is_removed, *named)
        checks.check_workers(config, result, checks.check_rows(config, result, loadable, state))
    print_result(result.members(), _lines(result), as_json=as_json)
    sys.exit(0 if result.fine else NEGATIVE_RESULT)


def _lines(result: Any) -> list[str]:
    problems = sum(finding.severity == "problem" for finding in result.findings)
    counted = f"{count_of(result.models, 'model')}, {count_of(result.versions, 'version')}"
    tried = ", loaded" if result.loaded else ""
    lines = [*filter(None, [result.memory, result.confinement]), *result.devices]
    return [*lines, f"{counted}{tried}: {count_of(problems, 'problem') if problems else 'no problems'}"]


@click.command()
def demo() -> None:
    """Load, query, swap and unload a real model; show the ledger.

    Exit code: 0 if everything was as the demo says, 1 if not.
    """
    from loadledger.cli.demo import run_demo

    sys.exit(run_demo())
