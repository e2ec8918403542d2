"""Backups: one file, complete and verified, made beside a running log, or none at all."""

import asyncio
import fcntl
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from support.history import opened, write
from support.ledgers import change_ledger, rows_of, write_ledger

from events.audit.audit import audit
from events.audit.backup import back_up
from events.errors import ForeignDatabase, LedgerDamaged, LogUnavailable
from events.files import open_temporary


def names_in(folder: Path) -> list[str]:
    """Return what is there, but for what SQLite leaves beside a ledger that was read."""
    return sorted(each.name for each in folder.iterdir() if not each.name.endswith(("-wal", "-shm")))


async def test_backup_beside_a_running_log_is_one_complete_file(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "backups" / "backup.db"
    target.parent.mkdir()
    async with opened(path) as log:
        await log.server_started()
        found = back_up(path, target)
        for number in range(2):
            await write(log, 10, first=10 * number)
            writing = asyncio.create_task(write(log, 20, first=1_000 + 20 * number))
            before = log.head.position
            found = await asyncio.to_thread(back_up, path, target)
            await writing
            assert found.finding is None
            assert before <= found.verification.position <= log.head.position
            assert rows_of(target) == rows_of(path)[: found.verification.position]
    assert names_in(target.parent) == ["backup.db"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with closing(sqlite3.connect(target)) as copy:
        assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert audit(target).finding is None  # though its last event is no ServerStopped
    async with opened(target) as log:
        assert log.head.position == found.verification.position


async def test_damaged_ledger_leaves_the_earlier_backup(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "backup.db"
    await write_ledger(path)
    back_up(path, target)
    good = target.read_bytes()
    change_ledger(path, "UPDATE events SET hash = zeroblob(32) WHERE position = 3")
    with pytest.raises(LedgerDamaged, match="position 3"):
        back_up(path, target)
    assert target.read_bytes() == good
    assert names_in(tmp_path) == ["backup.db", "ledger.db"]


def test_failed_backup_leaves_nothing(tmp_path: Path) -> None:
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


def test_temporary_file_removed_before_its_lock_is_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, list[Path]()

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:  # as another process that takes it for a stale one
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with open_temporary(tmp_path / "file") as temporary:
        assert temporary not in removed
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []
