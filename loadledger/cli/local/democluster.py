"""`loadledger demo --cluster`: three real nodes over one ledger in PostgreSQL, one of which is killed.

Like `demo`, it talks to its servers over HTTP and fails if what it sees differs from what it says. It leaves
no process and no file behind, also after Ctrl-C, and no process after `kill -9`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from events.audit.verify import Expected, verify
from events.sqlite.datalock import LEDGER
from loadledger.cli.events import event_line
from loadledger.cli.local.demo import (
    STOP_LIMIT_S,
    DemoFailed,
    is_gone,
    issue_demo_token,
    read_lines,
    read_url,
    report_failure,
    require,
    server_environment,
    stop_servers,
)
from loadledger.cli.local.demodatabase import (
    OWNER,
    SERVER,
    DatabaseFailed,
    DatabaseMissing,
    DemoDatabase,
    check_user,
    find_programs,
    open_demo_database,
)
from loadledger.cli.local.localdatabase import migrate_database, verify_address
from loadledger.cli.output import exit_with_error
from loadledger.client import Client
from loadledger.problems import ClientProblem
from runtime.memory import list_descendants
from runtime.process.forkserver import die_with
from server.auth.keys import ensure_data_dir, keys_folder

NAMES = ("n1", "n2", "n3")
MODELS = tuple(f"digits-{letter}" for letter in "abcdef")

LEASE_S = 3
"""Seconds until a killed node may be declared lost; `serve` has 10 by default."""

RELOAD_LIMIT_S = 120
"""How long until its models are loaded elsewhere: some seconds, or a defect."""

MIN_ACCURACY = 0.95
"""Of the packaged example, whose two versions reach 97.2 and 99.3 %."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A node's server, which may have been killed.

    Attributes:
        client: of an admin who may predict.
    """

    name: str
    data: Path
    process: subprocess.Popen[str]
    client: Client

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def find_placement(self) -> dict[str, str]:
        """Return the node of each model that is loaded, as this node's ledger says."""
        return {model.id: model.node for model in self.client.models() if model.node is not None}


def run_cluster() -> int:
    """Run the demo of several nodes; return 0 if everything held, else 1."""
    try:
        programs = find_programs()
        check_user()
    except DatabaseMissing as problem:
        exit_with_error(str(problem))
    try:
        with _cleaned_up_after_signals(), tempfile.TemporaryDirectory(prefix="loadledger-demo-") as folder:
            Path(folder).chmod(0o711)  # PostgreSQL's user goes through it
            _show(programs, Path(folder))
    except (DemoFailed, DatabaseFailed, ClientProblem) as failure:
        return report_failure(failure)
    return 0


@contextmanager
def _cleaned_up_after_signals() -> Iterator[None]:
    """End as after an exception when a signal comes, and do not interrupt the clean-up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(programs: Path, folder: Path) -> None:
    _prepare_repository(folder / "models")
    with open_demo_database(programs, folder / "database") as database:
        asyncio.run(migrate_database(database.url(OWNER), SERVER, None))
        click.echo(f"PostgreSQL {database.version} has the ledger, in {folder}, which is removed in the end")
        with _serve(folder, database) as nodes:
            _load_models(nodes)
            _classify(nodes)
            _kill_fullest(nodes)
            _classify(nodes)
        _verify(database, nodes)


def _prepare_repository(repository: Path) -> None:
    """Copy the packaged example under several names."""
    with resources.as_file(resources.files("server.examples") / "digits") as example:
        for name in MODELS:
            shutil.copytree(example, repository / name)


@contextmanager
def _serve(folder: Path, database: DemoDatabase) -> Iterator[list[_Node]]:
    """Start the nodes; stop those that still run in order, unless something failed."""
    _share_keys(folder)
    with ExitStack() as stack:
        ports = zip(NAMES, _find_free_ports(), strict=True)
        processes = [stack.enter_context(_start(folder, database, name, port)) for name, port in ports]
        urls = [_await_url(folder, name, process) for name, process in zip(NAMES, processes, strict=True)]
        token = issue_demo_token(folder / NAMES[0], "alice", "admin", "predict")  # valid at all nodes
        nodes = []
        for name, process, url in zip(NAMES, processes, urls, strict=True):
            client = Client(url, token=token)
            nodes.append(_Node(name, folder / name, process, stack.enter_context(client)))
            click.echo(f"{name} serves {client.url}, with a replica of the ledger")
        yield nodes
        stop_servers([node.process for node in nodes if node.is_running], STOP_LIMIT_S)


def _share_keys(folder: Path) -> None:
    """Give all nodes the same keys, so that a token is valid at each."""
    ensure_data_dir(folder / NAMES[0])
    for name in NAMES[1:]:
        shutil.copytree(keys_folder(folder / NAMES[0]), keys_folder(folder / name))
        ensure_data_dir(folder / name)


def _find_free_ports() -> list[int]:
    """Return a port for each node, which tells the others where it is before it listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in NAMES]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _start(folder: Path, database: DemoDatabase, name: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """Start a node; kill it in the end if it still runs."""
    # -P: what lies in the current directory must not be taken for our packages.
    command = [sys.executable, "-P", "-m", "loadledger", "serve", "--ledger", database.url(SERVER)]
    command += ["--node-name", name, "--node-address", f"http://127.0.0.1:{port}", "--port", str(port)]
    command += ["--data", str(folder / name), "--repository", str(folder / "models")]
    command += ["--lease-s", str(LEASE_S), "--prepared-size", "off", "--log-level", "warning"]
    with (
        _log_of(folder, name).open("wb") as log,
        subprocess.Popen(  # noqa: S603 - our own interpreter and package
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=server_environment(),
            start_new_session=True,  # Ctrl-C reaches the demo alone, which ends the nodes
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509 - no other threads
        ) as process,
    ):
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a server unless it has ended; its workers end with it."""
    if process.poll() is None:
        children = list_descendants(process.pid)
        process.kill()
        process.wait()
        require(all(map(is_gone, children)), f"the workers of process {process.pid} end with it")


def _await_url(folder: Path, name: str, process: subprocess.Popen[str]) -> str:
    try:
        return read_url(process)
    except DemoFailed:
        said = _log_of(folder, name).read_text(encoding="utf-8", errors="replace").strip()
        raise DemoFailed(f"{name} starts: {said or 'it said nothing'}") from None


def _log_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _load_models(nodes: Sequence[_Node]) -> None:
    """Request all models at one node, and show where they are placed."""
    client = nodes[0].client
    began_s = time.perf_counter()
    for job in [client.load(name) for name in MODELS]:
        client.wait_for(job.id)
    took_s = time.perf_counter() - began_s
    click.echo(f"\nall models requested at {nodes[0].name}, and loaded after {took_s:.1f} s:")
    placed = nodes[0].find_placement()
    require(set(placed) == set(MODELS), "all models are loaded")
    for node in nodes:
        click.echo(f"  {node.name} has {', '.join(_models_at(placed, node)) or 'none'}")


def _models_at(placed: Mapping[str, str], node: _Node) -> list[str]:
    return sorted(model for model, name in placed.items() if name == node.name)


def _classify(nodes: Sequence[_Node]) -> None:
    """Classify the held-out digits with each model, all at one node."""
    digits = json.loads((resources.files("server.examples") / "digits.json").read_text(encoding="utf-8"))
    asked = next(node for node in nodes if node.is_running)
    for model in MODELS:
        labels = asked.client.infer(model, {"pixels": digits["inputs"]})["label"]
        require((labels == digits["labels"]).mean() > MIN_ACCURACY, f"{model} reads digits")
    click.echo(f"asked at {asked.name}, each model reads {len(digits['labels'])} handwritten digits")


def _kill_fullest(nodes: Sequence[_Node]) -> None:
    """Kill the node with most models; show where they are loaded again, and what the ledger says of it."""
    placed = nodes[0].find_placement()
    killed = max(nodes, key=lambda node: len(_models_at(placed, node)))
    witness = next(node for node in nodes if node is not killed)
    lost, head = _models_at(placed, killed), witness.client.head().position
    click.echo(f"\nkill -9 of {killed.name}, which has {', '.join(lost)}")
    began_s = time.perf_counter()
    _kill(killed.process)
    placed = _await_reload(witness, killed)
    took_s = time.perf_counter() - began_s
    where = ", ".join(f"{model} at {placed[model]}" for model in lost)
    click.echo(f"after {took_s:.1f} s (the lease is {LEASE_S} s) they are loaded: {where}")
    click.secho("\nthe ledger", bold=True)
    for line in asyncio.run(read_lines(witness.data / LEDGER, after=head)):
        click.echo(event_line(line))


def _await_reload(witness: _Node, killed: _Node) -> dict[str, str]:
    """Return where the models are once all are loaded and the killed node has none."""
    deadline_s = time.monotonic() + RELOAD_LIMIT_S
    while len(placed := witness.find_placement()) < len(MODELS) or killed.name in placed.values():
        require(time.monotonic() < deadline_s, f"its models are loaded again within {RELOAD_LIMIT_S} s")
        time.sleep(0.05)
    return placed


def _verify(database: DemoDatabase, nodes: Sequence[_Node]) -> None:
    """Verify the database, and each node's replica, whose last event the database must have."""
    address = database.url(SERVER)
    whole = asyncio.run(verify_address(address, None))
    require(whole.finding is None, f"the database verifies: {whole.finding}")
    proved = whole.verification
    click.echo(f"\ndatabase verified: {proved.events} events, head {proved.hash.hex()[:16]}…")
    for node in nodes:
        replica = verify(node.data / LEDGER)
        require(replica.verified, f"the replica of {node.name} verifies: {replica.finding}")
        compared = asyncio.run(verify_address(address, Expected(replica.position, replica.hash)))
        require(compared.finding is None, f"the database has the events of {node.name}: {compared.finding}")
        click.echo(f"replica of {node.name} verified: {replica.events} events, all in the database")
