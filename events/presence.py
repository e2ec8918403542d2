"""Presence of servers: the changes by starts and ends, and the state at a moment. Pure.

Each change is stored (`events.sqlite.history`). An end that was discovered later has `seen_at`: from then to
its discovery the state is `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from events.clock import Timestamp
from events.types import Event, ServerStarted, ServerStopped
from features.facts import PRESENT_SHARING, SharingState

SERVER = ""
"""Stands for the server, or all that share the ledger, where others have the name of one of these."""


class ServerState(StrEnum):
    """The state of the server; `unknown` from when it was last seen to the discovery of an unclean end.

    Of several that share the ledger, the server runs while any is there.
    """

    RUNNING = "running"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


PRESENT = (ServerState.RUNNING, *PRESENT_SHARING)


class Transition(NamedTuple):
    """A change of the state of a server.

    Attributes:
        position: the event's position.
        server: its name, or SERVER.
        state: the state from then on; None for a forgotten server.
        at: when the event was recorded; None for a guess for the time before the first event.
        seen_at: until when the state before is known to have lasted, and empty if nobody knows; None is until
            `at`.
    """

    position: int
    server: str
    state: ServerState | SharingState | None
    at: Timestamp | None
    seen_at: Timestamp | None = None


@dataclass(frozen=True, slots=True)
class SharingLiveness:
    """The state of one of several servers at a moment, and since when, or None if the log does not tell."""

    id: str
    state: SharingState
    since: Timestamp | None


@dataclass(frozen=True, slots=True)
class Liveness:
    """The state of the server at a moment, and since when, or None if the log does not tell.

    `servers` are the servers that had joined by then, by name.
    """

    state: ServerState
    since: Timestamp | None
    servers: tuple[SharingLiveness, ...] = ()


def list_transitions(event: Event) -> tuple[Transition, ...]:
    """Return the change by the start or end of a server alone; empty for other events."""
    position, at, data = event.position, event.recorded_at, event.data
    match data:
        case ServerStarted(unclean=unclean, last_seen_at=last_seen_at):
            seen_at = last_seen_at or "" if unclean else None
            return (Transition(position, SERVER, ServerState.RUNNING, at, seen_at),)
        case ServerStopped():
            return (Transition(position, SERVER, ServerState.STOPPED, at),)
    return ()


def find_liveness(
    last: Mapping[str, Transition],
    following: Mapping[str, Transition],
    time: Timestamp | None,
    *,
    is_first: bool,
) -> Liveness:
    """Return the liveness at a moment.

    Args:
        last: the last transition by then of each server.
        following: the first one after that.
        time: the moment, before the next event was recorded; None for that of the last event.
        is_first: whether no event at all is before.
    """
    servers = []
    for name in sorted(last.keys() - {SERVER}):
        state, since = _state_at(last[name], following.get(name), time)
        if state is not None:
            servers.append(SharingLiveness(name, SharingState(state), since))
    before, after = last.get(SERVER), following.get(SERVER)
    if before is None:
        was_stopped = after is not None and after.state is ServerState.RUNNING and after.seen_at is None
        unsaid = ServerState.UNKNOWN if after is None else ServerState.RUNNING
        guess = ServerState.STOPPED if is_first or was_stopped else unsaid
        before = Transition(0, SERVER, guess, None)
    state, since = _state_at(before, after, time)
    return Liveness(ServerState(state or ServerState.UNKNOWN), since, tuple(servers))


def _state_at(
    last: Transition, following: Transition | None, time: Timestamp | None
) -> tuple[str | None, Timestamp | None]:
    """Return the state of a server, and since when."""
    seen_at = following.seen_at if following is not None else None
    if last.state in PRESENT and seen_at is not None and time is not None and seen_at < time:
        return "unknown", seen_at or None
    return last.state, last.at


def unknown_since(found: Liveness, seen_at: Timestamp) -> Liveness:
    """Return the liveness where all that was there may have ended after it was last seen."""
    servers = [
        replace(each, state=SharingState.UNKNOWN, since=seen_at) if each.state in PRESENT else each
        for each in found.servers
    ]
    return Liveness(ServerState.UNKNOWN, seen_at, tuple(servers))
