"""`loadledger nodes | drain`: the servers that share a ledger, and taking one out of service."""

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
