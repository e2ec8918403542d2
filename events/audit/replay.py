"""Replay: the live state at any moment, folded anew from the log, or from its archives and the log.

It trusts no stored projections and no stored history: `?at=` reads those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from events.audit.exportreader import prove_archives, read_proved
from events.clock import Timestamp, format_timestamp, utc_now
from events.codec import decode_event
from events.errors import Archived, LogUnavailable
from events.presence import Transition, find_liveness, transitions_at_base
from events.sqlite.bases import list_archives
from events.sqlite.queries import read_base, read_rows, read_starts_and_ends
from events.sqlite.schema import Connection, begin_reading
from events.sqlite.timetravel import (
    BeforeFirst,
    Moment,
    bounds,
    cannot_fold,
    load_base_state,
    moment_at,
    parse_moment,
    unknown_if_overdue,
)
from events.state import Entities, State
from events.storage import Row
from events.types import OF_NODES, OF_SERVER

_OF_PRESENCE = frozenset({*OF_SERVER, *OF_NODES})


def replay(ledger: Connection, until: str | None, archives: Sequence[Path] = ()) -> tuple[Moment, State]:
    """Fold the log anew, and return the live state at a moment, with the moment.

    Without archives the fold begins at the base, and a moment before that is refused.

    Args:
        ledger: a transaction begins in it.
        until: a position in digits, a time, or None for the head.
        archives: of the ledger, all of them, in any order.

    Raises:
        InvalidMoment: `invalid_parameter`.
        BeyondHead: `beyond_head`.
        BeforeFirst: `before_first_event`.
        Archived: `archived`, the moment is before the base, and no archives were given.
        ArchiveMissing: `archive_missing`, the archives do not lead from the first event to the base.
        LedgerDamaged: `ledger_damaged`, an archive does not verify.
        NothingThere: `nothing_there`, archives were given for a ledger without archived events.
        LogUnavailable: `log_unavailable`, a file cannot be read, or an event cannot be folded.
    """
    now = format_timestamp(utc_now())
    files = prove_archives(archives, read_base(ledger), list_archives(ledger)) if archives else []
    begin_reading(ledger)  # not earlier: it keeps the writer from beginning its write-ahead log anew
    if files and read_base(ledger) != files[-1].proved:
        raise LogUnavailable("events were archived meanwhile: give that archive, too")
    base, head = bounds(ledger)
    try:
        moment = moment_at(ledger, str(head) if until is None else until)
    except Archived:
        if not files:
            raise
        asked = parse_moment(until)
        moment = Moment(asked, None) if isinstance(asked, int) else Moment(base, None, asked)
    start, end = State() if files else load_base_state(ledger), max(base, moment.position)
    rows = chain(
        chain.from_iterable(map(read_proved, files)),
        read_rows(ledger, base, end),
        read_starts_and_ends(ledger, end),
    )
    state, transitions = _fold(start, rows, moment.position, moment.time)
    position = state.position
    if files and moment.time is not None and position == 0:
        raise BeforeFirst(f"{moment.time[:19]}Z is before the first event: name a later time")
    last = {each.node_id: each for each in transitions if each.position <= position}
    following = {each.node_id: each for each in reversed(transitions) if each.position > position}
    time = now if until is None else moment.time and min(moment.time, now)
    server = find_liveness(last, following, time, is_first=position == 0)
    if not following:
        server = unknown_if_overdue(ledger, server, time)
    return replace(moment, position=position, recorded_at=state.recorded_at or None, server=server), state


def _fold(
    start: State, rows: Iterable[Row], position: int, time: Timestamp | None
) -> tuple[State, list[Transition]]:
    """Fold events up to a position or time, and go on to their end with servers and nodes alone.

    Archives are so read to their ends, which shows whether they still are those that were proved.

    Returns:
        The state, and the transitions of servers and nodes in all rows and at the start.

    Raises:
        LogUnavailable: an event cannot be folded.
    """
    entities, later = Entities(start.models.values(), start.unended(), start.registers), None
    transitions = transitions_at_base(start.position, start.registers.nodes.values())
    reached, recorded_at = start.position, start.recorded_at
    for row in rows:
        try:
            event = decode_event(row.body)
            if event.position <= position and (time is None or event.recorded_at <= time):
                folded = entities
                reached, recorded_at = event.position, event.recorded_at
            elif type(event.data) in _OF_PRESENCE:
                folded = later = later or Entities(registers=replace(entities.registers, shares_tokens=True))
            else:
                continue
            folded.apply(event)
            if type(event.data) in _OF_PRESENCE:
                transitions += folded.common.transitions
        except Exception as error:  # a forged body may raise anything
            raise cannot_fold(row.position, error) from error
    if position == 0:  # before the base, too
        return State(), transitions
    return State(
        reached, recorded_at, entities.models, entities.jobs, registers=entities.registers
    ), transitions
