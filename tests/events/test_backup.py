"""Backups: one file, complete and verified, made beside a log that goes on; or none at all."""

import asyncio
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from support.events import opened, write
from support.ledgers import rows_of, write_ledger

from events.audit import audit
from events.backup import back_up
from events.errors import ForeignDatabase, IncompleteCopy, LedgerDamaged, LogUnavailable


def names_in(folder: Path) -> list[str]:
    """Return what is there, but for what SQLite leaves beside a ledger that was read."""
    return sorted(each.name for each in folder.iterdir() if not each.name.endswith(("-wal", "-shm")))


async def test_a_backup_beside_a_running_log_has_all_that_was_acknowledged(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "backup.db"
    async with opened(path) as log:
        await log.server_started()
        for number in range(5):
            await write(log, 10, first=10 * number)
            writing = asyncio.create_task(write(log, 20, first=1_000 + 20 * number))
            before = log.head.position
            found = await asyncio.to_thread(back_up, path, target)
            await writing
            assert found.finding is None
            assert before <= found.verification.position <= log.head.position
            assert rows_of(target) == rows_of(path)[: found.verification.position]


async def test_a_backup_is_one_file_that_is_complete_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    path, target = tmp_path / "ledger.db", folder / "backup.db"
    async with opened(path) as log:
        await log.server_started()
        back_up(path, target)
    assert names_in(folder) == ["backup.db"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with closing(sqlite3.connect(target)) as copy:
        assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert audit(target).finding is None  # though its last event is no ServerStopped
    async with opened(target) as log:
        assert log.head.type == "ServerStarted"


async def test_an_earlier_backup_is_replaced_at_once_or_stays(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "backup.db"
    await write_ledger(path)
    back_up(path, target)
    good = target.read_bytes()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET hash = zeroblob(32) WHERE position = 3")
    with pytest.raises(LedgerDamaged, match="position 3"):
        back_up(path, target)
    assert target.read_bytes() == good
    assert names_in(tmp_path) == ["backup.db", "ledger.db"]


async def test_a_copy_that_may_lack_events_is_not_made_to_look_complete(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    async with opened(path) as log:
        await log.server_started()
        await write(log, 3)
        copy.write_bytes(path.read_bytes())
    for _ in range(2):  # the first look makes an empty write-ahead log
        with pytest.raises(IncompleteCopy):
            back_up(copy, tmp_path / "backup.db")
    assert not (tmp_path / "backup.db").exists()


async def test_a_backup_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(LogUnavailable):
        back_up(path, tmp_path / "backup.db")
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.commit()
    with pytest.raises(ForeignDatabase):
        back_up(path, tmp_path / "backup.db")
    with pytest.raises(OSError, match="nowhere"):
        back_up(path, tmp_path / "nowhere" / "backup.db")
    assert names_in(tmp_path) == ["ledger.db"]
