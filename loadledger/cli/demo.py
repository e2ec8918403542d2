"""`loadledger demo`: the whole story in a few seconds, on real servers, real models and a real ledger.

It talks to servers of its own over HTTP, observes their processes from outside, and fails if what it sees
differs from what it says. Without --cluster it shows one server; with it, three nodes over one ledger in
PostgreSQL, of which one is killed while clients ask a model with two copies. That leaves no process and no
file behind, also after Ctrl-C, and no process after `kill -9`.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import click

from events.audit.verify import verify
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import EventQuery, open_reader
from events.types import Anchor
from loadledger.cli.events import event_line
from loadledger.cli.output import cleaned_up_after_signals, exit_with_error
from loadledger.cli.postgres import DatabaseFailed, DatabaseMissing, PostgresServer, find_programs
from loadledger.client import Client
from loadledger.errors import ClientProblem
from runtime.memory import list_descendants, tree_bytes
from runtime.process.forkserver import die_with
from server.auth.keys import ensure_data_dir, keys_folder

MAX_KEPT_BYTES = 8 * 2**20
"""Tolerated growth of the process tree: the allocators of a serving process vary."""

START_LIMIT_S = 60
STOP_LIMIT_S = 60
GONE_LIMIT_S = 10
REST_LIMIT_S = 10
_MB = 2**20

NAMES = ("n1", "n2", "n3")
MODELS = tuple(f"digits-{letter}" for letter in "abcdef")
COPIED = MODELS[0]
"""The model that is to have two copies."""

INFER_PAUSE_S = 0.005
"""Between two inferences of a client: three of them leave the nodes time to load."""

LEASE_S = 3
"""Seconds until a killed node may be declared lost; `serve` has 10 by default."""

RELOAD_LIMIT_S = 120
"""How long until its models are loaded elsewhere: some seconds, or a defect."""

MIN_ACCURACY = 0.95
"""Of the packaged example, whose two versions reach 97.2 and 99.3 %."""

OWNER, SERVER, DATABASE = "loadledger_owner", "loadledger", "loadledger"
"""Roles and database of the demo's PostgreSQL: the migrating owner, the nodes' role, the name."""


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[str]
    admin: Client
    predict: Client

    def load(self, version: int) -> float:
        """Load a version of the model; return the milliseconds from request to ready."""
        began = time.perf_counter()
        self.admin.load("digits", version, wait=True, on_away=_fail)
        return 1000 * (time.perf_counter() - began)

    def unload(self) -> float:
        """Unload the model; return the milliseconds until its process was gone."""
        began = time.perf_counter()
        self.admin.unload("digits", wait=True, on_away=_fail)
        return 1000 * (time.perf_counter() - began)

    def accuracy(self, digits: dict[str, Any]) -> float:
        """Classify all held-out digits over HTTP; return the accuracy."""
        labels = self.predict.infer("digits", {"pixels": digits["inputs"]})["label"]
        return float((labels == digits["labels"]).mean())

    def memory_bytes(self) -> int:
        """Return the anonymous memory of the process tree."""
        return tree_bytes(self.process.pid)

    def workers(self) -> set[int]:
        """Return the process ids of the workers: what descends from the server beside the fork server."""
        return set(list_descendants(self.process.pid)[1:])


class DemoFailed(Exception):
    """An observation contradicts what the demo tells its user."""


def _fail(problem: ClientProblem) -> NoReturn:
    """Fail at once instead of waiting for the server to return."""
    raise problem


def run_server() -> int:
    """Run the demo of one server; return 0 if everything held, else 1."""
    digits = _read_digits()
    try:
        with (
            resources.as_file(resources.files("server.examples")) as repository,
            tempfile.TemporaryDirectory(prefix="loadledger-demo-") as folder,
        ):
            _show(repository, Path(folder) / "data", digits)
    except (DemoFailed, ClientProblem) as failure:
        return _report_failure(failure)
    return 0


def _report_failure(failure: Exception) -> int:
    """Print why the demo failed; return its exit code."""
    click.echo(f"{click.style('failed:', fg='red')} {failure}")
    return 1


def _show(repository: Path, data: Path, digits: dict[str, Any]) -> None:
    with _serve(repository, data) as server:
        click.echo(f"loadledger serves {server.admin.url}; alice is its admin, bob may predict\n")
        before, nothing_loaded = server.memory_bytes(), server.workers()
        first = _load(server, 1, nothing_loaded)
        with_model = server.memory_bytes()
        plain = _classify(server, 1, digits)
        second = _load(server, 2, nothing_loaded | {first})
        better = _classify(server, 2, digits)
        _require(better > plain, "version 2 is better than version 1")
        _require(_is_gone(first), f"process {first} of version 1 is gone after the swap")
        took_ms = server.unload()
        _require(_is_gone(second), f"process {second} is gone after the unload")
        click.echo(f"unloaded in {took_ms:.0f} ms: process {second} is gone")
        _memory(before, with_model, server.memory_bytes())
    _ledger(data / LEDGER)


@contextmanager
def _serve(repository: Path, data: Path) -> Iterator[_Server]:
    with _start(data, "--port", "0", "--repository", str(repository)) as process:
        url = _await_url(data, process)
        with (
            Client(url, token=issue_demo_token(data, "alice", "admin")) as admin,
            Client(url, token=issue_demo_token(data, "bob", "predict")) as predict,
        ):
            yield _Server(process, admin, predict)
        _stop_servers([process], STOP_LIMIT_S)


@contextmanager
def _start(data: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start a server, whose log is beside its data directory; kill it in the end if it still runs."""
    ensure_data_dir(data)
    # -P: what lies in the current directory must not be taken for our packages.
    command = [sys.executable, "-P", "-m", "loadledger", "serve", "--data", str(data), *options]
    command += ["--log-level", "warning"]  # the demo prints its own progress
    with (
        data.with_suffix(".log").open("wb") as log,
        subprocess.Popen(  # noqa: S603 - our own interpreter and package
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # without settings of other servers
            env={key: value for key, value in os.environ.items() if not key.startswith("LOADLEDGER_")},
            start_new_session=True,  # Ctrl-C reaches the demo alone, which ends the servers
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
        _require(all(map(_is_gone, children)), f"the workers of process {process.pid} end with it")


def _await_url(data: Path, process: subprocess.Popen[str]) -> str:
    """Return the URL that a server prints when it is ready."""
    url = ""
    if process.stdout is not None and select.select([process.stdout], [], [], START_LIMIT_S)[0]:
        url = process.stdout.readline().rpartition(" ")[2].strip()
    if not url.startswith("http"):
        said = data.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
        raise DemoFailed(f"the server on {data.name} starts: {said or 'it said nothing'}")
    return url


def _stop_servers(processes: Sequence[subprocess.Popen[str]], limit_s: float) -> None:
    """Stop servers cleanly, all at once; kill one that does not end in time.

    Raises:
        DemoFailed: one did not stop in order.
    """
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DemoFailed(f"the server stops within {limit_s:g} s") from None
        _require(status == 0, f"the server stops in order: it ended with {status}")


def issue_demo_token(data: Path, subject: str, *roles: str) -> str:
    """Return a token that is valid for ten minutes."""
    with Client.of_data(data) as client:
        body = {"subject": subject, "roles": list(roles), "expires_s": 600}
        return str(client.post("/api/v1/tokens", body)["token"])


def _load(server: _Server, version: int, others: set[int]) -> int:
    took_ms = server.load(version)
    new = server.workers() - others
    _require(len(new) == 1, "the model has a process of its own")
    pid = new.pop()
    click.echo(f"version {version} loaded in {took_ms:.0f} ms, in a process of its own: {pid}")
    return pid


def _classify(server: _Server, version: int, digits: dict[str, Any]) -> float:
    accuracy = server.accuracy(digits)
    count = len(digits["labels"])
    click.echo(f"version {version} reads {accuracy:.1%} of {count} handwritten digits right, over HTTP\n")
    return accuracy


def _memory(before: int, with_model: int, after: int) -> None:
    click.echo(
        f"memory of all processes: {before / _MB:.1f} MB before, {with_model / _MB:.1f} MB with a model, "
        f"{after / _MB:.1f} MB after (mapped files aside)\n"
    )
    _require(before, "the kernel says how much memory a process has")
    _require(after <= before + MAX_KEPT_BYTES, "all the model's memory is back")


def _ledger(path: Path) -> None:
    click.secho("the ledger", bold=True)
    for line in asyncio.run(_read_lines(path)):
        click.echo(event_line(line))
    verification = verify(path)
    _require(verification.verified, f"the chain verifies: {verification.finding}")
    click.echo(f"chain verified: {verification.position} events, head {verification.hash.hex()[:16]}…")


async def _read_lines(path: Path, *, after: int | None = None) -> list[bytes]:
    """Return the first hundred events of a ledger, or those after a position."""
    async with open_reader(path) as reader:
        return [event.line for event in (await reader.event_page(EventQuery(after=after))).items]


def _is_gone(pid: int) -> bool:
    """Whether the process has ended, within a generous limit."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], GONE_LIMIT_S)[0])
    finally:
        os.close(descriptor)


def _require(so: object, what: str) -> None:
    """Fail unless something is so.

    Raises:
        DemoFailed: it is not.
    """
    if not so:
        raise DemoFailed(what)


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

    def find_placement(self) -> dict[str, list[str]]:
        """Return the nodes of each loaded model, as this node's ledger says; that of its first copy first."""
        models = self.client.models()
        found = {each.id: [copy.node for copy in each.copies_at] or [each.node] for each in models}
        return {model: names for model, nodes in found.items() if (names := [*filter(None, nodes)])}


@dataclass(slots=True)
class _Answers:
    """The answers to a client of all nodes, which asks the copied model again and again.

    Attributes:
        failures: inferences that failed, and why.
        longest_gap_s: between two answers.
    """

    count: int = 0
    failures: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0

    def collect(self, client: Client, is_over: threading.Event) -> None:
        pixels = _read_digits()["inputs"][:1]
        at_s = time.monotonic()
        while not is_over.wait(INFER_PAUSE_S):
            try:
                client.infer(COPIED, {"pixels": pixels})
            except ClientProblem as problem:
                self.failures.append(str(problem))
            else:
                before_s, at_s = at_s, time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, at_s - before_s)
                self.count += 1


@contextmanager
def _infer_everywhere(nodes: Sequence[_Node]) -> Iterator[list[_Answers]]:
    """Infer with the copied model, first at each node, until the block ends; all answer before it begins."""
    token, is_over = issue_demo_token(nodes[0].data, "bob", "predict"), threading.Event()
    urls, answers = [node.client.url for node in nodes], [_Answers() for _ in nodes]
    with ExitStack() as stack:
        each_first = (",".join(urls[at:] + urls[:at]) for at in range(len(urls)))
        clients = [stack.enter_context(Client(each, token=token)) for each in each_first]
        threads = stack.enter_context(ThreadPoolExecutor(len(nodes)))
        stack.callback(is_over.set)
        for each, client in zip(answers, clients, strict=True):
            threads.submit(each.collect, client, is_over)
        _await_inferences(answers)
        yield answers
        _await_inferences(answers)


def _await_inferences(answers: Sequence[_Answers]) -> None:
    """Wait until each client was answered once more."""
    counts, deadline_s = [each.count for each in answers], time.monotonic() + REST_LIMIT_S
    while any(each.count == count for each, count in zip(answers, counts, strict=True)):
        _require(time.monotonic() < deadline_s, f"{COPIED} answers within {REST_LIMIT_S} s")
        time.sleep(0.01)


def run_cluster() -> int:
    """Run the demo of several nodes; return 0 if everything held, else 1."""
    try:
        programs = find_programs()
    except DatabaseMissing as problem:
        exit_with_error(str(problem))
    try:
        with cleaned_up_after_signals(), tempfile.TemporaryDirectory(prefix="loadledger-demo-") as folder:
            Path(folder).chmod(0o711)  # PostgreSQL's user goes through it
            _show_cluster(programs, Path(folder))
    except (DemoFailed, DatabaseFailed, ClientProblem) as failure:
        return _report_failure(failure)
    return 0


def _show_cluster(programs: Path, folder: Path) -> None:
    from loadledger.cli.database import migrate_database  # needs the driver, which is an extra

    _prepare_repository(folder / "models")
    (folder / "database").mkdir()
    database = PostgresServer(programs, folder / "database")
    try:
        database.create(OWNER, SERVER, options=("--no-sync",))
        database.create_database(DATABASE, OWNER)
        migrate_database(database.url(OWNER, DATABASE), SERVER, None)
        version, address = database.version(), database.url(SERVER, DATABASE)
        click.echo(f"PostgreSQL {version} has the ledger, in {folder}, which is removed in the end")
        with _serve_nodes(folder, address) as nodes:
            _load_models(nodes)
            _classify_at_one_node(nodes)
            _kill_first_copy(nodes)
            _classify_at_one_node(nodes)
        _verify(address, nodes)
    finally:
        database.stop()


def _prepare_repository(repository: Path) -> None:
    """Copy the packaged example under several names."""
    with resources.as_file(resources.files("server.examples") / "digits") as example:
        for name in MODELS:
            shutil.copytree(example, repository / name)


@contextmanager
def _serve_nodes(folder: Path, address: str) -> Iterator[list[_Node]]:
    """Start the nodes; stop those that still run in order, unless something failed."""
    _share_keys(folder)
    options = ["--ledger", address, "--lease-s", str(LEASE_S), "--repository", str(folder / "models")]
    with ExitStack() as stack:
        processes = []
        for name, port in zip(NAMES, _find_free_ports(), strict=True):
            place = ["--node-name", name, "--node-address", f"http://127.0.0.1:{port}", "--port", str(port)]
            processes.append(stack.enter_context(_start(folder / name, *options, *place)))
        urls = [_await_url(folder / name, process) for name, process in zip(NAMES, processes, strict=True)]
        token = issue_demo_token(folder / NAMES[0], "alice", "admin", "predict")  # valid at all nodes
        nodes = []
        for name, process, url in zip(NAMES, processes, urls, strict=True):
            client = Client(url, token=token)
            nodes.append(_Node(name, folder / name, process, stack.enter_context(client)))
            click.echo(f"{name} serves {client.url}, with a replica of the ledger")
        yield nodes
        _stop_servers([node.process for node in nodes if node.is_running], STOP_LIMIT_S)


def _share_keys(folder: Path) -> None:
    """Give all nodes the same keys, so that a token is valid at each."""
    ensure_data_dir(folder / NAMES[0])
    for name in NAMES[1:]:
        shutil.copytree(keys_folder(folder / NAMES[0]), keys_folder(folder / name))


def _find_free_ports() -> list[int]:
    """Return a port for each node, which tells the others where it is before it listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in NAMES]
        return [each.getsockname()[1] for each in sockets]


def _read_digits() -> dict[str, Any]:
    """Return the held-out digits of the packaged example, and their labels."""
    path = resources.files("server.examples") / "digits.json"
    digits: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return digits


def _load_models(nodes: Sequence[_Node]) -> None:
    """Request all models at one node, one with two copies, and show where they are placed."""
    client = nodes[0].client
    began_s = time.perf_counter()
    for job in [client.load(COPIED, copies=2), *[client.load(name) for name in MODELS[1:]]]:
        client.wait_for(job.id)
    placed = _await_placement(nodes[0])
    took_s = time.perf_counter() - began_s
    click.echo(f"\nall models requested at {nodes[0].name}, and loaded after {took_s:.1f} s:")
    for node in nodes:
        click.echo(f"  {node.name} has {', '.join(_models_at(placed, node)) or 'none'}")


def _models_at(placed: Mapping[str, Sequence[str]], node: _Node) -> list[str]:
    return sorted(model for model, names in placed.items() if node.name in names)


def _classify_at_one_node(nodes: Sequence[_Node]) -> None:
    """Classify the held-out digits with each model, all at one node."""
    digits = _read_digits()
    asked = next(node for node in nodes if node.is_running)
    for model in MODELS:
        labels = asked.client.infer(model, {"pixels": digits["inputs"]})["label"]
        _require((labels == digits["labels"]).mean() > MIN_ACCURACY, f"{model} reads digits")
    click.echo(f"asked at {asked.name}, each model reads {len(digits['labels'])} handwritten digits")


def _kill_first_copy(nodes: Sequence[_Node]) -> None:
    """Kill the node of the first copy during inferences; show that none fails, and what the ledger says."""
    placed = nodes[0].find_placement()
    killed = next(node for node in nodes if node.name == placed[COPIED][0])
    witness = next(node for node in nodes if node is not killed)
    lost = _models_at(placed, killed)
    where = " and ".join(placed[COPIED])
    click.echo(f"\n{COPIED} has copies at {where}; a client at each node asks it all the time")
    with _infer_everywhere(nodes) as answers:
        head = witness.client.head().position
        click.echo(f"kill -9 of {killed.name}, which has {', '.join(lost)}")
        began_s = time.perf_counter()
        _kill(killed.process)
        placed = _await_placement(witness, killed)
        took_s = time.perf_counter() - began_s
    where = ", ".join(f"{model} at {' and '.join(placed[model])}" for model in lost)
    click.echo(f"after {took_s:.1f} s (the lease is {LEASE_S} s) they are loaded: {where}")
    failures = [failure for each in answers for failure in each.failures]
    gap_s = max(each.longest_gap_s for each in answers)
    click.echo(
        f"{COPIED} meanwhile: {sum(each.count for each in answers)} answers, {len(failures)} failed, "
        f"at most {1000 * gap_s:.0f} ms from one to the next"
    )
    _require(not failures, f"a model with two copies goes on answering: {failures[:3]}")
    click.secho("\nthe ledger", bold=True)
    for line in asyncio.run(_read_lines(witness.data / LEDGER, after=head)):
        click.echo(event_line(line))


def _await_placement(witness: _Node, killed: _Node | None = None) -> dict[str, list[str]]:
    """Return the nodes of the models once all are loaded, with both copies, and a killed node has none."""
    deadline_s = time.monotonic() + RELOAD_LIMIT_S
    while True:
        placed = witness.find_placement()
        is_whole = len(placed) == len(MODELS) and len(placed[COPIED]) == 2  # noqa: PLR2004
        if is_whole and (killed is None or not _models_at(placed, killed)):
            return placed
        _require(time.monotonic() < deadline_s, f"all models are loaded within {RELOAD_LIMIT_S} s")
        time.sleep(0.05)


def _verify(address: str, nodes: Sequence[_Node]) -> None:
    """Verify the database, and each node's replica, whose last event the database must have."""
    from loadledger.cli.database import verify_address

    whole = verify_address(address, None)
    _require(whole.finding is None, f"the database verifies: {whole.finding}")
    proved = whole.verification
    click.echo(f"\ndatabase verified: {proved.position} events, head {proved.hash.hex()[:16]}…")
    for node in nodes:
        replica = verify(node.data / LEDGER)
        _require(replica.verified, f"the replica of {node.name} verifies: {replica.finding}")
        compared = verify_address(address, Anchor(replica.position, replica.hash))
        _require(compared.finding is None, f"the database has the events of {node.name}: {compared.finding}")
        click.echo(f"replica of {node.name} verified: {replica.position} events, all in the database")
