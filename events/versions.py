"""The versions of a model: added, removed, held by servers, and what features know of them. A pure fold.

`events.models` folds what is loaded of a model; `events.accept` asks both. Without events of its versions a
model has an empty `ModelVersions`. Its past is folded from its own few events (`events.sqlite.timetravel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import UNSET, Struct
from msgspec.structs import replace

from events.types import Data, Event, Unknown, VersionAdded, VersionRemoved, contents_of, digest_of
from features.facts import STORED_NAMES
from features.folds import STEPS_OF_FEATURES, FeaturesOfVersions


class AddedVersion(Struct, frozen=True, gc=False):
    """Bytes that were added as a version, also if that was removed since.

    Attributes:
        version: their number.
        digest: the digest of the files, as in `VersionAdded`.
        by: the actor.
        position: the position of the `VersionAdded`; of repeated ones, of the latest.
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


class ModelVersions(FeaturesOfVersions, frozen=True, gc=False, omit_defaults=True):
    """The versions of a model, loaded or not, and the features' records of them.

    Attributes:
        id: the model's id.
        added: the bytes that callers added, the latest at the end; a removal forgets none.
        removed: versions that cannot be loaded until they are added again, even if their files exist.
        holders: the servers to whose own repositories a version was added.
    """

    id: str
    added: tuple[AddedVersion, ...] = ()
    removed: tuple[int, ...] = ()
    holders: tuple[VersionHolders, ...] = ()

    def find_holders(self, version: int) -> VersionHolders:
        """Return the holders of a version; without any, each server may have it."""
        found = (each for each in self.holders if each.version == version)
        return next(found, VersionHolders(version))

    def find_added(self, version: int) -> AddedVersion | None:
        """Return the bytes that were added last as a version, or None."""
        return next((each for each in reversed(self.added) if each.version == version), None)

    def list_adders(self, digest: str) -> list[str]:
        """Return all actors who added bytes, under any version; empty if the ledger has none."""
        return sorted({each.by for each in self.added if each.digest == digest})


def evolve_versions(before: ModelVersions | None, event: Event) -> ModelVersions | None:
    """Return the versions of a model after an event; the same object if nothing changes.

    Args:
        before: the versions before the event; None if it is the first one.
        event: an event of any model or of none.
    """
    evolve = None if isinstance(event.data, Unknown) else STEPS.get(type(event.data))
    if evolve is None or event.model_id is None or (before is not None and event.model_id != before.id):
        return before
    # An event that changes nothing makes the model known, too: the past finds models by their events.
    return evolve(before or ModelVersions(event.model_id), event, event.data)


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


STEPS: Mapping[type[Data], Callable[[ModelVersions, Event, Any], ModelVersions]] = {
    VersionAdded: _version_added,
    VersionRemoved: _version_removed,
    **STEPS_OF_FEATURES,
}

OF_VERSIONS = tuple(STEPS)
"""The events that change the versions of a model, and nothing else; in the order of their index."""
