"""Other servers that share the ledger, as runtime asks about them: their part of the work, and their models.

A server alone has `ALONE`: all work is its own, and no model is elsewhere. One of several overrides it;
`docs/decisions/0064` has the reasons.
"""

# ruff: noqa: ARG002 - a server alone looks at no argument

from __future__ import annotations

from typing import TypeVar

from msgspec import UnsetType

from events.commands import Condition, Record
from events.jobcommands import RequestLoad, RequestUnload
from events.models import Model
from events.state import State
from features.facts import ServerSignature
from runtime.consumer.running import RunningLoad
from runtime.errors import ModelNotLoaded
from runtime.scheduler.actions import Decision
from runtime.scheduler.scheduler import decide
from runtime.scheduler.view import SchedulerView

SystemCommand = TypeVar("SystemCommand", bound=Record | RequestLoad | RequestUnload)


class Elsewhere:
    """Which of the recorded work is this server's, all; and where models are that are not here, nowhere."""

    name: str | None = None
    """The name of this server among those that share the ledger; None if it is alone."""

    def servers(self, state: State) -> object:
        """Return a value that is another one once a server has come or gone."""
        return None

    def find_epoch(self, state: State) -> tuple[str | None, tuple[Condition, ...]]:
        """Return the name of this server's present epoch, and its conditions; None if it is alone.

        Raises:
            EpochOver: `log_unavailable`.
        """
        return None, ()

    def is_over(self, epoch: str, state: State) -> bool:
        """Whether this names an epoch of a server that is over: no event of it can come any more."""
        return False

    def share(self, state: State) -> State:
        """Return the part of the state that this server works on."""
        return state

    def decide(self, view: SchedulerView) -> Decision:
        """Return the next action on that part."""
        return decide(view)

    def complete(self, command: SystemCommand, state: State) -> SystemCommand:
        """Return a command of the consumer, completed for other servers."""
        return command

    def is_signed(self, statement: bytes, signature: ServerSignature | UnsetType, state: State) -> bool:
        """Whether a server that may sign has signed it; nobody else writes to the ledger of one alone."""
        return True

    def locate(self, model: Model, state: State) -> str | None:
        """Return the name of the other server at which a model is loaded."""
        return None

    def view(self, model: Model) -> Model:
        """Return a model as this server sees it: serving from its own copy, if it has one."""
        return model

    def choose(
        self, model: Model, state: State, version: int | None, own: RunningLoad | None = None
    ) -> str | None:
        """Return the name of the server whose copy answers, or None.

        With `own`, the copy here, it is None unless that is clearly busier.
        """
        return None

    def refusal(self) -> ModelNotLoaded | None:
        """Return why this server may not answer inferences now, or None."""
        return None


ALONE = Elsewhere()
