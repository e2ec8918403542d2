"""`loadledger verify`: of a ledger, with its archives or without, and of files with events by themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from loadledger.cli.options import json_option

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="LOADLEDGER_DATA",
    help="Directory of a ledger to check. [LOADLEDGER_DATA, where no FILE is given]",
)
@click.option(
    "--archive",
    "archives",
    multiple=True,
    type=_FILE,
    help="An archive of the ledger in --data; may be repeated, in any order.",
)
@click.option("--key", metavar="FILE|KEY_ID", help="Whose signature is expected: as `key ledger` prints it.")
@click.option("--expect", metavar="POSITION:HASH", help="What must be there: a head that was kept.")
@json_option
@click.argument("files", metavar="[FILE]...", nargs=-1, type=_FILE)
@click.pass_context
def verify(
    context: click.Context,
    data: Path | None,
    archives: tuple[Path, ...],
    key: str | None,
    expect: str | None,
    *,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check a ledger, or files that were exported or archived.

    Of a ledger (--data): the database's file, the chain, and what is stored beside it. Works beside a running
    server, and on a copy made with `backup`. Where events were archived, --archive names their files: they
    are checked, have to lead to where the log begins, and have to come to the state that is stored there.

    Each FILE, an export as jsonl or an archive, is checked by itself: its chain, and its signed head. With
    --data too, the ledger has to have the same events. Whose the signature is, only --key can say.

    The exit code is 0 where all is well, 1 where something is wrong, and 2 where nobody can say.
    """
    from events.findings import parse_expected  # noqa: PLC0415 - keeps `loadledger --help` quick
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from loadledger.cli.proof import ledger_in  # noqa: PLC0415
    from server.ledger.audited import check  # noqa: PLC0415

    if files and context.get_parameter_source("data") is not ParameterSource.COMMANDLINE:
        data = None
    _refuse(data, archives, key, files)
    try:
        expected = None if expect is None else parse_expected(expect)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expect") from None
    with problems_told():
        checked = check(None if data is None else ledger_in(data), archives, files, key, expected)
    click.echo(json.dumps(checked.members(), indent=2) if as_json else "\n".join(checked.lines()))
    sys.exit(0 if checked.verified else 1)


def _refuse(data: Path | None, archives: tuple[Path, ...], key: str | None, files: tuple[Path, ...]) -> None:
    """Refuse what has no meaning, rather than to leave a part of it out.

    Raises:
        UsageError: it has none.
    """
    if data is None and archives:
        raise click.UsageError(
            "--archive goes with the ledger in --data; to check an archive by itself, name it as FILE"
        )
    if data is None and not files:
        raise click.UsageError("say what to check: --data DIR of a ledger, or FILE")
    if key is not None and not (files or archives):
        raise click.UsageError("--key is of signed files: name them as FILE, or with --archive")
