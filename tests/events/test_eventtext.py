"""Events as text: the table has every type, and reads alike in Python and in the console's script."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from events.eventtext import EVENT_TEXTS, describe_event, is_bad, log_fields
from events.types import TYPES

NODE = {
    "node_id": "a",
    "epoch": 2,
    "address": "https://a",
    "attributes": ["zone=eu_1"],
    "budget_bytes": None,
    "release": "1",
    "unclean": True,
    "last_seen_at": "T",
    "no_node_since": None,
    "confinement": None,
}

SCRIPT = Path(__file__).parents[2] / "server" / "static" / "eventtext.js"
REQUESTED = {"cause": "demand", "priority": "low", "pinned": False}
LOADED = {
    "files": [{"path": "model.onnx", "sha256": "0123456789abcdef"}],
    "durations": {"total_us": 19_400},
    "memory_bytes": 3_210_000,
}
FREED = {"freed_bytes": 54_321_000, "drained_requests": 2, "aborted_requests": 0}
ISSUED = {"jti": "i1", "subject": "bob", "roles": ["admin", "audit"], "expires_at": "T", "via": None}
EXITED = {"signal": None, "exit_code": 3, "stderr": ["first", "last"]}
UNEXPECTED, SEEN = "the server before ended unexpectedly", "the server was last seen at U"
STARTED = {"unclean": True, "last_event_at": "T", "last_seen_at": "U"}
CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("LoadRequested", REQUESTED, "demand, priority low", False),
    ("LoadRequested", REQUESTED | {"pinned": True}, "demand, priority low, pinned", False),
    ("LoadRequested", REQUESTED | {"label": "champion"}, "demand, priority low, label champion", False),
    ("LoadStarted", {"attempt": 2}, "attempt 2", False),
    ("ModelLoaded", LOADED, "19 ms, 3.2 MB, model.onnx 0123456789ab", False),
    ("ModelLoaded", LOADED | {"threads": None}, "19 ms, 3.2 MB, model.onnx 0123456789ab", False),
    ("ModelLoaded", LOADED | {"threads": 4}, "19 ms, 3.2 MB, threads 4, model.onnx 0123456789ab", False),
    (
        "ModelLoaded",
        LOADED | {"devices": [{"device": "cuda:0", "nodes": 62}, {"device": "cpu", "nodes": 7}]},
        "19 ms, 3.2 MB, on cuda:0 (62 graph nodes), cpu (7 graph nodes), model.onnx 0123456789ab",
        False,
    ),
    ("ModelSettingsChanged", {"pinned": True, "keep_alive_s": None}, "pinned", False),
    ("ModelSettingsChanged", {"pinned": False, "keep_alive_s": -1}, "not pinned, keep_alive_s -1", False),
    ("LoadFailed", {"code": "timeout", "message": "too slow"}, "timeout: too slow", True),
    ("UnloadRequested", {"cause": "request", "force": True}, "request, by force", False),
    ("UnloadRequested", {"cause": "idle", "force": False}, "idle", False),
    ("ModelUnloaded", FREED, "54.3 MB freed, 2 requests drained, 0 aborted", False),
    (
        "ModelUnloaded",
        FREED | {"unreturned_bytes": 2_000_000},
        "54.3 MB freed, 2 requests drained, 0 aborted, 2.0 MB not returned by the device",
        False,
    ),
    ("JobCancelled", {}, "", False),
    ("JobCancelled", {"reason": None, "superseded_by": None}, "", False),
    ("JobCancelled", {"reason": "superseded", "superseded_by": "j2"}, "superseded by job j2", False),
    ("AccessDenied", {"action": "GET /x", "count": 3}, "GET /x, 3 times", True),
    ("WorkerExited", EXITED, "exit code 3, last", True),
    ("WorkerExited", {"signal": 9, "exit_code": None, "stderr": []}, "signal 9", True),
    ("ServerStarted", STARTED, f"{UNEXPECTED}, the ledger's last event before was at T, {SEEN}", True),
    (
        "ServerStarted",
        STARTED | {"unclean": False},
        f"the ledger's last event before was at T, {SEEN}",
        False,
    ),
    ("ServerStarted", {"unclean": False, "last_event_at": None, "last_seen_at": None}, "", False),
    ("ServerStopped", {}, "", False),
    (
        "VersionAdded",
        {"files": [{"path": "model.onnx", "sha256": "c" * 64}]},
        "model.onnx cccccccccccc",
        False,
    ),
    ("VersionRemoved", {"reason": None}, "", False),
    ("LabelSet", {"label": "champion", "cause_event_id": None}, "champion", False),
    ("LabelRemoved", {"label": "champion"}, "champion", False),
    ("VersionRemoved", {"reason": None, "node_id": "a"}, "at node a", False),
    ("RollbackAccepted", {"kept_position": 7, "head_position": 4}, "signed up to 7, accepted at 4", True),
    ("EventsDiscarded", {"first_position": 7, "last_position": 9, "hash": "00"}, "positions 7 to 9", True),
    ("TokenIssued", ISSUED, "for bob, admin, audit, until T, id i1", False),
    ("TokenIssued", ISSUED | {"via": "link"}, "for bob, admin, audit, until T, via link, id i1", False),
    ("TokenRevoked", {"jti": "i1", "expires_at": None}, "id i1", False),
    ("SignInLinkIssued", {"link_id": "l1"}, "id l1", False),
    ("SignInLinkUsed", {"link_id": "l1"}, "id l1", False),
    (
        "NodeJoined",
        NODE,
        "a epoch 2, at https://a, zone=eu_1, release 1, its epoch before ended unexpectedly, last seen at T",
        True,
    ),
    (
        "NodeJoined",
        NODE | {"attributes": [], "budget_bytes": 2_000_000, "unclean": False, "last_seen_at": None},
        "a epoch 2, at https://a, budget 2.0 MB, release 1",
        False,
    ),
    ("NodeDraining", {"node_id": "a", "epoch": 2}, "a epoch 2", False),
    ("NodeLeft", {"node_id": "a", "epoch": 2}, "a epoch 2", False),
    ("NodeLost", {"node_id": "a", "epoch": 2, "last_renewed_at": "T"}, "a epoch 2, last seen at T", True),
    (
        "LoadPlaced",
        {"node_id": "a", "node_epoch": 2, "reason": "files", "files": []},
        "at node a, files",
        False,
    ),
    ("LoadStarted", {"attempt": 2, "node_id": "a"}, "attempt 2, at node a", False),
    ("ClockStepped", {"from": "T", "to": "U", "taken": True}, "from T to U", True),
    ("ClockStepped", {"from": "T", "to": "U", "taken": False}, "from T to U, not followed", True),
]


def test_table_has_every_event_type() -> None:
    assert list(EVENT_TEXTS) == list(TYPES)


@pytest.mark.parametrize(("kind", "data", "text", "bad"), CASES)
def test_event_is_described(kind: str, data: dict[str, Any], text: str, bad: bool) -> None:  # noqa: FBT001
    assert describe_event(kind, data) == text
    assert is_bad(kind, data) == bad


def test_unknown_event_shows_all_members() -> None:
    for kind in ("Later", "LoadStarted", "ModelLoaded"):
        assert describe_event(kind, {"other": 1, "more": [2]}) == "other: 1, more: [2]"


def test_log_fields_are_members() -> None:
    assert log_fields("ModelLoaded", LOADED) == {"memory_bytes": 3_210_000}
    assert log_fields("WorkerExited", EXITED) == {"exit_code": 3, "signal": None, "stderr": "last"}
    assert log_fields("Later", {}) == {}


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the console's script")
def test_console_describes_events_alike(tmp_path: Path) -> None:
    shutil.copytree(SCRIPT.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    events = [{"type": kind, "data": data} for kind, data, _, _ in CASES]
    (tmp_path / "check.js").write_text(
        'import { summary, toneOf } from "./eventtext.js";\n'
        f"const events = {json.dumps(events)};\n"
        'console.log(JSON.stringify(events.map((event) => [summary(event), toneOf(event) === "bad"])));\n'
    )
    done = subprocess.run(["node", "check.js"], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [[text, bad] for _, _, text, bad in CASES]
