"""Commands that change the repository: a version is added or removed, and the decisions on them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from events.commands import Accepted, Command, Condition, Decision, DecisionInput, Refused
from events.jobcommands import RequestCancel, RequestUnload
from events.jobs import JobKind
from events.models import Model
from events.state import State
from events.types import AddedFile, Draft, Provenance, VersionAdded, VersionRemoved, contents_of, digest_of
from features.commands import find_naming


@dataclass(frozen=True, slots=True)
class AddVersion(Command):
    """Record a version whose files are complete and on disk, but not visible yet.

    Attributes:
        event_id: chosen by the caller: the staging folder has this name, so that a start finds the event.
        source: where the actor says that it came from; UNSET if nothing was said.
        holder: name of the server in whose own repository it is; UNSET where all share one.
    """

    model_id: str
    version: int
    actor: str
    files: tuple[AddedFile, ...]
    event_id: str
    conditions: tuple[Condition, ...] = ()
    source: Provenance | UnsetType = UNSET
    holder: str | UnsetType = UNSET

    def decide(self, at: DecisionInput) -> Decision:
        """Accept it; in the own repositories of several servers, a version has the same files."""
        held = at.state.registers.find_versions(self.model_id).find_holders(self.version)
        others = [each for each in held.servers if each != self.holder]
        if self.holder is not UNSET and others and held.digest != digest_of(contents_of(self.files)):
            what = f"version {self.version} of {self.model_id!r} has other files at {', '.join(others)}"
            return Refused("version_exists", f"{what}: add the same files here, or choose another number")
        data = VersionAdded(self.files, self.source, server=self.holder)
        return Accepted((Draft(self.event_id, data, self.actor, None, self.model_id, self.version),))


@dataclass(frozen=True, slots=True)
class RemoveVersion(Command):
    """Record that a version's files leave the repository, unless a load uses them; as `AddVersion`."""

    model_id: str
    version: int
    actor: str
    event_id: str
    conditions: tuple[Condition, ...] = ()
    holder: str | UnsetType = UNSET

    def decide(self, at: DecisionInput) -> Decision:
        use = find_use(at.state, self.model_id, self.version)
        if use is not None:
            return Refused("version_in_use", use)
        data = VersionRemoved(server=self.holder)
        return Accepted((Draft(self.event_id, data, self.actor, None, self.model_id, self.version),))


def find_use(state: State, model_id: str, version: int) -> str | None:
    """Return why a version cannot be removed, and what to do, or None if it is unused."""
    name = f"version {version} of model '{model_id}'"
    model = state.models.get(model_id)
    if model is not None and any(each.version == version for each in model.held):
        advice = "unload the model, or load another version, and remove it then"
        return f"{name} is loaded, or will be reloaded: {advice}"
    if any(job.kind is JobKind.LOAD and job.version == version for job in state.unended(model_id)):
        return f"{name} has a load that has not ended: cancel it, and remove the version then"
    naming = find_naming(state, model_id, version)
    return None if naming is None else f"{name} {naming}"


def find_end_of_use(
    state: State, model_id: str, version: int, actor: str
) -> RequestUnload | RequestCancel | None:
    """Return the next command that ends a use of a version, or None without one, or with only a name."""
    model = state.models.get(model_id) or Model(model_id)
    held = [each.version for each in model.held]
    loads = [job for job in state.unended(model_id) if job.kind is JobKind.LOAD and job.version == version]
    if version in held or (loads and not held):
        return RequestUnload(model_id, actor, force=True)  # inferences do not undo it, unlike a cancellation
    return RequestCancel(loads[0].id, actor) if loads else None
