"""The page `docs/cli.md`, made from the commands: `python -m loadledger.cli.reference` prints it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from loadledger.cli.main import ALIASES, SECTIONS, find, main
from loadledger.cli.serve import SettingsCommand

HEAD = """\
# The command

This page is made from the commands: `python -m loadledger.cli.reference > docs/cli.md`. Each says the same
with `--help`.

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
"""

SETTINGS = "Its other options are the settings of the server, one for each; `--help` lists them."


def reference() -> str:
    """Return the page; the same code gives the same text."""
    parts = [HEAD, *_aliases()]
    for title, commands in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in commands:
            parts += _described(find(name), f"loadledger {name}")
    return "\n".join(parts)


def _aliases() -> Iterator[str]:
    yield "**Other words.** What Docker and Ollama call by these names is here, too:\n"
    yield "| typed | means |"
    yield "| --- | --- |"
    for alias, meant in ALIASES.items():
        yield f"| `loadledger {alias}` | `loadledger {' '.join(meant)}` |"
    yield ""


def _described(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(main, info_name="loadledger", **main.context_settings)
    with click.Context(command, info_name=path.partition(" ")[2], parent=context) as inner:
        usage = " ".join(command.collect_usage_pieces(inner))
    yield f"### {path}\n"
    yield f"```text\n{path} {usage}\n```\n"
    yield _help(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from _described(command.commands[name], f"{path} {name}")
        return
    yield from _options(command)


def _help(command: click.Command) -> str:
    text = inspect.cleandoc(command.help or "")
    if "\b\n" in text:  # whose lines stay as they are
        text, _, kept = text.partition("\b\n")
        return f"{text}```text\n{kept}\n```\n"
    return f"{text}\n"


def _options(command: click.Command) -> Iterator[str]:
    if isinstance(command, SettingsCommand):
        yield f"{SETTINGS}\n"
    rows = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    own = [
        row for row in rows if not (isinstance(command, SettingsCommand) and row.name in command.made_names)
    ]
    if own:
        yield "| option | what |"
        yield "| --- | --- |"
        yield from (_row(option) for option in own)
        yield ""


def _row(option: click.Option) -> str:
    flags = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or _kind(option)}"
    told = (option.help or "").replace("|", "\\|")
    shown = (
        option.show_default is not False and option.default not in {None, False, ""} and not option.multiple
    )
    default = (
        f" Default: `{option.default}`." if shown and isinstance(option.default, str | int | float) else ""
    )
    return f"| `{(flags + value).replace('|', chr(92) + '|')}` | {told}{default} |"


def _kind(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.type.name.upper().split()[0]


if __name__ == "__main__":
    click.echo(reference(), nl=False)
