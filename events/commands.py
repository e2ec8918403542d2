"""Commands to the writer of the log, their conditions, decisions and receipts.

Each decides itself, in the module of its subject: `events.jobcommands`, `events.versioncommands`,
`events.registercommands`, and those of the features.

Compare and append: the system decides on a state that may have changed by the time its command is decided. So
its commands carry conditions, each a part of the state that the decision rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec import Struct

from events.clock import Timestamp
from events.models import Model, ModelState
from events.state import State
from events.types import Draft, Idempotency, LoadParameters
from events.versions import ModelVersions

OUTDATED = "outdated"
"""Code of a refused command of the system: its conditions have changed, so the caller decides again."""


class Condition(Struct, frozen=True, gc=False):
    """A precondition of a command.

    A command of the system is `outdated` if one does not hold any more. A condition that a feature adds to a
    request has `find_refusal` alone, which says why it refuses that.
    """

    def holds(self, state: State) -> bool:
        """Whether the condition still holds on `state`."""
        raise NotImplementedError

    def find_refusal(self, at: DecisionInput) -> Refused | None:
        """Return why a command with this condition is refused; None if the condition holds."""
        return None if self.holds(at.state) else REFUSED_AS_OUTDATED


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


class Accepted(Struct, frozen=True, gc=False):
    """The command is accepted: append these events. `is_join`: the job was there before."""

    drafts: tuple[Draft, ...]
    job_id: str | None = None
    is_join: bool = False


class Existing(Struct, frozen=True, gc=False):
    """Nothing to append: the job did, or will do, what the command asks, and the actor is recorded.

    Without a job, the command's effect was recorded before.
    """

    job_id: str | None


class Refused(Struct, frozen=True, gc=False):
    """The present state does not allow the command."""

    code: str
    message: str


Decision = Accepted | Existing | Refused

REFUSED_AS_OUTDATED = Refused(OUTDATED, "what this was decided on has changed; decide it anew")


@dataclass(frozen=True, slots=True)
class DecisionInput:
    """The input of a decision: the arguments of `events.accept.accept`."""

    state: State
    new_id: Callable[[], str]
    now: Timestamp
    previous: bytes


class Command:
    """A command to the writer: it decides itself, if its conditions hold and its key was not used before."""

    __slots__ = ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Of a command of the system."""
        return ()

    @property
    def idempotency(self) -> Idempotency | None:
        return None

    def list_joinable(self, _: State) -> Iterator[tuple[str, str]]:
        """Yield the jobs that may answer a person's command, each with the person: joins matter to it."""
        return iter(())

    def decide(self, _: DecisionInput) -> Decision:
        """Decide the command on the present state."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Record(Command):
    """Append these facts unchanged, in this order, in one transaction, if all conditions hold."""

    drafts: tuple[Draft, ...]
    conditions: tuple[Condition, ...] = ()

    def decide(self, _: DecisionInput) -> Decision:
        return Accepted(self.drafts)


MAX_QUEUE = 256
"""Unended jobs from which on loads by clients are refused: more than any machine loads within the longest
`timeout_s`, and few enough to decide on all of them in a millisecond."""


@dataclass(frozen=True, slots=True)
class CauseRules:
    """The rules of loads with one cause, beside those of all loads.

    Attributes:
        most_unended: limit of unended jobs, from which on the load is refused; None is no limit.
        replaces: whether it takes the place of another version.
        is_for_inferences: whether it brings back the bytes from before (`Model.find_kept_files`), and is
            cancelled if it has not begun and no inference waits for it.
        find_refusal: returns why a version may not be loaded if none is loaded or pending, or None if it may.
        choose_parameters: returns the parameters of a version that is not loaded before, by those asked for.
    """

    most_unended: int | None = None
    replaces: bool = True
    is_for_inferences: bool = False
    find_refusal: Callable[[Model | None, ModelVersions, int], Refused | None] = lambda *_: None
    choose_parameters: Callable[[Model | None, int, LoadParameters], LoadParameters] = lambda _, __, it: it


class Receipt(Struct, frozen=True, gc=False):
    """The answer to a command.

    Attributes:
        job_id: the job that the command made or joined; None for facts and tokens.
        existing: whether the job was there before, or the token was revoked before.
        position: the head's position after the command.
    """

    job_id: str | None
    existing: bool
    position: int
