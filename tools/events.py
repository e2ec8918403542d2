"""The reference page of the events, from their types."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import UnionType
from typing import Any, get_type_hints

import msgspec
from msgspec import NODEFAULT, UNSET, Struct, UnsetType
from msgspec.structs import FieldInfo, fields

from events.eventtext import EVENT_TEXTS
from events.types import (
    SCHEMA,
    SYSTEM,
    TYPES,
    AddedFile,
    Cause,
    Durations,
    Idempotency,
    Justification,
    LoadedFile,
    Provenance,
)
from events.values import Confinement, Credential, FileHash, PlannedMemory
from features.approvals.facts import LoadApproval
from features.approvals.rules import ApprovalRule
from features.devices.facts import DeviceUse
from features.nodes.facts import NodeSignature
from features.rules import LoadPolicy
from features.signatures.facts import LoadSignature
from features.signatures.rules import TrustedCertificates, TrustRule
from tools.markdown import cell, slug, table

BY: Mapping[str, str] = {
    "LoadRequested": f"the caller; `{SYSTEM}` if the cause is neither `request` nor `demand`",
    "UnloadRequested": f"the caller; `{SYSTEM}` if the cause is not `request`",
    "LoadJoined": "the caller",
    "UnloadJoined": "the caller",
    "CancelRequested": "the caller",
    "VersionAdded": "the caller",
    "LabelSet": "the caller; of a load with a label, who asked for it",
    "LabelRemoved": "the caller",
    "VersionRemoved": f"the caller; `{SYSTEM}` with the reason `not_placed`",
    "TokenIssued": "who asked for the token: a caller, or `local:USER` for a user of the server's machine",
    "TokenRevoked": "the caller, or `local:USER`",
    "SignInLinkIssued": "the caller, or `local:USER`",
    "SignInLinkUsed": "who asked for the link",
    "NodeDraining": "the caller",
    "EventsDiscarded": "`local:USER`, who ran `loadledger discard` as the ledger's owner",
    "VersionApproved": "the caller, who did not add these bytes",
    "ApprovalWithdrawn": "the caller",
    "RecordsErased": f"the caller; `{SYSTEM}` for a file kept long enough, or whose room is needed",
    "AccessDenied": f"the refused subject; `{SYSTEM}` with the action `other` for those beyond the limit"
    f" of events",
} | dict.fromkeys(
    (
        "LoadStarted",
        "ModelLoaded",
        "ModelSettingsChanged",
        "LoadFailed",
        "UnloadStarted",
        "ModelUnloaded",
        "JobCancelled",
        "WorkerExited",
        "ServerStarted",
        "ServerStopped",
        "ClockStepped",
        "RollbackAccepted",
        "NodeJoined",
        "NodeLeft",
        "NodeLost",
        "LoadPlaced",
        "PolicyInForce",
        "RecordsClosed",
    ),
    f"`{SYSTEM}`",
)
"""The `actor` of each type of event."""

CAUSES: Mapping[Cause, str] = {
    Cause.REQUEST: "a caller requested it",
    Cause.DEMAND: "an inference needed the model (`--on-demand on`)",
    Cause.SWAP: "another version, or changed files, replaced the model",
    Cause.EVICTION: "another load needed the memory (`--evict idle`)",
    Cause.IDLE: "the model had no request for its `keep_alive_s`",
    Cause.RECOVERY: "a worker of the model died",
    Cause.RESTART: "the server, or the model's node, ended, and the model was loaded before",
    Cause.DRAIN: "the model's node is being drained, so the model moves to another one",
    Cause.COPY: "the model is to be loaded at more nodes, or at fewer",
}
"""The meaning of each cause of a load or an unload."""

OF_FEATURES: Mapping[str, str] = {
    "LoadRequested": "`label` is set to the version when that is loaded; it is missing without one.",
    "LoadStarted": "`node_id` is the node at which it started; it is missing in a ledger of one server,"
    " here as elsewhere.",
    "ModelLoaded": "`node_id` is the node at which it serves. Of a model with rules, `signature` and"
    " `approval` say how the load passed them, and `bundle` has the signature bundle, unless the ledger has"
    " it from a load of the same bytes before. `node_signature` is that of the node, also without rules; it"
    " is missing in a ledger of one server.",
    "UnloadRequested": "`node_id` is the node at which the load is, if it is at any.",
    "WorkerExited": "node_id: the node at which it ran.",
    "PolicyInForce": "`node_id` is the node where it is in force; it is missing in a ledger of one server.",
    "VersionAdded": "`node_id` is the node in whose own repository it is; it is missing where all share one.",
    "VersionRemoved": "`node_id` is the node whose own repository it leaves: loads find it where else it was"
    " added.",
    "VersionApproved": "node_signature: of the node that took it (`approval_statement`); missing in a ledger"
    " of one server.",
    "RecordsClosed": "`node_id` is the node whose file it is; it is missing in a ledger of one server.",
    "RecordsErased": "`node_id` is the node whose file it was; it is missing in a ledger of one server.",
    "Justification": "node_signature: of an emergency, by the node that has seen the person's role.",
}
"""What features add to types, and to parts of them."""

MEMBERS: Mapping[str, tuple[str, str]] = {
    "position": ("integer", "its number in the log: from 1, without gaps"),
    "id": ("text", "a UUIDv7; for a request, also the id of its job"),
    "type": ("text", "one of the types below"),
    "schema": ("integer", "the version of the type's members"),
    "job_id": ("text or null", "its job"),
    "model_id": ("text or null", "its model"),
    "version": ("integer or null", "the model's version"),
    "worker_id": ("text or null", "its worker"),
    "actor": ("text", f"a token's subject, `{SYSTEM}`, or `local:USER`, a user of the server's machine"),
    "recorded_at": ("text", "`YYYY-MM-DDTHH:MM:SS.ffffffZ`; never earlier than the event before"),
    "data": ("object", "the members of its type"),
}
"""The members of every event."""

_PARTS = (
    *(LoadedFile, AddedFile, Provenance, Durations, Confinement, PlannedMemory, FileHash, Idempotency),
    *(Credential, Justification, LoadSignature, LoadApproval, NodeSignature, DeviceUse),
    *(LoadPolicy, TrustRule, TrustedCertificates, ApprovalRule),
)
_HEAD = f"""\
# Events

Generated from [events/types.py](../../events/types.py); a test keeps it current. How to list and follow
events is in [The ledger's events](../events.md), how they are hashed in [Verify it
yourself](../verify-it-yourself.md).

Hashes are permanent, so types and members are added but never changed or removed. A release that does not
know a type or a schema version keeps the event and skips it. All types have schema version {SCHEMA}. If a
member may be missing, for example in events older than the member, the table says what that means. Values are
64-bit integers, text, booleans and null; no event has tensors or secrets. The caller is the subject of a
token.
"""


def event_page() -> str:
    """Return the page."""
    rows = ((name, kind, what) for name, (kind, what) in MEMBERS.items())
    parts = [_HEAD, "## Members of every event\n", _members(rows), "## Types\n", _overview()]
    for name, kind in TYPES.items():
        parts += [
            f"### {name}\n",
            f"{_about(kind)}\n",
            f"Actor: {BY[name]}.\n",
            _line(name),
            _members_of(kind),
        ]
    parts.append("## Parts of events\n")
    for part in _PARTS:
        parts += [f"### {part.__name__}\n", f"{_about(part)}\n", _members_of(part)]
    causes = ((f"`{cause}`", why) for cause, why in CAUSES.items())
    parts += ["## Causes\n", table(("cause", "a load or an unload happened because"), causes)]
    return "\n".join(parts)


def _overview() -> str:
    rows = (
        (f"[`{name}`](#{slug(name)})", _about(kind).partition(". ")[0].rstrip("."), cell(BY[name]))
        for name, kind in TYPES.items()
    )
    return table(("type", "what", "actor"), rows)


def _line(name: str) -> str:
    """Say what a line in the log, the command line and the console has of a type."""
    parts = EVENT_TEXTS[name].parts
    return (
        f"In a line: {', '.join(f'`{part}`' for part in parts)}.\n"
        if parts
        else "In a line: the type alone.\n"
    )


def _about(kind: type[Struct]) -> str:
    return cell(f"{kind.__doc__} {OF_FEATURES.get(kind.__name__, '')}")


def _members_of(kind: type[Struct]) -> str:
    hints = get_type_hints(kind)
    rows = [(member.encode_name, _type(hints[member.name]), _missing(member)) for member in fields(kind)]
    return _members(rows) if rows else "No members.\n"


def _members(rows: Iterable[tuple[str, str, str]]) -> str:
    return table(("member", "type", "what"), ((f"`{name}`", kind, what) for name, kind, what in rows))


def _missing(member: FieldInfo) -> str:
    if member.default is NODEFAULT:
        return ""
    if member.default is UNSET:
        is_list = _type(member.type).startswith("list")
        is_of_nodes = member.encode_name.startswith("node")
        others = "missing in a ledger without nodes" if is_of_nodes else "may be missing"
        return "missing if empty" if is_list else others
    return f"if missing: {msgspec.json.encode(member.default).decode()}"


def _type(hint: Any) -> str:
    """Return an annotation in words."""
    arguments = [each for each in getattr(hint, "__args__", ()) if each is not UnsetType]
    if hint.__class__ is UnionType and len(arguments) == 1:
        return _type(arguments[0])
    if type(None) in arguments:
        return " or ".join([*(_type(each) for each in arguments if each is not type(None)), "null"])
    if arguments:  # a tuple of any length
        return f"list of {_type(arguments[0])}"
    if hint is Cause:
        return "a [cause](#causes)"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return "one of " + ", ".join(f"`{value}`" for value in hint)
    return _WORDS.get(hint) or f"[{hint.__name__}](#{slug(hint.__name__)})"


_WORDS = {int: "integer", str: "text", bool: "true or false"}
