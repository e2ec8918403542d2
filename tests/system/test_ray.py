"""Three machines of a Ray cluster, all on this one: `loadledger ray` keeps a node running on each."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.fleet import soak_only
from support.namespaces import Namespaces, isolated
from support.postgres import Database
from support.servers import clean_environment

from loadledger.cli.demo import issue_demo_token
from server.auth.keys import ensure_data_dir, keys_folder

ADDRESSES = {"a": "127.0.0.1", "b": "127.0.0.2", "c": "127.0.0.3"}
NAMES = tuple(ADDRESSES)
LOOKS = 30
"""At the status until it is as expected; each takes some seconds, most of them to import Ray."""
HEAD = "127.0.0.1:6379"
SMALL = ("--num-cpus=1", "--object-store-memory=80000000")
JOIN = f"--address={HEAD}"
START_HEAD = ("--head", "--port=6379", "--include-dashboard=false")
Status = dict[str, dict[str, Any] | None]
"""What is known of each node; None while its actor does not answer."""

pytestmark = [
    soak_only,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
]


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines, each of which has a raylet.

    Attributes:
        within: where their processes are.
        folder: of the data directories, by the names of the nodes.
        logs: folder of what actors and their servers write.
    """

    within: Namespaces
    folder: Path
    logs: Path

    def run(self, *arguments: object, **variables: object) -> "subprocess.CompletedProcess[str]":
        """Run `loadledger` on the first machine."""
        return self.within.run(program("loadledger"), *arguments, env=environment(**variables))

    def ray(self, command: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """Run a command of `loadledger ray`."""
        return self.run("ray", command, "--address", HEAD, *arguments)

    def status(self) -> Status:
        """Return what `loadledger ray status` says."""
        return nodes_of(self.ray("status", "--json"))

    def until(self, holds: Callable[[Status], bool]) -> Status:
        """Look until the status is as expected, and return it."""
        looks = (self.status() for _ in range(LOOKS))
        found = next(filter(holds, looks), None)
        assert found is not None, f"{self.status()}\n{self.read_logs()}"
        return found

    def read_logs(self) -> str:
        """Return what actors and their servers have written."""
        logs = sorted(self.logs.glob("worker-*.err"))
        return "\n".join(f"{each.name}:\n{each.read_text(errors='replace')}" for each in logs)

    def start(self, name: str, *role: str) -> None:
        """Start the raylet of a machine, with a data directory of its own."""
        own = {"LOADLEDGER_DATA": self.folder / name, "LOADLEDGER_REPOSITORY": self.folder / "models"}
        where = (f"--node-name={name}", f"--node-ip-address={ADDRESSES[name]}", *SMALL)
        begin = self.within.run(program("ray"), "start", *where, *role, env=environment(**own))
        assert begin.returncode == 0, begin.stdout + begin.stderr

    def kill(self, pid: int) -> None:
        """Kill a process, by its number on the machines."""
        assert self.within.run("kill", "-9", pid).returncode == 0


def program(name: str) -> Path:
    """Return a command of this environment."""
    return Path(sys.executable).with_name(name)


def environment(**more: object) -> dict[str, str]:
    """Return an environment in which Ray reports nothing."""
    return {
        **clean_environment(),
        "RAY_USAGE_STATS_ENABLED": "0",
        **{name: str(value) for name, value in more.items()},
    }


def nodes_of(done: "subprocess.CompletedProcess[str]") -> Status:
    """Return the nodes that a command printed as JSON."""
    assert done.returncode == 0, done.stdout + done.stderr
    found: Status = json.loads(done.stdout)["nodes"]
    return found


def is_serving(found: Status, name: str, *, instead_of: int) -> bool:
    """Whether a node has another server than this process, and it is ready."""
    node = found[name]
    return node is not None and node["url"] is not None and node["pid"] != instead_of


@contextmanager
def started(tmp_path: Path) -> Iterator[Machines]:
    """Start three raylets, each with a loopback address of its own."""
    models.save(models.add(), tmp_path / "models", "add-one")
    # Ray's sockets are in its folder, and their paths are bounded.
    with tempfile.TemporaryDirectory(prefix="ray-") as short, isolated() as within:
        machines = Machines(within, tmp_path, Path(short) / "session_latest" / "logs")
        machines.start("a", *START_HEAD, f"--temp-dir={short}")
        machines.start("b", JOIN)
        machines.start("c", JOIN)
        yield machines


def make_keys(folder: Path) -> None:
    """Create the data directories, with the same keys in each."""
    ensure_data_dir(folder / NAMES[0])
    for name in NAMES[1:]:
        shutil.copytree(keys_folder(folder / NAMES[0]), keys_folder(folder / name))
        ensure_data_dir(folder / name)


async def test_ray_starts_and_keeps_node_on_each_machine(tmp_path: Path, ledger: Database) -> None:
    make_keys(tmp_path)
    socket = f"host={ledger.server.home}&port={ledger.server.port}"
    address = f"postgresql://ledger_server@/{ledger.name}?{socket}"
    with started(tmp_path) as machines:
        first = nodes_of(machines.ray("up", "--json", "--ledger", address, "--", "--lease-s=3"))
        urls = {name: f"http://{host}:8080" for name, host in ADDRESSES.items()}
        assert {name: each and each["url"] for name, each in first.items()} == urls
        pids = {name: each["pid"] for name, each in first.items() if each}
        token = issue_demo_token(tmp_path / "a", "alice", "admin")
        loaded = machines.run("load", "add-one", "--wait", "--url", urls["c"], LOADLEDGER_TOKEN=token)
        assert loaded.returncode == 0, loaded.stdout + loaded.stderr

        again = machines.ray("up", "--json", "--ledger", address)
        assert nodes_of(again) == first
        assert "left as it was: a, b, c" in again.stderr

        machines.kill(pids["b"])
        second = machines.until(partial(is_serving, name="b", instead_of=pids["b"]))["b"]
        assert second is not None
        assert (second["exits"], second["exit_code"]) == (1, -9)
        actor = machines.within.run("ps", "-o", "ppid=", "-p", pids["c"])
        machines.kill(int(actor.stdout))
        machines.until(partial(is_serving, name="c", instead_of=pids["c"]))
        raylet = machines.within.run("pgrep", "--full", f"raylet/raylet .*node_ip_address={ADDRESSES['b']}")
        machines.kill(int(raylet.stdout))
        machines.until(lambda found: found["b"] is None)
        assert machines.run("nodes", "--data", tmp_path / "b").returncode == 2  # its server has exited
        machines.start("b", JOIN)
        third = machines.until(partial(is_serving, name="b", instead_of=second["pid"]))
        gone = [*pids.values(), second["pid"]][1:]
        assert [machines.within.run("ps", "-p", pid).returncode for pid in gone] == [1, 1, 1]
        listed = json.loads(machines.run("nodes", "--json", "--data", tmp_path / "a").stdout)["nodes"]
        assert {each["id"]: each["phase"] for each in listed} == dict.fromkeys(NAMES, "joined")

        assert machines.ray("down", "b").stdout == "stopped: b\n"
        assert machines.ray("down").stdout == "stopped: a, c\n"
        assert machines.status() == {}
        left = [each["pid"] for each in third.values() if each]
        assert [machines.within.run("ps", "-p", pid).returncode for pid in left] == [1, 1, 1]
        verified = machines.run("verify", "--data", tmp_path / "a")
        assert verified.returncode == 0, verified.stdout
