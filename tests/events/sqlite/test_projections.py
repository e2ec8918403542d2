"""`verify` compares stored jobs, models and history with a fold of the log, and names what differs."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER
from support.ledgers import change_ledger, copy_of, rows_of, sound_ledger

from events.audit.verify import Finding, FindingKind, Verification, verify
from events.sqlite.projections import StoredJobs
from events.sqlite.storage import rebuild_file

LEDGER = sound_ledger()
LONG_LEDGER = sound_ledger(3)
with copy_of(LEDGER) as _path:
    HEAD, _, HEAD_HASH = rows_of(_path)[-1]
OPEN_JOBS = (
    "CREATE TABLE forged AS SELECT created_position, id, body, landmark FROM jobs; DROP TABLE jobs;"
    "ALTER TABLE forged RENAME TO jobs;"
)
"""Put a table in the place of the jobs that takes whatever it is given."""


# Jobs and models.


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE projected SET position = 3", "projections are at position 3"),
        ("DELETE FROM projected", "projections are at position None"),
        ("DELETE FROM models WHERE id = 'other'", "models lack 'other'"),
        ("DELETE FROM jobs WHERE id = 'F0'", "jobs lack 'F0'"),
    ],
)
def test_missing_projection_is_named_at_the_head(statement: str, problem: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, statement)
        assert verify(path) == Verification(HEAD, HEAD_HASH, Finding(HEAD, f"the stored {problem}"))


@pytest.mark.parametrize(
    ("table", "change", "key"),
    [
        ("models", "UPDATE models SET body = replace(body, 'loaded', 'failed') WHERE id = 'other'", "other"),
        ("models", "UPDATE models SET body = body || ' '", "digits"),
        ("models", "UPDATE models SET body = CAST(body AS BLOB) WHERE id = 'other'", "other"),
        ("models", "UPDATE models SET id = CAST(id AS BLOB) WHERE id = 'other'", "other"),
        ("models", "UPDATE models SET body = 'no JSON' WHERE id = 'other'", "other"),
        ("models", "INSERT INTO models VALUES ('ghost', '{}')", "ghost"),
        ("jobs", "UPDATE jobs SET body = replace(body, 'alice', 'mallory') WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET created_position = 99 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET created_position = -1 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET landmark = 1 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET landmark = NULL WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET id = 'X' WHERE id = 'L0'", "X"),
        ("jobs", "UPDATE jobs SET id = CAST(x'ff' AS TEXT) WHERE id = 'L0'", "\ufffd"),
        ("jobs", "UPDATE jobs SET id = CAST(id AS BLOB) WHERE id = 'L0'", "L0"),
        ("jobs", "INSERT INTO jobs (created_position, id, body) SELECT 99, 'X', body FROM jobs LIMIT 1", "X"),
        *(
            ("jobs", f"{OPEN_JOBS} UPDATE jobs SET {value} WHERE id = 'L0'", "L0")
            for value in (
                "created_position = NULL",
                "created_position = 'z'",
                "created_position = 2.5",
                "created_position = x'00'",
                "body = 'no JSON'",
            )
        ),
    ],
)
def test_changed_projection_is_named_at_the_head(table: str, change: str, key: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, *change.split(";"))
        problem = f"the stored {table} differ from the log's at {key!r}"
        assert verify(path) == Verification(HEAD, HEAD_HASH, Finding(HEAD, problem))


def test_surplus_jobs_are_read_one_by_one() -> None:
    with copy_of(LEDGER) as path:
        change_ledger(
            path,
            "WITH RECURSIVE numbers (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999)"
            " INSERT INTO jobs (created_position, id, body) SELECT n, 'x' || n, body"
            " FROM numbers, (SELECT body FROM jobs LIMIT 1)",
        )
        with closing(sqlite3.connect(path)) as connection:
            connection.text_factory = bytes
            stored = StoredJobs(connection)
            assert stored.difference(()) == "the stored jobs differ from the log's at 'L0'"
            assert next(stored._walk)[1] == b"F0"


# History.


def difference(path: Path) -> int | None:
    finding = verify(path).finding
    if finding is None:
        return None
    assert finding.kind is FindingKind.PROJECTIONS
    assert "history" in finding.problem or "presence" in finding.problem
    return finding.position


@FEWER
@given(st.data())
def test_changed_character_of_the_history_is_found(data: st.DataObject) -> None:
    with copy_of(LONG_LEDGER) as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            rows = connection.execute("SELECT position, model_id, body FROM model_history").fetchall()
            position, model_id, body = data.draw(st.sampled_from(rows))
            index = data.draw(st.integers(0, len(body) - 1))
            other = body[:index] + chr(ord(body[index]) ^ 1) + body[index + 1 :]
            connection.execute(
                "UPDATE model_history SET body = ? WHERE position = ? AND model_id = ?",
                (other, position, model_id),
            )
        assert difference(path) == position


@pytest.mark.parametrize(
    ("statement", "position"),
    [
        ("DELETE FROM model_history WHERE position = 14", 14),
        ("UPDATE model_history SET model_id = 'digits2' WHERE position = 14", 14),
        ("UPDATE model_history SET is_common = 1 WHERE position = 14", 14),
        ("UPDATE model_history SET position = 1000 WHERE position = 14", 14),
        ("INSERT INTO model_history SELECT 14, 'zoo', 0, body FROM model_history LIMIT 1", 15),
        ("INSERT INTO model_history SELECT 1000, 'zoo', 0, body FROM model_history LIMIT 1", 54),
        ("INSERT INTO model_history SELECT -1, 'zoo', 0, body FROM model_history LIMIT 1", 2),
        ("UPDATE presence SET state = 'stopped' WHERE position = 1", 1),
        ("UPDATE presence SET seen_at = at WHERE position = 1", 1),
        ("DELETE FROM presence WHERE position = 1", 1),
        ("INSERT INTO presence VALUES (1000, '', 'running', 'now', NULL)", 54),
    ],
)
def test_tampered_history_is_found_and_a_rebuild_removes_it(statement: str, position: int) -> None:
    with copy_of(LONG_LEDGER) as path:
        assert change_ledger(path, statement, keeps_triggers=True) > 0
        assert difference(path) == position
        rebuild_file(path)
        assert difference(path) is None
