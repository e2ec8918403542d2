"""The base of a log, with the state there: moved by archiving, and as plain values.

Archiving removes the events before it (`events.audit.archive` decides and proves); the stored state stands
for them: all models, unended jobs, tokens, nodes and policies, and the ended loads that models serve from or
return to.
A replica whose database has archived events begins with the values of a base.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from events.clock import Timestamp
from events.errors import LedgerDamaged
from events.jobs import Job, JobStatus
from events.models import Model
from events.sqlite import history
from events.sqlite.queries import (
    LAST,
    as_job,
    as_model,
    as_text,
    find_base,
    make_state,
    read_head,
    read_rows,
    transaction,
)
from events.state import State
from events.storage import ArchiveRecord, BaseEntity, LogHead, Row, StorageDamaged, StoredBase
from events.types import Anchor

_LIFTED = ("events_never_go", "base_never_changes")
"""The triggers that have to be dropped to move the base, and created again."""


@contextmanager
def suspended_triggers(connection: sqlite3.Connection) -> Iterator[None]:
    """Drop the triggers within the caller's transaction, so that no reader sees the log without them."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name IN (?, ?)", _LIFTED
    ).fetchall()
    for name, _ in found:
        connection.execute(f"DROP TRIGGER {name}")
    yield
    for _, sql in found:
        connection.execute(sql)


class LedgerFile:
    """A ledger in a file whose oldest events can be removed (`events.audit.archive.CutLedger`)."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def stored_base(self) -> StoredBase:
        return read_stored_base(self._connection)

    def head(self) -> LogHead:
        return read_head(self._connection)

    def rows(self, after: int, until: int = LAST) -> Iterator[Row]:
        return read_rows(self._connection, after, until)

    def cut(self, before: Anchor, stored: StoredBase) -> None:
        """Remove the events after `before` up to a new base, and give their space back if there is room.

        The stored jobs that had ended by then go with their events, except those in the state there.

        Raises:
            LedgerDamaged: `ledger_damaged`, other events would go; nothing was changed.
        """
        with transaction(self._connection):
            cut(self._connection, before, stored)
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.execute("VACUUM")


def cut(connection: sqlite3.Connection, before: Anchor, stored: StoredBase) -> None:
    """Do what `LedgerFile.cut` does; the caller holds the transaction."""
    position = stored.base.position
    with suspended_triggers(connection):
        write_base(connection, stored)
        removed = connection.execute("DELETE FROM events WHERE position <= ?", (position,)).rowcount
    if removed != position - before.position:
        raise LedgerDamaged(f"nothing was moved: of positions up to {position}, {removed} would have gone")
    connection.execute(
        f"DELETE FROM jobs WHERE status NOT IN ('{JobStatus.PENDING}', '{JobStatus.IN_PROGRESS}')"  # noqa: S608 - literals
        " AND json_extract(body, '$.position') <= ?"
        " AND created_position NOT IN (SELECT CAST(key AS INTEGER) FROM base_state WHERE kind = 'job')",
        (position,),
    )
    state = state_at_base(stored)
    history.write_base(connection, position, state.models.values(), state.registers.nodes.values())


def write_base(connection: sqlite3.Connection, stored: StoredBase) -> None:
    """Replace the base, the state there and the listed archives, without triggers and in a transaction."""
    connection.execute(
        "UPDATE base SET position = ?, hash = ?, state_sha256 = ?",
        (stored.base.position, stored.base.hash, stored.state_sha256),
    )
    connection.execute("DELETE FROM base_state")
    connection.executemany("INSERT INTO base_state (kind, key, body) VALUES (?, ?, ?)", stored.entities)
    connection.execute("DELETE FROM archives")
    connection.executemany(
        "INSERT INTO archives (last_position, recorded_at, file) VALUES (?, ?, ?)", stored.archives
    )


def read_stored_base(connection: sqlite3.Connection) -> StoredBase:
    """Return where the log begins; bytes that are not UTF-8 are replaced, and so differ from the digest.

    Raises:
        StorageDamaged: the base is missing, or has other types.
    """
    base = find_base(connection)
    if base is None:
        raise StorageDamaged("the base of the chain is missing")
    (digest,) = connection.execute("SELECT state_sha256 FROM base").fetchone()
    entities = connection.execute(
        "SELECT CAST(kind AS BLOB), CAST(key AS BLOB), CAST(body AS BLOB) FROM base_state ORDER BY kind, key"
    ).fetchall()
    return StoredBase(
        base,
        digest,
        tuple(BaseEntity(_decode(kind), _decode(key), _decode(body)) for kind, key, body in entities),
        list_archives(connection),
    )


def list_archives(connection: sqlite3.Connection) -> tuple[ArchiveRecord, ...]:
    """Return the archives that a ledger lists, in the order of their positions; texts may be damaged."""
    found = connection.execute(
        "SELECT last_position, CAST(recorded_at AS BLOB), CAST(file AS BLOB) FROM archives ORDER BY 1"
    )
    return tuple(ArchiveRecord(last, _decode(time), _decode(file)) for last, time, file in found)


def name_archive(connection: sqlite3.Connection, moment: int | Timestamp) -> str:
    """Return words for the archive with a position, or for those two that may have the last event by a time.

    One of the two ends by then. Only their events tell whether the one after it had begun. Empty for none.
    """
    archives = list_archives(connection)
    if isinstance(moment, int):
        found = [each for each in archives if each.last_position >= moment][:1]
    else:
        found = [each for each in archives if each.recorded_at <= moment][-1:]
        found += [each for each in archives if each.recorded_at > moment][:1]
    return f" in {' or '.join(repr(each.file) for each in found)}" if found else ""


def _decode(stored: bytes | None) -> str:
    """Return stored text; a null, which only tampering stores, reads as empty."""
    return (stored or b"").decode(errors="replace")


def state_at_base(stored: StoredBase) -> State:
    """Return the live state at a base; raise ValueError if a part of it is damaged."""
    return make_state(
        stored.base.position,
        "",
        stored.bodies("model"),
        stored.bodies("job"),
        tokens=stored.bodies("token"),
        nodes=stored.bodies("node"),
        policies=stored.bodies("policy"),
    )


def entities_of(state: State) -> tuple[BaseEntity, ...]:
    """Return a state as it is stored at a base; its jobs are all that were given to it, ended ones, too."""
    return (
        *(BaseEntity("model", model.id, as_text(model)) for model in state.models.values()),
        *(BaseEntity("job", f"{job.created_position:019d}", as_text(job)) for job in state.jobs.values()),
        *(BaseEntity("token", token.id, as_text(token)) for token in state.registers.tokens.values()),
        *(BaseEntity("node", node.id, as_text(node)) for node in state.registers.nodes.values()),
        *(BaseEntity("policy", policy.id, as_text(policy)) for policy in state.registers.policies.values()),
    )


def read_base_model(connection: sqlite3.Connection, model_id: str) -> Model | None:
    """Return a model at the base; raise ValueError if it is damaged."""
    body = _read_body(connection, "model", model_id)
    return None if body is None else as_model(body)


def read_base_job(connection: sqlite3.Connection, created_position: int) -> Job | None:
    """Return a job at the base; raise ValueError if it is damaged."""
    body = _read_body(connection, "job", f"{created_position:019d}")
    return None if body is None else as_job(body)


def _read_body(connection: sqlite3.Connection, kind: str, key: str) -> str | None:
    row = connection.execute("SELECT body FROM base_state WHERE kind = ? AND key = ?", (kind, key)).fetchone()
    return None if row is None else str(row[0])


def store_base(connection: sqlite3.Connection, stored: StoredBase) -> None:
    """Give an empty ledger a base; the caller holds the transaction, and folds the log from there.

    Raises:
        LedgerDamaged: `ledger_damaged`, the state is not what archiving wrote.
    """
    if not stored.is_unchanged:
        raise LedgerDamaged(
            f"the state that the database has at its base, position {stored.base.position}, is not the one "
            "that `loadledger archive` stored there: `loadledger verify --ledger` compares it with archives"
        )
    with suspended_triggers(connection):
        write_base(connection, stored)
