"""The facts of approvals."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from msgspec import Struct

from events.values import Credential, FileHash
from features.nodes.facts import SignedFact


class ApprovalResult(StrEnum):
    """Why a load went on whose model's rules ask for approval."""

    APPROVED = "approved"
    RELOAD = "reload"
    BYPASSED = "bypassed"


class LoadApproval(Struct, frozen=True, gc=False):
    """The approval with which a version was loaded.

    Attributes:
        rule: digest of the model's rules of approval.
        result: `approved`; `reload` of the same bytes by the system, which needs none; or `bypassed`.
        by: those who approved its bytes, or the person who loaded them without.
        positions: of the `VersionApproved` that the load rests on.
    """

    rule: str
    result: ApprovalResult
    by: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()


class VersionApproved(SignedFact, frozen=True, gc=False):
    """The actor approved these bytes for loads of the model. The event's version is how they were named.

    Attributes:
        digest: of the files, as `digest_of` has it.
        files: path and SHA-256 of each.
        reason: as it was given.
        credential: of the actor.
        served_version: that the model served then; None if none.
        served_digest: of its files.
    """

    TYPE: ClassVar[str] = "VersionApproved"
    digest: str
    files: tuple[FileHash, ...]
    reason: str
    credential: Credential
    served_version: int | None = None
    served_digest: str | None = None


class ApprovalWithdrawn(Struct, frozen=True, gc=False):
    """The actor withdrew all approvals of the bytes with this digest: no load rests on them from here on."""

    TYPE: ClassVar[str] = "ApprovalWithdrawn"
    digest: str
    reason: str
    credential: Credential
