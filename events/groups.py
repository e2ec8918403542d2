"""A group of events that become durable at once: decided from commands, or read from another server. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from events.accept import OUTDATED, Accepted, Existing, Refused, accept
from events.clock import Timestamp
from events.codec import decode_event, encode_event, hash_body
from events.commands import Command, JoinNode, KnownRequests, PendingCommand, Receipt
from events.errors import LedgerProblem, RequestRefused, UnreadableEvent
from events.nodes import NodeJoined
from events.state import Attempt, State
from events.storage import LogHead, Row
from events.types import Draft, Event, record_draft


@dataclass(frozen=True, slots=True)
class DecidedGroup:
    """The outcome of a group: its events, their rows, the state after them and the head."""

    attempt: Attempt
    events: Sequence[Event]
    rows: Sequence[Row]
    head: LogHead


def decide_group(
    group: Iterable[PendingCommand],
    state: State,
    head: LogHead,
    *,
    known: KnownRequests,
    now: Timestamp,
    new_id: Callable[[], str],
) -> DecidedGroup:
    """Decide the commands of a group one after the other, each on the state after those before it.

    Only the outcomes in `group` change. Commands of cancelled callers are skipped.

    Args:
        group: the pending commands.
        state: the durable state.
        head: the durable head.
        known: what the log has of the group's idempotency keys, actors and the jobs that may answer them.
        now: the ledger's time, one for the group, because it becomes durable at one moment.
        new_id: returns the id of a new event.
    """
    attempt, events, rows = Attempt(state, known), list[Event](), list[Row]()
    for pending in group:
        if pending.done.cancelled():
            continue
        try:
            decision = accept(attempt.state, pending.command, new_id, now)
            if isinstance(decision, Accepted):
                drafts = _sign_join(pending.command, decision.drafts, head)
                new_events, new_rows, head = encode_drafts(drafts, head, now)
                for event in new_events:
                    attempt.apply(event)
                events += new_events
                rows += new_rows
            pending.outcome = make_receipt(decision, head)
        except LedgerProblem as error:
            pending.outcome = error
    return DecidedGroup(attempt, events, rows, head)


def _sign_join(command: Command, drafts: Sequence[Draft], head: LogHead) -> Sequence[Draft]:
    """Return the drafts of a command, that of a join signed: only here the event before it is known."""
    if not isinstance(command, JoinNode) or command.sign is None:
        return drafts
    joins = [
        replace(each.data, after=head.hash.hex()) for each in drafts if isinstance(each.data, NodeJoined)
    ]
    signed = [replace(join, signature=command.sign(join.statement)) for join in joins]
    return [replace(draft, data=join) for draft, join in zip(drafts, signed, strict=True)]


def fold_rows(rows: Sequence[Row], state: State) -> DecidedGroup:
    """Fold events that others appended on top of a state, which does not change.

    Raises:
        UnreadableEvent: `log_unavailable`, an event cannot be folded.
    """
    attempt, events = Attempt(state), list[Event]()
    for row in rows:
        try:
            event = decode_event(row.body)
            attempt.apply(event)
        except Exception as error:  # a forged body may raise anything
            raise UnreadableEvent(row.position, error) from error
        events.append(event)
    last, head = events[-1], rows[-1]
    return DecidedGroup(attempt, events, rows, LogHead(head.position, head.hash, last.recorded_at, last.type))


def encode_drafts(
    drafts: Sequence[Draft], head: LogHead, now: Timestamp
) -> tuple[list[Event], list[Row], LogHead]:
    """Return the drafts as events and rows after `head`.

    Raises:
        NotEncodable: `not_encodable`; no draft is encoded then, so one caller fails alone.
    """
    events, rows = [], []
    position, digest = head.position, head.hash
    recorded_at = max(now, head.recorded_at)
    for draft in drafts:
        position += 1
        event = record_draft(draft, position, recorded_at)
        body = encode_event(event)
        digest = hash_body(digest, body)
        events.append(event)
        rows.append(Row(position, body, digest))
    return events, rows, LogHead(position, digest, recorded_at, events[-1].type) if events else head


def make_receipt(decision: Accepted | Existing | Refused, head: LogHead) -> Receipt:
    """Return the receipt of a decision; `head` is the one after it.

    Raises:
        RequestRefused: the command was refused.
    """
    if isinstance(decision, Refused):
        raise RequestRefused(decision.code, decision.message)
    return Receipt(
        decision.job_id,
        existing=not isinstance(decision, Accepted) or decision.is_join,
        position=head.position,
    )


def rests_on_state(pending: PendingCommand) -> bool:
    """Whether a command was refused, or answered with what was there.

    Not if it is outdated: the system then decides anew by itself.
    """
    match pending.outcome:
        case RequestRefused(code=code):
            return code != OUTDATED
        case Receipt(existing=existing):
            return existing
    return False
