"""The versions of a model: added, removed, held by servers, named by labels, approved. A pure fold.

`events.models` folds what is loaded of a model; `events.accept` asks both. Without events of its versions a
model has an empty `ModelVersions`. Its past is folded from its own few events (`events.sqlite.timetravel`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.clock import Timestamp
from events.types import (
    ApprovalWithdrawn,
    Data,
    Event,
    LabelRemoved,
    LabelSet,
    Unknown,
    VersionAdded,
    VersionApproved,
    VersionRemoved,
    contents_of,
    digest_of,
)
from events.values import STORED_NAMES, NodeSignature


class AddedVersion(Struct, frozen=True, gc=False):
    """Bytes that were added as a version, also if that was removed since.

    Attributes:
        version: their number.
        digest: of the files, as `VersionAdded` has them.
        by: the actor.
        position: of the `VersionAdded`; of several with the same version, digest and actor, of the latest.
    """

    version: int
    digest: str
    by: str
    position: int


class VersionHolders(Struct, frozen=True, gc=False, rename=STORED_NAMES):
    """The servers in whose own repositories a version is, if it is in any, and the digest of its files."""

    version: int
    digest: str = ""
    servers: tuple[str, ...] = ()


class Label(Struct, frozen=True, gc=False):
    """A name for a version of a model; `position` is that of its latest `LabelSet`."""

    name: str
    version: int
    position: int


class Approval(Struct, frozen=True, gc=False, omit_defaults=True):
    """One person's approval of bytes, as `VersionApproved` has it.

    Attributes:
        digest: of the files.
        version: how they were named.
        by: the person.
        reason: as it was given.
        at: when it was recorded, and `position` where.
        event_id: of the `VersionApproved`: its server has signed it, so that no other event can repeat it.
        jti, issuer, issued_by: of the person's token, as in `Credential`.
        node_signature: UNSET at a server alone.
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
    node_signature: NodeSignature | UnsetType = UNSET

    @property
    def people(self) -> tuple[str, ...]:
        """The person, and who issued the person's token."""
        return (self.by, *self.issued_by)


MAX_APPROVED = 64
"""Bytes of a model whose approvals are kept: more than one goes back to. The oldest that nothing served when
the newest was approved go first."""


LABEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
"""A label begins with a letter, since a number is a version."""


class ModelVersions(Struct, frozen=True, gc=False, omit_defaults=True):
    """The versions of a model, loaded or not.

    Attributes:
        id: of the model.
        added: the bytes that callers added, the latest at the end; a removal forgets none.
        removed: versions that load nowhere until they are added again, whatever files there are.
        holders: of the versions that were added to servers' own repositories.
        labels: in order of their names.
        approvals: that were not withdrawn, the latest at the end, of at most `MAX_APPROVED` digests.
    """

    id: str
    added: tuple[AddedVersion, ...] = ()
    removed: tuple[int, ...] = ()
    holders: tuple[VersionHolders, ...] = ()
    labels: tuple[Label, ...] = ()
    approvals: tuple[Approval, ...] = ()

    def find_label(self, name: str) -> Label | None:
        return next((each for each in self.labels if each.name == name), None)

    def describe_unknown(self, label: str) -> str:
        return (
            f"model '{self.id}' has no label '{label}'; GET /api/v1/models/{self.id} shows those that it has"
        )

    @property
    def versions_by_label(self) -> dict[str, int]:
        """The version that each label names."""
        return {label.name: label.version for label in self.labels}

    def find_holders(self, version: int) -> VersionHolders:
        """Return the holders of a version; without any, each server may have it."""
        found = (each for each in self.holders if each.version == version)
        return next(found, VersionHolders(version))

    def find_added(self, version: int) -> AddedVersion | None:
        """Return the bytes that were added last as a version; None if nobody added it."""
        return next((each for each in reversed(self.added) if each.version == version), None)

    def list_adders(self, digest: str) -> list[str]:
        """Return all who added bytes, under any version; empty if the ledger has nobody."""
        return sorted({each.by for each in self.added if each.digest == digest})

    def list_signers(self) -> list[str]:
        """Return the servers that have signed approvals."""
        signatures = (each.node_signature for each in self.approvals)
        return [each.server for each in signatures if each is not UNSET]

    def list_labels_of(self, version: int) -> list[str]:
        """Return the labels that name a version."""
        return [label.name for label in self.labels if label.version == version]


def evolve_versions(before: ModelVersions | None, event: Event) -> ModelVersions | None:
    """Return the versions of a model after an event; the same object if nothing changes.

    Args:
        before: as they were; None if there was no event of them.
        event: of any model or of none.
    """
    evolve = None if isinstance(event.data, Unknown) else STEPS.get(type(event.data))
    if evolve is None or event.model_id is None or (before is not None and event.model_id != before.id):
        return before
    known = before or ModelVersions(event.model_id)
    after = evolve(known, event, event.data)
    return before if after is known else after


def _version_added(versions: ModelVersions, event: Event, data: VersionAdded) -> ModelVersions:
    """A version has holders if it was added to servers' own repositories, and not to a shared one since."""
    if event.version is None:
        return versions
    digest = digest_of(contents_of(data.files))
    same = event.version, digest, event.actor
    others = [each for each in versions.added if (each.version, each.digest, each.by) != same]
    versions = replace(
        versions,
        added=(*others, AddedVersion(*same, event.position)),
        removed=tuple(version for version in versions.removed if version != event.version),
    )
    if data.server is UNSET:
        return _set_holders(versions, VersionHolders(event.version))
    servers = {data.server, *versions.find_holders(event.version).servers}
    return _set_holders(versions, VersionHolders(event.version, digest, tuple(sorted(servers))))


def _version_removed(versions: ModelVersions, event: Event, data: VersionRemoved) -> ModelVersions:
    """A version that leaves a server's own repository is removed if that was the last holder.

    A removal with a reason is of an added version that never became visible: no files of others go.
    """
    if event.version is None:
        return versions
    if data.server is not UNSET:
        held = versions.find_holders(event.version)
        left = tuple(each for each in held.servers if each != data.server)
        versions = _set_holders(versions, replace(held, servers=left))
        if left or not held.servers:
            return versions
    if data.reason is not None or event.version in versions.removed:
        return versions
    return replace(versions, removed=(*versions.removed, event.version))


def _set_holders(versions: ModelVersions, held: VersionHolders) -> ModelVersions:
    others = tuple(each for each in versions.holders if each.version != held.version)
    holders = (*others, held) if held.servers else others
    return versions if holders == versions.holders else replace(versions, holders=holders)


def _label_set(versions: ModelVersions, event: Event, data: LabelSet) -> ModelVersions:
    if event.version is None:
        return versions
    return _replace_label(versions, data.label, Label(data.label, event.version, event.position))


def _label_removed(versions: ModelVersions, _: Event, data: LabelRemoved) -> ModelVersions:
    return versions if versions.find_label(data.label) is None else _replace_label(versions, data.label)


def _replace_label(versions: ModelVersions, name: str, *new: Label) -> ModelVersions:
    others = (each for each in versions.labels if each.name != name)
    return replace(versions, labels=tuple(sorted((*others, *new), key=lambda label: label.name)))


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
        data.node_signature,
    )


def _version_approved(versions: ModelVersions, event: Event, data: VersionApproved) -> ModelVersions:
    kept = {data.digest, data.served_digest}
    for each in reversed(versions.approvals):
        if len(kept - {None}) < MAX_APPROVED:
            kept.add(each.digest)
    left = (each for each in versions.approvals if each.digest in kept)
    return replace(versions, approvals=(*left, make_approval(event, data)))


def _approval_withdrawn(versions: ModelVersions, _: Event, data: ApprovalWithdrawn) -> ModelVersions:
    left = tuple(each for each in versions.approvals if each.digest != data.digest)
    return versions if left == versions.approvals else replace(versions, approvals=left)


STEPS: Mapping[type[Data], Callable[[ModelVersions, Event, Any], ModelVersions]] = {
    VersionAdded: _version_added,
    VersionRemoved: _version_removed,
    LabelSet: _label_set,
    LabelRemoved: _label_removed,
    VersionApproved: _version_approved,
    ApprovalWithdrawn: _approval_withdrawn,
}

OF_VERSIONS = tuple(STEPS)
"""The events that change the versions of a model, and nothing else; in the order of their index."""
