"""`loadledger demo`: the whole story in a few seconds, on a real server, a real model and a real ledger.

It talks to a server of its own over HTTP, observes the process tree from outside, and fails if what it sees
differs from what it says.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import click

from events.audit.verify import verify
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import EventQuery, open_reader
from loadledger.cli.events import event_line
from loadledger.client import Client
from loadledger.problems import ClientProblem
from runtime.memory import has_order, list_descendants, list_workers, tree_bytes
from server.auth.keys import ensure_data_dir

MAX_KEPT_BYTES = 8 * 2**20
"""Tolerated growth of the process tree: the allocators of a serving process vary."""

START_LIMIT_S = 60
STOP_LIMIT_S = 60
GONE_LIMIT_S = 10
REST_LIMIT_S = 10
_MB = 2**20


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
        """Return the anonymous memory of the process tree at rest, which has a worker for the next load."""
        limit_s = time.monotonic() + REST_LIMIT_S
        while all(map(has_order, list_descendants(self.process.pid)[1:])) and time.monotonic() < limit_s:
            time.sleep(0.01)
        return tree_bytes(self.process.pid)

    def workers(self) -> set[int]:
        """Return the process ids of the workers that have a model."""
        return set(list_workers(self.process.pid))


class DemoFailed(Exception):
    """What the demo saw differs from what it says."""


def _fail(problem: ClientProblem) -> NoReturn:
    """Fail at once instead of waiting for the server to return."""
    raise problem


def run() -> int:
    """Run the demo; return 0 if everything held, else 1."""
    examples = resources.files("server.examples")
    digits = json.loads((examples / "digits.json").read_text(encoding="utf-8"))
    try:
        with (
            resources.as_file(examples) as repository,
            tempfile.TemporaryDirectory(prefix="loadledger-demo-") as folder,
        ):
            _show(repository, Path(folder) / "data", digits)
    except (DemoFailed, ClientProblem) as failure:
        return report_failure(failure)
    return 0


def report_failure(failure: Exception) -> int:
    """Print why the demo failed; return its exit code."""
    click.echo(f"{click.style('failed:', fg='red')} {failure}")
    return 1


def _show(repository: Path, data: Path, digits: dict[str, Any]) -> None:
    with _serve(repository, data) as server:
        click.echo(f"loadledger serves {server.admin.url}; alice is its admin, bob may predict\n")
        _warm_up(server, digits)
        before, nothing_loaded = server.memory_bytes(), server.workers()
        first = _load(server, 1, nothing_loaded)
        with_model = server.memory_bytes()
        plain = _classify(server, 1, digits)
        second = _load(server, 2, nothing_loaded | {first})
        better = _classify(server, 2, digits)
        require(better > plain, "version 2 is better than version 1")
        require(is_gone(first), f"process {first} of version 1 is gone after the swap")
        took_ms = server.unload()
        require(is_gone(second), f"process {second} is gone after the unload")
        click.echo(f"unloaded in {took_ms:.0f} ms: process {second} is gone")
        _memory(before, with_model, server.memory_bytes())
    _ledger(data / LEDGER)


@contextmanager
def _serve(repository: Path, data: Path) -> Iterator[_Server]:
    ensure_data_dir(data)
    # -P: what lies in the current directory must not be taken for our packages.
    command = [sys.executable, "-P", "-m", "loadledger", "serve", "--port", "0"]
    command += ["--repository", str(repository), "--data", str(data)]
    command += ["--prepared-size", "off"]  # it would add processes and memory to the figures
    command += ["--log-level", "warning"]  # the demo prints its own progress
    with subprocess.Popen(  # noqa: S603 - our own interpreter and package
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=server_environment(),
    ) as process:
        try:
            url = read_url(process)
            with (
                Client(url, token=issue_demo_token(data, "alice", "admin")) as admin,
                Client(url, token=issue_demo_token(data, "bob", "predict")) as predict,
            ):
                yield _Server(process, admin, predict)
        except BaseException:  # this is the failure to report
            process.kill()
            raise
        stop_servers([process], STOP_LIMIT_S)


def server_environment() -> dict[str, str]:
    """Return this process's environment without settings of other servers."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LOADLEDGER_")}


def read_url(process: subprocess.Popen[str]) -> str:
    """Return the URL that the server prints when it is ready."""
    url = ""
    if process.stdout is not None and select.select([process.stdout], [], [], START_LIMIT_S)[0]:
        url = process.stdout.readline().rpartition(" ")[2].strip()
    require(url.startswith("http"), "the server starts; see above")
    return url


def stop_servers(processes: Sequence[subprocess.Popen[str]], limit_s: float) -> None:
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
        require(status == 0, f"the server stops in order: it ended with {status}")


def issue_demo_token(data: Path, subject: str, *roles: str) -> str:
    """Return a token that is valid for ten minutes."""
    with Client.of_data(data) as client:
        body = {"subject": subject, "roles": list(roles), "expires_s": 600}
        return str(client.post("/api/v1/tokens", body)["token"])


def _warm_up(server: _Server, digits: dict[str, Any]) -> None:
    """Load and unload once, so that later growth is the models' alone."""
    for version in (1, 2):
        server.load(version)
        server.accuracy(digits)
    server.unload()


def _load(server: _Server, version: int, others: set[int]) -> int:
    took_ms = server.load(version)
    new = server.workers() - others
    require(len(new) == 1, "the model has a process of its own")
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
    require(before, "the kernel says how much memory a process has")
    require(after <= before + MAX_KEPT_BYTES, "all the model's memory is back")


def _ledger(path: Path) -> None:
    click.secho("the ledger", bold=True)
    for line in asyncio.run(read_lines(path)):
        click.echo(event_line(line))
    verification = verify(path)
    require(verification.verified, f"the chain verifies: {verification.finding}")
    click.echo(f"chain verified: {verification.events} events, head {verification.hash.hex()[:16]}…")


async def read_lines(path: Path, *, after: int | None = None) -> list[bytes]:
    """Return the first hundred events of a ledger, or those after a position."""
    async with open_reader(path) as reader:
        return [event.line for event in (await reader.event_page(EventQuery(after=after))).items]


def is_gone(pid: int) -> bool:
    """Whether the process has ended, within a generous limit."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], GONE_LIMIT_S)[0])
    finally:
        os.close(descriptor)


def require(so: object, what: str) -> None:
    """Fail unless something is so.

    Raises:
        DemoFailed: it is not.
    """
    if not so:
        raise DemoFailed(what)
