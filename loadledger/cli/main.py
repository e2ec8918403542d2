"""The command `loadledger`: thin, and what it needs is imported by the subcommand that needs it."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from types import ModuleType

import click

from loadledger.cli.problems import is_dumb
from loadledger.cli.sections import Contents

SECTIONS = {
    "Serve": ("serve", "check", "demo"),
    "Models of a server": ("load", "unload", "models", "infer", "resources", "top"),
    "Jobs and events of a server": ("jobs", "job", "cancel", "events"),
    "Files of a ledger": ("verify", "replay", "export", "archive", "backup", "prepared"),
    "Keys, tokens and this shell": ("token", "key", "login", "completion"),
}
"""The table of contents."""

ALIASES = {
    "ls": ("models",),
    "list": ("models",),
    "ps": ("models", "--loaded"),
    "run": ("load", "--wait"),
    "stop": ("unload", "--wait"),
    "logs": ("events",),
    "inspect": ("models",),
    "show": ("models",),
    "kill": ("unload", "--force", "--wait"),
    "stats": ("top",),
}
"""What people type who know Docker and Ollama."""

EPILOG = """\b
A server is told by --url or LOADLEDGER_URL, with a token in LOADLEDGER_TOKEN;
or by a profile, which `loadledger login` writes. Without, it is
http://127.0.0.1:8080. Words of Docker and Ollama do as well: ls, ps, run,
show, stop, kill, logs, stats."""


def find(name: str) -> click.Command:
    """Return a command; only its own module is imported, since all of them together take 20 ms."""
    module = _module(name)
    command: click.Command = module.export_events if name == "export" else getattr(module, name)
    return command


def _module(name: str) -> ModuleType:  # noqa: PLR0912 - a table, of names that imports are held to the rules by
    match name:
        case "serve" | "check" | "demo":
            return import_module("loadledger.cli.serve")
        case "load" | "unload":
            return import_module("loadledger.cli.load")
        case "models":
            return import_module("loadledger.cli.models")
        case "infer":
            return import_module("loadledger.cli.infer")
        case "resources":
            return import_module("loadledger.cli.resources")
        case "top":
            return import_module("loadledger.cli.top")
        case "jobs" | "job" | "cancel":
            return import_module("loadledger.cli.jobs")
        case "events":
            return import_module("loadledger.cli.events")
        case "verify":
            return import_module("loadledger.cli.verify")
        case "replay":
            return import_module("loadledger.cli.replay")
        case "export" | "archive" | "backup":
            return import_module("loadledger.cli.proof")
        case "prepared":
            return import_module("loadledger.cli.prepared")
        case "token" | "key":
            return import_module("loadledger.cli.tokens")
        case "login":
            return import_module("loadledger.cli.login")
        case "completion":
            return import_module("loadledger.cli.completion")
    raise LookupError(name)


@click.group(
    cls=Contents,
    sections=SECTIONS,
    find=find,
    aliases=ALIASES,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="loadledger")
@click.pass_context
def main(context: click.Context) -> None:
    """Load and unload ONNX models over HTTP, each in a process of its own, with a ledger of who did what."""
    os.umask(0o077)  # what is written is the ledger and keys: nobody else's to read
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is shown as such, and no error
        sys.stdout.reconfigure(errors="replace")
    if os.environ.get("NO_COLOR") or is_dumb(os.environ):  # no-color.org: whatever it says
        context.color = False
