"""`loadledger ray up | status | down`: a node on each machine of a Ray cluster.

Ray starts a detached actor on each machine (`NodeKeeper`), which keeps `loadledger serve` running there, and
starts the actor again with its machine. Nothing else is Ray's: where models run, and what was recorded, is
decided as in any cluster. Ray is imported on use: it takes a second, and is no part of loadledger.

The server is a child process of the actor, as everywhere else; it begins in `serve_for_keeper`, so that it
ends when its actor does, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from threading import Event, Thread
from typing import Any, TypedDict

import click

from loadledger.cli.options import json_option
from loadledger.cli.output import (
    NEGATIVE_RESULT,
    count_of,
    exit_with_error,
    format_cell,
    format_table,
    print_note,
    print_result,
)

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
FIRST_BACK_OFF_S = 1.0
"""Before a server that has exited is started again; it doubles with each exit soon after a start."""
LONGEST_BACK_OFF_S = 30.0
STEADY_S = 60.0
"""A server that ran for so long begins with the first back-off again."""
READY = " is ready at "
"""In the line of a server that answers, before its URL."""

address_option = click.option(
    "--address",
    metavar="ADDRESS",
    envvar="RAY_ADDRESS",
    default="auto",
    help="Ray cluster: HOST:PORT of its head, or auto, the one of this machine. [RAY_ADDRESS]",
)


class KeeperStatus(TypedDict):
    """A server's status, as its keeper reports it.

    Attributes:
        machine: the address that Ray knows the machine by.
        pid: of the server; None between two.
        url: of the server that answers; None while it starts.
        exits: how many servers have exited.
        exit_code: of the last one; negative for a signal; None before the first exit.
    """

    machine: str
    pid: int | None
    url: str | None
    exits: int
    exit_code: int | None


class NodeKeeper:
    """Runs a node's server on this machine, and starts it again when it has exited.

    Args:
        machine: the address that Ray knows this machine by.
        environment: variables for the server; those of this machine go before them.
        arguments: of `loadledger serve`.
    """

    def __init__(self, machine: str, environment: Mapping[str, str], arguments: Sequence[str]) -> None:
        self._machine = machine
        self._environment = {**environment, **os.environ}
        self._command = [sys.executable, "-m", __name__, str(os.getpid()), *arguments]
        self._stopping = Event()
        self._child: subprocess.Popen[str] | None = None
        self._url: str | None = None
        self._exits = 0
        self._exit_code: int | None = None
        # A thread of its own: the kernel ends the server when the thread that started it has ended.
        self._thread = Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def status(self) -> KeeperStatus:
        pid = self._child.pid if self._child is not None else None
        return KeeperStatus(
            machine=self._machine, pid=pid, url=self._url, exits=self._exits, exit_code=self._exit_code
        )

    def stop(self, limit_s: float) -> KeeperStatus:
        """Stop the server as SIGTERM does, and start it no more; kill it if it has not exited in time."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join()
        return self.status()

    def _keep(self) -> None:
        back_off_s = FIRST_BACK_OFF_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._run()
            if time.monotonic() - began_s >= STEADY_S:
                back_off_s = FIRST_BACK_OFF_S
            self._stopping.wait(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)

    def _run(self) -> None:
        """Run a server until it exits; its log goes where the actor's does."""
        with subprocess.Popen(  # noqa: S603 - this module, with the operator's arguments
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self._environment,
            text=True,
            start_new_session=True,  # Ray kills the group of an actor that died
        ) as child:
            self._child = child
            if self._stopping.is_set():  # it was, before there was a child to stop
                child.terminate()
            for line in child.stdout or ():
                print(line, end="", file=sys.stderr, flush=True)  # noqa: T201 - the actor's log
                self._url = self._url or line.partition(READY)[2].strip() or None
        self._child, self._url = None, None
        self._exits, self._exit_code = self._exits + 1, child.returncode

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)


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


def serve_for_keeper() -> None:
    """Serve until SIGTERM, or until the keeper ends: `argv` has its process id and the options of `serve`."""
    from loadledger.cli.main import main  # it names this module
    from runtime.process.forkserver import die_with

    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # an actor's threads may block some
    die_with(int(sys.argv[1]), signal.SIGTERM)
    main(["serve", *sys.argv[2:]], prog_name="loadledger")


if __name__ == "__main__":
    serve_for_keeper()
