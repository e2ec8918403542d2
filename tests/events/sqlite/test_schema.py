"""The schema: every one that a release made is known and migrated, any other change is named or refused."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.history import opened
from support.ledgers import change_ledger, copy_of, sound_ledger

from events.audit.audit import audit
from events.audit.verify import FindingKind, verify
from events.errors import ForeignDatabase, FutureSchema, LogUnavailable
from events.sqlite.listing import open_reader
from events.sqlite.schema import APPLICATION_ID, connect, schema_difference
from migrations import read_migrations

LEDGER = sound_ledger()


def make_schema(path: Path, migrations: int) -> None:
    """Make an empty ledger as the release did that had so many migrations."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for number, script in read_migrations()[:migrations]:
            connection.executescript(script)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def difference(path: Path) -> str | None:
    """Return what `audit` says of the schema, which has to be the one thing that is wrong."""
    found = audit(path)
    assert found.verification.verified
    assert found.damage is None
    if found.finding is None:
        return None
    assert (found.finding.position, found.finding.kind) == (found.verification.position, FindingKind.SCHEMA)
    return found.finding.problem.removeprefix("the database's schema: ")


@pytest.mark.parametrize("migrations", range(1, len(read_migrations()) + 1))
def test_every_released_schema_is_known_and_migrated(tmp_path: Path, migrations: int) -> None:
    path = tmp_path / "ledger.db"
    make_schema(path, migrations)
    assert difference(path) is None
    with closing(connect(path)) as connection:
        assert schema_difference(connection) is None


def test_generated_column_that_lies_is_named() -> None:
    column = "json_extract(body, '$.actor')".replace("'", "''")
    lie = f"iif(position = 2, ''mallory'', {column})"
    with copy_of(LEDGER) as path:
        change_ledger(
            path,
            f"UPDATE sqlite_schema SET sql = replace(sql, '{column}', '{lie}') WHERE name = 'events'",
            keeps_triggers=True,
        )
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("REINDEX")
            told = connection.execute("SELECT position FROM events WHERE actor = 'mallory'").fetchall()
        assert told == [(2,)]
        assert difference(path) == "the table 'events' was changed"


EDIT = "UPDATE sqlite_schema SET sql = replace(sql"
GHOST_TRIGGER = "CREATE TRIGGER ghost AFTER INSERT ON jobs BEGIN DELETE FROM models; END"


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DROP TRIGGER events_never_change", "the trigger 'events_never_change' is missing"),
        ("DROP INDEX events_by_time", "the index 'events_by_time' is missing"),
        ("DROP TABLE last_used", "the table 'last_used' is missing"),
        (
            f"{EDIT}, 'BEGIN', 'WHEN 0 BEGIN') WHERE name LIKE '%_go'",
            "the trigger 'events_never_go' was changed",
        ),
        (f"{EDIT}, 'events', 'EVENTS') WHERE name LIKE '%_go'", "the trigger 'events_never_go' was changed"),
        (GHOST_TRIGGER, "the trigger 'ghost' is not of a ledger"),
        ("CREATE UNIQUE INDEX ghost ON events (actor, position)", "the index 'ghost' is not of a ledger"),
        ("CREATE VIEW ghost AS SELECT * FROM events", "the view 'ghost' is not of a ledger"),
        ("ALTER TABLE jobs ADD COLUMN ghost", "the table 'jobs' was changed"),
        ("CREATE TABLE _replication (id TEXT PRIMARY KEY)", None),  # plain tables of others are left alone
        ("ANALYZE", None),
    ],
)
def test_changed_schema_is_named(statement: str, problem: str | None) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, statement, keeps_triggers=True)
        assert difference(path) == problem


# Files that are no ledger, to the writer, to readers and to `verify`.


async def read(path: Path) -> None:
    async with open_reader(path):
        pass


async def verify_file(path: Path) -> None:
    await asyncio.to_thread(verify, path)


async def write(path: Path) -> None:
    async with opened(path):
        pass


@pytest.mark.parametrize("use", [write, read, verify_file])
@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("this is no database, it is a sentence\n" * 100, LogUnavailable, "not a database"),
        ("PRAGMA user_version = 99; PRAGMA application_id = 0x4C4C4631", FutureSchema, "use the release"),
        ("CREATE TABLE events (position INTEGER PRIMARY KEY, body TEXT)", ForeignDatabase, "not a ledger"),
        ("PRAGMA application_id = 7", ForeignDatabase, "not a ledger"),
        ("PRAGMA user_version = 1", ForeignDatabase, "not a ledger"),
        ("CREATE TABLE events (x); PRAGMA application_id = 0x4C4C6467", ForeignDatabase, "before 0.1.0"),
    ],
)
async def test_file_that_is_no_ledger_is_refused_untouched(
    tmp_path: Path, use: Callable[[Path], Awaitable[None]], content: str, error: type[Exception], words: str
) -> None:
    path = tmp_path / "ledger.db"
    if content.startswith("this"):
        path.write_text(content)
    else:
        change_ledger(path, *content.split(";"), "VACUUM", keeps_triggers=True)  # so that there is a file
    before = path.read_bytes()
    with pytest.raises(error, match=words):
        await use(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.db"]  # noqa: ASYNC240


@pytest.mark.parametrize("use", [write, read, verify_file])
async def test_missing_file_or_folder_is_unavailable(
    tmp_path: Path, use: Callable[[Path], Awaitable[None]]
) -> None:
    with pytest.raises(LogUnavailable, match=r"ledger\.db cannot be (opened|read)"):
        await use(tmp_path / ("nowhere/ledger.db" if use is write else "ledger.db"))
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
