"""`loadledger verify | replay | export | archive | backup | migrate | discard` and `key ledger`.

They work on the files of a data directory, or on a ledger in PostgreSQL; no server is asked.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from loadledger.cli.options import Command, data_option, json_option, own_data
from loadledger.cli.output import NEGATIVE_RESULT, exit_with_error, print_note, print_result, report_problems

INSTALL = "pip install 'loadledger[postgres]'"
_FILE = click.Path(path_type=Path, dir_okay=False)


def _archive_option(text: str) -> Callable[[Command], Command]:
    return click.option("--archive", "archives", multiple=True, type=_FILE, help=text)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="LOADLEDGER_DATA",
    help="Directory of a ledger to check. [LOADLEDGER_DATA, without FILE]",
)
@_archive_option("An archive of the ledger. May be repeated, in any order.")
@click.option("--key", metavar="FILE|KEY_ID", help="Expected signing key, as `key ledger` prints it.")
@click.option("--expect", metavar="POSITION:HASH", help="Expected event: a head that you kept.")
@click.option(
    "--store",
    is_flag=True,
    show_default=False,
    help="Check the store of model versions in --data instead of the ledger: hash all of its files.",
)
@click.option("--ledger", "address", metavar="URL", help="Verify the ledger in this PostgreSQL database.")
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
    store: bool,
    address: str | None,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Verify a ledger, exports, archives or a store.

    --data verifies a ledger: the database file, the hash chain and the stored projections. The server may be
    running; a copy made with `backup` works too. The ledger must contain the head that the server kept last,
    or, with --expect, that one. If events were archived, give the files with --archive: they have to lead to
    the first event of the log, and to the state that the ledger stored there.

    Each FILE, a jsonl export or an archive, is verified by itself: its chain and its signed head. With
    --data, its events are also compared with the ledger's. Use --key to check who signed.

    With --ledger, a ledger in a PostgreSQL database is verified in the same way, with --archive, too; it has
    no stored projections. A server's replica of it is in the server's --data.

    With --store, the private copies that models are loaded from are hashed and compared with their names. The
    server may be running.

    Exit code: 0 verified, 1 not verified, 2 if it cannot be decided.
    """
    from events.audit.verify import parse_expected
    from loadledger.cli.verification import VerifyResult, verify_ledger_and_files

    if (files or address) and context.get_parameter_source("data") is not ParameterSource.COMMANDLINE:
        data = None
    if data is None and not (files or archives or address):
        data = own_data()
    if address is not None and (data is not None or files or store):
        raise click.UsageError("--ledger URL takes --archive, --key and --expect, and nothing else to verify")
    if store:
        _verify_store(data, as_json=as_json, others=bool(archives or key or expect or files))
    _refuse(data or address, archives, key, files)
    try:
        expected = None if expect is None else parse_expected(expect)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expect") from None
    with report_problems():
        if address is not None:
            from server.auth.keys import expected_key

            wanted = None if key is None else expected_key(key)
            found = _in_database(lambda it: it.verify_address(address, expected, archives, wanted))
            checked = VerifyResult(found, (), wanted)
        else:
            ledger = None if data is None else _ledger_in(data)
            checked = verify_ledger_and_files(ledger, archives, files, key, expected)
    _exit_verified(checked, as_json=as_json)


def _exit_verified(checked: Any, *, as_json: bool) -> NoReturn:
    click.echo(json.dumps(checked.members(), indent=2) if as_json else "\n".join(checked.lines()))
    sys.exit(0 if checked.verified else NEGATIVE_RESULT)


def _verify_store(data: Path | None, *, as_json: bool, others: bool) -> NoReturn:
    from loadledger.cli.verification import verify_local_store

    if data is None or others:
        raise click.UsageError("--store takes --data DIR, and nothing else to verify beside it")
    with report_problems():
        checked = verify_local_store(data)
    _exit_verified(checked, as_json=as_json)


def _refuse(
    ledger: Path | str | None, archives: tuple[Path, ...], key: str | None, files: tuple[Path, ...]
) -> None:
    """Refuse combinations of options without a meaning."""
    if ledger is None and archives:
        raise click.UsageError(
            "--archive belongs to a ledger, in --data or --ledger; to verify an archive by itself, name it "
            "as FILE"
        )
    if key is not None and not (files or archives):
        raise click.UsageError("--key is for signed files: name them as FILE, or with --archive")


@click.command()
@data_option
@click.option(
    "--until",
    metavar="POSITION|TIME",
    help="Last event to fold: a position, or a time like 2026-01-31T14:02:00Z. [default: the head]",
    show_default=False,
)
@_archive_option("An archive of this ledger; give all of them, in any order. May be repeated.")
@click.option("--model", "model_id", metavar="ID", help="Only this model and its jobs.")
@json_option
@click.option(
    "--rebuild",
    "rebuilds",
    is_flag=True,
    show_default=False,
    help="Rebuild the stored projections and print the differences; the server must be stopped.",
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
    """Replay the log and print the state at a moment.

    The state is the models and the unended jobs. It comes from the log alone; if events were archived, it
    starts from the state stored then. With --archive it starts from the archives, and --until may lie before
    the log's first event. With --rebuild, the exit code is 1 if the stored projections differed.
    """
    if rebuilds and (until is not None or model_id is not None or archives):
        raise click.UsageError("--rebuild takes the whole log: leave out --until, --model and --archive")
    with report_problems():
        ledger = _ledger_in(data)
        if rebuilds:
            _rebuild(data, ledger, as_json=as_json)
        else:
            state = _replay_state(ledger, until, model_id, archives)
            click.echo(json.dumps(state, indent=2) if as_json else "\n".join(_state_lines(state)))


def _replay_state(
    path: Path, until: str | None, model_id: str | None, archives: Sequence[Path]
) -> dict[str, Any]:
    """Return the state at a moment, in the form of the management API."""
    from events.audit.archivechain import replay
    from events.sqlite.readonly import open_read_only
    from server.api.jobs import job_view
    from server.api.models import model_view
    from server.api.timetravel import as_of

    with open_read_only(path) as ledger:
        moment, state = replay(ledger, until, archives)
    active = state.active()
    ids = [each for each in sorted(state.models) if model_id in (None, each)]
    return {
        **as_of(moment),
        "models": [model_view(each, state, None, active) for each in ids],
        "jobs": [job_view(job, None) for job in state.unended(model_id)],
    }


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    recorded = f", recorded {state['as_of_time']}" if state["as_of_time"] else ""
    yield f"as of position {state['as_of']}{recorded}"
    since = f" since {state['server']['since']}" if state["server"]["since"] else ""
    yield f"server: {state['server']['state']}{since}"
    for node in state.get("nodes", ()):
        since = f" since {node['since']}" if node["since"] else ""
        yield f"  node {node['id']}: {node['state']}{since}"
    yield f"models: {len(state['models'])}"
    for model in state["models"]:
        version = f" version {model['version']}" if model["version"] is not None else ""
        yield f"  {model['id']}: {model['state']}{version}{', active' if model['active'] else ''}"
        if model["loaded_at"] is not None:
            where = f"position {model['position']}, job {model['job_id']}"
            yield f"    loaded {model['loaded_at']} by {model['loaded_by']}, {where}"
        for file in model["files"]:
            yield f"    {file['path']}: {file['bytes']} bytes, sha256 {file['sha256']}"
        if model["error"] is not None:
            yield f"    {model['error']['code']}: {model['error']['message']}"
    yield f"unended jobs: {len(state['jobs'])}"
    for job in state["jobs"]:
        version = f" version {job['version']}" if job["version"] is not None else ""
        yield f"  {job['id']}: {job['kind']} of {job['model_id']}{version}, {job['status']}"
        yield f"    requested {job['created_at']} by {job['requested_by']}, cause {job['cause']}"


def _rebuild(data: Path, path: Path, *, as_json: bool) -> None:
    from events.sqlite.datalock import lock_data, lock_ledger
    from events.sqlite.storage import rebuild_file

    with lock_data(data), lock_ledger(path):
        done = rebuild_file(path)
    result = {"position": done.position, "differ": bool(done.differences), "differences": done.differences}
    lines = [f"the stored projections match the log, up to position {done.position}"]
    if done.differences:
        rebuilt = "the stored projections differed from the log and were rebuilt:"
        lines = [rebuilt, *(f"  {difference}" for difference in done.differences)]
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines))
    if done.differences:
        sys.exit(NEGATIVE_RESULT)


@click.command("export")
@data_option
@click.option(
    "--format", "form", type=click.Choice(["jsonl", "cloudevents"]), default="jsonl", help="Output format."
)
@click.option("--after", type=click.IntRange(min=0), help="Only events after this position.")
@click.option("--until", type=click.IntRange(min=0), help="Only events up to this position.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-")
def export_events(data: Path, form: str, after: int | None, until: int | None, file: Path) -> None:
    """Export events as lines.

    They go to FILE or standard output, and end with a signed head. The server may be running. `jsonl` has the
    exact bodies and hashes; `verify` reads it (docs/verify-it-yourself.md). `cloudevents` is CloudEvents 1.0
    for other programs; `verify` does not read it.
    """
    from events.audit.export import JSONL, cloudevents, export
    from events.files import is_stream, refuse_own, write_file
    from server.auth.keys import open_signer

    with report_problems():
        ledger, sign = _ledger_in(data), open_signer(data)
        lines = JSONL if form == "jsonl" else cloudevents(sign.public_key)
        exported = export(ledger, lines, sign, after=after, until=until)
        if str(file) == "-":
            sys.stdout.buffer.writelines(exported)
            sys.stdout.buffer.flush()  # so that an error is reported here
            return
        refuse_own(file, data)
        if is_stream(file):
            with file.open("wb") as target:
                target.writelines(exported)
            return
        with _exit_on_sigterm(), write_file(file, replace=True) as target:
            target.writelines(exported)


@click.command()
@data_option
@click.option(
    "--before",
    metavar="POSITION|TIME",
    required=True,
    help="Archive events below this position, or before a time like 2026-01-31T14:02:00Z.",
)
@click.option(
    "--ledger",
    "address",
    metavar="URL",
    help="Archive the ledger in this PostgreSQL database, as the role that owns it: "
    "postgresql://OWNER@HOST/DATABASE. The key in --data signs.",
)
@json_option
@click.argument("file", type=_FILE)
def archive(data: Path, before: str, address: str | None, file: Path, *, as_json: bool) -> None:
    """Move the oldest events to a compressed file that proves itself.

    Stop the server first. The log then begins after the archived events, and the hash chain continues. Jobs
    that had ended by then move too, except those behind loaded models.

    With --ledger, servers may be running, also that of --data. FILE's folder needs room for a copy of the
    ledger while the command runs.
    """
    from events.files import refuse_own
    from server.auth.keys import open_signer

    with report_problems():
        if address is None:
            _ledger_in(data)
        sign = open_signer(data)
        refuse_own(file, data)
        with _exit_on_sigterm():
            if address is None:
                done = _archive_file(data, before, file, sign)
            else:
                done = _in_database(lambda it: it.archive_database(address, data, before, file, sign))
    first, last, sha256 = done.first_position, done.last_position, done.sha256.hex()
    print_result(
        {"first_position": first, "last_position": last, "jobs": done.jobs, "sha256": sha256},
        [
            f"archived: positions {first} to {last}, {done.jobs} ended jobs",
            f"sha256 of {file.name}: {sha256}",
        ],
        as_json=as_json,
    )
    if not done.alone:
        print_note(
            "ledger.db is being read, so it could not shrink; ledger.db-wal belongs to it: copy both with "
            "`loadledger backup`"
        )


def _archive_file(data: Path, before: str, file: Path, sign: Any) -> Any:
    """Archive the ledger of a data directory whose server is stopped."""
    from events.audit.archive import archive
    from events.sqlite.datalock import lock_data, lock_ledger, refuse_replica

    ledger = _ledger_in(data)
    with lock_data(data), lock_ledger(ledger):
        refuse_replica(data)
        return archive(ledger, before, file, sign, datetime.now(UTC))


@click.command()
@data_option
@json_option
@click.argument("file", type=_FILE)
def backup(data: Path, file: Path, *, as_json: bool) -> None:
    """Copy the ledger to a file and verify the copy.

    An existing FILE is replaced. The server may be running. The keys are not included, since anyone with them
    can sign.
    """
    from events.audit.backup import back_up
    from events.files import refuse_own
    from loadledger.cli.verification import audit_members, format_audit

    with report_problems():
        ledger = _ledger_in(data)
        refuse_own(file, data)
        with _exit_on_sigterm():
            found = back_up(ledger, file)
    print_result(audit_members(found), format_audit(found), as_json=as_json)


@click.command("ledger")
@data_option
@json_option
def ledger_key(data: Path, *, as_json: bool) -> None:
    """Show the public key of the ledger's signatures, and its id."""
    from events.audit.signing import key_id
    from server.auth.keys import open_signer, public_pem

    with report_problems():
        signer = open_signer(data)
    pem, name = public_pem(signer), key_id(signer.public_key)
    print_result({"public_key": pem, "key_id": name}, [f"{pem}key id: {name}"], as_json=as_json)


_ledger_option = click.option(
    "--ledger",
    "address",
    metavar="URL",
    envvar="LOADLEDGER_LEDGER",
    required=True,
    help="Database, as the role that owns the ledger: postgresql://OWNER@HOST/DATABASE. [LOADLEDGER_LEDGER]",
)


@click.command()
@_ledger_option
@click.option(
    "--server-role",
    metavar="ROLE",
    help="Role of the servers: may read, and append through a function, nothing else.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Data directory whose ledger is copied into the database; it is the server's replica from then on.",
)
@json_option
def migrate(address: str, server_role: str | None, data: Path | None, *, as_json: bool) -> None:
    """Create or update the schema of a ledger in PostgreSQL.

    Run it as the role that owns the ledger, never with a server's credentials: with its first run, with each
    release that changes the schema, and to let a role in. With --data, the ledger of a stopped server is
    verified, copied into the empty database with its positions and hashes, and verified there.
    """
    with report_problems():
        done = _in_database(lambda it: it.migrate_database(address, server_role, data))
    lines = [f"schema: {done['migrations']} migrations applied"]
    if server_role is not None:
        lines.append(f"role {server_role}: may read and append")
    if data is not None:
        lines.append(f"copied and verified: {done['events']} events, head {done['position']}:{done['hash']}")
    print_result(done, lines, as_json=as_json)


@click.command()
@_ledger_option
@json_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def discard(address: str, file: Path, *, as_json: bool) -> None:
    """Remove the end of a ledger in PostgreSQL that no node can read.

    For nodes that say that an event cannot be folded, because somebody with their role appended it. Run it as
    the role that owns the ledger, with the latest release that any node has, when that role has another
    password. All events from that one on, which no node has, go to FILE, and `EventsDiscarded` takes their
    place.
    """
    with report_problems():
        done = _in_database(lambda it: it.discard_unreadable(address, file))
    members = {"first_position": done.first_position, "last_position": done.last_position, "hash": done.hash}
    line = f"discarded: positions {done.first_position} to {done.last_position}, kept in {file}"
    print_result(members, [line], as_json=as_json)


def _in_database(call: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """Run what a function returns, given the module for ledgers in PostgreSQL, which needs the driver."""
    require_driver()
    import asyncio

    from loadledger.cli import database

    return asyncio.run(call(database))


def require_driver() -> None:
    from importlib.util import find_spec

    if find_spec("asyncpg") is None:
        exit_with_error(f"asyncpg is not installed: {INSTALL}")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that drafts are removed."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _ledger_in(data: Path) -> Path:
    """Return the ledger's file in a data directory, which must exist."""
    from events.sqlite.datalock import LEDGER

    if not (data / LEDGER).is_file():
        raise FileNotFoundError(f"there is no {LEDGER} in {data}: name the data directory with --data")
    return data / LEDGER
