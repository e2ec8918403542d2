"""Damage and old copies: what `audit` says of a file that somebody, or a disk, changed behind our back."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import FEWER, PLAIN, START, child, opened, write
from support.ledgers import SIGN, rows_of, write_ledger
from support.soak import of_both

from events import rebuild
from events.archive import archive
from events.audit import Audit, audit
from events.errors import Archived, IncompleteCopy, LedgerProblem, LogUnavailable
from events.findings import Expected, parse_expected
from events.log import Log
from events.schema import connect
from events.verify import Kind

LATER = START + timedelta(days=30)
MANY = settings(PLAIN, max_examples=of_both(short=60, long=1_000))
ANSWERS = (
    "SELECT position, body, hash FROM events ORDER BY position",
    "SELECT position, type FROM events INDEXED BY events_by_type ORDER BY type, position",
    "SELECT position, model_id FROM events INDEXED BY events_by_model WHERE model_id > '' ORDER BY 2, 1",
    "SELECT position, job_id FROM events INDEXED BY events_by_job WHERE job_id IS NOT NULL ORDER BY 2, 1",
    "SELECT position, actor FROM events INDEXED BY events_by_actor ORDER BY actor, position",
    "SELECT position, recorded_at FROM events INDEXED BY events_by_time ORDER BY recorded_at, position",
    "SELECT created_position, id, body FROM jobs ORDER BY created_position",
    "SELECT id, body FROM models ORDER BY id",
    "SELECT position, hash FROM base",
)
"""What anybody may ask of a ledger, through each index."""


def sound_ledger() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_ledger(path))
        return path.read_bytes()


LEDGER = sound_ledger()


@contextmanager
def copy(data: bytes = LEDGER) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(data)
        yield path


def flipped(index: int, bits: int) -> bytes:
    return LEDGER[:index] + bytes([LEDGER[index] ^ bits]) + LEDGER[index + 1 :]


def answers(path: Path) -> list[list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(sql).fetchall() for sql in ANSWERS]


with copy() as _path:
    ROWS = rows_of(_path)
    SOUND = answers(_path)
HEAD = len(ROWS)


def audited(path: Path, position: int, digest: bytes) -> Audit:
    return audit(path, Expected(position, digest))


# Bytes.


def test_a_ledger_that_nobody_touched_has_nothing_wrong() -> None:
    with copy() as path:
        found = audit(path)
        assert found.finding is None
        assert found.damage is None
        assert (found.verification.position, found.verification.hash) == (HEAD, ROWS[-1][2])


@MANY
@given(st.integers(0, len(LEDGER) - 1), st.integers(1, 255))
def test_a_changed_byte_of_the_file_is_found_or_changes_no_answer(index: int, bits: int) -> None:
    with copy(flipped(index, bits)) as path:
        try:
            finding = audit(path).finding
        except LedgerProblem:
            return  # it is no ledger any more, and says so
        if finding is None:
            assert answers(path) == SOUND


@MANY
@given(st.integers(1, HEAD), st.integers(0, 31), st.integers(1, 255))
def test_a_changed_byte_of_a_hash_in_the_file_is_named_at_its_position(
    position: int, index: int, bits: int
) -> None:
    assert LEDGER.count(ROWS[position - 1][2]) == 1
    with copy(flipped(LEDGER.index(ROWS[position - 1][2]) + index, bits)) as path:
        finding = audit(path).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (position, Kind.HASH)


@MANY
@given(st.integers(1, HEAD), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_of_a_body_in_the_file_is_named_at_its_position(
    position: int, index: int, bits: int
) -> None:
    body = ROWS[position - 1][1].encode()
    assert LEDGER.count(body) == 1  # short enough not to be spread over pages
    with copy(flipped(LEDGER.index(body) + index % len(body), bits)) as path:
        finding = audit(path).finding
        assert finding is not None
        assert finding.position == position


def test_what_only_sqlite_can_see_is_told_in_its_words() -> None:
    with copy() as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_schema SET rootpage ="
                " (SELECT sum(rootpage) FROM sqlite_schema WHERE name IN (:one, :other)) - rootpage"
                " WHERE name IN (:one, :other)",
                {"one": "events_by_type", "other": "events_by_actor"},
            )
        found = audit(path)
        assert found.verification.verified
        assert found.damage is not None
        assert found.finding is not None
        assert found.finding.kind is Kind.DAMAGED


def test_an_event_recorded_before_the_one_before_it_is_found_though_the_chain_is_good() -> None:
    with copy() as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("DROP TRIGGER events_never_change")
            digest = bytes(32)
            for position, body, _ in ROWS:
                forged = body.replace("2026-01-01T", "2025-01-01T") if position == 5 else body
                digest = hashlib.sha256(digest + forged.encode()).digest()
                connection.execute(
                    "UPDATE events SET body = ?, hash = ? WHERE position = ?", (forged, digest, position)
                )
        finding = audit(path).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (5, Kind.ORDER)


# An expected head.


@pytest.mark.parametrize("position", [0, 1, HEAD // 2, HEAD])
def test_each_head_that_somebody_kept_is_found_again(position: int) -> None:
    digest = ROWS[position - 1][2] if position else bytes(32)
    with copy() as path:
        assert audited(path, position, digest).finding is None
        finding = audited(path, position, b"\1" * 32).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (position, Kind.EXPECTATION)


@FEWER
@given(st.integers(1, HEAD - 1))
def test_an_end_that_was_cut_off_with_care_is_found_by_who_kept_the_head(length: int) -> None:
    with copy() as path:
        with closing(connect(path)) as connection:
            (trigger,) = connection.execute(
                "SELECT sql FROM sqlite_schema WHERE name = 'events_never_go'"
            ).fetchone()
            connection.execute("DROP TRIGGER events_never_go")
            connection.execute("DELETE FROM events WHERE position > ?", (length,))
            connection.execute(trigger)
            rebuild.rebuild(connection)
        finding = audited(path, HEAD, ROWS[-1][2]).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (length + 1, Kind.EXPECTATION)
        assert audited(path, length, ROWS[length - 1][2]).finding is None  # who kept only this cannot know


def test_the_first_bad_position_goes_before_what_was_expected() -> None:
    with copy(flipped(LEDGER.index(ROWS[4][2]), 1)) as path:
        finding = audited(path, HEAD + 9, bytes(32)).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (5, Kind.HASH)


def test_a_position_before_the_base_cannot_be_judged_here() -> None:
    with copy() as path:
        archive(path, "4", path.with_name("archive.gz"), SIGN, LATER)
        assert audited(path, 3, ROWS[2][2]).finding is None
        assert audited(path, 3, ROWS[1][2]).finding is not None
        with pytest.raises(Archived, match="up to position 3"):
            audited(path, 2, ROWS[1][2])


@pytest.mark.parametrize("text", ["", "5", "5:", ":", "5:" + "0" * 63, "-1:" + "0" * 64, "5:" + "g" * 64])
def test_what_is_no_position_and_hash_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="POSITION:HASH"):
        parse_expected(text)


def test_a_position_and_hash_is_read() -> None:
    assert parse_expected("5:" + "aB" * 32) == Expected(5, b"\xab" * 32)


# Copies without the write-ahead log.


async def test_a_file_copied_from_a_running_server_without_its_wal_is_refused(tmp_path: Path) -> None:
    path, copied = tmp_path / "ledger.db", tmp_path / "copy.db"
    async with opened(path) as log:
        await log.server_started()
        early = log.head
        await write(log, 20)
        assert audit(path).verification.position == log.head.position
        copied.write_bytes(path.read_bytes())
        for _ in range(3):  # looking at it must not make it look complete
            with pytest.raises(IncompleteCopy, match="backup"):
                audit(copied)
        assert audited(copied, early.position, early.hash).finding is None
        finding = audited(copied, log.head.position, log.head.hash).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (early.position + 1, Kind.EXPECTATION)


async def test_a_file_is_never_older_than_the_start_of_the_server(tmp_path: Path) -> None:
    path, copied = tmp_path / "ledger.db", tmp_path / "copy.db"
    await write_ledger(path)
    async with opened(path) as log:
        await log.server_started()
        copied.write_bytes(path.read_bytes())
        assert rows_of(copied) == rows_of(path)
        assert path.with_name("ledger.db-wal").stat().st_size > 0
        assert audit(path).finding is None


async def when_whole(log: Log) -> None:
    """Wait until the log has brought its file up to date."""
    async with asyncio.timeout(30):
        while not log._whole:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def test_a_reader_in_the_way_holds_up_neither_the_start_nor_the_rule_for_ever(tmp_path: Path) -> None:
    path, copied = tmp_path / "ledger.db", tmp_path / "copy.db"
    await write_ledger(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("PRAGMA journal_mode = WAL")  # as a server leaves it that was killed
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        async with opened(path) as log:
            await log.server_started()
            await write(log, 2)
            assert log.head.position == HEAD + 3
            reader.execute("ROLLBACK")
            await when_whole(log)
            copied.write_bytes(path.read_bytes())
            with pytest.raises(IncompleteCopy):
                audit(copied)


async def test_a_file_of_a_server_that_stopped_in_order_is_complete_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await write_ledger(path)
    assert not path.with_name("ledger.db-wal").exists()
    assert audit(path).finding is None
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_start_that_fails_after_a_server_was_killed_leaves_a_file_that_can_be_verified(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    process = await asyncio.create_subprocess_exec(*child(DIE, path, 3))
    assert await process.wait() == -9
    async with opened(path) as log:
        assert log.head.type != "ServerStopped"  # nothing is written, as where the key cannot be read
    assert not path.with_name("ledger.db-wal").exists()
    assert audit(path).finding is None


async def test_a_reader_in_the_way_of_an_orderly_stop_leaves_the_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path) as log:
        await write(log, 2)
        reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
    with closing(reader):
        assert audit(path).finding is None
    assert audit(path).finding is None


DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from support.events import opened, write
async def main():
    async with opened(Path(sys.argv[1])) as log:
        await log.server_started()
        await write(log, int(sys.argv[2]))
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.parametrize("events", [0, 7])
async def test_a_file_of_a_server_that_was_killed_is_complete_with_its_wal(
    tmp_path: Path, events: int
) -> None:
    path = tmp_path / "ledger.db"
    process = await asyncio.create_subprocess_exec(*child(DIE, path, events))
    assert await process.wait() == -9
    for _ in range(2):
        found = audit(path)
        assert found.finding is None
        assert found.verification.position == events + 1


def test_a_file_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable):
        audit(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


# A file that nobody may write.

READ_ONLY = """
import asyncio, ctypes, logging, sys
from pathlib import Path
from events.errors import LogUnavailable
from events.verify import verify
from support.events import facts, opened, write
logging.disable()
async def main(folder):
    path = folder / "ledger.db"
    async with opened(path) as log:
        await write(log, 3)
        folder.chmod(0o500)
        path.chmod(0o400)
        log._database._connection.close()  # whatever makes the writer open the file anew
        for command in facts(2, first=4):
            try:
                await log.submit(command)
            except LogUnavailable:
                assert log.head.position == 3
            else:
                raise SystemExit("written, though nobody may")
        folder.chmod(0o700)
        path.chmod(0o600)
        async with asyncio.timeout(30):  # nobody writes: the log tries by itself
            while not log.healthy:
                await asyncio.sleep(0.01)
        assert [receipt.position for receipt in await write(log, 2, first=4)] == [4, 5]
    assert verify(path).verified
class Capabilities(ctypes.Structure):  # capget(2), version 3
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]
def obey_modes():
    # root writes whatever it likes by CAP_DAC_OVERRIDE
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (Capabilities * 2)()
    assert libc.capget(header, capabilities) == 0
    capabilities[0].effective &= ~2
    assert libc.capset(header, capabilities) == 0
obey_modes()
asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_file_that_became_read_only_fails_requests_and_recovers(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *child(READ_ONLY, tmp_path), stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert (process.returncode, stderr.decode()) == (0, "")
