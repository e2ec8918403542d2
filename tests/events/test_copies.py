"""A copy that lacks its write-ahead log goes on looking like one, whatever is tried on it."""

import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from support.events import child, opened, write
from support.ledgers import SIGN, write_ledger

from events.archive import archive
from events.audit import audit
from events.backup import back_up
from events.clock import utc_now
from events.copies import lacks_wal, wants_wal
from events.errors import IncompleteCopy, LogUnavailable
from events.export import export, jsonl
from events.rebuild import FOLDS, rebuild_file


@pytest.fixture
async def copied(tmp_path: Path) -> Path:
    """A ledger's file, copied from under a running server without its write-ahead log."""
    path, copied = tmp_path / "running.db", tmp_path / "ledger.db"
    async with opened(path) as log:
        await log.server_started()
        await write(log, 20)
        copied.write_bytes(path.read_bytes())
        await log.server_stopped()
    path.unlink()
    return copied


def refused(path: Path) -> bool:
    with pytest.raises(IncompleteCopy):
        audit(path)
    return wants_wal(path)


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


async def test_a_start_that_fails_leaves_it_refused(copied: Path) -> None:
    change(copied, "UPDATE projected SET folds = 0")
    change(copied, "UPDATE models SET body = 'no JSON'")
    change(copied, "DROP TRIGGER events_never_change")
    change(copied, 'UPDATE events SET body = \'{"position":1,"type":"","actor":"","recorded_at":""}\'')
    with pytest.raises(LogUnavailable):
        async with opened(copied):
            pass
    assert wants_wal(copied)


async def test_a_start_that_fails_before_it_is_recorded_leaves_it_refused(copied: Path) -> None:
    for _ in range(2):
        async with opened(copied) as log:  # as where the key cannot be read
            assert log.head.position == 1
        assert refused(copied)


async def test_a_start_that_makes_the_projections_anew_and_then_fails_leaves_it_refused(copied: Path) -> None:
    change(copied, f"UPDATE projected SET folds = {FOLDS + 1}")
    async with opened(copied):
        pass
    assert refused(copied)


def test_projections_made_anew_leave_it_refused(copied: Path) -> None:
    for _ in range(2):
        rebuild_file(copied)
        assert refused(copied)


def test_nothing_is_made_of_it(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(IncompleteCopy):
        archive(copied, "1", target, SIGN, utc_now())
    with pytest.raises(IncompleteCopy):
        back_up(copied, target)
    with pytest.raises(IncompleteCopy):
        list(export(copied, jsonl(), SIGN))
    assert refused(copied)
    assert not target.exists()


async def test_a_server_that_starts_and_stops_on_it_makes_it_complete(copied: Path) -> None:
    async with opened(copied) as log:
        await log.server_started()
        await log.server_stopped()
    assert audit(copied).finding is None
    assert not wants_wal(copied)


async def test_a_server_that_does_not_record_its_stop_does_not(copied: Path) -> None:
    async with opened(copied) as log:
        await log.server_started()
    assert refused(copied)


def test_a_file_whose_write_ahead_log_is_there_is_left_complete(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    killed = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from support.events import opened, write\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1])) as log:\n"
        "        await log.server_started()\n"
        "        await write(log, 3)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    assert subprocess.run(child(killed, path), check=False, timeout=60).returncode == -signal.SIGKILL
    assert wants_wal(path)
    assert not lacks_wal(path)
    rebuild_file(path)
    assert audit(path).finding is None
    assert not wants_wal(path)


async def test_a_ledger_that_ended_in_order_lacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await write_ledger(path)
    change(path, "PRAGMA journal_mode = WAL")
    assert lacks_wal(path)
    rebuild_file(path)
    assert not wants_wal(path)
    with pytest.raises(LogUnavailable):
        rebuild_file(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()
