"""The history of models, the server and nodes, in rows: written with their events, read at any position.

The latest row of a model is the one at its latest event that changed it, which the log's index of models
finds; or one at an event that concerns all models, which a small index of those rows finds.
So the rows themselves are in the order of the log: each group writes to the end of the table alone.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from events.history import encode_row, has_row, make_row
from events.presence import SERVER, NodeState, ServerState, Transition
from events.state import Changes
from events.types import Event

_INSERT_MODELS = "INSERT INTO model_history (position, model_id, is_common, body) VALUES (?, ?, ?, ?)"
_INSERT_TRANSITIONS = "INSERT INTO presence (position, node_id, state, at, seen_at) VALUES (?, ?, ?, ?, ?)"


def write_steps(connection: sqlite3.Connection, steps: Iterable[tuple[Event, Changes]]) -> None:
    """Store what events changed; the caller holds their transaction."""
    rows, transitions = [], list[Transition]()
    for event, changes in steps:
        for model in changes.models.values():
            if has_row(event, model):
                body = encode_row(make_row(model)).decode()
                rows.append((event.position, model.id, model.id != event.model_id, body))
        transitions += changes.transitions
    connection.executemany(_INSERT_MODELS, rows)
    if transitions:
        connection.executemany(_INSERT_TRANSITIONS, transitions)


# Models.


def latest_row(model: str, position: str, after: str = "-1") -> str:
    """Return an SQL expression for the position of a model's latest row in a range; -1 without one.

    It walks backward over the model's events without a row: `after` keeps it from walking over them again.
    """
    return f"""max(
  coalesce((SELECT own.position FROM events INDEXED BY events_by_model
    CROSS JOIN model_history AS own ON own.position = events.position AND own.model_id = events.model_id
    WHERE events.model_id = {model} AND events.position > {after} AND events.position <= {position}
    ORDER BY events.position DESC LIMIT 1), -1),
  coalesce((SELECT max(common.position) FROM model_history AS common INDEXED BY model_history_by_model
    WHERE common.is_common AND common.model_id = {model}
    AND common.position > {after} AND common.position <= {position}), -1))"""  # noqa: S608 - names of columns and parameters


class HistoryRow(NamedTuple):
    """A stored row of a model's history; `event` is the body of the event there, or None."""

    position: int
    body: str
    event: bytes | None


def rows_between(
    connection: sqlite3.Connection, model_id: str, after: int, until: int, limit: int
) -> list[HistoryRow] | None:
    """Return the rows of a model in a range of positions; None if more than so many events may have some."""
    given = {"model": model_id, "after": after, "until": until, "limit": limit + 1}
    positions = connection.execute(
        "SELECT * FROM (SELECT position FROM events INDEXED BY events_by_model"
        "  WHERE model_id = :model AND position > :after AND position <= :until LIMIT :limit)"
        " UNION ALL SELECT * FROM (SELECT position FROM model_history INDEXED BY model_history_by_model"
        "  WHERE is_common AND model_id = :model AND position > :after AND position <= :until LIMIT :limit)",
        given,
    ).fetchall()
    if len(positions) > limit:
        return None
    found = connection.execute(
        "SELECT history.position, history.body, CAST(events.body AS BLOB) FROM json_each(:positions) AS place"
        " CROSS JOIN model_history AS history ON history.position = place.value AND history.model_id = :model"
        " CROSS JOIN events ON events.position = place.value ORDER BY history.position",
        {"model": model_id, "positions": json.dumps([position for (position,) in positions])},
    ).fetchall()
    return [HistoryRow._make(row) for row in found]


def rows_at(
    connection: sqlite3.Connection, model_id: str, positions: Sequence[int]
) -> list[HistoryRow | None]:
    """Return the latest row of a model up to each of some positions, in order; None where there was none."""
    latest = latest_row(":model", "span.value ->> 1", after="span.value ->> 0")
    found = connection.execute(
        "SELECT history.position, history.body, NULL FROM json_each(:spans) AS span"  # noqa: S608 - literals
        f" LEFT JOIN model_history AS history ON history.position = {latest} AND history.model_id = :model"
        " ORDER BY span.key",
        {"model": model_id, "spans": json.dumps(list(pairwise([-1, *positions])))},
    ).fetchall()
    rows = list[HistoryRow | None]()
    for position, *rest in found:
        if position is not None:
            rows.append(HistoryRow(position, *rest))
        else:
            rows.append(rows[-1] if rows else None)
    return rows


# The server and nodes.

_NODE_IDS = """WITH RECURSIVE ids (id) AS (SELECT min(node_id) FROM presence UNION ALL
  SELECT (SELECT min(node_id) FROM presence WHERE node_id > ids.id) FROM ids WHERE ids.id IS NOT NULL)
SELECT id FROM ids WHERE id IS NOT NULL"""
"""All ids of the table, with one look-up for each instead of a walk over all its rows."""


def presence_around(
    connection: sqlite3.Connection, position: int
) -> tuple[dict[str, Transition], dict[str, Transition]]:
    """Return the last transition of the server and of each node up to a position, and the next one."""
    last, following = dict[str, Transition](), dict[str, Transition]()
    for (node_id,) in connection.execute(_NODE_IDS).fetchall():
        for found, where, order in (
            (last, "position <= ?", "DESC"),
            (following, "position > ?", "ASC"),
        ):
            row = connection.execute(
                "SELECT position, node_id, state, at, seen_at FROM presence"  # noqa: S608 - literals
                f" WHERE node_id = ? AND {where} ORDER BY position {order} LIMIT 1",
                (node_id, position),
            ).fetchone()
            if row is not None:
                found[node_id] = _transition(row)
    return last, following


def transitions_between(connection: sqlite3.Connection, after: int, until: int) -> list[Transition]:
    found = connection.execute(
        "SELECT position, node_id, state, at, seen_at FROM presence WHERE position > ? AND position <= ?"
        " ORDER BY position",
        (after, until),
    ).fetchall()
    return [_transition(row) for row in found]


def _transition(row: Sequence[object]) -> Transition:
    position, node_id, state, at, seen_at = row
    kind = ServerState if node_id == SERVER else NodeState
    return Transition(position, node_id, None if state is None else kind(state), at, seen_at)  # type: ignore[arg-type]
