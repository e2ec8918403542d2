"""The reference page of the events, from their types."""

from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields

from events.types import SCHEMA, SYSTEM, TYPES, Cause, Durations, Idempotency, LoadedFile, Prepared
from tools.markdown import cell, slug, table

BY: Mapping[str, str] = {
    "LoadRequested": f"who asked; `{SYSTEM}` where the cause is neither `request` nor `demand`",
    "UnloadRequested": f"who asked; `{SYSTEM}` where the cause is not `request`",
    "CancelRequested": "who asked",
    "AccessDenied": f"who was refused; `{SYSTEM}` with the action `other`, of what had no room",
} | dict.fromkeys(
    (
        "LoadStarted",
        "ModelLoaded",
        "LoadFailed",
        "UnloadStarted",
        "ModelUnloaded",
        "UnloadFailed",
        "JobCancelled",
        "WorkerExited",
        "ServerStarted",
        "ServerStopped",
    ),
    f"`{SYSTEM}`",
)
"""Whose name an event of a type bears as its `actor`."""

CAUSES: Mapping[Cause, str] = {
    Cause.REQUEST: "somebody asked for it",
    Cause.DEMAND: "somebody's inference needed the model (`--on-demand on`)",
    Cause.SWAP: "another version, or changed files, took the place of what is unloaded",
    Cause.EVICTION: "another load needed the room (`--evict idle`)",
    Cause.IDLE: "nobody had asked the model anything for its `keep_alive_s`",
    Cause.RECOVERY: "a worker of the model had died",
    Cause.RESTART: "the server had, and the model was loaded before",
}
"""What each cause says of a load or an unload."""

MEMBERS: Mapping[str, tuple[str, str]] = {
    "position": ("integer", "its place in the log: from 1, without gaps"),
    "id": ("text", "a UUIDv7; of a request, the id of its job"),
    "type": ("text", "what happened: one of the types below"),
    "schema": ("integer", "the version of the type's members"),
    "job_id": ("text or null", "the job that it belongs to"),
    "model_id": ("text or null", "the model that it is about"),
    "version": ("integer or null", "the model's version"),
    "worker_id": ("text or null", "the worker that it is about"),
    "actor": ("text", f"a token's subject, or `{SYSTEM}`"),
    "recorded_at": ("text", "when, as `YYYY-MM-DDTHH:MM:SS.ffffffZ`; never before the event before"),
    "data": ("object", "the members of its type"),
}
"""What every event has, by name."""

_PARTS = (LoadedFile, Prepared, Durations, Idempotency)
_HEAD = f"""\
# Events

Generated from [events/types.py](../../events/types.py); a test holds this page to it. How to list and follow
events is in [The ledger's events](../events.md), how they are hashed in [Verify it
yourself](../verify-it-yourself.md).

An event is hashed for ever, so types and members are added and never changed or removed; a release that does
not know a type, or a schema version, keeps the event and passes over it. All types are at schema version
{SCHEMA}. Where a member may be missing, as in events from before it was added, the table says what that
means. Values are 64-bit integers, text, booleans and null; no event has tensors or secrets in it. Who asked
is the subject of their token.
"""


def event_page() -> str:
    """Return the page."""
    rows = ((name, kind, what) for name, (kind, what) in MEMBERS.items())
    parts = [_HEAD, "## What every event has\n", _members(rows), "## Types\n", _overview()]
    for name, kind in TYPES.items():
        parts += [f"### {name}\n", f"{_about(kind)}\n", f"Actor: {BY[name]}.\n", _members_of(kind)]
    parts.append("## Parts of events\n")
    for part in _PARTS:
        parts += [f"### {part.__name__}\n", f"{_about(part)}\n", _members_of(part)]
    causes = ((f"`{cause}`", why) for cause, why in CAUSES.items())
    parts += ["## Causes\n", table(("cause", "of a load or an unload, because"), causes)]
    return "\n".join(parts)


def _overview() -> str:
    rows = (
        (f"[`{name}`](#{slug(name)})", _about(kind).partition(". ")[0].rstrip("."), cell(BY[name]))
        for name, kind in TYPES.items()
    )
    return table(("type", "what", "actor"), rows)


def _about(kind: type[Struct]) -> str:
    return cell(kind.__doc__ or "")


def _members_of(kind: type[Struct]) -> str:
    hints = get_type_hints(kind)
    rows = [(member.name, _type(hints[member.name]), _missing(member)) for member in fields(kind)]
    return _members(rows) if rows else "No members.\n"


def _members(rows: Iterable[tuple[str, str, str]]) -> str:
    return table(("member", "type", "what"), ((f"`{name}`", kind, what) for name, kind, what in rows))


def _missing(member: FieldInfo) -> str:
    if member.default is NODEFAULT:
        return ""
    return f"where it is missing: {msgspec.json.encode(member.default).decode()}"


def _type(hint: Any) -> str:
    """Return an annotation in words."""
    arguments = getattr(hint, "__args__", ())
    if type(None) in arguments:
        return " or ".join([*(_type(each) for each in arguments if each is not type(None)), "null"])
    if arguments:  # a tuple of any length
        return f"list of {_type(arguments[0])}"
    if hint is Cause:
        return "a [cause](#causes)"
    return _WORDS.get(hint) or f"[{hint.__name__}](#{slug(hint.__name__)})"


_WORDS = {int: "integer", str: "text", bool: "true or false"}
