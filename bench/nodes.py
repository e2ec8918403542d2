"""Several nodes over one PostgreSQL: one is killed, the database is away, each is replaced under load."""

import http.client
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import driver, models
from bench.driver import Server
from bench.postgres import Postgres, find_free_port
from bench.table import Row

NAMES = ("a", "b", "c")
LEASE_S = 3.0
KILL_GOAL_S = 4.0
"""For all models of a killed node to be loaded elsewhere, beside the time that loading them takes."""
MODELS = 12
LIMIT_S = 60.0
"""For nodes to do what they must: far more than any lease."""
LOOK_S = 0.02


@dataclass(slots=True)
class Node:
    """One node: its process and a connection to it."""

    name: str
    process: subprocess.Popen[bytes]
    server: Server


class Fleet:
    """Nodes over one ledger, with one repository and the same keys.

    Args:
        folder: An empty directory.
        address: Of the ledger.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._address = address
        self.repository = folder / "repository"
        self.nodes: dict[str, Node] = {}
        self._ports = {name: find_free_port() for name in NAMES}

    def start(self, name: str) -> Server:
        """Start a node, or start it again; return when it is ready."""
        data, output = self._folder / name, self._folder / f"{name}.log"
        if not data.exists():
            if not (shared := self._folder / "keys").exists():
                driver.run("key", "rotate", "--data", shared)
            shutil.copytree(shared / "keys", data / "keys")
        port = self._ports[name]
        node = ("--ledger", self._address, "--node-name", name, "--lease-s", f"{LEASE_S:g}")
        where = ("--port", str(port), "--node-address", self.url(name))
        options = (*driver.UNLIMITED, *node, *where)
        process = driver.serve(self.repository, data, output, options)
        try:
            client = http.client.HTTPConnection(
                driver.find_address(process, output), timeout=driver.ANSWER_LIMIT_S
            )
        except BaseException:
            process.kill()
            raise
        server = Server(process.pid, self.repository, client, driver.issue_token(data))
        self.nodes[name] = Node(name, process, server)
        return server

    def url(self, name: str) -> str:
        """Return the address of a node, which it keeps."""
        return f"http://127.0.0.1:{self._ports[name]}"

    def kill(self, name: str) -> None:
        """Kill a node with SIGKILL, and wait for its process to end."""
        node = self.nodes.pop(name)
        node.server.client.close()
        node.process.kill()
        node.process.wait()

    def stop(self, name: str) -> None:
        """Stop a node in order."""
        node = self.nodes.pop(name)
        node.server.client.close()
        node.process.send_signal(signal.SIGTERM)
        if status := node.process.wait(driver.STOP_LIMIT_S):
            raise SystemExit(f"node {name} ended with {status}")

    @property
    def any(self) -> Server:
        """Return a node to ask."""
        return next(iter(self.nodes.values())).server


@contextmanager
def running(folder: Path, database: Postgres) -> Iterator[Fleet]:
    """Start three nodes over an empty ledger, and stop them at the end."""
    folder.mkdir()
    fleet = Fleet(folder, database.create_ledger())
    fleet.repository.mkdir()
    try:
        for name in NAMES:
            fleet.start(name)
        yield fleet
        for name in list(fleet.nodes):
            fleet.stop(name)
    finally:
        for name in list(fleet.nodes):
            fleet.kill(name)


def measure_kills(folder: Path, database: Postgres, *, rounds: int) -> Row:
    """Kill the node with most models, until each of them is loaded at another node."""
    with running(folder, database) as fleet:
        ids = [f"kept-{number}" for number in range(MODELS)]
        for model_id in ids:
            models.write(fleet.repository, model_id, models.tiny())
        loading_s = _load_all(fleet.any, ids)
        took_s, moved = zip(*(_kill_round(fleet, ids) for _ in range(rounds)), strict=True)
    goal_s = KILL_GOAL_S + loading_s
    what = f"its {min(moved)} to {max(moved)} models are loaded elsewhere, lease {LEASE_S:g} s"
    return Row(
        f"kill -9 of one of {len(NAMES)} nodes until {what}; beside: loading {MODELS} models",
        f"{median(took_s):.2f} s, worst {max(took_s):.2f} s",
        f"{loading_s:.2f} s",
        None,
        f"≤ {KILL_GOAL_S:g} s + loading them",
        max(took_s) <= goal_s,
    )


def _kill_round(fleet: Fleet, ids: Sequence[str]) -> tuple[float, int]:
    """Return the seconds, and how many models moved; the node is back and its share of models with it."""
    places = _places(fleet.any, ids)
    ((victim, _),) = Counter(places.values()).most_common(1)
    moving = {model_id for model_id, node in places.items() if node == victim}
    begin = time.monotonic()
    fleet.kill(victim)
    wait_until(lambda: not {each for each, node in _places(fleet.any, moving).items() if node == victim})
    took_s = time.monotonic() - begin
    fleet.start(victim)
    return took_s, len(moving)


def _load_all(server: Server, ids: Sequence[str]) -> float:
    """Load models at once, and return the seconds until all are ready."""
    paths = [f"/api/v1/models/{model_id}/load" for model_id in ids]
    begin = time.monotonic()
    connections = [server.connect() for _ in paths]
    for connection, path in zip(connections, paths, strict=True):
        server.send(connection, "POST", path, headers=driver.WAIT)
    for connection, path in zip(connections, paths, strict=True):
        driver.completed_job(driver.read(connection), path)
        connection.close()
    return time.monotonic() - begin


def _places(server: Server, ids: Collection[str]) -> dict[str, str]:
    """Return at which node each model was loaded last."""
    found = dict[str, str]()
    for event in _loaded_events(server):
        if event["model_id"] in ids:
            found.setdefault(event["model_id"], event["data"]["node_id"])
    return found


def _loaded_events(server: Server) -> list[dict[str, Any]]:
    """Return the newest events of loaded models, newest first."""
    page = server.ask("GET", f"/api/v1/events?type=ModelLoaded&before={driver.BEYOND_ALL}&limit=100").json()
    events: list[dict[str, Any]] = page["events"]
    return events


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"the nodes have not done what they must within {LIMIT_S:g} s")
        time.sleep(LOOK_S)
