"""`loadledger verify | replay | export | backup` and `key ledger`: files of a data directory, no server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadledger.cli import options, output

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--data",
    type=options.FOLDER,
    envvar="LOADLEDGER_DATA",
    help="Directory of a ledger to check. [LOADLEDGER_DATA, without FILE]",
)
@click.option("--key", metavar="FILE|KEY_ID", help="Expected signing key, as `key ledger` prints it.")
@click.option("--expect", "expected", type=options.KEPT_HEAD, help="Expected event: a head that you kept.")
@click.option(
    "--store",
    is_flag=True,
    help="Check the store of model versions in --data instead of the ledger: hash all of its files.",
)
@click.option("--ledger", "address", metavar="URL", help="Verify the ledger in this PostgreSQL database.")
@options.json_option
@click.argument("files", metavar="[FILE]...", nargs=-1, type=_FILE)
@click.pass_context
def verify(
    context: click.Context,
    data: Path | None,
    key: str | None,
    expected: Any,
    *,
    store: bool,
    address: str | None,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Verify a ledger, exports or a store.

    --data verifies a ledger: the database file, the hash chain and the stored projections. The server may be
    running; a copy made with `backup` works too. The ledger must contain the head that the server kept last,
    or, with --expect, that one.

    A load under the operator's policy is checked again: its signature, and what persons said of its bytes.
    Remarks are no findings: they name, for example, emergencies.

    Each FILE, a jsonl export, is verified by itself: its chain and its signed head. With --data,
    its events are also compared with the ledger's. Use --key to check who signed. A FILE that `backup` made
    is verified as the ledger, without the kept head.

    With --ledger, a ledger in a PostgreSQL database is verified in the same way; it has no stored
    projections. A server's replica of it is in the server's --data.

    With --store, the private copies that models are loaded from are hashed and compared with their names. The
    server may be running.

    Exit code: 0 verified, 1 not verified, 2 if it cannot be decided.
    """
    from loadledger.cli.verification import VerifyResult, verify_ledger_and_files, verify_local_store

    if (files or address) and context.get_parameter_source("data") is not ParameterSource.COMMANDLINE:
        data = None
    if data is None and not (files or address):
        data = options.own_data()
    if address is not None and (data is not None or files or store):
        raise click.UsageError("--ledger URL takes --expect, and nothing else to verify")
    if store and (data is None or key or expected or files):
        raise click.UsageError("--store takes --data DIR, and nothing else to verify beside it")
    if key is not None and not files:
        raise click.UsageError("--key is for signed files: name them as FILE")
    checked: Any
    if data is not None and store:
        checked = verify_local_store(data)
    elif address is not None:
        from features.nodes.cli import import_admin

        checked = VerifyResult(import_admin().verify_address(address, expected), (), None)
    else:
        ledger = None if data is None else _ledger_in(data).parent
        checked = verify_ledger_and_files(ledger, files, key, expected)
    output.print_result(checked.members(), checked.lines(), as_json=as_json)
    sys.exit(0 if checked.verified else output.NEGATIVE_RESULT)


@click.command()
@options.data_option
@click.option(
    "--until",
    type=options.MOMENT,
    help="Last event to fold: a position, or a time like 10m (ago) or 14:02. [default: the head]",
)
@click.option("--model", "model_id", metavar="ID", help="Only this model and its jobs.")
@options.json_option
@click.option(
    "--rebuild",
    "rebuilds",
    is_flag=True,
    help="Rebuild the stored projections and print the differences; the server must be stopped.",
)
def replay(data: Path, until: str | None, model_id: str | None, *, as_json: bool, rebuilds: bool) -> None:
    """Replay the log and print the state at a moment.

    The state is the models and the unended jobs. It comes from the log alone. With --rebuild, the
    exit code is 1 if the stored projections differed.
    """
    if rebuilds and (until is not None or model_id is not None):
        raise click.UsageError("--rebuild takes the whole log: leave out --until and --model")
    if options.parse_version_name(model_id or "")[1] is not None:
        raise click.UsageError("the state is of all versions of a model: give --model without /VERSION")
    ledger = _ledger_in(data)
    if rebuilds:
        _rebuild(data, ledger, as_json=as_json)
    else:
        state = _replay_state(ledger, until, model_id)
        output.print_result(state, _state_lines(state), as_json=as_json)


def _replay_state(path: Path, until: str | None, model_id: str | None) -> dict[str, Any]:
    """Return the state at a moment, in the form of the management API."""
    import msgspec

    from answers.past import PastAnswer
    from events.audit.replay import replay
    from events.history import describe_model
    from events.sqlite.readonly import open_read_only
    from server.api.jobs import make_job_info
    from server.api.models import make_model_info
    from server.api.timetravel import at_moment

    with open_read_only(path) as ledger:
        moment, state = replay(ledger, until)
    active = state.active()
    known = {*state.models, *state.registers.versions}
    ids = [each for each in sorted(known) if model_id in (None, each)]
    models = [
        make_model_info(describe_model(state, each), is_active=active is not None and active.id == each)
        for each in ids
    ]
    jobs = [make_job_info(job) for job in state.unended(model_id)]
    shown: dict[str, Any] = msgspec.to_builtins(at_moment(PastAnswer(), moment))
    shown.update(msgspec.to_builtins({"models": models, "jobs": jobs}))
    return shown


def _state_lines(state: dict[str, Any]) -> Iterator[str]:
    recorded = f", recorded {state['as_of_time']}" if "as_of_time" in state else ""
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
        for copy in model.get("copies_at", ()):
            what = f"version {copy['version']}, loaded {copy['loaded_at']}"
            where = f"position {copy['position']}, job {copy['job_id']}"
            yield f"    copy at {copy['node']}: {what}, {where}"
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
    output.print_result(result, lines, as_json=as_json)
    if done.differences:
        sys.exit(output.NEGATIVE_RESULT)


@click.command("export")
@options.data_option
@click.option(
    "--format", "form", type=click.Choice(["jsonl", "cloudevents"]), default="jsonl", help="Output format."
)
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only events after this position.")
@click.option("--until", type=click.IntRange(min=0), help="Only events up to this position.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-")
def export_events(data: Path, form: str, after: int, until: int | None, file: Path) -> None:
    """Export events as lines.

    They go to FILE, which is replaced, or standard output, and end with a signed head. The server may be
    running. `jsonl` has the exact bodies and hashes; `verify` reads it (docs/verify-it-yourself.md).
    `cloudevents` is CloudEvents 1.0 for other programs; `verify` does not read it.
    """
    from events.audit.export import JSONL, cloudevents, export
    from events.files import is_stream, refuse_own, write_file
    from server.auth.keys import open_signer

    ledger, sign = _ledger_in(data), open_signer(data)
    lines = JSONL if form == "jsonl" else cloudevents(sign.public_key)
    exported = export(ledger, lines, sign, after=after, until=until)
    if str(file) == "-":
        sys.stdout.buffer.writelines(exported)
        sys.stdout.buffer.flush()  # so that errors are reported here
        return
    refuse_own(file, data)
    if is_stream(file):
        with file.open("wb") as target:
            target.writelines(exported)
        return
    with output.cleaned_up_after_signals(), write_file(file, replace=True) as target:
        target.writelines(exported)


@click.command()
@options.data_option
@options.json_option
@click.argument("file", type=_FILE)
def backup(data: Path, file: Path, *, as_json: bool) -> None:
    """Copy the ledger to a file and verify the copy.

    An existing FILE is replaced. The server may be running. The keys are not included, since anyone with them
    can sign.
    """
    from events.audit.backup import back_up
    from events.files import refuse_own
    from loadledger.cli.verification import audit_members, format_audit

    ledger = _ledger_in(data)
    refuse_own(file, data)
    with output.cleaned_up_after_signals():
        found = back_up(ledger, file)
    output.print_result(audit_members(found), format_audit(found), as_json=as_json)


@click.command("ledger")
@options.data_option
@options.json_option
def ledger_key(data: Path, *, as_json: bool) -> None:
    """Show the public key of the ledger's signatures, and its id."""
    from events.audit.signing import key_id
    from server.auth.keys import open_signer, public_pem

    signer = open_signer(data)
    pem, name = public_pem(signer), key_id(signer.public_key)
    output.print_result({"public_key": pem, "key_id": name}, [f"{pem}key id: {name}"], as_json=as_json)


def _ledger_in(data: Path) -> Path:
    """Return the ledger's file in a data directory, which must exist."""
    from events.sqlite.datalock import LEDGER

    if not (data / LEDGER).is_file():
        raise FileNotFoundError(f"there is no {LEDGER} in {data}: name the data directory with --data")
    return data / LEDGER
