"""The command `loadledger`: its sections, aliases and help; each command's module is imported on use."""

from __future__ import annotations

import os
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click

from loadledger.cli.output import is_dumb, prepare_output, report_problems

SECTIONS = {
    "Serve": {
        "run": "loadledger.cli.serve:run",
        "serve": "loadledger.cli.serve:serve",
        "check": "loadledger.cli.serve:check",
        "demo": "loadledger.cli.serve:demo",
    },
    "Models of a server": {
        "add": "loadledger.cli.models:add",
        "rm": "loadledger.cli.models:remove",
        "load": "loadledger.cli.jobs:load",
        "unload": "loadledger.cli.jobs:unload",
        "models": "loadledger.cli.models:models",
        "show": "loadledger.cli.models:show",
        "label": "features.labels.cli:label_model",
        "verify-model": "features.signatures.cli:verify_model",
        "infer": "loadledger.cli.infer:infer",
        "resources": "loadledger.cli.models:resources",
        "top": "loadledger.cli.top:top",
    },
    "Jobs and events of a server": {
        "jobs": "loadledger.cli.jobs:jobs",
        "job": "loadledger.cli.jobs:job",
        "cancel": "loadledger.cli.jobs:cancel",
        "approve": "features.approvals.cli:approve",
        "events": "loadledger.cli.events:events",
        "records": "features.records.cli:records",
    },
    "Nodes that share a ledger": {
        "nodes": "features.nodes.cli:nodes",
        "drain": "features.nodes.cli:drain",
    },
    "Files of a ledger": {
        "verify": "loadledger.cli.ledger:verify",
        "replay": "loadledger.cli.ledger:replay",
        "export": "loadledger.cli.ledger:export_events",
        "backup": "loadledger.cli.ledger:backup",
        "migrate": "features.nodes.cli:migrate",
        "discard": "features.nodes.cli:discard",
    },
    "Keys, tokens and this shell": {
        "token": "loadledger.cli.keys:token",
        "key": "loadledger.cli.keys:key",
        "login": "loadledger.cli.keys:login",
        "whoami": "loadledger.cli.keys:whoami",
        "console": "loadledger.cli.keys:console",
        "completion": "loadledger.cli.completion:completion",
    },
}
"""The sections of the help, and the place of each command."""

ALIASES = {
    "ls": ("models",),
    "list": ("models",),
    "ps": ("models", "--loaded"),
    "stop": ("unload", "--wait"),
    "logs": ("events",),
    "inspect": ("show",),
    "kill": ("unload", "--force", "--wait"),
    "stats": ("top",),
    "status": ("resources",),
}
"""Aliases from Docker, Ollama and others."""

EPILOG = """\b
Name the server by --url or LOADLEDGER_URL, and set the token in
LOADLEDGER_TOKEN; or save both with `loadledger login`. The default server is
http://127.0.0.1:8080, or at LOADLEDGER_PORT. Words of Docker and Ollama work
too: ls, ps, stop, kill, logs, stats."""


COMMANDS = {name: place for commands in SECTIONS.values() for name, place in commands.items()}
EXAMPLES = Path(__file__).with_name("examples.txt")
"""Command lines for each command, whose help shows the first two; `demo` takes no arguments and has one."""
MAX_HELP_CHARACTERS = 200
"""Longer than each command's first sentence, so that click never cuts one."""


def find_command(name: str) -> click.Command:
    """Import a command's module and return the command; importing all modules would take 20 ms."""
    command: click.Command = resolve_name(COMMANDS[name])
    _add_examples(command, f"loadledger {name}", EXAMPLES.read_text(encoding="utf-8").splitlines())
    return command


def _add_examples(command: click.Command, path: str, lines: list[str]) -> None:
    """End the help of a command, and of those in a group, with its first two examples."""
    own = [line for line in lines if f"{line} ".startswith(f"{path} ")]
    command.epilog = "\n  ".join(["\b\nExamples:", *own[:2]])
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        _add_examples(inner, f"{path} {name}", own)


class CommandGroup(click.Group):
    """The top-level group: commands in sections, and aliases."""

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        return find_command(name) if name in COMMANDS else None

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, with one column for all descriptions."""
        width = max(map(len, COMMANDS))
        for title, names in SECTIONS.items():
            rows = [
                (name.ljust(width), find_command(name).get_short_help_str(MAX_HELP_CHARACTERS))
                for name in names
            ]
            with formatter.section(title):
                formatter.write_dl(rows)

    def make_context(self, *given: Any, **options: Any) -> click.Context:
        prepare_output()
        with report_problems():  # of `--help` and `--version`
            return super().make_context(*given, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with report_problems():
            return super().invoke(ctx)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by name or alias; an unknown one is refused with similar ones."""
        name = args[0]
        if name == "help":  # as in git, docker and ollama
            if len(args) == 1:
                click.echo(context.get_help())
                context.exit()
            return self.resolve_command(context, [*args[1:], "--help"])
        if name in ALIASES:
            return super().resolve_command(context, [*ALIASES[name], *args[1:]])
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches  # takes 5 ms

            meant = " or ".join(get_close_matches(name, [*COMMANDS, *ALIASES], n=3))
            advice = f"did you mean {meant}?" if meant else "`loadledger --help` lists them"
            context.fail(f"there is no command {name[:64]!r}; {advice}")
        return super().resolve_command(context, args)


@click.group(
    cls=CommandGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="loadledger")
@click.pass_context
def main(context: click.Context) -> None:
    """Load and unload ONNX models over HTTP, each in a process of its own, with a ledger of who did what."""
    os.umask(0o077)  # ledger and keys are private
    if os.environ.get("NO_COLOR") or is_dumb(os.environ):  # no-color.org: any value
        context.color = False
