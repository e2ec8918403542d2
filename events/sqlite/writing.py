"""The writer's statements: each is one transaction, so none stays open where a caller or a process ends.

What a group writes goes into a view of the connection, whose trigger fills the tables: all texts as one BLOB,
and for each table JSON with numbers and the places of texts. So it takes one hop to the connection's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from events.errors import ForeignHead
from events.history import encode_row, find_landmark, has_row, make_row
from events.registers import ENTRIES
from events.sqlite.queries import as_bytes, encode, types_sql
from events.state import JOINS, REQUESTS, Changes
from events.storage import LogHead, Row, StorageError
from features.facts import STORED_NAMES

_BY_ID = ["models", *ENTRIES]
"""The tables of bodies by their ids."""

_LISTS = ["events", "jobs", "history", "presence", *_BY_ID]
_COLUMNS = ["head", "head_hash", "position", "texts", "hashes", *_LISTS]
_FOREIGN = "another process has written into the ledger"


def _text(number: int) -> str:
    """Return the expression of the text whose place in `texts` are a row's numbers from this one on."""
    return f"CAST(substr(NEW.texts, value ->> {number}, value ->> {number + 1}) AS TEXT)"


def _store(table: str) -> str:
    """Return the statements that store bodies by their ids, and delete from a register what has none."""
    given = f"FROM json_each(NEW.{table}) WHERE value ->> 2 IS"
    deletion = f"DELETE FROM {table} WHERE id IN (SELECT {_text(0)} {given} NULL);"  # noqa: S608 - names of tables
    return f"""
  {deletion if table in ENTRIES else ""}
  INSERT INTO {table} (id, body) SELECT {_text(0)}, {_text(2)} {given} NOT NULL
    ON CONFLICT (id) DO UPDATE SET body = excluded.body;"""


VIEWS = f"""
PRAGMA temp_store = MEMORY;
CREATE TEMP VIEW groups ({", ".join(_COLUMNS)})
AS SELECT {", ".join(["NULL"] * len(_COLUMNS))};

CREATE TEMP TRIGGER write_group INSTEAD OF INSERT ON groups
BEGIN
  SELECT RAISE(ABORT, '{_FOREIGN}') WHERE NEW.events <> '[]' AND (
    NEW.head IS NOT coalesce((SELECT max(position) FROM events), 0)
    OR NEW.head_hash IS NOT coalesce((SELECT hash FROM events WHERE position = NEW.head), NEW.head_hash)
  );
  INSERT INTO events (position, body, hash)
    SELECT NEW.head + 1 + key, {_text(0)}, substr(NEW.hashes, 1 + 32 * key, 32) FROM json_each(NEW.events);
  UPDATE projected SET position = NEW.position;
  INSERT INTO jobs (created_position, landmark, id, body)
    SELECT value ->> 0, value ->> 1, {_text(2)}, {_text(4)} FROM json_each(NEW.jobs) WHERE TRUE
    ON CONFLICT (id) DO UPDATE SET body = excluded.body, landmark = excluded.landmark,
      created_position = excluded.created_position;
  INSERT INTO model_history (position, is_common, model_id, body)
    SELECT value ->> 0, value ->> 1, {_text(2)}, {_text(4)} FROM json_each(NEW.history);
  INSERT INTO presence (position, {STORED_NAMES["server"]}, state, at, seen_at)
    SELECT value ->> 0, {_text(1)}, {_text(3)}, {_text(5)}, {_text(7)} FROM json_each(NEW.presence);
{"".join(map(_store, _BY_ID))}
END;

CREATE TEMP VIEW notes (used, seen_at) AS SELECT NULL, NULL;
CREATE TEMP TRIGGER write_note INSTEAD OF INSERT ON notes
BEGIN
  INSERT INTO last_seen (one, seen_at) VALUES (1, NEW.seen_at)
    ON CONFLICT (one) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at);
  INSERT INTO last_used (model_id, used_at) SELECT key, value FROM json_each(NEW.used) WHERE TRUE
    ON CONFLICT (model_id) DO UPDATE SET used_at = max(used_at, excluded.used_at);
END;

CREATE TEMP VIEW probes (one) AS SELECT NULL;
CREATE TEMP TRIGGER write_probe INSTEAD OF INSERT ON probes
BEGIN
  UPDATE projected SET position = -1 - position; -- twice, since SQLite writes nothing if nothing changes
  UPDATE projected SET position = -1 - position;
END;
"""  # noqa: S608 - names of tables and columns
"""The views through which a connection writes. What they keep for an undo is in memory, not in a file."""

WRITE_GROUP = f"INSERT INTO groups VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - literals
"""Appends one or more events, and stores the entities that they changed."""

WRITE_NOTE = "INSERT INTO notes VALUES (?, ?)"
"""Stores the models' times of last use (JSON) and the server's note; later stored times stay."""

PROBE = "INSERT INTO probes VALUES (NULL)"
"""Commits a transaction that changes nothing, to see whether the ledger can be written."""

FIND_KEYS = f"""SELECT body, max(position) FROM events
WHERE idempotency_key IN (SELECT value FROM json_each(?)) AND +type IN ({types_sql(REQUESTS)})
GROUP BY idempotency_key"""  # noqa: S608 - literals; the plus excludes the index of types
"""Finds the latest use of each of some idempotency keys, however long ago."""

FIND_JOINS = f"""SELECT DISTINCT job_id, actor, events.type FROM json_each(?) AS asked CROSS JOIN events
ON job_id = asked.value ->> 0 AND actor = asked.value ->> 1 AND events.type IN ({types_sql(JOINS)})"""  # noqa: S608 - literals
"""Finds who joined which job, of pairs of a job's id and an actor."""


def group_of(rows: Sequence[Row], changes: Changes, after: LogHead) -> tuple[object, ...]:
    """Return the parameters of `WRITE_GROUP`: events that follow a head, or the changes up to it alone."""
    texts, end = list[bytes](), 0

    def place(text: str | bytes | None) -> tuple[int | None, int | None]:
        """Append a text; return where it begins, counted from 1, and its length in bytes, or twice None."""
        nonlocal end
        if text is None:
            return None, None
        texts.append(added := text.encode() if isinstance(text, str) else text)
        end += len(added)
        return end - len(added) + 1, len(added)

    jobs = changes.jobs.values()
    by_id = dict[str, Mapping[str, Any]](models=changes.models, **changes.registers)
    changed = [(at, each) for at, step in changes.steps for each in step.models.values() if has_row(at, each)]
    transitions = [each for _, step in changes.steps for each in step.transitions]
    lists = [
        [place(row.body) for row in rows],
        [(job.created_position, find_landmark(job), *place(job.id), *place(as_bytes(job))) for job in jobs],
        [
            (at.position, model.id != at.model_id, *place(model.id), *place(encode_row(make_row(model))))
            for at, model in changed
        ],
        [(each.position, *chain.from_iterable(map(place, each[1:]))) for each in transitions],
    ]
    tables = [by_id.get(table, {}).items() for table in _BY_ID]
    lists += [[place(key) + place(each and as_bytes(each)) for key, each in entries] for entries in tables]
    position, hashes = rows[-1].position if rows else after.position, b"".join([row.hash for row in rows])
    return after.position, after.hash, position, b"".join(texts), hashes, *map(encode, lists)


def meaning_of(error: StorageError, after: LogHead) -> Exception:
    """Return what an error of `WRITE_GROUP` says about the events, or else the error."""
    if str(error) == _FOREIGN:
        return ForeignHead(
            f"the ledger's head is not the event at {after.position}, the last one that this server wrote: "
            "another process has written into its file"
        )
    if str(error) == "UNIQUE constraint failed: events.id":
        return StorageError(
            f"an event after position {after.position} has the id of an earlier one, and no release "
            "writes that: `loadledger verify --ledger` names it"
        )
    return error
