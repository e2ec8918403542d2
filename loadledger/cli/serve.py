"""`loadledger serve | check | demo`: run a server, say what would go wrong, and show what it is like."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from loadledger.cli.options import json_option
from loadledger.cli.problems import FAILED, INTERRUPTED, problems_told
from loadledger.cli.tables import in_one_line


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each setting; their values come from there, the environment, or the default."""
    from server.config import settings  # noqa: PLC0415 - keeps `loadledger --help` quick

    for setting in reversed(settings()):
        default = "no default" if setting.default is None else f"default: {setting.default}"
        text = f"{setting.help} [{setting.variable}; {'required' if setting.required else default}]"
        option = click.option(setting.flag, setting.name, metavar=setting.kind.__name__.upper(), help=text)
        command = option(command)
    text = "TOML file with settings by their names, for what neither options nor variables say."
    return click.option("--config", metavar="FILE", help=f"{text} [LOADLEDGER_CONFIG]")(command)


class SettingsCommand(click.Command):
    """A command that has an option for each setting; they are made when they are wanted."""

    made_names: frozenset[str] = frozenset()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the settings' options, then its own."""
        if not self.made_names:
            made = _made_options()
            self.params = [*made, *self.params]
            self.made_names = frozenset(str(parameter.name) for parameter in made)
        return super().get_params(ctx)


def _made_options() -> list[click.Parameter]:
    def nothing(**_: Any) -> None: ...

    return list(reversed(getattr(_settings_options(nothing), "__click_params__", [])))


@click.command(cls=SettingsCommand)
def serve(**flags: str | None) -> None:
    """Run the server until SIGTERM.

    Each setting comes from its option, else from its variable, else from the file that --config names, else
    it has its default.
    """
    from server import serve as server  # noqa: PLC0415 - as above
    from server.config import check_files, load_config  # noqa: PLC0415
    from server.pathchecks import check_paths  # noqa: PLC0415

    with problems_told():
        config = load_config(flags, os.environ)
        check_paths(config)
        check_files(config)
        sys.exit(server.serve(config, _announce))


def _announce(url: str) -> None:
    from server.unknownvariables import warn_of_unknown  # noqa: PLC0415 - as above

    warn_of_unknown(os.environ)  # here, since by now there is a log
    click.echo(f"loadledger is ready at {url}")
    sys.stdout.flush()


@click.command(cls=SettingsCommand)
@click.option("--quick", is_flag=True, show_default=False, help="Look at files only, and load no model.")
@click.option(
    "--limit-s",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="How long each version is given to load, if not its own timeout_s is less.",
)
@json_option
def check(*, quick: bool, limit_s: float, as_json: bool, **flags: str | None) -> None:
    """Say what is wrong with a configuration or a repository.

    Takes the options and variables that `serve` takes, and changes nothing; a server may run meanwhile. Each
    version of each model is loaded in a process of its own, one after the other, within the memory budget,
    and warmed up as a load is. --data is looked at if it is given.

    The exit code is 0 where nothing is wrong (notes are no problems), 1 where something is, and 2 where
    nothing could be checked.
    """
    from server.precheck import NothingToCheck, check_configuration  # noqa: PLC0415 - as above
    from server.repositorycheck import Checked, check_repository  # noqa: PLC0415

    try:
        config, findings = check_configuration(flags, os.environ)
    except NothingToCheck as error:
        raise click.UsageError(str(error)) from None
    checked = Checked(findings)
    with problems_told():
        try:
            check_repository(config, checked, limit_s=None if quick else limit_s, on_version=_progress())
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
    click.echo(json.dumps(checked.members(), indent=2) if as_json else "\n".join(_told(checked)))
    sys.exit(0 if checked.fine else FAILED)


def _progress() -> Callable[[str], None]:
    """Return what tells somebody who watches which version is being loaded."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda place: click.echo(f"loading {place} …", err=True)


def _told(checked: Any) -> list[str]:
    lines = []
    for finding in checked.findings:
        word = click.style(finding.severity.value, fg="red" if finding.severity == "problem" else "yellow")
        lines.append(f"{word}: {in_one_line(f'{finding.place}: {finding.text}')} ({finding.code})")
    problems = sum(finding.severity == "problem" for finding in checked.findings)
    counted = f"{_number(checked.models, 'model')}, {_number(checked.versions, 'version')}"
    tried = f", {checked.loaded} of them loaded" if checked.loaded else ""
    return [*lines, f"{counted}{tried}: {_number(problems, 'problem') if problems else 'no problems'}"]


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


@click.command()
def demo() -> None:
    """Load, ask, swap and unload a real model, and show the ledger."""
    from server.demo import run  # noqa: PLC0415 - as above

    sys.exit(run())
