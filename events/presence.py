"""Presence of the server and the nodes: what starts and ends change, and what they tell of a moment. Pure.

Each change is stored (`events.sqlite.history`). An end that was discovered later has `seen_at`: from then to
its discovery the state is `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from events.clock import Timestamp
from events.nodes import Node
from events.types import Event, ServerStarted, ServerStopped
from features.nodes.facts import OF_NODES, NodeJoined, NodeLost

SERVER = ""
"""Stands for the server, or all nodes together, where others have the name of a node."""


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


PRESENT = (ServerState.RUNNING, NodeState.JOINED, NodeState.DRAINING)


class Transition(NamedTuple):
    """A change of the state of the server or of a node.

    Attributes:
        position: of the event.
        node_id: the node, or SERVER.
        state: from then on; None of a node that is forgotten.
        at: when the event was recorded; None of a guess for the time before the first one.
        seen_at: until when the state before is known to have lasted, and empty if nobody knows; None is until
            `at`.
    """

    position: int
    node_id: str
    state: ServerState | NodeState | None
    at: Timestamp | None
    seen_at: Timestamp | None = None


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


def list_transitions(
    event: Event, before: Mapping[str, Node], changed: Mapping[str, Node | None]
) -> tuple[Transition, ...]:
    """Return what the start or end of a server, or an event about a node, changes.

    Args:
        event: any event.
        before: the nodes before it.
        changed: the nodes that it changed; None for those that it had forgotten.
    """
    position, at, data = event.position, event.recorded_at, event.data
    match data:
        case ServerStarted(unclean=unclean, last_seen_at=last_seen_at):
            seen_at = last_seen_at or "" if unclean else None
            return (Transition(position, SERVER, ServerState.RUNNING, at, seen_at),)
        case ServerStopped():
            return (Transition(position, SERVER, ServerState.STOPPED, at),)
    after = changed.get(data.node_id) if isinstance(data, OF_NODES) else None
    if after is None:
        return ()
    forgotten = [Transition(position, node_id, None, at) for node_id, node in changed.items() if node is None]
    old, was_there = before.get(after.id), any_present(before.values())
    is_there = any_present(node for node in {**before, **changed}.values() if node is not None)
    seen_at = none_since = None
    if isinstance(data, NodeLost):
        seen_at = data.last_renewed_at
    elif isinstance(data, NodeJoined):
        seen_at = data.last_seen_at if old is not None and old.is_present else None
        none_since = data.no_node_since if was_there else None
    of_node = Transition(position, after.id, NodeState(after.phase), at, seen_at)
    if is_there == was_there and none_since is None:
        return (*forgotten, of_node)
    state = ServerState.RUNNING if is_there else ServerState.STOPPED
    return (*forgotten, of_node, Transition(position, SERVER, state, at, none_since))


def any_present(nodes: Iterable[Node]) -> bool:
    return any(node.is_present for node in nodes)


def find_liveness(
    last: Mapping[str, Transition],
    following: Mapping[str, Transition],
    time: Timestamp | None,
    *,
    is_first: bool,
) -> Liveness:
    """Return the liveness at a moment.

    Args:
        last: the last transition by then of the server and of each node.
        following: the first one after that.
        time: of the moment, before the next event was recorded; None for that of the last event.
        is_first: whether no event at all is before.
    """
    nodes = []
    for node_id in sorted(last.keys() - {SERVER}):
        state, since = _state_at(last[node_id], following.get(node_id), time)
        if state is not None:
            nodes.append(NodeLiveness(node_id, NodeState(state), since))
    before, after = last.get(SERVER), following.get(SERVER)
    if before is None:
        was_stopped = after is not None and after.state is ServerState.RUNNING and after.seen_at is None
        unsaid = ServerState.UNKNOWN if after is None else ServerState.RUNNING
        guess = ServerState.STOPPED if is_first or was_stopped else unsaid
        before = Transition(0, SERVER, guess, None)
    state, since = _state_at(before, after, time)
    return Liveness(ServerState(state or ServerState.UNKNOWN), since, tuple(nodes))


def _state_at(
    last: Transition, following: Transition | None, time: Timestamp | None
) -> tuple[str | None, Timestamp | None]:
    """Return the state of one server or node, and since when."""
    seen_at = following.seen_at if following is not None else None
    if last.state in PRESENT and seen_at is not None and time is not None and seen_at < time:
        return "unknown", seen_at or None
    return last.state, last.at


def unknown_since(found: Liveness, seen_at: Timestamp) -> Liveness:
    """Return the liveness where all that was there may have ended after it was last seen."""
    nodes = [
        replace(node, state=NodeState.UNKNOWN, since=seen_at) if node.state in PRESENT else node
        for node in found.nodes
    ]
    return Liveness(ServerState.UNKNOWN, seen_at, tuple(nodes))
