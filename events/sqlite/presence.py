"""Was the server there at a moment of the past? Its starts and stops tell, and its last note."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from enum import StrEnum

from events.clock import Timestamp, add_seconds
from events.codec import decode_event
from events.sqlite import queries
from events.types import OF_SERVER, Event, ServerStarted, ServerStopped

NOTE_EVERY_S = 60.0
"""How often a server notes that it is there: one commit, and an unclean end is known to the minute."""

_OVERDUE_S = 2 * NOTE_EVERY_S
"""A server that has noted nothing for so long may have ended."""


class ServerState(StrEnum):
    """The state of the server; `unknown` from when it was last seen to the discovery of an unclean end."""

    RUNNING = "running"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Presence:
    """The state of the server at a moment, and since when; None if the log does not say."""

    state: ServerState
    since: Timestamp | None


def presence_at(
    connection: sqlite3.Connection, position: int, time: Timestamp | None = None, *, is_live: bool = False
) -> Presence:
    """Return the state of the server right after the event at `position`, or at a later time.

    Args:
        connection: in one transaction with what else is asked of that moment.
        position: of the last event by then; 0 is before the first.
        time: before the next event was recorded; None for the moment of the event itself.
        is_live: whether the caller is the server, so that no end is behind the last event.
    """
    before, after = (
        find_server_event(connection, position),
        find_server_event(connection, position, after=True),
    )
    if after is None and not is_live:
        seen_at = max(queries.read_last_seen(connection), queries.read_last_of_server(connection).recorded_at)
        if _is_running(before) and time is not None and time > add_seconds(seen_at, _OVERDUE_S):
            return Presence(ServerState.UNKNOWN, seen_at)
    return presence_between(before, after, time, is_first=position == 0)


def presence_between(
    before: Event | None, after: Event | None, time: Timestamp | None, *, is_first: bool
) -> Presence:
    """Return the state of the server between two of its starts and stops; None where there is none.

    `time` is as for `presence_at`; `is_first` says that no event at all is before.
    """
    if before is not None and isinstance(before.data, ServerStopped):
        return Presence(ServerState.STOPPED, before.recorded_at)
    starts = after.data if after is not None and isinstance(after.data, ServerStarted) else None
    if is_first or (starts is not None and not starts.unclean):
        return Presence(ServerState.STOPPED, None)
    if before is None and after is None:
        return Presence(ServerState.UNKNOWN, None)
    if starts is not None and time is not None and time > (starts.seen_at or ""):
        return Presence(ServerState.UNKNOWN, starts.seen_at)
    return Presence(ServerState.RUNNING, before.recorded_at if before is not None else None)


def find_server_event(connection: sqlite3.Connection, position: int, *, after: bool = False) -> Event | None:
    """Return the last start or stop of the server up to a position, or the first one after it."""
    where, order = ("position > ?", "ASC") if after else ("position <= ?", "DESC")
    found = [
        row
        for kind in OF_SERVER
        for row in connection.execute(
            f"SELECT position, body FROM events WHERE type = ? AND {where} ORDER BY position {order} LIMIT 1",  # noqa: S608 - literals
            (kind.TYPE, position),
        )
    ]
    return decode_event((min if after else max)(found)[1]) if found else None


def _is_running(before: Event | None) -> bool:
    return before is not None and isinstance(before.data, ServerStarted)
