"""The history of models and servers, in rows: written with their events, read at any position.

The latest row of a model is at its latest event that changed it, found by the log's index of models, or at an
event that concerns all models, found by a small index of such rows. So the rows are in the order of the log,
and each group writes to the end of the table only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from events.history import ModelRow, decode_row
from events.presence import SERVER, ServerState, Transition
from features.facts import STORED_NAMES, SharingState

_NAME = STORED_NAMES["server"]
"""The column with the name of a server."""


# Models.


def latest_row(model: str, position: str) -> str:
    """Return an SQL expression for the position of a model's latest row up to a position; -1 without one."""
    return f"""max(
  coalesce((SELECT own.position FROM events INDEXED BY events_by_model
    CROSS JOIN model_history AS own ON own.position = events.position AND own.model_id = events.model_id
    WHERE events.model_id = {model} AND events.position <= {position}
    ORDER BY events.position DESC LIMIT 1), -1),
  coalesce((SELECT max(common.position) FROM model_history AS common INDEXED BY model_history_by_model
    WHERE common.is_common AND common.model_id = {model} AND common.position <= {position}), -1))"""  # noqa: S608 - names of columns and parameters


_OWN_POSITIONS = (
    "SELECT position FROM events INDEXED BY events_by_model"
    " WHERE model_id = :model AND position > :after AND position <= :until"
)
_COMMON_POSITIONS = (
    "SELECT position FROM model_history INDEXED BY model_history_by_model"
    " WHERE is_common AND model_id = :model AND position > :after AND position <= :until"
)


def count_rows(connection: sqlite3.Connection, model_ids: Iterable[str], after: int, until: int) -> int:
    """Return how many rows models and servers have in a range of positions, at most.

    Each event of a model counts by its index, although some have no row.
    """
    given = {"after": after, "until": until}
    (found,) = connection.execute(
        "SELECT count(*) FROM presence WHERE position > :after AND position <= :until", given
    ).fetchone()
    for model_id in model_ids:
        for positions in (_OWN_POSITIONS, _COMMON_POSITIONS):
            (count,) = connection.execute(
                f"SELECT count(*) FROM ({positions})",  # noqa: S608 - literals
                {"model": model_id, **given},
            ).fetchone()
            found += count
    return int(found)


def rows_between(
    connection: sqlite3.Connection, model_id: str, after: int, until: int
) -> list[tuple[str | None, bytes]]:
    """Return a model's events in a range of positions: the row, if there is one, and the event's body."""
    return connection.execute(
        f"WITH places AS ({_OWN_POSITIONS} UNION {_COMMON_POSITIONS})"  # noqa: S608 - literals
        " SELECT history.body, CAST(events.body AS BLOB) FROM places"
        " CROSS JOIN events ON events.position = places.position"
        " LEFT JOIN model_history AS history"
        "  ON history.position = places.position AND history.model_id = :model ORDER BY places.position",
        {"model": model_id, "after": after, "until": until},
    ).fetchall()


def row_at(connection: sqlite3.Connection, model_id: str, position: int) -> ModelRow | None:
    """Return the latest row of a model up to a position."""
    found = connection.execute(
        "SELECT body FROM model_history"  # noqa: S608 - literals
        f" WHERE model_id = :model AND position = {latest_row(':model', ':position')}",
        {"model": model_id, "position": position},
    ).fetchone()
    return None if found is None else decode_row(found[0])


# Servers.

SELECT_TRANSITIONS = f"SELECT position, {_NAME} AS server, state, at, seen_at FROM presence"  # noqa: S608

_SERVERS = f"""WITH RECURSIVE ids (id) AS (SELECT min({_NAME}) FROM presence UNION ALL
  SELECT (SELECT min({_NAME}) FROM presence WHERE {_NAME} > ids.id) FROM ids WHERE ids.id IS NOT NULL)
SELECT id FROM ids WHERE id IS NOT NULL"""  # noqa: S608
"""All ids of the table, with one look-up for each instead of a walk over all rows."""


def presence_around(
    connection: sqlite3.Connection, position: int
) -> tuple[dict[str, Transition], dict[str, Transition]]:
    """Return the last transition of each server up to a position, and the next one."""
    last, following = dict[str, Transition](), dict[str, Transition]()
    for (server,) in connection.execute(_SERVERS).fetchall():
        for found, where, order in ((last, "position <= ?", "DESC"), (following, "position > ?", "ASC")):
            row = connection.execute(
                f"{SELECT_TRANSITIONS} WHERE server = ? AND {where} ORDER BY position {order} LIMIT 1",
                (server, position),
            ).fetchone()
            if row is not None:
                found[server] = _transition(row)
    return last, following


def transitions_between(connection: sqlite3.Connection, after: int, until: int) -> list[Transition]:
    found = connection.execute(
        f"{SELECT_TRANSITIONS} WHERE position > ? AND position <= ? ORDER BY position", (after, until)
    ).fetchall()
    return [_transition(row) for row in found]


def _transition(row: Sequence[object]) -> Transition:
    position, server, state, at, seen_at = row
    kind = ServerState if server == SERVER else SharingState
    return Transition(position, server, None if state is None else kind(state), at, seen_at)  # type: ignore[arg-type]
