"""The schema: each that our migrations make is taken, and whatever somebody made of it is named."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.ledgers import rows_of, write_ledger

from events.audit import audit
from events.backup import back_up
from events.findings import Kind
from events.schema import APPLICATION_ID, _migrations, connect, schema_difference


def made(path: Path, migrations: int) -> None:
    """Make a ledger as the release did that had so many migrations."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for number, script in _migrations()[:migrations]:
            connection.executescript(script)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    await write_ledger(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def changed(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)


def difference(path: Path) -> str | None:
    """Return what `verify` says of the schema, which has to be the one thing that is wrong."""
    found = audit(path)
    assert found.verification.verified
    assert found.damage is None
    if found.finding is None:
        return None
    assert (found.finding.position, found.finding.kind) == (found.verification.position, Kind.SCHEMA)
    return found.schema


@pytest.mark.parametrize("migrations", range(1, len(_migrations()) + 1))
def test_every_schema_there_was_is_known_and_so_is_what_it_was_migrated_to(
    tmp_path: Path, migrations: int
) -> None:
    path = tmp_path / "ledger.db"
    made(path, migrations)
    assert difference(path) is None
    with closing(connect(path)) as connection:
        assert schema_difference(connection) is None


def test_a_copy_has_the_schema_of_its_ledger(path: Path, tmp_path: Path) -> None:
    with closing(connect(path)) as connection:
        connection.execute("VACUUM")
    assert back_up(path, tmp_path / "copy.db").finding is None
    assert difference(tmp_path / "copy.db") is None


def test_what_columns_say_of_a_body_cannot_be_made_to_lie(path: Path) -> None:
    column = "json_extract(body, '$.actor')".replace("'", "''")
    changed(
        path,
        f"UPDATE sqlite_schema SET sql = replace(sql, '{column}', 'iif(position = 2, ''mallory'', {column})')"
        " WHERE name = 'events'",
    )
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("REINDEX")
        told = connection.execute("SELECT position FROM events WHERE actor = 'mallory'").fetchall()
    assert told == [(2,)]
    assert rows_of(path)
    assert difference(path) == "the table 'events' is not as it was made"


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DROP TRIGGER events_never_change", "the trigger 'events_never_change' is missing"),
        ("DROP INDEX events_by_time", "the index 'events_by_time' is missing"),
        ("DROP TABLE last_used", "the table 'last_used' is missing"),
        (
            "UPDATE sqlite_schema SET sql = replace(sql, 'BEGIN', 'WHEN 0 BEGIN') WHERE name LIKE '%_go'",
            "the trigger 'events_never_go' is not as it was made",
        ),
        (
            "UPDATE sqlite_schema SET sql = replace(sql, 'events', 'EVENTS') WHERE name = 'events_never_go'",
            "the trigger 'events_never_go' is not as it was made",
        ),
        (
            "CREATE TRIGGER ghost AFTER INSERT ON jobs BEGIN DELETE FROM models; END",
            "the trigger 'ghost' is none of a ledger's",
        ),
        ("CREATE UNIQUE INDEX ghost ON events (actor, position)", "the index 'ghost' is none of a ledger's"),
        ("CREATE VIEW ghost AS SELECT * FROM events", "the view 'ghost' is none of a ledger's"),
        ("ALTER TABLE jobs ADD COLUMN ghost", "the table 'jobs' is not as it was made"),
        ("PRAGMA user_version = 4", "the table 'models' is not as it was made"),
    ],
)
def test_what_is_gone_or_changed_or_more_is_named(path: Path, statement: str, problem: str) -> None:
    changed(path, statement)
    assert difference(path) == problem


def test_plain_tables_of_others_are_left_alone(path: Path) -> None:
    changed(path, "CREATE TABLE _replication (id TEXT PRIMARY KEY)", "ANALYZE")
    assert difference(path) is None
