"""Signatures of versions, and what a load of one would pass."""

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
