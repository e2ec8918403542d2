"""The ledger's file and its write-ahead log: complete after every end; a copy without the log is refused."""

import asyncio
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from support.crashes import run_counted
from support.fleet import of_both
from support.history import MODEL, facts, opened, write
from support.ledgers import (
    SIGN,
    change_ledger,
    copy_of,
    database_of,
    lose_connection,
    place_of,
    rows_of,
    run_forked,
    sound_ledger,
    write_and_be_killed,
    write_ledger,
)
from support.modes import obey_modes

from events.audit.audit import audit
from events.audit.backup import back_up
from events.audit.export import JSONL, export
from events.audit.verify import FindingKind, verify
from events.clock import uuid7
from events.commands import Record
from events.errors import IncompleteCopy, LogUnavailable
from events.sqlite.listing import open_reader
from events.sqlite.readonly import lacks_wal, open_past, wants_wal
from events.sqlite.schema import WAL_LIMIT_BYTES
from events.sqlite.storage import FOLDS, Database, rebuild_file
from events.storage import StorageError
from events.types import SYSTEM, Anchor, Draft, LoadFailed, LoadStarted


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
    with pytest.raises(IncompleteCopy, match="backup"):
        audit(path)
    return wants_wal(path)


async def test_write_ahead_log_is_cut_after_a_long_read(path: Path) -> None:
    wal = path.with_name("ledger.db-wal")
    async with opened(path) as log:
        await write(log, 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM events").fetchone()
            for group in range(20):
                drafts = (
                    Draft(f"{group} {each}", LoadFailed("x", "x" * 4096), SYSTEM) for each in range(500)
                )
                await log.submit(Record(tuple(drafts)))
            assert wal.stat().st_size > WAL_LIMIT_BYTES
        await write(log, 2, first=2)  # the first copies the log into the database, the second begins it anew
        assert wal.stat().st_size <= WAL_LIMIT_BYTES


# A file that is complete.


async def test_file_of_an_orderly_stop_is_complete(path: Path) -> None:
    await write_ledger(path)
    assert not path.with_name("ledger.db-wal").exists()
    assert not wants_wal(path)
    assert audit(path).finding is None
    change_ledger(path, "PRAGMA journal_mode = WAL", keeps_triggers=True)
    assert lacks_wal(path)
    assert audit(path).finding is None  # its last event says that nothing is missing
    rebuild_file(path)
    assert not wants_wal(path)
    with pytest.raises(LogUnavailable):
        rebuild_file(path.with_name("none.db"))
    assert not path.with_name("none.db").exists()


@pytest.mark.parametrize("events", [0, 7])
async def test_file_of_a_killed_server_is_complete_with_its_wal(path: Path, events: int) -> None:
    write_and_be_killed(path, events)
    for _ in range(2):
        found = audit(path)
        assert found.finding is None
        assert found.verification.position == events + 1
    assert wants_wal(path)
    assert not lacks_wal(path)
    if events:
        rebuild_file(path)
    else:
        async with opened(path) as log:
            assert log.head.type != "ServerStopped"  # nothing is written, as where the key cannot be read
    assert not wants_wal(path)
    assert not path.with_name("ledger.db-wal").exists()
    assert audit(path).finding is None


async def test_kept_error_of_a_read_holds_up_no_checkpoint(path: Path) -> None:
    fails_amid = "SELECT json(iif(position < 5, body, 'no JSON')) FROM events"
    async with opened(path) as log, open_reader(path) as reader, open_past(path) as past:
        await write(log, 20)
        with pytest.raises(LogUnavailable, match="malformed JSON") as kept:
            await reader._select(fails_amid, ())
        with pytest.raises(StorageError, match="malformed JSON") as kept_too:
            await database_of(log)._run(fails_amid)
        with pytest.raises(LogUnavailable, match="malformed JSON") as kept_as_well:
            await past.run(lambda connection: connection.execute(fails_amid).fetchall())
        await write(log, 1, first=21)
        assert await database_of(log).checkpoint(), (kept, kept_too, kept_as_well)


async def test_reader_holds_up_neither_start_nor_checkpoint_for_ever(path: Path) -> None:
    copied = path.with_name("copy.db")
    await write_ledger(path)
    head = len(rows_of(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("PRAGMA journal_mode = WAL")  # as a server leaves it that was killed
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        async with opened(path) as log:
            await log.server_started()
            await write(log, 2)
            assert log.head.position == head + 3
            reader.execute("ROLLBACK")
            async with asyncio.timeout(30):
                while not log._is_complete:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.01)
            copied.write_bytes(path.read_bytes())  # noqa: ASYNC240 - nothing else runs
            assert refused(copied)


async def test_reader_during_an_orderly_stop_leaves_the_wal(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 2)
        reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
    with closing(reader):
        assert audit(path).finding is None
    assert audit(path).finding is None


async def test_open_after_disk_error_waits_for_a_reader_and_syncs_the_wal(path: Path) -> None:
    error = StorageError("disk I/O error", is_disk_error=True)
    database = Database(path)
    await database.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM events").fetchall()
        await database.probe()
        await database.close_after_error(error)
        assert not database.is_open
        opening = asyncio.create_task(database.open())
        done, _ = await asyncio.wait([opening], timeout=0.3)
        assert not done
        reader.execute("ROLLBACK")
        await opening
        assert path.with_name("ledger.db-wal").stat().st_size == 0  # all of it is in the file
    await database.close()


# A copy without the write-ahead log.


async def test_copy_beside_server_is_refused_unless_a_head_is_expected(path: Path) -> None:
    copied = path.with_name("copy.db")
    await write_ledger(path)
    async with opened(path) as log:
        await log.server_started()
        copied.write_bytes(path.read_bytes())  # noqa: ASYNC240 - nothing else runs
        assert rows_of(copied) == rows_of(path)  # a start brings the file up to date
        early = log.head
        await write(log, 20)
        assert audit(path).verification.position == log.head.position
        copied.write_bytes(path.read_bytes())  # noqa: ASYNC240 - nothing else runs
        for _ in range(3):  # looking at it must not make it look complete
            assert refused(copied)
        assert audit(copied, Anchor(early.position, early.hash)).finding is None
        late = audit(copied, Anchor(log.head.position, log.head.hash))
        assert place_of(late.finding) == (early.position + 1, FindingKind.EXPECTATION)


def test_nothing_is_made_of_a_copy_without_wal(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(IncompleteCopy):
        back_up(copied, target)
    with pytest.raises(IncompleteCopy, match=r"ledger\.db-wal"):
        list(export(copied, JSONL, SIGN))
    for _ in range(2):
        rebuild_file(copied)
        assert refused(copied)
    assert not target.exists()


async def test_only_orderly_start_and_stop_complete_the_copy(copied: Path, tmp_path: Path) -> None:
    for _ in range(2):
        async with opened(copied) as log:  # as where the key cannot be read
            assert log.head.position == 1
        assert refused(copied)
    change_ledger(copied, f"UPDATE projected SET folds = {FOLDS + 1}", keeps_triggers=True)
    async with opened(copied):
        pass
    assert refused(copied)
    async with opened(copied) as log:
        await log.server_started()  # and its stop is not recorded
    assert refused(copied)
    completed = tmp_path / "completed.db"
    completed.write_bytes(copied.read_bytes())  # noqa: ASYNC240 - nothing else runs
    async with opened(completed) as log:
        await log.server_started()
        await log.server_stopped()
    assert audit(completed).finding is None
    assert not wants_wal(completed)
    change_ledger(
        copied,
        "UPDATE projected SET folds = 0",
        "UPDATE models SET body = 'no JSON'",
        'UPDATE events SET body = \'{"position":1,"type":"","actor":"","recorded_at":""}\'',
    )
    with pytest.raises(LogUnavailable):
        async with opened(copied):
            pass
    assert wants_wal(copied)


# A file that nobody may write.


async def write_read_only_file(folder: Path) -> None:
    path = folder / "ledger.db"
    async with opened(path) as log:
        await write(log, 3)
        folder.chmod(0o500)  # noqa: ASYNC240 - nothing else runs
        path.chmod(0o400)
        await lose_connection(log)  # whatever makes the writer open the file anew
        for command in facts(2, first=4):
            with pytest.raises(LogUnavailable):
                await log.submit(command)
            assert log.head.position == 3
        folder.chmod(0o700)  # noqa: ASYNC240 - nothing else runs
        path.chmod(0o600)
        async with asyncio.timeout(30):
            while not log.healthy:  # noqa: ASYNC110 - the log tries by itself, and tells nobody
                await asyncio.sleep(0.01)
        assert [receipt.position for receipt in await write(log, 2, first=4)] == [4, 5]
    assert verify(path).verified


def test_read_only_file_fails_requests_until_it_is_writable(tmp_path: Path) -> None:
    def work() -> None:
        obey_modes()
        asyncio.run(write_read_only_file(tmp_path))

    assert run_forked(work) == 0


# A process that is killed at any call of SQLite.

LEDGER = sound_ledger(1)
SWITCH_CALLS = 16
"""The first and the last ones, which open and close the write-ahead log: a process dies before each."""
STRIDE = of_both(short=5, long=1)
"""Of how many of the others it dies before one."""


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
    """Have a process die before each call in turn, or most; yield the ledger that it left."""
    with copy_of(ledger) as path:
        calls = run_counted(lambda: work(path))
    for call in range(1, calls + 1):
        if call % STRIDE and SWITCH_CALLS < call <= calls - SWITCH_CALLS:
            continue
        with copy_of(ledger) as path:
            assert run_forked(partial(run_counted, partial(work, path), call)) == -signal.SIGKILL
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
    asyncio.run(write_ledger(path, stopped=False))
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
    assert run_forked(lambda: read_without_rights(ledger_with_journal)) == 0
    ledger_with_journal.parent.chmod(0o700)
    ledger_with_journal.chmod(0o600)
    assert ledger_with_journal.read_bytes() == before
    assert audit(ledger_with_journal).finding is None
