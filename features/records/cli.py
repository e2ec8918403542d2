"""`loadledger records`: list, read, verify and erase recorded inferences."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from loadledger.cli import options, output
from loadledger.cli.completion import models_of_server

COLUMNS = ("MODEL", "FILE", "STATE", "RECORDS", "DROPPED", "SIZE", "WRITTEN", "POSITION")
model_option = click.option(
    "--model", metavar="MODEL", help="Only this model.", shell_complete=models_of_server
)


@click.group()
def records() -> None:
    """List, read, verify and erase recorded inferences.

    `[[record]]` in the server's configuration says which are recorded. Each node has its own files.
    """


@records.command("list")
@model_option
@options.json_option
@options.server_options
def list_model_files(model: str | None, *, as_json: bool, where: options.ServerChoice) -> None:
    """List the files of records of a server. Your token needs the role audit or admin."""
    if options.parse_version_name(model or "")[1] is not None:
        raise click.UsageError("a file is of all versions of a model: give --model without /VERSION")
    with options.open_chosen_client(where) as client:
        found = list(client.record_files(model=model))
    table = output.format_table(COLUMNS, [_row(each) for each in found], right={"RECORDS", "DROPPED", "SIZE"})
    output.print_result({"files": found}, table if found else ["no files of records"], as_json=as_json)


def _row(file: Any) -> tuple[str, ...]:
    return (
        output.format_cell(file.model_id),
        output.format_cell(file.file),
        file.state,
        output.format_cell(file.records),
        output.format_cell(file.dropped),
        output.format_size(file.bytes),
        output.format_timestamp(file.written_at),
        output.format_cell(file.position),
    )


@records.command("read")
@click.option("--id", "request_id", metavar="ID", help="Only the inference whose answer has this id.")
@model_option
@click.option("--since", type=options.MOMENT, help="Only from a time on, like 10m (ago).")
@options.server_options
def read_records(
    request_id: str | None, *, model: str | None, since: str | None, where: options.ServerChoice
) -> None:
    """Print recorded inferences as lines of JSON.

    The id is the `X-Request-Id` of a request or its answer, or the `id` in its body. Your token needs the
    role audit or admin.
    """
    import msgspec

    model_id, version = (None, None) if model is None else options.parse_version_name(model)
    with options.open_chosen_client(where) as client:
        for line in client.records(model=model_id, request_id=request_id, since=since):
            if version in (None, line.get("version")):
                click.echo(msgspec.json.encode(line))


@records.command()
@click.argument("file")
@click.option("--reason", metavar="TEXT", required=True, help="Why, for the ledger.")
@options.server_options
def erase(file: str, *, reason: str, where: options.ServerChoice) -> None:
    """Erase a file of records of a server; the ledger keeps what it was.

    Your token needs the role admin.
    """
    name = Path(file).stem
    with options.open_chosen_client(where) as client:
        client.erase_record_file(name, reason)
    click.echo(f"{output.to_printable(name)}: erased")


@records.command()
@options.data_option
@click.option("--node", metavar="NAME", help="Whose files must be there, if the ledger is of several nodes.")
@options.json_option
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
def verify(data: Path, node: str | None, *, files: tuple[Path, ...], as_json: bool) -> None:
    """Compare files of records with the ledger.

    Hashes the files in the data directory, or each FILE, a copy with its name. A file that is changed, or
    that the ledger does not know, is a finding; without FILE also one that is missing and was not erased. The
    server may be running. `loadledger verify` verifies the ledger itself.

    Exit code: 0 verified, 1 not verified, 2 if it cannot be decided.
    """
    from events.sqlite.datalock import LEDGER
    from features.records import verification
    from features.records.files import FOLDER, stat_file

    options.require_data(data)
    if files:
        announced = verification.read_announced(data / LEDGER)
        findings = list(verification.compare_files(map(stat_file, files), announced))
    else:
        findings, announced = verification.compare_folder(data / FOLDER, data / LEDGER)
        names = [each.file for each in findings]
        nodes = {node} if node is not None else announced.list_nodes(names)
        if not nodes and any(map(verification.node_of, announced.closed.values())):
            raise click.UsageError("the ledger is of several nodes: say whose files must be here with --node")
        findings += verification.find_missing(names, announced, nodes or {None})
    members = {
        "verified": all(each.is_sound for each in findings),
        "files": [each._asdict() for each in findings],
    }
    output.print_result(members, _describe_findings(findings), as_json=as_json)
    sys.exit(0 if members["verified"] else output.NEGATIVE_RESULT)


def _describe_findings(findings: Iterable[Any]) -> Iterator[str]:
    states = Counter[str]()
    for each in findings:
        states[each.state] += 1
        name = f"{output.to_printable(each.model_id)}/{output.to_printable(each.file)}"
        if not each.is_sound:
            yield f"NOT verified: {name}: {each.state}: {output.to_printable(each.detail)}"
        elif each.state != "as_announced":
            yield f"{name}: {output.to_printable(each.detail)}"
    counts = [
        f"{states['as_announced']} as announced",
        f"{states['erased']} erased",
        f"{states['open']} open",
    ]
    if not states.keys() & {"changed", "unknown", "missing"}:
        yield f"verified: {output.count_of(sum(states.values()), 'file')}: {', '.join(counts)}"
