"""Snapshots are written right after their events, not too often, and only what has changed."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.history import History, facts, opened
from support.ledgers import append_events, copy_of, database_of, overwrite_pages

from events.audit.verify import verify
from events.sqlite import snapshots
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS

EVERY = 200


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A ledger that gets a snapshot every 200 events instead of 4,000."""
    monkeypatch.setattr(snapshots, "EVERY", EVERY)
    with copy_of(b"") as path:
        yield path


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def positions(path: Path) -> list[object]:
    return [position for (position,) in rows(path, "SELECT position FROM snapshots ORDER BY position")]


async def append(path: Path, history: History) -> None:
    async with opened(path) as log:
        await append_events(log, history.facts[log.head.position :])


async def test_snapshot_is_written_with_the_event_that_makes_it_due(path: Path) -> None:
    async with opened(path) as log:
        await asyncio.gather(*map(log.submit, facts(EVERY - 1)))
        assert positions(path) == []
        await asyncio.gather(*map(log.submit, facts(2, first=EVERY)))
        assert positions(path) == [EVERY + 1]  # with its group
    async with opened(path) as log:
        await asyncio.gather(*map(log.submit, facts(EVERY - 1, first=EVERY + 2)))
        assert positions(path) == [EVERY + 1]  # opening the log changes nothing
        await asyncio.gather(*map(log.submit, facts(1)))
        assert positions(path) == [EVERY + 1, 2 * EVERY + 1]
    assert verify(path).verified
    with closing(connect(path)) as connection:
        connection.execute("UPDATE projected SET folds = ?", (FOLDS + 1,))
        connection.execute("UPDATE snapshots SET position = 7 WHERE position = ?", (EVERY + 1,))
    async with opened(path):  # other folds: they are made anew
        assert positions(path) == [2 * EVERY + 1]


async def test_many_models_and_jobs_put_a_snapshot_off(path: Path) -> None:
    history, many = History(), EVERY + 20
    for number in range(many):
        history.ask_load(f"L{number}", of=f"m{number}")
    await append(path, history)
    assert positions(path) == []  # as many models, and as many jobs
    for number in range(many):
        history.fail_load(f"L{number}", of=f"m{number}")
    await append(path, history)
    assert positions(path) == [many * 2 - 1]  # one of the jobs had ended when it was asked


async def test_snapshot_writes_only_models_that_changed(path: Path) -> None:
    history = History()
    history.load("L")
    history.load("O", of="other")
    await append(path, history)
    with closing(connect(path)) as connection:
        snapshots.write(connection, 6)
    history.ask_unload("U", "O", of="other")
    await append(path, history)
    with closing(connect(path)) as connection:
        snapshots.write(connection, 7)
    assert rows(path, "SELECT model_id, position FROM model_snapshots ORDER BY position, model_id") == [
        ("digits", 6), ("other", 6), ("other", 7),
    ]  # fmt: skip
    assert rows(path, "SELECT position, created_position FROM job_snapshots") == [(7, 7)]
    with closing(connect(path)) as connection:
        assert [len(list(snapshots.models_of(connection, at))) for at in (5, 6, 7)] == [0, 2, 2]
        assert [snapshots.latest(connection, at) for at in (5, 6, 7)] == [None, 6, 7]


@pytest.mark.parametrize("table", ["snapshots", "model_snapshots", "job_snapshots"])
async def test_failed_snapshot_holds_up_no_event_and_is_logged_once(
    path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    history = History()
    history.load("L")
    history.ask_load("L2", version=2)
    await append(path, history)
    overwrite_pages(path, table)
    async with opened(path) as log:
        await asyncio.gather(*map(log.submit, facts(EVERY)))
        assert log.head.position == EVERY + 4
        await asyncio.gather(*map(log.submit, facts(10, first=EVERY + 1)))
        assert len([record for record in caplog.records if "no snapshot" in record.message]) == 1
        await asyncio.gather(*map(log.submit, facts(EVERY, first=EVERY + 11)))
        assert len([record for record in caplog.records if "no snapshot" in record.message]) == 2
        await database_of(log).close_after_error()
        await asyncio.gather(*map(log.submit, facts(1, first=2 * EVERY + 11)))  # a new connection tries again
        assert len([record for record in caplog.records if "no snapshot" in record.message]) == 3
    assert rows(path, "SELECT max(position) FROM events") == [(2 * EVERY + 15,)]
    if table != "snapshots":
        assert positions(path) == []  # it is whole, or not there
