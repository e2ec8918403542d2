"""`loadledger nodes | drain | migrate | discard`: servers that share a ledger, and a ledger in PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from loadledger.cli import options, output
from loadledger.cli.completion import completer

nodes_of_server = completer(
    lambda client: ((node.id, node.phase) for node in client.nodes() if not node.ended)
)
COLUMNS = ("NODE", "PHASE", "MODELS", "JOBS", "BUDGET", "RENEWED", "ATTRIBUTES", "ADDRESS", "RELEASE")
PAUSE_S = 0.5
"""Pause between two reads of a draining node, less than a load takes."""


@click.command()
@options.optional_data_option
@options.json_option
@options.server_options
def nodes(*, data: Path | None, as_json: bool, where: options.ServerChoice) -> None:
    """List the nodes, which share one ledger, and what runs where.

    A star marks the node that answers. A node is late when it has not renewed its lease in time; the others
    then declare it lost and load its models.
    """
    with options.open_managing_client(data, where) as client:
        found = client.nodes()
    table = output.format_table(COLUMNS, [_row(node) for node in found], right={"JOBS", "BUDGET", "RENEWED"})
    none = "this server is alone: servers with --ledger are nodes"
    output.print_result({"nodes": found}, table if found else [none], as_json=as_json)


def _row(node: Any) -> tuple[str, ...]:
    renewed = output.format_age(node.renewed_at, datetime.now(UTC))
    return (
        output.format_cell(node.id) + (" *" if node.this else ""),
        f"{node.phase}, not trusted" if node.trusted is False else node.phase,
        output.format_cell(", ".join(model.id for model in node.models), most=60),
        str(len(node.jobs)) if node.jobs else output.NOTHING,
        output.format_size(node.budget_bytes),
        f"late, {renewed}" if node.late else renewed,
        output.format_cell(", ".join(node.attributes), most=40),
        output.format_cell(node.address),
        output.format_cell(node.release),
    )


@click.command()
@click.argument("node_id", metavar="NODE", envvar="LOADLEDGER_NODE_NAME", shell_complete=nodes_of_server)
@click.option(
    "--wait",
    "-w",
    is_flag=True,
    help="Wait until no model and no job is left there; Ctrl-C leaves it draining.",
)
@options.int_option("--timeout-s", metavar="SECONDS", text="With --wait: give up after so many seconds.")
@options.optional_data_option
@options.json_option
@options.server_options
def drain(
    node_id: str,
    *,
    wait: bool,
    timeout_s: int | None,
    data: Path | None,
    as_json: bool,
    where: options.ServerChoice,
) -> None:
    """Drain a node: its models are loaded at other nodes.

    It takes no more loads, and unloads a model once another node serves it. It drains until it stops; when it
    starts again, it takes loads. Without NODE, the variable LOADLEDGER_NODE_NAME names it.

    With --wait, the exit code is 1 if something is left: when the time is up, or at once if no other node
    takes loads. In that case the command does not begin a drain.
    """
    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout-s goes with --wait")
    began_s = time.monotonic()
    with options.open_managing_client(data, where) as client:
        if wait:
            _refuse_vain_drain(node_id, client.nodes())
        node = client.drain(node_id)
        if wait:
            node = _wait_until_drained(client, node, timeout_s)
    output.print_result(node, _outcome_lines(node, time.monotonic() - began_s, waited=wait), as_json=as_json)


def _outcome_lines(node: Any, took_s: float, *, waited: bool) -> Iterator[str]:
    name = output.to_printable(node.id)
    if waited:
        yield f"{name}: {'left' if node.ended else 'drained'} in {output.format_duration(took_s)}"
        return
    yield f"{name}: draining, {describe_rest(node)}"
    if has_rest(node):
        yield f"to wait for it: loadledger drain {name} --wait"


def describe_rest(node: Any) -> str:
    if not has_rest(node):
        return "nothing is left there"
    parts = [(len(node.models), "model"), (len(node.jobs), "job")]
    return f"{' and '.join(output.count_of(count, noun) for count, noun in parts if count)} left"


def has_rest(node: Any) -> bool:
    return bool(node.models or node.jobs)


def find_takers(node_id: str, nodes: Sequence[Any]) -> list[str]:
    """Return the other nodes that take loads."""
    return [
        node.id
        for node in nodes
        if node.id != node_id and node.phase == "joined" and node.trusted is not False
    ]


def _refuse_vain_drain(node_id: str, nodes: Sequence[Any]) -> None:
    """End the command if nothing could move away from a node."""
    node = next((node for node in nodes if node.id == node_id), None)
    if node is not None and not node.ended and has_rest(node) and not find_takers(node_id, nodes):
        _fail(node, "no other node takes loads: start one, or stop this one without a drain")


def _wait_until_drained(client: Any, node: Any, timeout_s: int | None) -> Any:
    """Wait until nothing is left at a node, or it has left, and return it; all else ends the command."""
    began_s, epoch, said = time.monotonic(), node.epoch, ""
    while True:
        found = client.nodes()
        node = next(each for each in found if each.id == node.id)
        waited_s = time.monotonic() - began_s
        if node.epoch != epoch:
            _fail(node, "it has joined again, and takes loads")
        if node.phase == "lost":
            _fail(node, "it was lost meanwhile; other nodes load its models")
        if node.phase == "left" or not has_rest(node):
            return node
        if not find_takers(node.id, found):
            _fail(node, "no other node takes loads any more")
        if timeout_s is not None and waited_s >= timeout_s:
            _fail(node, f"the {timeout_s} s of --timeout-s are over; it goes on draining")
        if describe_rest(node) != said:
            said = describe_rest(node)
            output.print_note(f"{node.id}: {said} ({waited_s:.1f}s)")
        time.sleep(PAUSE_S)


def _fail(node: Any, reason: str) -> NoReturn:
    output.print_note(f"{node.id} is not drained, {describe_rest(node)}: {reason}")
    raise SystemExit(output.NEGATIVE_RESULT)


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
@options.json_option
def migrate(address: str, server_role: str | None, data: Path | None, *, as_json: bool) -> None:
    """Create or update the schema of a ledger in PostgreSQL.

    Run it as the role that owns the ledger, never with a server's credentials: with its first run, with each
    release that changes the schema, and to let a role in. With --data, the ledger of a stopped server is
    verified, copied into the empty database with its positions and hashes, and verified there.
    """
    done = import_admin().migrate_database(address, server_role, data)
    lines = [f"schema: {done['migrations']} migrations applied"]
    if server_role is not None:
        lines.append(f"role {server_role}: may read and append")
    if data is not None:
        lines.append(f"copied and verified: {done['events']} events, head {done['position']}:{done['hash']}")
    output.print_result(done, lines, as_json=as_json)


@click.command()
@_ledger_option
@options.json_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def discard(address: str, file: Path, *, as_json: bool) -> None:
    """Remove the end of a ledger in PostgreSQL that no node can read.

    For nodes that say that an event cannot be folded, because somebody with their role appended it. Run it as
    the role that owns the ledger, with the latest release that any node has, when that role has another
    password. All events from that one on, which no node has, go to FILE, and `EventsDiscarded` takes their
    place.
    """
    done = import_admin().discard_unreadable(address, file)
    members = {"first_position": done.first_position, "last_position": done.last_position, "hash": done.hash}
    line = f"discarded: positions {done.first_position} to {done.last_position}, kept in {file}"
    output.print_result(members, [line], as_json=as_json)


def import_admin() -> Any:
    """Return the module for ledgers in PostgreSQL, which needs the driver."""
    try:
        from nodes.postgres import admin
    except ModuleNotFoundError as error:
        from nodes.thisnode import INSTALL

        output.exit_with_error(f"{error.name} is not installed: {INSTALL}")
    return admin
