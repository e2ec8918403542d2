"""`loadledger verify | replay | export | archive | backup` and `key ledger`: the files of a ledger."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadledger.cli.server import data_option, json_option, print_json

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
    from events.audit.verify import parse_expected  # noqa: PLC0415 - keeps `loadledger --help` quick
    from loadledger.cli.localledger import check  # noqa: PLC0415
    from loadledger.cli.output import problems_told  # noqa: PLC0415

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


@click.command()
@data_option
@click.option(
    "--until",
    metavar="POSITION|TIME",
    help="As of when: a position, or a time with its offset like 2026-01-31T14:02:00Z. [default: the head]",
    show_default=False,
)
@click.option(
    "--archive",
    "archives",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What was archived from this ledger: all its archives, in any order; may be repeated.",
)
@click.option("--model", "model_id", metavar="ID", help="Only this model, and its jobs.")
@json_option
@click.option(
    "--rebuild",
    "rebuilds",
    is_flag=True,
    show_default=False,
    help="Write the stored projections anew, and say whether they differed; takes a server that is stopped.",
)
def replay(
    data: Path,
    until: str | None,
    archives: tuple[Path, ...],
    model_id: str | None,
    *,
    as_json: bool,
    rebuilds: bool,
) -> None:
    """Fold the log, and print what was so at a moment.

    That is the models, and the jobs that had not ended. Nothing but the log is asked, and where events were
    archived, what archiving stored of them; with --archive, the archives are folded instead, and --until may
    be before the log begins. With --rebuild, the exit code is 1 where the projections differed.
    """
    from loadledger.cli.output import problems_told  # noqa: PLC0415
    from server.app import LEDGER  # noqa: PLC0415 - keeps `loadledger --help` quick

    if rebuilds and (until is not None or model_id is not None or archives):
        raise click.UsageError("--rebuild is of the whole log: leave --until and --model out, and --archive")
    if not (data / LEDGER).is_file():
        raise click.BadParameter(f"there is no {LEDGER} in {data}", param_hint="--data")
    with problems_told():
        if rebuilds:
            _rebuild(data, data / LEDGER, as_json=as_json)
        else:
            told = replayed(data / LEDGER, until, model_id, archives)
            click.echo(json.dumps(told, indent=2) if as_json else "\n".join(_lines(told)))


def replayed(
    path: Path, until: str | None, model_id: str | None, archives: Sequence[Path] = ()
) -> dict[str, Any]:
    """Return what was so at a moment, as the management API shows it.

    Raises:
        LedgerProblem: `invalid_parameter`, `beyond_head`, `archived`, `log_unavailable`, and of archives
            `archive_missing`, `ledger_damaged`, `nothing_there`.
        OSError: an archive cannot be read.
    """
    from events.audit.audit import replay  # noqa: PLC0415 - as above
    from events.sqlite.schema import opened_to_read  # noqa: PLC0415
    from server.api.schemas import job_view, model_view  # noqa: PLC0415
    from server.api.timetravel import as_of  # noqa: PLC0415

    with opened_to_read(path) as connection:
        moment, state = replay(connection, until, archives)
    active = state.active()
    ids = [each for each in sorted(state.models) if model_id in (None, each)]
    return {
        **as_of(moment),
        "models": [model_view(each, state, None, active) for each in ids],
        "jobs": [job_view(job, None) for job in state.unended(model_id)],
    }


def _lines(told: dict[str, Any]) -> Iterator[str]:
    recorded = f", recorded {told['as_of_time']}" if told["as_of_time"] else ""
    yield f"as of position {told['as_of']}{recorded}"
    yield f"models: {len(told['models'])}"
    for model in told["models"]:
        version = f" version {model['version']}" if model["version"] is not None else ""
        yield f"  {model['id']}: {model['state']}{version}{', active' if model['active'] else ''}"
        if model["loaded_at"] is not None:
            where = f"position {model['position']}, job {model['job_id']}"
            yield f"    loaded {model['loaded_at']} by {model['loaded_by']}, {where}"
        for file in model["files"]:
            yield f"    {file['path']}: {file['bytes']} bytes, sha256 {file['sha256']}"
        if model["error"] is not None:
            yield f"    {model['error']['code']}: {model['error']['message']}"
    yield f"jobs that had not ended: {len(told['jobs'])}"
    for job in told["jobs"]:
        version = f" version {job['version']}" if job["version"] is not None else ""
        yield f"  {job['id']}: {job['kind']} of {job['model_id']}{version}, {job['status']}"
        yield f"    requested {job['created_at']} by {job['requested_by']}, cause {job['cause']}"


def _rebuild(data: Path, path: Path, *, as_json: bool) -> None:
    from events.datalock import lock_data  # noqa: PLC0415 - as above
    from events.sqlite.storage import rebuild_file  # noqa: PLC0415

    with lock_data(data):
        done = rebuild_file(path)
    differences = done.differences
    told = {"position": done.position, "differ": bool(differences), "differences": differences}
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif differences:
        click.echo("the stored projections differed from the log, and were made anew:")
        for difference in differences:
            click.echo(f"  {difference}")
    else:
        click.echo(f"the stored projections are what the log gives, up to position {told['position']}")
    if differences:
        raise SystemExit(1)


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
    from events.audit.export import cloudevents, export, jsonl  # noqa: PLC0415
    from events.audit.files import is_stream, refuse_own, written  # noqa: PLC0415
    from loadledger.cli.output import problems_told  # noqa: PLC0415
    from server.auth.keys import open_signer  # noqa: PLC0415

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
    from events.audit.archive import archive  # noqa: PLC0415
    from events.audit.files import refuse_own  # noqa: PLC0415
    from events.datalock import lock_data  # noqa: PLC0415
    from loadledger.cli.output import problems_told  # noqa: PLC0415
    from server.auth.keys import open_signer  # noqa: PLC0415

    with problems_told():
        ledger, sign = ledger_in(data), open_signer(data)
        refuse_own(file, data)
        with _ended_by_sigterm(), lock_data(data):
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
    from events.audit.backup import back_up  # noqa: PLC0415
    from events.audit.files import refuse_own  # noqa: PLC0415
    from loadledger.cli.localledger import members, told  # noqa: PLC0415
    from loadledger.cli.output import problems_told  # noqa: PLC0415

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
    from events.audit.signing import key_id  # noqa: PLC0415
    from loadledger.cli.output import problems_told  # noqa: PLC0415
    from server.auth.keys import open_signer, public_pem  # noqa: PLC0415

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
