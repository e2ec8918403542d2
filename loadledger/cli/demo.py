"""`loadledger demo`: the product in a few seconds, on a real server, a real model and a real ledger.

It uses a server of its own over HTTP, observes its processes from outside, and fails if an observation
differs from its text.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import click

from events.audit.verify import verify
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import EventQuery, find_event_page, read
from events.sqlite.readonly import open_read_only
from loadledger.cli.events import event_line
from loadledger.client import Client
from loadledger.errors import ClientProblem
from runtime.memory import list_descendants, tree_bytes
from runtime.process.prctl import die_with
from server.auth.keys import ensure_data_dir

MAX_KEPT_BYTES = 8 * 2**20
"""Tolerated growth of the process tree: the allocators of a serving process vary."""

START_LIMIT_S = 60
STOP_LIMIT_S = 60
GONE_LIMIT_S = 10
_MB = 2**20


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[str]
    admin: Client
    inference: Client

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
        labels = self.inference.infer("digits", {"pixels": digits["inputs"]})["label"]
        return float((labels == digits["labels"]).mean())

    def memory_bytes(self) -> int:
        """Return the anonymous memory of the process tree."""
        return tree_bytes(self.process.pid)

    def workers(self) -> set[int]:
        """Return the process ids of the workers: the server's descendants except the fork server."""
        return set(list_descendants(self.process.pid)[1:])


class DemoFailed(Exception):
    """An observation contradicts what the demo tells its user."""


def _fail(problem: ClientProblem) -> NoReturn:
    """Fail at once instead of waiting for the server to return."""
    raise problem


def run_demo() -> int:
    """Run the demo; return 0 if everything held, else 1."""
    digits = _read_digits()
    try:
        with (
            resources.as_file(resources.files("server.examples")) as repository,
            tempfile.TemporaryDirectory(prefix="loadledger-demo-") as folder,
        ):
            _show(repository, Path(folder) / "data", digits)
    except (DemoFailed, ClientProblem) as failure:
        click.echo(f"{click.style('failed:', fg='red')} {failure}")
        return 1
    return 0


def _show(repository: Path, data: Path, digits: dict[str, Any]) -> None:
    with _serve(repository, data) as server:
        click.echo(f"loadledger serves {server.admin.url}; alice is its admin, bob may run inferences\n")
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
    with _start(repository, data) as process:
        url = _await_url(data, process)
        with (
            Client(url, token=_issue_token(data, "alice", "admin")) as admin,
            Client(url, token=_issue_token(data, "bob", "infer")) as inference,
        ):
            yield _Server(process, admin, inference)
        _stop(process, STOP_LIMIT_S)


@contextmanager
def _start(repository: Path, data: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a server, whose log is beside its data directory; kill it in the end if it still runs."""
    ensure_data_dir(data)
    # -P: Python must not take files of the current directory for the product's packages.
    command = [sys.executable, "-P", "-m", "loadledger", "serve", "--port", "0"]
    command += ["--data", str(data), "--repository", str(repository)]
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
            start_new_session=True,  # Ctrl-C reaches only the demo, which ends the server
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
        raise DemoFailed(f"the server starts: {said or 'it said nothing'}")
    return url


def _stop(process: subprocess.Popen[str], limit_s: float) -> None:
    """Stop a server in order; kill it if it does not end in time.

    Raises:
        DemoFailed: the server did not stop in order.
    """
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DemoFailed(f"the server stops within {limit_s:g} s") from None
    _require(status == 0, f"the server stops in order: it ended with {status}")


def _issue_token(data: Path, subject: str, *roles: str) -> str:
    """Return a token that is valid for ten minutes."""
    with Client.of_data(data) as client:
        body = {"subject": subject, "roles": list(roles), "expires_s": 600}
        return str(client.post("/api/v1/tokens", body)["token"])


def _read_digits() -> dict[str, Any]:
    """Return the held-out digits of the packaged example, and their labels."""
    path = resources.files("server.examples") / "digits.json"
    digits: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return digits


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
    with open_read_only(path) as ledger:
        for event in read(ledger, find_event_page(EventQuery())).items:
            click.echo(event_line(event.line))
    verification = verify(path)
    _require(verification.verified, f"the chain verifies: {verification.finding}")
    click.echo(f"chain verified: {verification.position} events, head {verification.hash.hex()[:16]}…")


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
    """Fail unless a condition holds.

    Raises:
        DemoFailed: the condition does not hold.
    """
    if not so:
        raise DemoFailed(what)
