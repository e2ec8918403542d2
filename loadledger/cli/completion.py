"""`loadledger completion`: what teaches a shell to complete commands, options, models and jobs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_LOADLEDGER_COMPLETE"
"""By which the shell asks; click makes the name of the command's."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, models and jobs.

    \b
    bash:  echo 'eval "$(loadledger completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(loadledger completion zsh)"' >> ~/.zshrc
    fish:  loadledger completion fish > ~/.config/fish/completions/loadledger.fish
    """  # noqa: D301 - to click, \b is one letter, before lines to keep
    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(context.find_root().command, {}, "loadledger", VARIABLE).source())
