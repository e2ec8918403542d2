"""Replay: the live state at any moment, folded anew from the log.

It uses no stored projections and no stored history, unlike `?at=`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from events.clock import format_timestamp, utc_now
from events.codec import decode_event
from events.presence import Transition, find_liveness
from events.registers import Registers
from events.sqlite.queries import read_head, read_rows, read_starts_and_ends
from events.sqlite.schema import Connection, begin_reading
from events.sqlite.timetravel import Moment, cannot_fold, moment_at, unknown_if_overdue
from events.state import Entities, State
from events.storage import Row
from events.types import OF_SERVER
from features.facts import OF_SERVERS

_OF_PRESENCE = frozenset({*OF_SERVER, *OF_SERVERS})


def replay(ledger: Connection, until: str | None) -> tuple[Moment, State]:
    """Fold the log anew, and return the live state at a moment, with the moment.

    Args:
        ledger: the connection, in which a transaction begins.
        until: a position in digits, a time, or None for the head.

    Raises:
        InvalidMoment: `invalid_parameter`.
        BeyondHead: `beyond_head`.
        BeforeFirst: `before_first_event`.
        LogUnavailable: `log_unavailable`, the file cannot be read, or an event cannot be folded.
    """
    now = format_timestamp(utc_now())
    begin_reading(ledger)
    moment = moment_at(ledger, str(read_head(ledger).position) if until is None else until)
    position = moment.position
    rows = chain(read_rows(ledger, 0, position), read_starts_and_ends(ledger, position))
    state, transitions = _fold(rows, position)
    last = {each.server: each for each in transitions if each.position <= position}
    following = {each.server: each for each in reversed(transitions) if each.position > position}
    time = now if until is None else moment.time and min(moment.time, now)
    server = find_liveness(last, following, time, is_first=position == 0)
    if not following:
        server = unknown_if_overdue(ledger, server, time)
    return replace(moment, recorded_at=state.recorded_at or None, server=server), state


def _fold(rows: Iterable[Row], position: int) -> tuple[State, list[Transition]]:
    """Fold events up to a position, and go on to their end with servers alone.

    Returns:
        The state, and the transitions of servers in all rows.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    entities, recorded_at, transitions = Entities(), "", list[Transition]()
    later: Registers | None = None
    for row in rows:
        try:
            event = decode_event(row.body)
            if event.position > position:
                later = later or entities.registers.share()
                transitions += later.apply(event, {}, list)[1]
                continue
            entities.apply(event)
            recorded_at = event.recorded_at
            if type(event.data) in _OF_PRESENCE:
                transitions += entities.common.transitions
        except Exception as error:  # a forged body may raise anything
            raise cannot_fold(row.position, error) from error
    return State(
        position, recorded_at, entities.models, entities.jobs, registers=entities.registers
    ), transitions
