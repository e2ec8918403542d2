"""Evidence of the checks that a load passed before it started, which the kernel passes on unread."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET, Struct, UnsetType

from features.approvals.facts import ApprovalResult, LoadApproval
from features.nodes.facts import FactAtNode, NodeSignature
from features.signatures.facts import LoadSignature, remember_bundle

STORED_NAMES_OF_EVIDENCE: Mapping[str, str] = {"known_evidence": "bundles"}
"""What JSON calls a model's names of evidence that the ledger has already."""


class LoadEvidence(Struct, frozen=True, gc=False):
    """The checks that a load passed before it started: one member for each kind of rule, UNSET without it."""

    signature: LoadSignature | UnsetType = UNSET
    approval: LoadApproval | UnsetType = UNSET

    def __bool__(self) -> bool:
        return self != LoadEvidence()

    @property
    def is_enforced(self) -> bool:
        """Whether a rule enforced its signature."""
        return self.signature is not UNSET and self.signature.is_enforced

    @property
    def is_bypassed(self) -> bool:
        """Whether a person with the role `emergency` let it pass."""
        return self.approval is not UNSET and self.approval.result is ApprovalResult.BYPASSED


class RecordedEvidence(FactAtNode, frozen=True, gc=False, kw_only=True):
    """Evidence as a fact has it: of a model with rules, how the load passed them.

    Beside it stands the bundle, unless the ledger has that already, and the node's signature.
    """

    signature: LoadSignature | UnsetType = UNSET
    approval: LoadApproval | UnsetType = UNSET
    bundle: str | UnsetType = UNSET
    server_signature: NodeSignature | UnsetType = UNSET

    @property
    def evidence(self) -> LoadEvidence:
        """The checks that the load passed."""
        return LoadEvidence(self.signature, self.approval)


def remember_evidence(
    known: tuple[str, ...] | UnsetType, data: RecordedEvidence
) -> tuple[str, ...] | UnsetType:
    """Return the names of a model's evidence that the ledger has once a load is recorded."""
    name = None if data.signature is UNSET else data.signature.bundle
    return known if name is None else remember_bundle(known or (), name)
