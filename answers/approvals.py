"""Approvals of versions."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, one_of


class ApprovalInfo(AnswerBody, frozen=True, kw_only=True):
    """One person's approval of the bytes with a digest."""

    digest: str
    version: Annotated[int, about("How they were named.")]
    by: str
    reason: str
    at: str
    position: Annotated[int, about("Of its `VersionApproved`, which has the SHA-256 of each file.")]


class UnapprovedVersion(AnswerBody, frozen=True, kw_only=True):
    """A version that waits for a person to approve it."""

    version: int
    digest: Annotated[str | None, about("Of the files that were added as it; null if none were.")]
    is_refused: Annotated[
        bool, about("Whether the last load was of it, and was refused with `not_approved`.")
    ]
    added_by: Annotated[str | None, about("Null if the ledger has nobody.")]
    position: Annotated[int | None, about("Of its `VersionAdded`.")]


class LoadApprovalInfo(AnswerBody, frozen=True, kw_only=True):
    """Why a load could go on whose model's rules ask for approval."""

    rule: Annotated[str, about("Digest of the model's rules of approval then.")]
    result: Annotated[str, one_of("approved", "reload", "bypassed")]
    by: Annotated[list[str], about("Who approved its bytes, or loaded them without.")]
    positions: Annotated[list[int], about("Of the `VersionApproved` that it rests on; empty without any.")]


class VersionApprovals(AnswerBody, frozen=True, kw_only=True):
    """The approvals of a version's bytes."""

    model_id: str
    version: int
    approvals: Annotated[list[ApprovalInfo], about("Those of its bytes that stand, the oldest first.")]
    missing: Annotated[
        int,
        about("How many other persons the rules for the model still ask for, beside who asks for the load."),
    ]
