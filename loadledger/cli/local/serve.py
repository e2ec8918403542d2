"""`loadledger serve | check | demo`: run a server, check its configuration, demonstrate it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import click

from loadledger.cli.local.database import require_driver
from loadledger.cli.output import NEGATIVE_RESULT, count_of, report_problems
from loadledger.cli.server import json_option


class SettingsCommand(click.Command):
    """A command with an option for each setting of the server."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options of the settings, then the command's own."""
        return [*_settings_options(), *super().get_params(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then those of the settings in sections."""
        from server.config import SECTIONS  # noqa: PLC0415 - as below

        rows = {each.name: each.get_help_record(ctx) for each in self.get_params(ctx)}
        sections = {title: [rows.pop(name) for name in names] for title, names in SECTIONS.items()}
        for title, found in {"Options": list(rows.values()), **sections}.items():
            with formatter.section(title):
                formatter.write_dl([row for row in found if row is not None])


@cache
def _settings_options() -> list[click.Option]:
    from server.config import settings  # noqa: PLC0415 - keeps `loadledger --help` quick

    text = "TOML file with settings by name; options and variables override it."
    options = [click.Option(["--config"], metavar="FILE", help=f"{text} [LOADLEDGER_CONFIG]")]
    for setting in settings():
        default = "no default" if setting.default is None else f"default: {setting.default}"
        text = f"{setting.help} [{setting.variable}; {default}]"
        names = [setting.flag, setting.name]
        options.append(click.Option(names, metavar=setting.kind.__name__.upper(), help=text))
    return options


@click.command(cls=SettingsCommand)
@click.option(
    "--accept-rollback",
    is_flag=True,
    show_default=False,
    help="Serve a ledger that does not contain the last signed head, as after restoring a backup; recorded.",
)
def serve(*, accept_rollback: bool, **flags: str | None) -> None:
    """Run the server until SIGTERM.

    A setting's option overrides its variable, which overrides the --config file, which overrides the default.
    """
    from loadledger.cli.local.startup import announce  # noqa: PLC0415 - as above
    from server import serve as server  # noqa: PLC0415
    from server.check import load_config  # noqa: PLC0415

    with report_problems():
        config = load_config(flags, os.environ)
        sys.exit(server.serve(config, announce, accepts_rollback=accept_rollback))


@click.command(cls=SettingsCommand)
@click.option("--quick", is_flag=True, show_default=False, help="Load no model.")
@click.option(
    "--limit-s",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Time limit of each load; a smaller timeout_s of the model goes first.",
)
@json_option
def check(*, quick: bool, limit_s: float, as_json: bool, **flags: str | None) -> None:
    """Check a configuration and a model repository.

    It takes the options and variables of `serve` and changes nothing; a server may be running. Each version
    of each model is loaded in a process of its own, one after the other, within the memory budget, and warmed
    up. Of a --ledger it checks the schema, the role and the clock. --data is optional.

    Exit code: 0 without problems (notes do not count), 1 with problems, 2 if nothing could be checked.
    """
    from server.check import (  # noqa: PLC0415 - as above
        CheckResult,
        check_configuration,
        check_ledger,
        check_repository,
        check_workers,
    )

    result = CheckResult()
    with report_problems():
        config = check_configuration(flags, os.environ, result)
        check_ledger(config, result)
        candidates = check_repository(config, result)
        check_workers(config, result, [] if quick else candidates, limit_s=limit_s, on_version=_progress())
    click.echo(json.dumps(result.members(), indent=2) if as_json else "\n".join(_lines(result)))
    sys.exit(0 if result.fine else NEGATIVE_RESULT)


def _progress() -> Callable[[str], None]:
    """Return a callback that prints, on a terminal, which version is being loaded."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda place: click.echo(f"loading {place} …", err=True)


def _lines(result: Any) -> list[str]:
    from loadledger.cli.local.startup import format_finding  # noqa: PLC0415 - as above

    lines = [format_finding(finding) for finding in result.findings]
    problems = sum(finding.severity == "problem" for finding in result.findings)
    counted = f"{count_of(result.models, 'model')}, {count_of(result.versions, 'version')}"
    tried = f", {result.loaded} of them loaded" if result.loaded else ""
    lines += [result.confinement] if result.confinement else []
    return [*lines, f"{counted}{tried}: {count_of(problems, 'problem') if problems else 'no problems'}"]


@click.command()
@click.option(
    "--cluster",
    is_flag=True,
    help="Show three nodes over a ledger in PostgreSQL instead, of which one is killed.",
)
def demo(*, cluster: bool) -> None:
    """Load, query, swap and unload a real model; show the ledger.

    With --cluster it starts a PostgreSQL server and three nodes in a temporary directory, and removes all of
    it at the end. It needs PostgreSQL's programs (Debian: apt install postgresql), not a running server.

    Exit code: 0 if everything was as the demo says, 1 if not, 2 if PostgreSQL is not installed.
    """
    if cluster:
        require_driver()
        from loadledger.cli.local.democluster import run_cluster  # noqa: PLC0415 - as above

        sys.exit(run_cluster())
    from loadledger.cli.local.demo import run  # noqa: PLC0415 - as above

    sys.exit(run())
