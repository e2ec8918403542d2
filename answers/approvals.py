"""Signatures and approvals of versions."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, one_of
from answers.errors import ErrorInfo


class LoadSignatureInfo(AnswerBody, frozen=True, kw_only=True, rename={"is_enforced": "enforced"}):
    """The signature of a version's files, as it was checked by the rules for the model."""

    policy: Annotated[str, about("Digest of the model's rules.")]
    method: Annotated[
        str | None,
        about("Null if no signature was accepted, like the next two."),
        one_of("key", "certificate"),
    ]
    signer: Annotated[str | None, about("SHA-256 of the key, or the subject of the certificate.")]
    bundle: Annotated[str | None, about("SHA-256 of the signature bundle.")]
    is_enforced: Annotated[bool, about("Whether a rule with the mode `enforce` accepted it.")]
    problem: Annotated[str | None, about("Code of what the mode `warn` let pass.")]
    was_verified: Annotated[
        bool,
        about("Whether today's rules refuse it, and the system reloaded bytes that were verified before."),
    ]


class FileDigest(AnswerBody, frozen=True, kw_only=True):
    """A file of a version."""

    path: str
    sha256: str


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


class VerifiedVersionInfo(AnswerBody, frozen=True, kw_only=True):
    """The checks that a load of a version would pass now."""

    model_id: str
    version: int
    digest: Annotated[str, about("Of all files: SHA-256 over a line `<sha256> <path>` for each, by path.")]
    files: list[FileDigest]
    signature: Annotated[
        LoadSignatureInfo | None, about("Null without rules for signatures, and if a load would be refused.")
    ]
    problem: Annotated[
        ErrorInfo | None, about("Why a load would be refused, whoever asks for it; null if it would not.")
    ]
    added_by: Annotated[list[str] | None, about("All who added these files; null if the ledger has nobody.")]
