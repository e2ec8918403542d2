"""Events as text: one table of the words for each type, for log, command line, console and reference.

`tools.generate` writes the table into the console's script and the reference page. This module imports the
standard library only: the start of the command line is a measured budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

HASH_DIGITS = 12
"""Digits of a file's SHA-256 in a line: enough to tell files apart."""

_CHOICE = re.compile(r"(\w+)\?([^|]*)\|?(.*)")
_MEMBER = re.compile(r"\{([\w.-]+)(\?)?(?::(\w+))?\}")


class EventText(NamedTuple):
    """The words of a line for one event type.

    Attributes:
        parts: joined by commas. `{a.b}` is a member of the event's data, `{a.-1}` the last item of a list;
            `{a:ms}`, `{a:MB}`, `{a:list}`, `{a:acts}`, `{a:devices}` and `{a:files}` have a form;
            `{a?}` may be missing. A part is left out if its member is null or an empty list. `a?yes|no`
            chooses by a member.
        fields: the fields of a log line: name and member.
        tone: `good`, `bad` or `plain`. A bad event is logged as a warning.
        bad_if: the member that makes an event bad if it is true.
    """

    parts: Sequence[str] = ()
    fields: Mapping[str, str] = {}
    tone: str = "plain"
    bad_if: str | None = None


_FAILED = EventText(("{code}: {message}",), {"code": "code", "reason": "message"}, "bad")

EVENT_TEXTS: Mapping[str, EventText] = {
    "LoadRequested": EventText(
        (
            "{cause}",
            "priority {priority}",
            "pinned?pinned",
            "reason: {justification.reason?}",
            "emergency: {justification.emergency?}",
            "label {label?}",
            "passed over: {passed_over?}",
        ),
        {"cause": "cause", "priority": "priority"},
    ),
    "LoadJoined": EventText(),
    "LoadStarted": EventText(("attempt {attempt}", "at node {node_id?}"), {"attempt": "attempt"}),
    "ModelLoaded": EventText(
        (
            "{durations.total_us:ms}",
            "{memory_bytes:MB}",
            "threads {threads?}",
            "on {devices?:devices}",
            "rows {rows?}",
            "at node {node_id?}",
            "signed by {signature.signer?}",
            "{signature.problem?}",
            "{approval.result?:plain}",
            "{files:files}",
        ),
        {"memory_bytes": "memory_bytes"},
        "good",
    ),
    "ModelSettingsChanged": EventText(
        ("pinned?pinned|not pinned", "keep_alive_s {keep_alive_s}", "max_queue {max_queue?}"),
        {"pinned": "pinned", "keep_alive_s": "keep_alive_s"},
        "good",
    ),
    "LoadFailed": _FAILED,
    "UnloadRequested": EventText(
        ("{cause}", "force?by force", "at node {node_id?}"), {"cause": "cause", "force": "force"}
    ),
    "UnloadJoined": EventText(),
    "UnloadStarted": EventText(),
    "ModelUnloaded": EventText(
        (
            "{freed_bytes:MB} freed",
            "{drained_requests} requests drained",
            "{aborted_requests} aborted",
            "{unreturned_bytes?:MB} not returned by the device",
        ),
        {name: name for name in ("freed_bytes", "drained_requests", "aborted_requests")},
    ),
    "CancelRequested": EventText(),
    "JobCancelled": EventText(
        ("superseded by job {superseded_by?}",), {"reason": "reason", "superseded_by": "superseded_by"}
    ),
    "AccessDenied": EventText(("{action}", "{count} times"), {"action": "action", "count": "count"}, "bad"),
    "WorkerExited": EventText(
        ("signal {signal}", "exit code {exit_code}", "at node {node_id?}", "{stderr.-1}"),
        {"exit_code": "exit_code", "signal": "signal", "stderr": "stderr.-1"},
        "bad",
    ),
    "ServerStarted": EventText(
        (
            "unclean?the server before ended unexpectedly|",
            "the ledger's last event before was at {last_event_at?}",
            "the server was last seen at {last_seen_at?}",
            "workers could {confinement.not_prevented?:acts}",
            "models and requests may take {memory.excess_bytes?:MB} more than its memory",
        ),
        {"unclean": "unclean", "last_event_at": "last_event_at", "last_seen_at": "last_seen_at"},
        bad_if="unclean",
    ),
    "ServerStopped": EventText(),
    "ClockStepped": EventText(
        ("from {from} to {to}", "taken?|not followed"), {"from": "from", "to": "to", "taken": "taken"}, "bad"
    ),
    "RollbackAccepted": EventText(
        ("signed up to {kept_position}", "accepted at {head_position}"),
        {"kept_position": "kept_position", "head_position": "head_position"},
        "bad",
    ),
    "EventsDiscarded": EventText(
        ("positions {first_position} to {last_position}",),
        {"first_position": "first_position", "last_position": "last_position"},
        "bad",
    ),
    "VersionAdded": EventText(
        ("{files:files}", "from {source.resolved?}", "at node {node_id?}"), tone="good"
    ),
    "VersionRemoved": EventText(("{reason?}", "at node {node_id?}"), {"reason": "reason"}),
    "TokenIssued": EventText(
        ("for {subject}", "{roles:acts}", "until {expires_at}", "via {via?}", "id {jti}"),
        {"jti": "jti", "token_subject": "subject", "expires_at": "expires_at", "via": "via"},
    ),
    "TokenRevoked": EventText(("id {jti}",), {"jti": "jti"}),
    "SignInLinkIssued": EventText(("id {link_id}",), {"link_id": "link_id"}),
    "SignInLinkUsed": EventText(("id {link_id}",), {"link_id": "link_id"}),
    "NodeJoined": EventText(
        (
            "{node_id} epoch {epoch}",
            "at {address}",
            "{attributes:list}",
            "budget {budget_bytes:MB}",
            "release {release}",
            "unclean?its epoch before ended unexpectedly|",
            "last seen at {last_seen_at}",
            "no node since {no_node_since}",
            "workers could {confinement.not_prevented?:acts}",
        ),
        {"node": "node_id", "epoch": "epoch", "unclean": "unclean", "last_seen_at": "last_seen_at"},
        bad_if="unclean",
    ),
    "NodeDraining": EventText(("{node_id} epoch {epoch}",), {"node": "node_id", "epoch": "epoch"}),
    "NodeLeft": EventText(("{node_id} epoch {epoch}",), {"node": "node_id", "epoch": "epoch"}),
    "NodeLost": EventText(
        ("{node_id} epoch {epoch}", "last seen at {last_renewed_at}"),
        {"node": "node_id", "epoch": "epoch", "last_renewed_at": "last_renewed_at"},
        "bad",
    ),
    "LoadPlaced": EventText(
        ("at node {node_id}", "{reason}", "{files:files}"), {"node": "node_id", "reason": "reason"}
    ),
    "LabelSet": EventText(("{label}",), {"label": "label"}, "good"),
    "LabelRemoved": EventText(("{label}",), {"label": "label"}),
    "VersionApproved": EventText(
        ("{reason}", "digest {digest}"), {"digest": "digest", "reason": "reason"}, "good"
    ),
    "ApprovalWithdrawn": EventText(
        ("{reason}", "digest {digest}"), {"digest": "digest", "reason": "reason"}, "bad"
    ),
    "RecordsClosed": EventText(
        (
            "{records} inferences",
            "{dropped} dropped",
            "interrupted?the server died before it closed the file|",
            "{bytes:MB}",
            "sha256 {sha256}",
            "at node {node_id?}",
        ),
        {"records": "records", "dropped": "dropped", "bytes": "bytes", "sha256": "sha256"},
        bad_if="interrupted",
    ),
    "RecordsErased": EventText(
        ("file {file}", "{reason}", "at node {node_id?}"), {"file": "file", "reason": "reason"}
    ),
    "PolicyInForce": EventText(("{policy.trust:rules}", "{policy.approval:rules}", "at node {node_id?}")),
}

_FORMS: Mapping[str | None, Callable[[Any], str]] = {
    None: str,
    "ms": lambda microseconds: f"{microseconds / 1000:.0f} ms",
    "MB": lambda size_bytes: f"{size_bytes / 10**6:.1f} MB",
    "list": ", ".join,
    "acts": lambda acts: ", ".join(act.replace("_", " ") for act in acts),
    "devices": lambda uses: ", ".join(f"{each['device']} ({each['nodes']} graph nodes)" for each in uses),
    "plain": lambda name: name.replace("_", " "),
    "rules": lambda rules: "; ".join(
        f"{rule.get('mode', 'approval')} {', '.join(rule['models'])}" for rule in rules
    ),
    "files": lambda files: ", ".join(f"{each['path']} {each['sha256'][:HASH_DIGITS]}" for each in files),
}


def describe_event(kind: str, data: Mapping[str, Any]) -> str:
    """Return the line for an event; all of its members if the type or its data is unknown.

    Args:
        kind: the event's type.
        data: the event's data, as JSON has it.
    """
    try:
        parts = [_fill(part, data) for part in EVENT_TEXTS[kind].parts]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return ", ".join(f"{name}: {value}" for name, value in data.items())
    return ", ".join(part for part in parts if part)


def log_fields(kind: str, data: Mapping[str, Any]) -> dict[str, object]:
    return {name: _find(data, path) for name, path in EVENT_TEXTS.get(kind, EventText()).fields.items()}


def is_bad(kind: str, data: Mapping[str, Any]) -> bool:
    text = EVENT_TEXTS.get(kind, EventText())
    return text.tone == "bad" or (text.bad_if is not None and bool(data[text.bad_if]))


def _fill(part: str, data: Mapping[str, Any]) -> str:
    """Return a part with its members, or nothing if one of them is null or empty."""
    choice = _CHOICE.fullmatch(part)
    if choice is not None:
        return choice[2] if data[choice[1]] else choice[3]
    found = [_find(data, path, is_optional=bool(mark)) for path, mark, _ in _MEMBER.findall(part)]
    if any(_is_empty(value) for value in found):
        return ""
    values = iter(found)
    return _MEMBER.sub(lambda member: _FORMS[member[3]](next(values)), part)


def _find(data: Any, path: str, *, is_optional: bool = False) -> Any:
    """Return a member, or None if a part of its path is null or an empty list."""
    for step in path.split("."):
        if _is_empty(data):
            return None
        if isinstance(data, list | tuple):
            data = data[int(step)]
        elif step in data or not is_optional:
            data = data[step]
        else:
            return None
    return data


def _is_empty(value: object) -> bool:
    return value is None or value in ([], ())
