"""The approvals of a model's bytes that were not withdrawn. A pure fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp
from events.types import Data, Event
from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.nodes.facts import NodeSignature


class Approval(
    Struct, frozen=True, gc=False, omit_defaults=True, rename={"server_signature": "node_signature"}
):
    """One person's approval of bytes, from `VersionApproved`.

    Attributes:
        digest: the digest of the files.
        version: the version that had them.
        by: the person.
        reason: the person's words.
        at: the time of the event at `position`.
        event_id: the event's id, which its server has signed, so that no other event can repeat it.
        jti, issuer, issued_by: of the person's token, as in `Credential`.
        server_signature: UNSET at a server alone.
    """

    digest: str
    version: int
    by: str
    reason: str
    at: Timestamp
    position: int
    event_id: str
    jti: str | None = None
    issuer: str | None = None
    issued_by: tuple[str, ...] = ()
    server_signature: NodeSignature | UnsetType = UNSET

    @property
    def people(self) -> tuple[str, ...]:
        """The person, and the issuers of the person's token."""
        return (self.by, *self.issued_by)


MAX_APPROVED = 64
"""Bytes of a model whose approvals are kept, more than people go back to. The oldest are dropped first that
served nothing when the newest was approved."""


class ApprovedVersions:
    """The approvals of bytes, the latest at the end, of at most `MAX_APPROVED` digests."""

    __slots__ = ()
    approvals: tuple[Approval, ...]

    def list_signers(self) -> list[str]:
        """Return the servers that have signed approvals."""
        signatures = (each.server_signature for each in self.approvals)
        return [each.server for each in signatures if each is not UNSET]


_V = TypeVar("_V", bound=Any)


def make_approval(event: Event, data: VersionApproved) -> Approval:
    token = data.credential
    return Approval(
        data.digest,
        event.version or 0,
        event.actor,
        data.reason,
        event.recorded_at,
        event.position,
        event.id,
        token.jti,
        token.issuer,
        token.issued_by,
        data.server_signature,
    )


def _version_approved(versions: _V, event: Event, data: VersionApproved) -> _V:
    kept = {data.digest, data.served_digest}
    for each in reversed(versions.approvals):
        if len(kept - {None}) < MAX_APPROVED:
            kept.add(each.digest)
    left = (each for each in versions.approvals if each.digest in kept)
    return replace(versions, approvals=(*left, make_approval(event, data)))


def _approval_withdrawn(versions: _V, _: Event, data: ApprovalWithdrawn) -> _V:
    left = tuple(each for each in versions.approvals if each.digest != data.digest)
    return versions if left == versions.approvals else replace(versions, approvals=left)


STEPS: Mapping[type[Data], Callable[[Any, Event, Any], Any]] = {
    VersionApproved: _version_approved,
    ApprovalWithdrawn: _approval_withdrawn,
}
