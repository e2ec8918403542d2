"""`loadledger ray up | status | down`: a node on each machine of a Ray cluster.

Ray starts a detached actor on each machine, which keeps `loadledger serve` running there (`raynode`), and
starts the actor again with its machine. Nothing else is Ray's: where models run, and what was recorded, is
decided as in any cluster. Ray is imported on use: it takes a second, and is no part of loadledger.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from loadledger.cli.local.raynode import KeeperStatus, NodeKeeper
from loadledger.cli.output import (
    NEGATIVE_RESULT,
    count_of,
    exit_with_error,
    format_cell,
    format_table,
    print_note,
    print_result,
)
from loadledger.cli.server import json_option

INSTALL = "pip install 'loadledger[ray]'"
NAMESPACE = "loadledger"
PORT = 8080
START_LIMIT_S = 120.0
"""For all servers to be ready; then `up` says which are not, and leaves them starting."""
STOP_LIMIT_S = 60.0
"""For a server to stop in order; then it is killed."""
ANSWER_LIMIT_S = 10.0
"""For an actor to answer: it does nothing else."""
SHARE_OF_MACHINE = 0.001
"""Of the resource that Ray gives each machine, named by its address: an actor that asks for it runs there."""
PAUSE_S = 0.2
HEAD = ("NODE", "MACHINE", "STATE", "URL")

address_option = click.option(
    "--address",
    metavar="ADDRESS",
    envvar="RAY_ADDRESS",
    default="auto",
    help="Ray cluster: HOST:PORT of its head, or auto, the one of this machine. [RAY_ADDRESS]",
)


@click.group("ray")
def ray_group() -> None:
    """Run a node on each machine of a Ray cluster."""


@ray_group.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--ledger",
    metavar="URL",
    envvar="LOADLEDGER_LEDGER",
    required=True,
    help="Database, as the role of the servers: postgresql://ROLE@HOST/DATABASE. [LOADLEDGER_LEDGER]",
)
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, help="Port of each server.")
@address_option
@json_option
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF SERVE]...")
def up(*, ledger: str, port: int, address: str, options: tuple[str, ...], as_json: bool) -> None:
    """Start a node on each machine where none is, and wait until all serve.

    Each machine needs loadledger[postgres,ray] in the environment of Ray, a data directory and the models.
    Further options go to each `loadledger serve`. Variables of a machine, as `ray start` had them there, go
    before those that this command sets: LOADLEDGER_LEDGER, _PORT, _HOST, _NODE_NAME and _NODE_ADDRESS.

    Exit code: 0 if all nodes serve, 1 if one does not.
    """
    with _connected(address, shows_logs=True) as ray:
        before = set(ray.util.list_named_actors())
        machines = _find_machines(ray)
        for name, machine in machines.items():
            environment = {
                "LOADLEDGER_LEDGER": ledger,
                "LOADLEDGER_PORT": str(port),
                "LOADLEDGER_HOST": machine,
                "LOADLEDGER_NODE_NAME": name,
                "LOADLEDGER_NODE_ADDRESS": f"http://{machine}:{port}",
            }
            _create_keeper(ray, name, machine, environment, options)
        if running := sorted(before & machines.keys()):
            print_note(f"left as it was: {', '.join(running)}; `loadledger ray down` stops it")
        found = _wait_until_ready(ray, machines)
    _print(found, as_json=as_json)
    if not all(status is not None and status["url"] for status in found.values()):
        sys.exit(NEGATIVE_RESULT)


@ray_group.command()
@address_option
@json_option
def status(*, address: str, as_json: bool) -> None:
    """List the nodes that `up` started, and whether they serve."""
    with _connected(address) as ray:
        found = _ask(ray, dict.fromkeys(ray.util.list_named_actors(), "status"))
    _print(found, as_json=as_json)


@ray_group.command()
@click.argument("names", nargs=-1, metavar="[NODE]...")
@address_option
def down(*, names: tuple[str, ...], address: str) -> None:
    """Stop nodes that `up` started; without NODE, all of them.

    Each server stops as after SIGTERM. To move its models to other nodes before, use `loadledger drain`.
    """
    with _connected(address) as ray:
        known = ray.util.list_named_actors()
        if unknown := sorted(set(names) - set(known)):
            exit_with_error(f"no node {', '.join(unknown)}: `loadledger ray status` lists them")
        stopped = list(names or known)
        _ask(ray, dict.fromkeys(stopped, "stop"))
        for name in stopped:
            ray.kill(ray.get_actor(name), no_restart=True)
    click.echo(f"stopped: {', '.join(sorted(stopped)) or 'nothing'}")


@contextmanager
def _connected(address: str, *, shows_logs: bool = False) -> Iterator[Any]:
    """Yield the module `ray`, connected to a cluster.

    Meanwhile all output goes to stderr: Ray prints what happens in the cluster, and logs of actors.
    """
    if find_spec("ray") is None:
        exit_with_error(f"Ray is not installed: {INSTALL}")
    ray: Any = import_module("ray")
    with redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level="warning", log_to_driver=shows_logs)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).rstrip(".")
            exit_with_error(f"no Ray cluster at {address}: {reason}; `ray start` starts one")
        try:
            yield ray
        finally:
            ray.shutdown()


def _find_machines(ray: Any) -> dict[str, str]:
    """Return the addresses of the machines by the names of their nodes.

    The name is that of the host, unless `ray start --node-name` gave another.
    """
    found = dict[str, str]()
    for each in ray.nodes():
        name, machine = each["NodeName"], each["NodeManagerAddress"]
        name = name if name != machine else each["NodeManagerHostname"]
        if not each["Alive"]:
            continue
        if name in found:
            exit_with_error(
                f"two machines are named {name!r}, {found[name]} and {machine}: use `ray start --node-name`"
            )
        found[name] = machine
    return found


def _create_keeper(
    ray: Any, name: str, machine: str, environment: Mapping[str, str], options: tuple[str, ...]
) -> None:
    """Create the actor of a machine, unless it is there."""
    ray.remote(NodeKeeper).options(
        name=name,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources={f"node:{machine}": SHARE_OF_MACHINE},
    ).remote(machine, dict(environment), list(options))


def _wait_until_ready(ray: Any, names: Mapping[str, str]) -> dict[str, KeeperStatus | None]:
    """Return the status of nodes once each serves or has failed, at the latest when the time is up."""
    end_s = time.monotonic() + START_LIMIT_S
    while True:
        found = _ask(ray, dict.fromkeys(names, "status"))
        is_settled = all(each is not None and (each["url"] or each["exits"]) for each in found.values())
        if is_settled or time.monotonic() > end_s:
            return found
        time.sleep(PAUSE_S)


def _ask(ray: Any, methods: Mapping[str, str]) -> dict[str, KeeperStatus | None]:
    """Call a method of each actor, all at once; None for an actor that is not there, or does not answer."""
    calls = {
        name: getattr(ray.get_actor(name), method).remote(*([STOP_LIMIT_S] if method == "stop" else []))
        for name, method in methods.items()
    }
    limit_s = ANSWER_LIMIT_S + (STOP_LIMIT_S if "stop" in methods.values() else 0)
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=limit_s)
    return {name: _read_answer(ray, call) for name, call in calls.items()}


def _read_answer(ray: Any, call: Any) -> KeeperStatus | None:
    try:
        answer: KeeperStatus = ray.get(call, timeout=0)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None
    return answer


def _print(found: Mapping[str, KeeperStatus | None], *, as_json: bool) -> None:
    rows = [
        (name, format_cell(each and each["machine"]), _describe(each), format_cell(each and each["url"]))
        for name, each in sorted(found.items())
    ]
    members = {name: dict(each) if each is not None else None for name, each in sorted(found.items())}
    none = "no nodes: `loadledger ray up` starts them"
    print_result({"nodes": members}, format_table(HEAD, rows) if rows else [none], as_json=as_json)


def _describe(status: KeeperStatus | None) -> str:
    if status is None:
        return "no answer: its machine is not there, or the actor starts"
    if status["url"]:
        return "serving"
    if status["exits"]:
        return f"exited with {status['exit_code']}, {count_of(status['exits'], 'time')}; its log says why"
    return "starting"
