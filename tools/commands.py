"""Generate `docs/cli.md` from the commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from loadledger.cli.main import ALIASES, SECTIONS, find_command, main
from loadledger.cli.serve import SettingsCommand
from tools.markdown import cell, table

HEAD = """\
# The command

This page is generated from the commands; a test keeps it current. Each command prints the same with `--help`.

## All commands

**Server.** Commands use the first of these addresses: `--url`, `LOADLEDGER_URL`, the profile's `url`,
http://127.0.0.1 with the port in `LOADLEDGER_PORT`, http://127.0.0.1:8080. The token is that of
`LOADLEDGER_TOKEN` or of the profile. To trust other certificates than the system's, set `LOADLEDGER_CA` or
the profile's `ca` to a file.

**Profiles.** `loadledger login` asks for a token, tests it, and writes it to
`~/.config/loadledger/profile.toml` (or below `XDG_CONFIG_HOME`) with mode 0600. With `--profile staging` the
file is `staging.toml`; with a path it is that file. Choose a profile with `--profile` or
`LOADLEDGER_PROFILE`. A profile that others can read is refused. Its token is sent to its own URL only.

```toml
url = "https://models.example.org"
token = "eyJ…"
ca = "/etc/ssl/our-ca.pem"
```

**Output.** Commands print tables. Colours appear on a terminal only, and never if `NO_COLOR` is set or `TERM`
is `dumb`. `--json` prints the server's answer. Results go to standard output, everything else to standard
error.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | done, with a bad result: a job failed or was cancelled, a check found a problem, `run` could not run |
| 2 | not done: a usage error, a refusal, or no answer; standard error says what to do |
| 130 | ended by Ctrl-C |
| 141 | ended because the reader closed the pipe, as `head` does |

**Waiting.** With `--wait`, `load`, `unload` and `job` follow a job, across restarts of the server.
Ctrl-C ends the waiting, not the job; `loadledger job JOB --wait` resumes it.

**Completion.** `eval "$(loadledger completion bash)"` completes commands, options, models and jobs.

**Aliases.** These names of Docker and Ollama work, too:
"""

SETTINGS = "Its other options are the server's settings; `--help-all` lists all, `--help` the most used ones."


def command_page() -> str:
    """Return the page."""
    aliases = (
        (f"`loadledger {alias}`", f"`loadledger {' '.join(meant)}`") for alias, meant in ALIASES.items()
    )
    parts = [HEAD, table(("typed", "means"), aliases)]
    for title, commands in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in commands:
            parts += _command(find_command(name), f"loadledger {name}")
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
    examples = (command.epilog or "").splitlines()[2:]
    yield "\n".join(["```text", *map(str.strip, examples), "```\n"])


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
