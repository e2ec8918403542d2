"""The state of the server at moments of the past: running, stopped, or unknown after an unclean end."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support import ledgers
from support.history import History, at

from events.audit.replay import replay
from events.presence import Liveness, ServerState, SharingLiveness
from events.sqlite import queries
from events.sqlite.schema import connect
from events.sqlite.timetravel import NOTE_EVERY_S, liveness_at, models_at, read_moment
from events.types import ServerStarted, TokenRevoked
from features.nodes.facts import NodeLost, NodeState
from features.nodes.register import KEPT_S

RUNNING, STOPPED, UNKNOWN = ServerState.RUNNING, ServerState.STOPPED, ServerState.UNKNOWN


def store(path: Path) -> None:
    """Store a history: a start, a load, an unclean end, a start, a stop, and a start that still runs."""
    history = History()
    history.add(ServerStarted(False), None, of=None, version=None, after_s=2)
    history.load("L")  # at 3, 4, 5
    unclean = ServerStarted(True, last_event_at=at(5), last_seen_at=at(60))
    history.add(unclean, None, of=None, version=None, after_s=995)  # at 1,000
    history.restart(unclean=False, down_s=1_000)  # stopped at 1,001, started at 2,001
    history.ask_load("M", of="other")  # at 2,002
    with closing(connect(path)) as connection:
        ledgers.store_events(connection, history.facts)
        queries.write_note(connection, {}, at(2_100))


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    store(tmp_path / "ledger.db")
    with closing(connect(tmp_path / "ledger.db")) as connection:
        yield connection


MOMENTS = """
position, time -> state, since
0 -       -> stopped -
1 -       -> running 2
4 -       -> running 2
4 60      -> running 2
4 61      -> unknown 60
4 999     -> unknown 60
5 -       -> running 1000
6 -       -> stopped 1001
6 1500    -> stopped 1001
7 -       -> running 2001
8 -       -> running 2001
8 2150    -> running 2001
8 9000    -> unknown 2100
"""
"""Position, and the asked time where one was asked -> the state of the server, and since when."""


@pytest.mark.parametrize("row", [row for row in MOMENTS.splitlines()[2:] if row])
def test_presence_at_moment(connection: sqlite3.Connection, row: str) -> None:
    moment, _, expected = (each.strip() for each in row.partition("->"))
    position, time = moment.split()
    state, since = expected.split()
    found = liveness_at(connection, int(position), None if time == "-" else at(int(time)))
    connection.execute("DELETE FROM presence")  # which replay does not read
    replayed = replay(connection, position if time == "-" else at(int(time)))[0].server
    assert replayed == Liveness(ServerState(state), None if since == "-" else at(int(since)))
    assert found == replayed or time == "9000"  # a running server knows that it is there


def store_nodes(path: Path) -> None:
    """Store a history of nodes: one is drained and leaves, one is lost, and one is killed and joins again."""
    history = History()
    history.add(TokenRevoked("jti", at(900)), of=None, version=None, by="alice")  # at 1
    history.join("n1")  # at 2
    history.join("n2")  # at 3
    history.drain("n1")  # at 4
    history.about_node(NodeLost("n2", 1, at(60)), after_s=96)  # at 100
    history.leave("n1")  # at 101
    history.join("n1", after_s=899)  # at 1,000
    history.join("n1", unclean=True, last_seen_at=at(2_000), no_node_since=at(2_000), after_s=2_000)
    with closing(connect(path)) as connection:
        ledgers.store_events(connection, history.facts)
        queries.write_note(connection, {}, at(3_100))


NODE_MOMENTS = """
position, time -> state, since; nodes
1 -       -> stopped -
1 1       -> stopped -
2 -       -> running 2      n1 joined 2
3 -       -> running 2      n1 joined 2,     n2 joined 3
4 60      -> running 2      n1 draining 4,   n2 joined 3
4 61      -> running 2      n1 draining 4,   n2 unknown 60
5 -       -> running 2      n1 draining 4,   n2 lost 100
6 500     -> stopped 101    n1 left 101,     n2 lost 100
7 -       -> running 1000   n1 joined 1000,  n2 lost 100
7 2000    -> running 1000   n1 joined 1000,  n2 lost 100
7 2001    -> unknown 2000   n1 unknown 2000, n2 lost 100
8 3200    -> running 3000   n1 joined 3000,  n2 lost 100
8 9000    -> unknown 3100   n1 unknown 3100, n2 lost 100
"""
"""Position, and the asked time if there was one -> the state of the server and of nodes, and since when."""


@pytest.mark.parametrize("row", [row for row in NODE_MOMENTS.splitlines()[2:] if row])
def test_presence_of_nodes_at_moment(tmp_path: Path, row: str) -> None:
    store_nodes(tmp_path / "ledger.db")
    moment, _, expected = (each.strip() for each in row.partition("->"))
    position, time = moment.split()
    state, since, *nodes = expected.replace(",", " ").split()
    with closing(connect(tmp_path / "ledger.db")) as connection:
        found = liveness_at(connection, int(position), None if time == "-" else at(int(time)))
        connection.execute("DELETE FROM presence")
        replayed = replay(connection, position if time == "-" else at(int(time)))[0].server
    assert found == replayed or time == "9000"
    assert replayed == Liveness(
        ServerState(state),
        None if since == "-" else at(int(since)),
        tuple(
            SharingLiveness(node, NodeState(phase), at(int(then)))
            for node, phase, then in zip(nodes[::3], nodes[1::3], nodes[2::3], strict=True)
        ),
    )


def test_node_that_ended_long_before_another_joined_is_not_shown(tmp_path: Path) -> None:
    history = History()
    for node in ("n1", "n2", "n3"):
        history.join(node)
    history.leave("n1")  # at 4
    history.join("n2", unclean=True, after_s=KEPT_S)
    history.join("n3", unclean=True)
    with closing(connect(tmp_path / "ledger.db")) as connection:
        ledgers.store_events(connection, history.facts)
        shown = [[node.id for node in liveness_at(connection, position).servers] for position in (5, 6)]
    assert shown == [["n1", "n2", "n3"], ["n2", "n3"]]


def test_presence_of_live_server_is_never_unknown(connection: sqlite3.Connection) -> None:
    assert liveness_at(connection, 8, at(10**9)) == Liveness(RUNNING, at(2_001))


def test_replay_without_a_moment_says_whether_server_was_seen_lately(connection: sqlite3.Connection) -> None:
    moment, _ = replay(connection, None)
    assert moment.server == Liveness(UNKNOWN, at(2_100))
    assert NOTE_EVERY_S <= 60
    connection.rollback()
    assert replay(connection, at(500))[0].server == Liveness(UNKNOWN, at(60))
    connection.rollback()
    assert replay(connection, "4")[0].server == Liveness(RUNNING, at(2))


def test_time_travel_says_whether_server_ran(connection: sqlite3.Connection) -> None:
    moment, models = read_moment(connection, at(500), models_at)
    assert (moment.position, moment.server) == (4, Liveness(UNKNOWN, at(60)))
    assert [model.row.state for model in models] == ["loaded"]
    moment, models = read_moment(connection, at(1_500), models_at)
    assert (moment.position, moment.server) == (6, Liveness(STOPPED, at(1_001)))
    assert [model.row.state for model in models] == ["lost"]
