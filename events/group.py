"""What waits for the writer, and what becomes of it: decided, encoded, and answered when it is durable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import Struct

from events.accept import Accepted, Existing, Refused, accept
from events.bodies import to_body
from events.canonical import chain
from events.commands import Command, KnownKey, Record
from events.errors import LedgerProblem, RequestRefused
from events.state import Attempt, State
from events.store import Head, Row
from events.types import Draft, Event, recorded


class Receipt(Struct, frozen=True, gc=False):
    """What became of a command: the job behind it, whether it was there before, and the head after it."""

    job_id: str | None
    existing: bool
    position: int


@dataclass(slots=True)
class Waiting:
    """A command and who waits for it. A refusal, too, holds only once what it was decided on is durable."""

    command: Command
    done: asyncio.Future[Receipt]
    outcome: Receipt | LedgerProblem | None = None

    @property
    def key_hash(self) -> str | None:
        """The idempotency key that the command was given with."""
        given = None if isinstance(self.command, Record) else self.command.idempotency
        return given.key_hash if given is not None else None

    def settle(self) -> None:
        """Tell who waits, if still somebody does."""
        if self.done.done():
            return
        if isinstance(self.outcome, Receipt):
            self.done.set_result(self.outcome)
        elif self.outcome is not None:
            self.done.set_exception(self.outcome)


@dataclass(slots=True)
class Noting:
    """When models were last used, and who waits for that to be noted."""

    used: Mapping[str, str]
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Decided:
    """What a group comes to: the events, also as rows, the state that they make, and the head after them."""

    attempt: Attempt
    events: Sequence[Event]
    rows: Sequence[Row]
    head: Head


def keys_of(group: Iterable[Waiting]) -> set[str]:
    """Return the idempotency keys that the commands of a group were given with; most have none."""
    return {key_hash for waiting in group if (key_hash := waiting.key_hash) is not None}


def decide(
    group: Iterable[Waiting],
    state: State,
    head: Head,
    *,
    known: Mapping[str, KnownKey],
    now: str,
    new_id: Callable[[], str],
) -> Decided:
    """Decide the commands of a group one after the other, each on what those before it come to.

    Nothing but the outcomes of those who wait is changed; who gave up changes nothing.

    Args:
        group: who waits.
        state: what is durable.
        head: the log's.
        known: what the log knows of the group's idempotency keys.
        now: the ledger's time, as a stamp: one for the group, as it becomes durable at one moment.
        new_id: gives the ids of new events.
    """
    attempt, events, rows = Attempt(state, known), list[Event](), list[Row]()
    for waiting in group:
        if waiting.done.cancelled():
            continue
        try:
            decision = accept(attempt.state, waiting.command, new_id, now)
            if isinstance(decision, Accepted):
                new_events, new_rows, head = encoded(decision.drafts, head, now)
                for event in new_events:
                    attempt.state.apply(event)
                events += new_events
                rows += new_rows
            waiting.outcome = receipt_of(decision, head)
        except LedgerProblem as error:
            waiting.outcome = error
    return Decided(attempt, events, rows, head)


def encoded(drafts: Sequence[Draft], head: Head, now: str) -> tuple[list[Event], list[Row], Head]:
    """Return the drafts as events and rows after `head`: all or none of them, so one caller fails alone."""
    events, rows = [], []
    position, digest = head.position, head.hash
    recorded_at = max(now, head.recorded_at)
    for draft in drafts:
        position += 1
        event = recorded(draft, position, recorded_at)
        body = to_body(event)
        digest = chain(digest, body)
        events.append(event)
        rows.append(Row(position, body, digest))
    return events, rows, Head(position, digest, recorded_at, events[-1].type) if events else head


def receipt_of(decision: Accepted | Existing | Refused, head: Head) -> Receipt:
    """Return what a decision comes to, where `head` is the log's after it.

    Raises:
        RequestRefused: that is what it comes to.
    """
    if isinstance(decision, Refused):
        raise RequestRefused(decision.code, decision.message)
    return Receipt(decision.job_id, existing=isinstance(decision, Existing), position=head.position)


def fail(group: Iterable[Waiting | Noting], error: Exception) -> None:
    """Tell all who wait that nothing came of it."""
    for waiting in group:
        if not waiting.done.done():
            waiting.done.set_exception(error)
