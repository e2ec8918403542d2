"""A group of commands whose help is a table of contents, and that understands other tools' words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from loadledger.cli.problems import ends_told

MAX_HELP_CHARACTERS = 200
"""Of a command's first sentence: none is that long, so none is cut off."""


class Contents(click.Group):
    """Shows its commands by sections, in their order.

    Args:
        sections: titles, and the names of the commands under each.
        find: gives the command of a name in them, when it is wanted.
        aliases: words that stand for a command and its first arguments; the help does not list them.
    """

    def __init__(
        self,
        *arguments: Any,
        sections: Mapping[str, Sequence[str]],
        find: Callable[[str], click.Command],
        aliases: Mapping[str, Sequence[str]],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections
        self.aliases = aliases
        self._names = [name for names in sections.values() for name in names]
        self._find = find

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Return a command; None if there is none of this name."""
        return self._find(name) if name in self._names else None

    def list_commands(self, _context: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return list(self._names)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; what a command does is in the same column throughout."""
        width = max(map(len, self._names))
        for title, names in self.sections.items():
            rows = [(name.ljust(width), _first_sentence(self._find(name))) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is meant."""
        with ends_told():
            return super().invoke(ctx)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name or an alias; what is none is told with what is like it."""
        name = args[0]
        if name == "help":  # as of git, docker and ollama
            if len(args) == 1:
                click.echo(context.get_help())
                context.exit()
            return self.resolve_command(context, [*args[1:], "--help"])
        if name in self.aliases:
            return super().resolve_command(context, [*self.aliases[name], *args[1:]])
        if name not in self._names and not name.startswith("-"):
            from difflib import get_close_matches  # noqa: PLC0415 - 5 ms, and only here

            like = get_close_matches(name, [*self._names, *self.aliases], n=3)
            advice = f"did you mean {' or '.join(like)}?" if like else "`loadledger --help` lists them"
            context.fail(f"there is no command {name[:64]!r}; {advice}")
        return super().resolve_command(context, args)


def _first_sentence(command: click.Command) -> str:
    return command.get_short_help_str(limit=MAX_HELP_CHARACTERS)
