"""The facts of the features, which `events.types` lists with its own, and evidence of the checks of loads."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from features.approvals.facts import ApprovalResult, ApprovalWithdrawn, LoadApproval, VersionApproved
from features.devices import facts as devices
from features.labels import facts as labels
from features.nodes import facts as nodes
from features.records.facts import RecordsClosed, RecordsErased
from features.signatures import facts as signatures
from features.signatures.facts import LoadSignature

STORED_NAMES = {
    **nodes.STORED_NAMES,
    **devices.STORED_NAMES,
    **labels.STORED_NAMES,
    **signatures.STORED_NAMES,
}
"""What JSON calls the members of facts and folds that features have named there."""

FeatureData = (
    nodes.NodeData
    | nodes.LoadPlaced
    | labels.LabelSet
    | labels.LabelRemoved
    | VersionApproved
    | ApprovalWithdrawn
    | RecordsClosed
    | RecordsErased
)

OF_SERVERS = nodes.OF_NODES
"""The events about servers that share a ledger."""

ENDS_OF_SERVERS = nodes.ENDS_OF_NODES
"""Those of them that end the processes of a server: each has an `end`."""

PLACEMENTS = (nodes.LoadPlaced,)
"""The events that say at which server a job runs: each has a `server`."""


class ParametersOfFeatures(devices.DeviceParameters, frozen=True, gc=False, kw_only=True):
    """Those of a load.

    Attributes:
        node_attributes: attributes that its node must have, in order; not stored without any.
        copies: at how many nodes the model is to be loaded; not stored where none is named, which is 1.
    """

    node_attributes: tuple[str, ...] | UnsetType = UNSET
    copies: int | UnsetType = UNSET


SETTINGS_OF_FEATURES = nodes.SETTINGS
"""Those of them that change without new workers."""

FactAtServer = nodes.FactAtNode
"""A fact about what is at one server: it has a `server`."""

ServerSignature = nodes.NodeSignature
SignedFact = nodes.SignedFact
"""What a server signed a fact with, and a fact that has it."""

SharingState = nodes.NodeState
PRESENT_SHARING = nodes.PRESENT
"""The states of one of several servers that share a ledger, and those in which it is there."""

TargetUse = devices.DeviceUse
"""What runs on one target of a load: on its `target`, with `memory_bytes` beside the machine's."""


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


class RecordedEvidence(FactAtServer, frozen=True, gc=False, kw_only=True):
    """Evidence as a fact has it: of a model with rules, how the load passed them.

    Beside it stands the bundle, unless the ledger has that already, and the node's signature.
    """

    signature: LoadSignature | UnsetType = UNSET
    approval: LoadApproval | UnsetType = UNSET
    bundle: str | UnsetType = UNSET
    server_signature: ServerSignature | UnsetType = UNSET

    @property
    def evidence(self) -> LoadEvidence:
        """The checks that the load passed."""
        return LoadEvidence(self.signature, self.approval)


def remember_evidence(
    known: tuple[str, ...] | UnsetType, data: RecordedEvidence
) -> tuple[str, ...] | UnsetType:
    """Return the names of a model's evidence that the ledger has once a load is recorded."""
    name = None if data.signature is UNSET else data.signature.bundle
    return known if name is None else signatures.remember_bundle(known or (), name)
