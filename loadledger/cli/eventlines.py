"""An event as a line for people: when, where in the log, what, of which model, by whom, and what matters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARACTERS = 200
"""Of what is told of an event: messages can have 4 KiB."""

_MB = 10**6
_SHOWN_DIGITS = 12
"""Of a hash: enough to tell files apart."""
_ABSENT = "?"


def event_line(line: bytes) -> str:
    """Return the line for an event as it is stored; nothing in it moves a terminal's cursor.

    What is not as this release would have written it is shown as far as it can be.
    """
    event = _object(line)
    data = event.get("data")
    values = data if isinstance(data, dict) else {}
    kind = _word(event.get("type"))
    parts = [
        _word(event.get("recorded_at")),
        f"{_word(event.get('position')):>6}",
        f"{kind:<15}",
        f"{_model(event):<16}",
        _word(event.get("actor")),
        _bounded(_told(kind, values)),
    ]
    return "".join(letter if letter.isprintable() else "?" for letter in "  ".join(parts).rstrip())


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _model(event: Mapping[str, Any]) -> str:
    model_id, version = event.get("model_id"), event.get("version")
    name = "-" if model_id is None else str(model_id)
    return name if version is None else f"{name}/{version}"


def _word(value: object) -> str:
    return _ABSENT if value is None else str(value)


def _bounded(text: str) -> str:
    told = "".join(letter if letter.isprintable() else " " for letter in text)
    return told if len(told) <= MAX_CHARACTERS else f"{told[: MAX_CHARACTERS - 1]}…"


def _told(kind: str, data: Mapping[str, Any]) -> str:
    """Say what matters of a type; of one that is not known, or not like it, all that there is."""
    try:
        return _TOLD[kind](data)
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        return ", ".join(f"{name}: {value}" for name, value in data.items())


def _loaded(data: Mapping[str, Any]) -> str:
    files = [f"{each['path']} {each['sha256'][:_SHOWN_DIGITS]}" for each in data["files"]]
    took_ms, memory_mb = data["durations"]["total_us"] / 1000, data["memory_bytes"] / _MB
    return f"{took_ms:.0f} ms, {memory_mb:.1f} MB, {', '.join(files)}"


def _unloaded(data: Mapping[str, Any]) -> str:
    drained, aborted = data["drained_requests"], data["aborted_requests"]
    return f"{data['freed_bytes'] / _MB:.1f} MB freed, {drained} requests drained, {aborted} aborted"


def _exited(data: Mapping[str, Any]) -> str:
    number, code, stderr = data["signal"], data["exit_code"], data["stderr"]
    how = f"signal {number}" if number is not None else f"exit code {code}"
    return f"{how}{f': {stderr[-1]}' if stderr else ''}"


def _started(data: Mapping[str, Any]) -> str:
    how, since = "after an unclean end" if data["unclean"] else "in order", data.get("down_since")
    return f"{how}, down since {since}" if since else how


def _failed(data: Mapping[str, Any]) -> str:
    return f"{data['code']}: {data['message']}"


_TOLD: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "LoadRequested": lambda data: f"{data['cause']}, priority {data['priority']}",
    "LoadStarted": lambda data: f"attempt {data['attempt']}",
    "ModelLoaded": _loaded,
    "LoadFailed": _failed,
    "UnloadRequested": lambda data: f"{data['cause']}{', by force' if data['force'] else ''}",
    "UnloadStarted": lambda _: "",
    "ModelUnloaded": _unloaded,
    "UnloadFailed": _failed,
    "CancelRequested": lambda _: "",
    "JobCancelled": lambda _: "",
    "AccessDenied": lambda data: f"{data['action']}, {data['count']} times",
    "WorkerExited": _exited,
    "ServerStarted": _started,
    "ServerStopped": lambda _: "",
}
