"""Liveness of the server and the nodes at a moment of the past, from starts, ends and the last note."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from events.clock import Timestamp, add_seconds
from events.codec import decode_event
from events.nodes import Node, evolve_node, is_forgotten
from events.sqlite import queries
from events.types import OF_NODES, OF_SERVER, Event, NodeJoined, NodeLost, ServerStarted, ServerStopped

NOTE_EVERY_S = 60.0
"""How often a server notes that it is there: one commit, and an unclean end is known to the minute."""

_OVERDUE_S = 2 * NOTE_EVERY_S
"""A server that has noted nothing for so long may have ended."""


class ServerState(StrEnum):
    """The state of the server; `unknown` from when it was last seen to the discovery of an unclean end.

    With nodes, the server runs while any node is there.
    """

    RUNNING = "running"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class NodeState(StrEnum):
    """The phase of a node; `unknown` from its last renewal to the event that ended its epoch without it."""

    JOINED = "joined"
    DRAINING = "draining"
    LEFT = "left"
    LOST = "lost"
    UNKNOWN = "unknown"

    @property
    def is_present(self) -> bool:
        return self in (NodeState.JOINED, NodeState.DRAINING)


@dataclass(frozen=True, slots=True)
class NodeLiveness:
    """The state of a node at a moment, and since when; None if the log does not say."""

    id: str
    state: NodeState
    since: Timestamp | None


@dataclass(frozen=True, slots=True)
class Liveness:
    """The state of the server at a moment, and since when; None if the log does not say.

    `nodes` are those that had joined by then, by name.
    """

    state: ServerState
    since: Timestamp | None
    nodes: tuple[NodeLiveness, ...] = ()


_NOTHING_KNOWN = Liveness(ServerState.UNKNOWN, None)


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of the state of the server or of a node.

    Attributes:
        node_id: the node; empty is the server, or all nodes together.
        position: of the event.
        at: when that was recorded.
        seen_at: until when the state before is known to have lasted; None is until `at`.
    """

    node_id: str
    state: ServerState | NodeState
    position: int
    at: Timestamp
    seen_at: Timestamp | None = None


def list_transitions(base: Iterable[Node], events: Iterable[Event]) -> Iterator[Transition]:
    """Yield what starts and ends of servers and nodes change, in order.

    Args:
        base: the nodes before these events.
        events: those of OF_SERVER and OF_NODES, all of nodes since the base.
    """
    nodes = {node.id: node for node in base}
    for event in events:
        position, at, data = event.position, event.recorded_at, event.data
        if isinstance(data, ServerStarted):
            seen_at = data.last_seen_at if data.unclean else None
            yield Transition("", ServerState.RUNNING, position, at, seen_at)
        elif isinstance(data, ServerStopped):
            yield Transition("", ServerState.STOPPED, position, at)
        elif isinstance(data, OF_NODES):
            before, was_there = nodes.get(data.node_id), _is_any_present(nodes.values())
            after = evolve_node(before, data, position=position, recorded_at=at)
            if after is None or after is before:
                continue
            nodes[after.id] = after
            seen_at = data.last_renewed_at if isinstance(data, NodeLost) else None
            if isinstance(data, NodeJoined) and before is not None and before.is_present:
                seen_at = data.last_seen_at
            yield Transition(after.id, NodeState(after.phase), position, at, seen_at)
            is_there = _is_any_present(nodes.values())
            none_since = data.no_node_since if isinstance(data, NodeJoined) and was_there else None
            if is_there != was_there or none_since is not None:
                state = ServerState.RUNNING if is_there else ServerState.STOPPED
                yield Transition("", state, position, at, none_since)


def _is_any_present(nodes: Iterable[Node]) -> bool:
    return any(node.is_present for node in nodes)


def liveness_at(
    connection: sqlite3.Connection, position: int, time: Timestamp | None = None, *, is_live: bool = False
) -> Liveness:
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
    events = read_node_events(connection)
    server = liveness_between(before, after, time, is_first=position == 0)
    found = add_nodes(server, read_base_nodes(connection), events, position, time)
    is_last = after is None and (not events or events[-1].position <= position)
    if found.state is ServerState.RUNNING and is_last and not is_live and time is not None:
        seen_at = max(queries.read_last_seen(connection), queries.read_head(connection).recorded_at)
        if time > add_seconds(seen_at, _OVERDUE_S):
            nodes = tuple(_unknown_since(node, seen_at) for node in found.nodes)
            return Liveness(ServerState.UNKNOWN, seen_at, nodes)
    return found


def add_nodes(
    server: Liveness, base: Sequence[Node], events: Iterable[Event], position: int, time: Timestamp | None
) -> Liveness:
    """Return the liveness of nodes at a moment; that of the server if none had joined by then.

    Args:
        server: its liveness, without nodes.
        base: the nodes at the base.
        events: all of nodes since then.
        position: as for `liveness_at`.
        time: as for `liveness_at`.
    """
    nodes = {node.id: NodeLiveness(node.id, NodeState(node.phase), node.ended_at) for node in base}
    transitions = list(list_transitions(base, events))
    if base:
        is_there = _is_any_present(base)
        server = Liveness(ServerState.RUNNING if is_there else ServerState.STOPPED, None)
    elif transitions and server == _NOTHING_KNOWN:
        server = Liveness(ServerState.STOPPED, None)
    for each in transitions:
        if each.position <= position:
            if isinstance(each.state, ServerState):
                server = Liveness(each.state, each.at)
            else:
                if each.state is NodeState.JOINED:
                    nodes = {key: node for key, node in nodes.items() if not _is_forgotten(node, each.at)}
                nodes[each.node_id] = NodeLiveness(each.node_id, each.state, each.at)
        elif each.seen_at is not None and time is not None and each.seen_at < time:
            if each.node_id in nodes:
                nodes[each.node_id] = _unknown_since(nodes[each.node_id], each.seen_at)
            elif not each.node_id and nodes:
                server = replace(server, state=ServerState.UNKNOWN, since=each.seen_at)
    return replace(server, nodes=tuple(nodes[node_id] for node_id in sorted(nodes)))


def _is_forgotten(node: NodeLiveness, joined_at: Timestamp) -> bool:
    return not node.state.is_present and is_forgotten(node.since, joined_at)


def _unknown_since(node: NodeLiveness, seen_at: Timestamp) -> NodeLiveness:
    """Return a node that may have ended after it was last seen; what had ended before stays."""
    return replace(node, state=NodeState.UNKNOWN, since=seen_at) if node.state.is_present else node


def read_base_nodes(connection: sqlite3.Connection) -> list[Node]:
    return [queries.as_node(body) for (body,) in connection.execute("SELECT body FROM base_nodes")]


def read_node_events(connection: sqlite3.Connection) -> list[Event]:
    found = [
        row
        for kind in OF_NODES
        for row in connection.execute("SELECT position, body FROM events WHERE type = ?", (kind.TYPE,))
    ]
    return [decode_event(body) for _, body in sorted(found)]


def liveness_between(
    before: Event | None, after: Event | None, time: Timestamp | None, *, is_first: bool
) -> Liveness:
    """Return the state of the server between two of its starts and stops; None where there is none.

    `time` is as for `liveness_at`; `is_first` says that no event at all is before.
    """
    if before is not None and isinstance(before.data, ServerStopped):
        return Liveness(ServerState.STOPPED, before.recorded_at)
    starts = after.data if after is not None and isinstance(after.data, ServerStarted) else None
    if is_first or (starts is not None and not starts.unclean):
        return Liveness(ServerState.STOPPED, None)
    if before is None and after is None:
        return _NOTHING_KNOWN
    if starts is not None and time is not None and time > (starts.last_seen_at or ""):
        return Liveness(ServerState.UNKNOWN, starts.last_seen_at)
    return Liveness(ServerState.RUNNING, before.recorded_at if before is not None else None)


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
