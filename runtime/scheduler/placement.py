"""This server's share of the recorded work: all of it; servers that divide it override this (`nodes`).

`docs/decisions/0064` has the reasons.
"""

from __future__ import annotations

from typing import TypeVar

from msgspec import UnsetType

from events.commands import Record, RequestLoad, RequestUnload
from events.state import State
from events.values import NodeSignature
from runtime.scheduler.actions import Decision
from runtime.scheduler.scheduler import decide
from runtime.scheduler.view import SchedulerView

SystemCommand = TypeVar("SystemCommand", bound=Record | RequestLoad | RequestUnload)


class Placement:
    """The part of the recorded work that is this server's: all of it."""

    def share(self, state: State) -> State:
        """Return the part of the state that this server works on."""
        return state

    def decide(self, view: SchedulerView) -> Decision:
        """Return the next action on that part."""
        return decide(view)

    def complete(self, command: SystemCommand, state: State) -> SystemCommand:  # noqa: ARG002 - for others
        """Return a command of the consumer with what other servers have to know of it."""
        return command

    def is_signed(
        self,
        statement: bytes,  # noqa: ARG002 - for others
        signature: NodeSignature | UnsetType,  # noqa: ARG002
        state: State,  # noqa: ARG002
    ) -> bool:
        """Whether a trusted server has signed a statement; nobody else writes to the ledger of one alone."""
        return True


ALONE = Placement()
