"""The writer's statements: each is one transaction, so none stays open where a caller or a process ends.

What they write goes as JSON into a view of the connection, whose trigger fills the tables: a group of events
takes one hop to the thread of the connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from events.errors import ForeignHead
from events.history import encode_row, find_landmark, has_row, make_row
from events.models import Model
from events.presence import Transition
from events.registers import ENTRIES, RegisterEntry
from events.sqlite.queries import as_text, encode, types_sql
from events.state import JOINS, REQUESTS, Changes
from events.storage import LogHead, Row, StorageError
from features.facts import STORED_NAMES

_COLUMNS = ["head", "head_hash", "position", "bodies", "hashes", "models", "jobs", "history", "presence"]
_FOREIGN = "another process has written into the ledger"


def _store(table: str) -> str:
    """Return the statement that stores bodies by their ids."""
    return f"""
  INSERT INTO {table} (id, body) SELECT key, value FROM json_each(NEW.{table}) WHERE type <> 'null'
    ON CONFLICT (id) DO UPDATE SET body = excluded.body;"""  # noqa: S608 - names of tables


def _delete(table: str) -> str:
    """Return the statement that deletes the entries whose bodies are null."""
    return f"""
  DELETE FROM {table} WHERE id IN (SELECT key FROM json_each(NEW.{table}) WHERE type = 'null');"""  # noqa: S608 - names of tables


VIEWS = f"""
PRAGMA temp_store = MEMORY;
CREATE TEMP VIEW groups ({", ".join([*_COLUMNS, *ENTRIES])})
AS SELECT {", ".join(["NULL"] * len([*_COLUMNS, *ENTRIES]))};

CREATE TEMP TRIGGER write_group INSTEAD OF INSERT ON groups
BEGIN
  SELECT RAISE(ABORT, '{_FOREIGN}') WHERE NEW.bodies IS NOT NULL AND (
    NEW.head IS NOT coalesce((SELECT max(position) FROM events), 0)
    OR NEW.head_hash IS NOT coalesce((SELECT hash FROM events WHERE position = NEW.head), NEW.head_hash)
  );
  INSERT INTO events (position, body, hash)
    SELECT NEW.head + 1 + key, value, substr(NEW.hashes, 1 + 32 * key, 32) FROM json_each(NEW.bodies);
  UPDATE projected SET position = NEW.position;
{_store("models")}
  INSERT INTO jobs (created_position, id, body, landmark)
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(NEW.jobs) WHERE TRUE
    ON CONFLICT (id) DO UPDATE SET body = excluded.body, landmark = excluded.landmark,
      created_position = excluded.created_position;
  INSERT INTO model_history (position, model_id, is_common, body)
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(NEW.history);
  INSERT INTO presence (position, {STORED_NAMES["server"]}, state, at, seen_at)
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(NEW.presence);
{"".join(_delete(name) + _store(name) for name in ENTRIES)}
END;

CREATE TEMP VIEW notes (used, seen_at) AS SELECT NULL, NULL;
CREATE TEMP TRIGGER write_note INSTEAD OF INSERT ON notes
BEGIN
  INSERT INTO last_seen (one, seen_at) SELECT 1, NEW.seen_at WHERE NEW.seen_at IS NOT NULL
    ON CONFLICT (one) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at);
  INSERT INTO last_used (model_id, used_at) SELECT key, value FROM json_each(NEW.used) WHERE TRUE
    ON CONFLICT (model_id) DO UPDATE SET used_at = max(used_at, excluded.used_at);
  UPDATE projected SET position = -1 - position; -- twice, since SQLite writes nothing if nothing changes
  UPDATE projected SET position = -1 - position;
END;
"""  # noqa: S608 - names of tables and columns
"""The views through which a connection writes. What they keep for an undo is in memory, not in a file."""

WRITE_GROUP = f"INSERT INTO groups VALUES ({', '.join('?' * len([*_COLUMNS, *ENTRIES]))})"  # noqa: S608 - literals
"""Appends one or more events, and stores the entities that they changed."""

WRITE_NOTE = "INSERT INTO notes VALUES (?, ?)"
"""Stores the models' times of last use (JSON) and the server's note; later stored times stay.

A note of nothing, twice NULL, is a durable write that changes nothing: a probe.
"""

FIND_KEYS = f"""SELECT body, max(position) FROM events
WHERE idempotency_key IN (SELECT value FROM json_each(?)) AND +type IN ({types_sql(REQUESTS)})
GROUP BY idempotency_key"""  # noqa: S608 - literals; the plus excludes the index of types
"""Finds the latest use of each of some idempotency keys, however long ago."""

FIND_JOINS = f"""SELECT DISTINCT job_id, actor, events.type FROM json_each(?) AS asked CROSS JOIN events
ON job_id = asked.value ->> 0 AND actor = asked.value ->> 1 AND events.type IN ({types_sql(JOINS)})"""  # noqa: S608 - literals
"""Finds who joined which job, of pairs of a job's id and an actor."""


def group_of(rows: Sequence[Row], changes: Changes, after: LogHead) -> tuple[object, ...]:
    """Return the parameters of `WRITE_GROUP`: events that follow a head, or the changes up to it alone.

    A body has no U+0000, which the canonical form escapes and SQLite would read as the end of the text.
    """
    jobs = [(job.created_position, job.id, as_text(job), find_landmark(job)) for job in changes.jobs.values()]
    history, presence = [], list[Transition]()
    for event, step in changes.steps:
        for model in step.models.values():
            if has_row(event, model):
                body = encode_row(make_row(model)).decode()
                history.append((event.position, model.id, model.id != event.model_id, body))
        presence += step.transitions
    return (
        after.position,
        after.hash,
        rows[-1].position if rows else after.position,
        encode([row.body for row in rows]) if rows else None,
        b"".join([row.hash for row in rows]),
        _bodies(changes.models),
        encode(jobs),
        encode(history),
        encode(presence),
        *(_bodies(changes.registers.get(name, {})) for name in ENTRIES),
    )


def _bodies(entities: Mapping[str, Model | RegisterEntry | None]) -> str:
    return encode({key: None if each is None else as_text(each) for key, each in entities.items()})


def refusal(problem: str, after: LogHead) -> Exception | None:
    """Return what SQLite's message about `WRITE_GROUP` means, if it is about the events."""
    if problem == _FOREIGN:
        return ForeignHead(
            f"the ledger's head is not the event at {after.position}, the last one that this server wrote: "
            "another process has written into its file"
        )
    if "events_by_id" in problem:
        return StorageError(
            f"an event after position {after.position} has the id of an earlier one, and no release "
            "writes that: `loadledger verify --ledger` names it"
        )
    return None
