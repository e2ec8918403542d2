"""`loadledger export | archive | backup`, and `key ledger`: files that prove what they have."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from loadledger.cli.options import data_option, json_option, print_json


@click.command("export")
@data_option
@click.option(
    "--format", "form", type=click.Choice(["jsonl", "cloudevents"]), default="jsonl", help="As what."
)
@click.option("--after", type=click.IntRange(min=0), help="Only events after this position.")
@click.option("--until", type=click.IntRange(min=0), help="Only events up to this position.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-")
def export_events(data: Path, form: str, after: int | None, until: int | None, file: Path) -> None:
    """Write events out as lines.

    They go to FILE, or to standard output, with a signed head at the end. Works beside a running server.
    Lines of `jsonl` have the exact bodies and hashes, and `verify` reads them (docs/verify-it-yourself.md).
    Those of `cloudevents` are CloudEvents 1.0 for other programs: `verify` does not read them.
    """
    from events.export import cloudevents, export, jsonl  # noqa: PLC0415
    from events.files import is_stream, refuse_own, written  # noqa: PLC0415
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from server.ledger.key import open_signer  # noqa: PLC0415

    with problems_told():
        ledger, sign = ledger_in(data), open_signer(data)
        lines = jsonl() if form == "jsonl" else cloudevents(sign.public_key)
        exported = export(ledger, lines, sign, after=after, until=until)
        if str(file) == "-":
            sys.stdout.buffer.writelines(exported)
            sys.stdout.buffer.flush()  # what fails fails here, where it is told
            return
        refuse_own(file, data)
        if is_stream(file):
            with file.open("wb") as target:
                target.writelines(exported)
            return
        with _ended_by_sigterm(), written(file, replace=True) as target:
            target.writelines(exported)


@click.command()
@data_option
@click.option(
    "--before",
    metavar="POSITION|TIME",
    required=True,
    help="What goes: events below a position, or recorded before a time like 2026-01-31T14:02:00Z.",
)
@json_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def archive(data: Path, before: str, file: Path, *, as_json: bool) -> None:
    """Move the oldest events to a compressed file that proves itself.

    Takes a server that is stopped. The chain goes on: the log then begins after the archived events. Jobs
    that had ended by then go too, except those that models are loaded by.
    """
    from events.archive import archive  # noqa: PLC0415
    from events.files import refuse_own  # noqa: PLC0415
    from events.lock import hold  # noqa: PLC0415
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from server.ledger.key import open_signer  # noqa: PLC0415

    with problems_told():
        ledger, sign = ledger_in(data), open_signer(data)
        refuse_own(file, data)
        with _ended_by_sigterm(), hold(data):
            done = archive(ledger, before, file, sign, datetime.now(UTC))
    if as_json:
        print_json(
            {
                "first_position": done.first_position,
                "last_position": done.last_position,
                "jobs": done.jobs,
                "sha256": done.sha256.hex(),
            }
        )
    else:
        click.echo(
            f"archived: positions {done.first_position} to {done.last_position}, {done.jobs} ended jobs"
        )
        click.echo(f"sha256 of {file.name}: {done.sha256.hex()}")
    if not done.alone:
        click.echo(
            f"loadledger: somebody reads {ledger.name}, so it was not made smaller, and {ledger.name}-wal "
            "stays beside it and is a part of it: copy with `backup`",
            err=True,
        )


@click.command()
@data_option
@json_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def backup(data: Path, file: Path, *, as_json: bool) -> None:
    """Copy the ledger to a file, and verify the copy.

    FILE is replaced if it is there. Works beside a running server. The keys are not in it: whoever has them
    can sign.
    """
    from events.backup import back_up  # noqa: PLC0415
    from events.files import refuse_own  # noqa: PLC0415
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from server.ledger.audited import members, told  # noqa: PLC0415

    with problems_told():
        ledger = ledger_in(data)
        refuse_own(file, data)
        with _ended_by_sigterm():
            found = back_up(ledger, file)
    if as_json:
        print_json(members(found))
    else:
        click.echo("\n".join(told(found)))


@click.command("ledger")
@data_option
@json_option
def ledger_key(data: Path, *, as_json: bool) -> None:
    """Show the public key that the ledger's heads are signed with, and its id."""
    from events.signing import key_id  # noqa: PLC0415
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from server.ledger.key import open_signer, public_pem  # noqa: PLC0415

    with problems_told():
        signer = open_signer(data)
    pem, name = public_pem(signer), key_id(signer.public_key)
    if as_json:
        print_json({"public_key": pem, "key_id": name})
    else:
        click.echo(f"{pem}key id: {name}")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end the command as an error does, so that what is half-written is removed."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def ledger_in(data: Path) -> Path:
    """Return the ledger's file in a data directory.

    Raises:
        FileNotFoundError: there is none.
    """
    from server.app import LEDGER  # noqa: PLC0415

    if not (data / LEDGER).is_file():
        raise FileNotFoundError(f"there is no {LEDGER} in {data}: name the data directory with --data")
    return data / LEDGER
