"""A process killed at any call of SQLite: the next reader or server finds a ledger that verifies."""

import asyncio
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support import ledgers
from support.crashes import run_counted
from support.history import MODEL, opened
from support.modes import obey_modes

from events.audit.audit import audit
from events.clock import uuid7
from events.commands import Record
from events.errors import IncompleteCopy, LogUnavailable
from events.sqlite.readonly import wants_wal
from events.sqlite.storage import Database
from events.types import SYSTEM, Draft, LoadStarted

LEDGER = ledgers.sound_ledger(1)


def serve(path: Path) -> None:
    async def write_and_stop() -> None:
        async with opened(path) as log:
            await log.server_started()
            await log.submit(Record((Draft(uuid7(), LoadStarted(1), SYSTEM, "job", MODEL, 1),)))
            await log.server_stopped()

    asyncio.run(write_and_stop())


def use_replica(path: Path) -> None:
    async def write_note() -> None:
        database = Database(path, is_replica=True)
        await database.open()
        await database.note_last_use({}, "2026-11-23T12:00:00.000000Z")
        await database.close()

    asyncio.run(write_note())


def read(path: Path) -> None:
    with suppress(IncompleteCopy):  # it died while the write-ahead log was empty: a server has to start first
        assert audit(path).finding is None


def kill_at_each_call(work: Callable[[Path], None], ledger: bytes) -> Iterator[Path]:
    """Have a process die before each call in turn; yield the ledger that it left."""
    with ledgers.copy_of(ledger) as path:
        calls = run_counted(lambda: work(path))
    for call in range(1, calls + 1):
        with ledgers.copy_of(ledger) as path:
            assert ledgers.run_forked(partial(run_counted, partial(work, path), call)) == -signal.SIGKILL
            yield path


def names_beside(path: Path) -> tuple[str, ...]:
    return tuple(sorted(each.name.removeprefix(path.name) for each in path.parent.glob(f"{path.name}-*")))


def test_server_killed_at_any_call_leaves_a_ledger_that_opens(tmp_path: Path) -> None:
    left = set[tuple[str, ...]]()
    for path in kill_at_each_call(serve, LEDGER):
        left.add(names_beside(path))
        unread = shutil.copytree(path.parent, tmp_path / "unread", dirs_exist_ok=True) / path.name
        serve(unread)
        read(path)
        serve(path)
        for each in (unread, path):
            assert audit(each).finding is None
            assert not names_beside(each)
    assert left == {(), ("-journal",), ("-wal",), ("-shm", "-wal")}


def test_replica_killed_at_any_call_is_complete_after_the_next_stop(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    asyncio.run(ledgers.write_ledger(path, stopped=False))
    for killed in kill_at_each_call(use_replica, path.read_bytes()):
        use_replica(killed)
        assert audit(killed).finding is None
        assert not names_beside(killed)


@pytest.fixture
def ledger_with_journal(tmp_path: Path) -> Path:
    """A ledger as a process left it that died while it wrote with a rollback journal."""
    for killed in kill_at_each_call(serve, LEDGER):
        if wants_wal(killed) and names_beside(killed) == ("-journal",):
            return shutil.copytree(killed.parent, tmp_path / "data") / killed.name
    pytest.fail("no process left a rollback journal")


def read_without_rights(path: Path) -> None:
    obey_modes()
    with pytest.raises(LogUnavailable, match=r"ledger\.db-journal undoes that, which takes write access"):
        audit(path)


def test_ledger_that_may_not_be_completed_says_so(ledger_with_journal: Path) -> None:
    before = ledger_with_journal.read_bytes()
    ledger_with_journal.chmod(0o400)
    ledger_with_journal.parent.chmod(0o500)
    assert ledgers.run_forked(lambda: read_without_rights(ledger_with_journal)) == 0
    ledger_with_journal.parent.chmod(0o700)
    ledger_with_journal.chmod(0o600)
    assert ledger_with_journal.read_bytes() == before
    assert audit(ledger_with_journal).finding is None
