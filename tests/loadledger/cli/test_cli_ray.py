"""`loadledger ray` without Ray: what keeps a server running, and what is refused."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.clients import refused

from loadledger.cli import ray
from loadledger.cli.ray import KeeperStatus, NodeKeeper

LIMIT_S = 60


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeKeeper]:
    """A keeper of a server alone; the machine's own variable for the data directory goes first."""
    monkeypatch.setattr(ray, "FIRST_BACK_OFF_S", 0.1)
    monkeypatch.setenv("LOADLEDGER_DATA", str(tmp_path / "own"))
    (tmp_path / "models").mkdir()
    settings = {"LOADLEDGER_DATA": str(tmp_path / "given"), "LOADLEDGER_REPOSITORY": str(tmp_path / "models")}
    kept = NodeKeeper("10.0.0.7", settings, ["--port=0"])
    try:
        yield kept
    finally:
        kept.stop(LIMIT_S)


def until(keeper: NodeKeeper, holds: Callable[[KeeperStatus], object]) -> KeeperStatus:
    """Return the first status that is as expected."""
    end_s = time.monotonic() + LIMIT_S
    while not holds(found := keeper.status()):
        assert time.monotonic() < end_s, found
        time.sleep(0.02)
    return found


def test_keeper_starts_server_again(keeper: NodeKeeper, tmp_path: Path) -> None:
    first = until(keeper, lambda found: found["url"])
    assert first["pid"] is not None
    assert (first["machine"], first["exits"], first["exit_code"]) == ("10.0.0.7", 0, None)
    assert os.getpgid(first["pid"]) == first["pid"], "it would be killed with the actor's process group"
    os.kill(first["pid"], signal.SIGKILL)
    second = until(keeper, lambda found: found["url"] and found["exits"])
    assert (second["exits"], second["exit_code"]) == (1, -signal.SIGKILL)
    assert second["pid"] != first["pid"]
    stopped = keeper.stop(LIMIT_S)
    assert (stopped["pid"], stopped["url"], stopped["exits"], stopped["exit_code"]) == (None, None, 2, 0)
    assert (tmp_path / "own" / "ledger.db").exists()
    assert not (tmp_path / "given").exists()


def test_keeper_kills_server_that_does_not_stop(keeper: NodeKeeper) -> None:
    pid = until(keeper, lambda found: found["url"])["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert keeper.stop(0.1)["exit_code"] == -signal.SIGKILL


def test_ray_commands_need_ray_and_a_cluster() -> None:
    reason = "no Ray cluster at auto" if find_spec("ray") else "pip install 'loadledger[ray]'"
    for command in (("status",), ("down",), ("up", "--ledger", "postgresql://a@b/c")):
        assert reason in refused("ray", *command)
