"""Stored snapshots beside a fold: the writer's are right, and what somebody made of them is found."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, START, opened
from support.ledgers import SIGN, rows_of, told_history, write_ledger

from events import snapshots
from events.archive import archive
from events.commands import Record
from events.rebuild import rebuild_file
from events.schema import connect
from events.types import Draft, Unknown
from events.verify import Kind, verify

ROUNDS = 3
HISTORY = told_history(ROUNDS)
HEAD = len(HISTORY)
APART = 13


def sound_ledger() -> bytes:
    """Return a ledger with a snapshot after every 13 events."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(_written(path))
        return path.read_bytes()


async def _written(path: Path) -> None:
    for begin in range(0, HEAD, APART):
        async with opened(path, now=lambda: START, monotonic=float) as log:
            for fact in HISTORY[begin : begin + APART]:
                assert not isinstance(fact.data, Unknown)
                draft = Draft(
                    fact.id, fact.data, fact.actor, fact.job_id, fact.model_id, fact.version, fact.worker_id
                )
                await log.submit(Record((draft,)))
        with closing(connect(path)) as connection:
            snapshots.write(connection, min(begin + APART, HEAD))
            connection.execute("PRAGMA journal_mode = DELETE")


LEDGER = sound_ledger()


@contextmanager
def copy() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(LEDGER)
        yield path


def difference(path: Path) -> tuple[int, str] | None:
    """Return where and how the stored snapshots are not what the log gives, as `verify` finds it."""
    finding = verify(path).finding
    if finding is None:
        return None
    assert finding.kind is Kind.PROJECTIONS
    assert "snapshot" in finding.problem
    return finding.position, finding.problem


def changed(path: Path, statement: str, *values: object) -> int:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).rowcount


def test_snapshots_that_the_writer_made_are_what_the_log_gives() -> None:
    with copy() as path:
        assert difference(path) is None
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT count(*) FROM snapshots").fetchone() == (-(-HEAD // APART),)


@FEWER
@given(st.integers(2, HEAD - 1))
def test_so_are_those_that_archiving_left(before: int) -> None:
    with copy() as path:
        archive(path, str(before), path.with_name("archive.gz"), SIGN, START + timedelta(days=30))
        assert difference(path) is None


async def test_a_ledger_without_snapshots_has_nothing_to_compare(tmp_path: Path) -> None:
    await write_ledger(tmp_path / "ledger.db")
    assert rows_of(tmp_path / "ledger.db")
    assert difference(tmp_path / "ledger.db") is None


@FEWER
@given(st.data())
def test_a_changed_copy_is_found_at_its_position(data: st.DataObject) -> None:
    with copy() as path:
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute(
                "SELECT 'model_snapshots', rowid, position, body FROM model_snapshots"
                " UNION ALL SELECT 'job_snapshots', rowid, position, body FROM job_snapshots"
            ).fetchall()
        table, number, position, body = data.draw(st.sampled_from(rows))
        index = data.draw(st.integers(0, len(body) - 1))
        other = body[:index] + chr(ord(body[index]) ^ 1) + body[index + 1 :]
        changed(path, f"UPDATE {table} SET body = ? WHERE rowid = ?", other, number)
        found = difference(path)
        assert found is not None
        assert found[0] == position


@pytest.mark.parametrize(
    ("statement", "position"),
    [
        ("DELETE FROM model_snapshots WHERE model_id = 'digits' AND position = 26", 26),
        ("DELETE FROM model_snapshots WHERE position = 13", 13),
        ("DELETE FROM job_snapshots WHERE position = 39", 39),
        ("UPDATE model_snapshots SET position = 7 WHERE model_id = 'digits' AND position = 13", 7),
        ("UPDATE model_snapshots SET model_id = 'digits2' WHERE model_id = 'digits' AND position = 13", 13),
        ("INSERT INTO model_snapshots SELECT 'zoo', 26, body FROM model_snapshots LIMIT 1", 26),
        (
            "INSERT INTO model_snapshots SELECT model_id, 20, body FROM model_snapshots WHERE position = 39",
            20,
        ),
        (
            "INSERT INTO job_snapshots SELECT 13, 12, body FROM job_snapshots WHERE position = 39",
            13,
        ),
        ("INSERT INTO snapshots VALUES (1000)", 1000),
        ("UPDATE snapshots SET position = 14 WHERE position = 13", 14),
        ("INSERT INTO snapshots VALUES (-1)", -1),
        ("INSERT INTO model_snapshots SELECT 'zoo', -1, body FROM model_snapshots LIMIT 1", -1),
        ("INSERT INTO model_snapshots SELECT 'zoo', 0, body FROM model_snapshots LIMIT 1", 0),
        ("INSERT INTO model_snapshots SELECT 'digits', 13.5, body FROM model_snapshots LIMIT 1", 0),
        ("INSERT INTO model_snapshots SELECT 'digits', 'z', body FROM model_snapshots LIMIT 1", 0),
        ("INSERT INTO model_snapshots SELECT 'digits', x'00', body FROM model_snapshots LIMIT 1", 0),
        ("UPDATE model_snapshots SET model_id = CAST(model_id AS BLOB) WHERE position = 26", 26),
        ("UPDATE model_snapshots SET body = CAST(body AS BLOB) WHERE position = 26", 26),
        ("INSERT INTO job_snapshots SELECT -1, 1, body FROM job_snapshots LIMIT 1", -1),
        ("INSERT INTO job_snapshots SELECT 1000, 1, body FROM job_snapshots LIMIT 1", 1000),
        ("INSERT INTO job_snapshots SELECT 'z', 1, body FROM job_snapshots LIMIT 1", 0),
    ],
)
def test_copies_that_are_gone_moved_or_made_up_are_found(statement: str, position: int) -> None:
    with copy() as path:
        assert changed(path, statement) > 0
        found = difference(path)
        assert found is not None
        assert found[0] == position
        rebuild_file(path)
        assert difference(path) is None


def test_before_the_base_there_are_no_copies_and_making_them_anew_removes_them() -> None:
    with copy() as path:
        archive(path, "20", path.with_name("archive.gz"), SIGN, START + timedelta(days=30))
        assert changed(path, "INSERT INTO model_snapshots SELECT 'zoo', 5, body FROM model_snapshots LIMIT 1")
        found = difference(path)
        assert found is not None
        assert found[0] == 5
        rebuild_file(path)
        assert difference(path) is None


def test_a_snapshot_that_was_not_taken_is_missed_by_nobody() -> None:
    with copy() as path:
        assert changed(path, "DELETE FROM snapshots WHERE position = 26")
        assert difference(path) is None
