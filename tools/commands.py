"""The page `docs/cli.md`, from the commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from loadledger.cli.main import ALIASES, SECTIONS, find, main
from loadledger.cli.serve import SettingsCommand
from tools.markdown import cell, table

HEAD = """\
# The command

This page is generated from the commands; a test holds it to them. Each says the same with `--help`.

## In common

**Which server.** Commands that talk to a server take `--url`, or else `LOADLEDGER_URL`, or else the profile's
`url`, or else http://127.0.0.1:8080. The token is in `LOADLEDGER_TOKEN`, or else in the profile;
certificates to trust instead of the system's are in the file that `LOADLEDGER_CA` names, or else the
profile's `ca`.

**Profiles.** `loadledger login` asks for a token, tries it, and writes it to
`~/.config/loadledger/profile.toml` (or below `XDG_CONFIG_HOME`) with mode 0600; with `--profile staging` that
is `staging.toml` there, and with a path that file. `--profile`, or `LOADLEDGER_PROFILE`, chooses another than
the first. A profile that others may read is refused, and its token is shown to its own URL only.

```toml
url = "https://models.example.org"
token = "eyJ…"
ca = "/etc/ssl/our-ca.pem"
```

**What is printed.** Tables for people, with colours on a terminal only, and never where `NO_COLOR` is set
or `TERM` is `dumb`; `--json` prints what the server says. Answers go to standard output, all else to
standard error.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | done, and it did not come out well: a job failed or was cancelled, a check found something |
| 2 | not done: typed wrongly, refused, or nobody answered; standard error says what to do |
| 130 | ended by Ctrl-C |
| 141 | ended since whoever read went away, as `head` does |

**Waiting.** `load`, `unload` and `job` follow a job with `--wait`, over restarts of the server. Ctrl-C ends
the waiting and not the job; `loadledger job JOB --wait` comes back to it.

**In a shell.** `eval "$(loadledger completion bash)"` completes commands and options, and, from the server
that is meant, models and jobs.

**Other words.** What Docker and Ollama call by these names is here, too:
"""

SETTINGS = "Its other options are the settings of the server, one for each; `--help` lists them."


def command_page() -> str:
    """Return the page."""
    aliases = (
        (f"`loadledger {alias}`", f"`loadledger {' '.join(meant)}`") for alias, meant in ALIASES.items()
    )
    parts = [HEAD, table(("typed", "means"), aliases)]
    for title, commands in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in commands:
            parts += _command(find(name), f"loadledger {name}")
    return "\n".join(parts)


def _command(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(main, info_name="loadledger", **main.context_settings)
    with click.Context(command, info_name=path.partition(" ")[2], parent=context) as inner:
        usage = " ".join(command.collect_usage_pieces(inner))
    yield f"### {path}\n\n```text\n{path} {usage}\n```\n"
    # What stands behind a \b keeps its lines, for click as here.
    text, mark, kept = inspect.cleandoc(command.help or "").partition("\b\n")
    yield f"{text}```text\n{kept}\n```\n" if mark else f"{text}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from _command(command.commands[name], f"{path} {name}")
        return
    if isinstance(command, SettingsCommand):
        yield f"{SETTINGS}\n"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        yield table(("option", "what"), map(_row, options))


def _row(option: click.Option) -> tuple[str, str]:
    flags = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or _kind(option)}"
    shown = option.show_default is not False and option.default not in {None, False, ""}
    has_default = shown and not option.multiple and isinstance(option.default, str | int | float)
    default = f" Default: `{option.default}`." if has_default else ""
    return cell(f"`{flags}{value}`"), f"{cell(option.help or '')}{default}"


def _kind(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.type.name.upper().split()[0]
