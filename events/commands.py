"""Commands to the writer of the log, their conditions, decisions and receipts.

`events.accept` decides them, but for those that decide themselves (`events.registercommands`).

Compare and append: the system decides on a state that may have changed by the time its command is decided. So
its commands carry conditions, each a part of the state that the decision rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import UNSET, Struct, UnsetType

from events.clock import Timestamp
from events.models import Model, ModelState
from events.state import State
from events.types import (
    AddedFile,
    Cause,
    Contents,
    Draft,
    Idempotency,
    Justification,
    LoadParameters,
    Provenance,
)
from events.values import Sign

OUTDATED = "outdated"
"""Code of a refused command of the system: what it rests on has changed, so the caller decides anew."""


class Condition(Struct, frozen=True, gc=False):
    """A precondition of a command of the system; the command is `outdated` if it does not hold any more."""

    def holds(self, state: State) -> bool:
        """Whether `state` is still what the decision rests on."""
        raise NotImplementedError


class JobUnchanged(Condition, frozen=True, gc=False):
    """The job has not ended, and no event concerned it after `position`: no cancellation, no second start."""

    job_id: str
    position: int

    def holds(self, state: State) -> bool:
        job = state.unended_job(self.job_id)
        return job is not None and job.position == self.position


class ModelUnchanged(Condition, frozen=True, gc=False):
    """No event changed this model: no request, no start and no outcome."""

    model: Model

    def holds(self, state: State) -> bool:
        now = state.models.get(self.model.id)
        return now is not None and now.view_as(self.model) == self.model


class WorkerServes(Condition, frozen=True, gc=False):
    """The model is loaded by this load, and the worker is not recorded as gone."""

    model_id: str
    load_job_id: str
    worker_id: str

    def holds(self, state: State) -> bool:
        now = state.models.get(self.model_id)
        if now is None or now.phase is not ModelState.LOADED:
            return False
        serving = now.find_serving(self.load_job_id)
        return serving is not None and self.worker_id in serving.worker_ids


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """Load a version of a model.

    Attributes:
        contents: path and SHA-256 of the version's files, in order of their paths, if the repository still
            has those that were loaded last; None if they are unknown.
        asked: the names of the parameters that the request itself gave. A request that gives none accepts a
            loaded model as it is.
        conditions: of a reload by the system.
        policy: digest of the model's rules where it was asked; UNSET without any.
        is_checked: whether the bytes must pass rules each time that a person or an inference asks for them.
        justification: of the person; UNSET without rules or reasons.
        sign: signs an emergency for this server; None if it is alone.
        label: to set to the version when that is loaded; UNSET for none.
        passed_over: why the highest version could not be served; UNSET if it could, or was not asked for.
    """

    model_id: str
    version: int
    contents: Contents | None
    actor: str
    parameters: LoadParameters = field(default_factory=LoadParameters)
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    asked: frozenset[str] = frozenset()
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()
    policy: str | UnsetType = UNSET
    is_checked: bool = False
    justification: Justification | UnsetType = UNSET
    sign: Sign | None = None
    label: str | UnsetType = UNSET
    passed_over: str | UnsetType = UNSET

    @property
    def is_emergency(self) -> bool:
        return self.justification is not UNSET and self.justification.emergency is not None


@dataclass(frozen=True, slots=True)
class RequestUnload:
    """Unload a model from wherever it serves; None is the active model.

    Attributes:
        conditions: of an automatic unload.
        copy: the load of the only copy to unload; None is all.
        on_demand: whether inferences load models here; then one that is not loaded is taken out of service.
        until_asked: whether the next inference may load the model again.
    """

    model_id: str | None
    actor: str
    force: bool = False
    cause: Cause = Cause.REQUEST
    cause_event_id: str | None = None
    idempotency: Idempotency | None = None
    conditions: tuple[Condition, ...] = ()
    copy: str | None = None
    on_demand: bool = False
    until_asked: bool = False


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """Cancel a job before it has its effect."""

    job_id: str
    actor: str
    idempotency: Idempotency | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """None: only clients cancel."""
        return ()


@dataclass(frozen=True, slots=True)
class AddVersion:
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


@dataclass(frozen=True, slots=True)
class RemoveVersion:
    """Record that a version's files leave the repository, unless a load uses them; as `AddVersion`."""

    model_id: str
    version: int
    actor: str
    event_id: str
    conditions: tuple[Condition, ...] = ()
    holder: str | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Record:
    """Append these facts unchanged, in this order, in one transaction, if all conditions hold."""

    drafts: tuple[Draft, ...]
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class DecisionInput:
    """The input of a decision: as the arguments of `events.accept.accept`."""

    state: State
    new_id: Callable[[], str]
    now: Timestamp
    previous: bytes


class RegisterCommand:
    """A command that decides itself, in the module of its subject."""

    __slots__ = ()

    def decide(self, at: DecisionInput) -> Decision:
        raise NotImplementedError


JobCommand = RequestLoad | RequestUnload | RequestCancel
"""The commands that a job answers. They have conditions and may have an idempotency key."""

VersionCommand = AddVersion | RemoveVersion
Command = JobCommand | Record | VersionCommand | RegisterCommand


class Accepted(Struct, frozen=True, gc=False):
    """The command is accepted: append these events. `is_join`: the job was there before."""

    drafts: tuple[Draft, ...]
    job_id: str | None = None
    is_join: bool = False


class Existing(Struct, frozen=True, gc=False):
    """Nothing to append: this job did, or will do, what the command asks, and its actor is recorded.

    Without a job, what the command asks was recorded before.
    """

    job_id: str | None


class Refused(Struct, frozen=True, gc=False):
    """The present state does not allow the command."""

    code: str
    message: str


Decision = Accepted | Existing | Refused

REFUSED_AS_OUTDATED = Refused(OUTDATED, "what this was decided on has changed; decide it anew")


class Receipt(Struct, frozen=True, gc=False):
    """The answer to a command.

    Attributes:
        job_id: the job that the command made or joined; None for facts and tokens.
        existing: whether the job was there before, or the token was revoked before.
        position: of the head after the command.
    """

    job_id: str | None
    existing: bool
    position: int
