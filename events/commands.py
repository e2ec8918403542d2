"""Commands to the writer of the log, their conditions, and their receipts.

`events.accept` decides them.

Compare and append: the system decides on a state that may have changed by the time its command is decided. So
its commands carry conditions, each a part of the state that the decision rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

from events.clock import Timestamp
from events.models import Model
from events.nodes import Node
from events.types import (
    AddedFile,
    Cause,
    Confinement,
    Contents,
    Draft,
    Idempotency,
    LoadParameters,
    TokenIssued,
)


class JobUnchanged(Struct, frozen=True, gc=False):
    """The job has not ended, and no event concerned it after `position`: no cancellation, no second start."""

    job_id: str
    position: int


class ModelUnchanged(Struct, frozen=True, gc=False):
    """No event changed this model: no request, no start and no outcome."""

    model: Model


class WorkerServes(Struct, frozen=True, gc=False):
    """The model is loaded by this load, and the worker is not recorded as gone."""

    model_id: str
    load_job_id: str
    worker_id: str


class NodeCurrent(Struct, frozen=True, gc=False):
    """This epoch of the node has not ended: nothing is appended by a node that was lost."""

    node_id: str
    epoch: int


class NodeUnchanged(Struct, frozen=True, gc=False):
    """No event changed this node: it has not left, and is not being drained since then."""

    node: Node


Condition = JobUnchanged | ModelUnchanged | WorkerServes | NodeCurrent | NodeUnchanged
"""A precondition of a command of the system; the command is `outdated` if it does not hold any more."""


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """Load a version of a model.

    Attributes:
        contents: path and SHA-256 of the version's files, in order of their paths, if the repository still
            has those that were loaded last; None if they are unknown.
        asked: the names of the parameters that the request itself gave. A request that gives none accepts a
            loaded model as it is.
        conditions: of a reload by the system.
    """

    model_id: str
    version: int
    contents: Contents | None
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestUnload:
    """Unload a model; None is the active model. `conditions` are those of an automatic unload."""

    model_id: str | None
    actor: str
    force: bool = False
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """Cancel a job before it has its effect."""

    job_id: str
    actor: str
    idempotency: Idempotency | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """None: only clients cancel."""
        return ()


@dataclass(frozen=True, slots=True)
class AddVersion:
    """Record a version whose files are complete and on disk, but not visible yet.

    Attributes:
        event_id: chosen by the caller: the staging folder has this name, so that a start finds the event.
    """

    model_id: str
    version: int
    actor: str
    files: tuple[AddedFile, ...]
    event_id: str
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveVersion:
    """Record that a version's files leave the repository, unless a load uses them; as `AddVersion`."""

    model_id: str
    version: int
    actor: str
    event_id: str
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """Append these facts unchanged, in this order, in one transaction, if all conditions hold."""

    drafts: tuple[Draft, ...]
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class IssueToken:
    """Record a new token, which its caller has signed.

    Attributes:
        issued: what to record.
        link_id: the sign-in link that it is for, whose use is recorded before.
    """

    issued: TokenIssued
    actor: str
    link_id: str | None = None


@dataclass(frozen=True, slots=True)
class RevokeToken:
    """Refuse a token from now on.

    `expires_at` is when it expires at the latest: without it only tokens that the ledger issued are revoked.
    `with_issued` revokes those that it issued, too, and that these issued in turn.
    """

    jti: str
    actor: str
    expires_at: Timestamp | None = None
    with_issued: bool = False


@dataclass(frozen=True, slots=True)
class JoinNode:
    """Begin the next epoch of a node, and end the one before if that has not ended.

    The epoch is in the state then: `state.nodes[node_id]` has the position of the receipt, unless another
    process joined as the same node since. The attributes are those of `NodeJoined`, what signs its statement
    with a key that the nodes share, and the epoch in the node's lease: the state may have forgotten it.
    """

    node_id: str
    address: str
    labels: tuple[str, ...] = ()
    budget_bytes: int | None = None
    release: str = ""
    public_key: str | None = None
    last_seen_at: Timestamp | None = None
    no_node_since: Timestamp | None = None
    confinement: Confinement | None = None
    instance: str = ""
    sign: Callable[[bytes], str] | None = None
    last_epoch: int = 0


@dataclass(frozen=True, slots=True)
class DrainNode:
    """Drain a node: its models move to other nodes, and it takes no more loads."""

    node_id: str
    actor: str


@dataclass(frozen=True, slots=True)
class LeaveNode:
    """End an epoch of a node in order, when its workers have ended."""

    node_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LoseNode:
    """End an epoch of a node that did not renew its lease, last at `last_renewed_at`."""

    node_id: str
    epoch: int
    last_renewed_at: Timestamp


JobCommand = RequestLoad | RequestUnload | RequestCancel
"""The commands that a job answers. They have conditions and may have an idempotency key."""

VersionCommand = AddVersion | RemoveVersion
NodeCommand = JoinNode | DrainNode | LeaveNode | LoseNode
Command = JobCommand | Record | VersionCommand | IssueToken | RevokeToken | NodeCommand


class Receipt(Struct, frozen=True, gc=False):
    """The answer to a command.

    Attributes:
        job_id: the job that the command made or joined; None for facts and tokens.
        existing: whether the job was there before, or the token was revoked before.
        position: of the head after the command.
    """

    job_id: str | None
    existing: bool
    position: int
