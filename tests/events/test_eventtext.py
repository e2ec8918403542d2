"""Events as text: the table has every type, and reads alike in Python and in the console's script."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from events.eventtext import EVENT_TEXTS, describe_event, is_bad, log_fields
from events.types import TYPES

NODE = {"node_id": "a", "epoch": 2, "address": "https://a", "attributes": ["zone=eu_1"], "release": "1"}
NODE |= {
    "budget_bytes": None,
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
MEASURED, DRAINED = "19 ms, 3.2 MB", "54.3 MB freed, 2 requests drained, 0 aborted"
ON_TWO = {"devices": [{"device": "cuda:0", "nodes": 62}, {"device": "cpu", "nodes": 7}]}
ON_TWO_TEXT = "on cuda:0 (62 graph nodes), cpu (7 graph nodes)"
CLEAN, EVENT_BEFORE = STARTED | {"unclean": False}, "the ledger's last event before was at T"
NEVER = {"unclean": False, "last_event_at": None, "last_seen_at": None}
BUDGET = {"attributes": [], "budget_bytes": 2_000_000, "unclean": False, "last_seen_at": None}
ENDED_BEFORE = "its epoch before ended unexpectedly, last seen at T"
FILE, FILE_TEXT = {"path": "model.onnx", "sha256": "0123456789abcdef"}, "model.onnx 0123456789ab"
STEPPED = {"from": "T", "to": "U", "taken": True}
CASES: list[tuple[str, dict[str, Any], str]] = [
    # type, data, text, with an exclamation mark if it is bad
    ("LoadRequested", REQUESTED, "demand, priority low"),
    ("LoadRequested", REQUESTED | {"pinned": True}, "demand, priority low, pinned"),
    ("LoadRequested", REQUESTED | {"label": "champion"}, "demand, priority low, label champion"),
    ("LoadStarted", {"attempt": 2}, "attempt 2"),
    ("LoadStarted", {"attempt": 2, "node_id": "a"}, "attempt 2, at node a"),
    ("ModelLoaded", LOADED, f"{MEASURED}, {FILE_TEXT}"),
    ("ModelLoaded", LOADED | {"threads": None}, f"{MEASURED}, {FILE_TEXT}"),
    ("ModelLoaded", LOADED | {"threads": 4}, f"{MEASURED}, threads 4, {FILE_TEXT}"),
    ("ModelLoaded", LOADED | ON_TWO, f"{MEASURED}, {ON_TWO_TEXT}, {FILE_TEXT}"),
    ("ModelSettingsChanged", {"pinned": True, "keep_alive_s": None}, "pinned"),
    ("ModelSettingsChanged", {"pinned": False, "keep_alive_s": -1}, "not pinned, keep_alive_s -1"),
    ("LoadFailed", {"code": "timeout", "message": "too slow"}, "! timeout: too slow"),
    ("UnloadRequested", {"cause": "request", "force": True}, "request, by force"),
    ("UnloadRequested", {"cause": "idle", "force": False}, "idle"),
    ("ModelUnloaded", FREED, DRAINED),
    (
        "ModelUnloaded",
        FREED | {"unreturned_bytes": 2_000_000},
        f"{DRAINED}, 2.0 MB not returned by the device",
    ),
    ("JobCancelled", {}, ""),
    ("JobCancelled", {"reason": None, "superseded_by": None}, ""),
    ("JobCancelled", {"reason": "superseded", "superseded_by": "j2"}, "superseded by job j2"),
    ("AccessDenied", {"action": "GET /x", "count": 3}, "! GET /x, 3 times"),
    ("WorkerExited", EXITED, "! exit code 3, last"),
    ("WorkerExited", {"signal": 9, "exit_code": None, "stderr": []}, "! signal 9"),
    ("ServerStarted", STARTED, f"! {UNEXPECTED}, {EVENT_BEFORE}, {SEEN}"),
    ("ServerStarted", CLEAN, f"{EVENT_BEFORE}, {SEEN}"),
    ("ServerStarted", NEVER, ""),
    ("ServerStopped", {}, ""),
    ("VersionAdded", {"files": [FILE]}, FILE_TEXT),
    ("VersionRemoved", {"reason": None}, ""),
    ("VersionRemoved", {"reason": None, "node_id": "a"}, "at node a"),
    ("LabelSet", {"label": "champion", "cause_event_id": None}, "champion"),
    ("LabelRemoved", {"label": "champion"}, "champion"),
    ("RollbackAccepted", {"kept_position": 7, "head_position": 4}, "! signed up to 7, accepted at 4"),
    ("EventsDiscarded", {"first_position": 7, "last_position": 9, "hash": "00"}, "! positions 7 to 9"),
    ("TokenIssued", ISSUED, "for bob, admin, audit, until T, id i1"),
    ("TokenIssued", ISSUED | {"via": "link"}, "for bob, admin, audit, until T, via link, id i1"),
    ("TokenRevoked", {"jti": "i1", "expires_at": None}, "id i1"),
    ("SignInLinkIssued", {"link_id": "l1"}, "id l1"),
    ("SignInLinkUsed", {"link_id": "l1"}, "id l1"),
    ("NodeJoined", NODE, f"! a epoch 2, at https://a, zone=eu_1, release 1, {ENDED_BEFORE}"),
    ("NodeJoined", NODE | BUDGET, "a epoch 2, at https://a, budget 2.0 MB, release 1"),
    ("NodeDraining", {"node_id": "a", "epoch": 2}, "a epoch 2"),
    ("NodeLeft", {"node_id": "a", "epoch": 2}, "a epoch 2"),
    ("NodeLost", {"node_id": "a", "epoch": 2, "last_renewed_at": "T"}, "! a epoch 2, last seen at T"),
    ("LoadPlaced", {"node_id": "a", "node_epoch": 2, "reason": "files", "files": []}, "at node a, files"),
    ("ClockStepped", STEPPED, "! from T to U"),
    ("ClockStepped", STEPPED | {"taken": False}, "! from T to U, not followed"),
]


def test_table_has_every_event_type() -> None:
    assert list(EVENT_TEXTS) == list(TYPES)


@pytest.mark.parametrize(("kind", "data", "text"), CASES)
def test_event_is_described(kind: str, data: dict[str, Any], text: str) -> None:
    assert "! " * is_bad(kind, data) + describe_event(kind, data) == text


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
    events = [{"type": kind, "data": data} for kind, data, _ in CASES]
    (tmp_path / "check.js").write_text(
        'import { summary, toneOf } from "./eventtext.js";\n'
        f"const events = {json.dumps(events)};\n"
        'console.log(JSON.stringify(events.map((event) => [summary(event), toneOf(event) === "bad"])));\n'
    )
    done = subprocess.run(["node", "check.js"], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert [f"{'! ' * bad}{text}" for text, bad in json.loads(done.stdout)] == [text for *_, text in CASES]
