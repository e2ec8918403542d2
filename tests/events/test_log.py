"""The log on a real SQLite file: durable, gapless, one chain, and what becomes of it when writing fails."""

import asyncio
import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from support.events import MODEL, START, child, facts, ids, opened, write

import migrations
from events.bodies import from_body
from events.clock import stamp
from events.commands import Record, RequestLoad, RequestUnload
from events.errors import (
    ForeignDatabase,
    FutureSchema,
    LedgerProblem,
    LogClosed,
    LogUnavailable,
    NotEncodable,
    RequestRefused,
)
from events.log import MAX_GROUP, Log, Receipt
from events.schema import APPLICATION_ID
from events.types import SYSTEM, Draft, LoadFailed, LoadStarted, ServerStarted, ServerStopped
from events.verify import verify

LIMIT_S = 60
"""For what cannot take long: only against hanging."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    """Read through a connection of its own."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def bodies(path: Path) -> list[str]:
    return [str(body) for (body,) in query(path, "SELECT body FROM events ORDER BY position")]


def commits(path: Path) -> int:
    """Count the transactions in the WAL: the frames that carry the size of the database after them."""
    wal = path.with_name(f"{path.name}-wal").read_bytes()
    page_size = int.from_bytes(wal[8:12], "big")
    salt = wal[16:24]
    frames = range(32, len(wal), 24 + page_size)
    return sum(wal[at + 4 : at + 8] != bytes(4) and wal[at + 8 : at + 16] == salt for at in frames)


def content(path: Path) -> bytes:
    return path.read_bytes()


def make(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def fact(name: str, message: str = "") -> Record:
    return Record((Draft(name, LoadFailed("x", message), SYSTEM, "job", MODEL, 1),))


def load(model_id: str = MODEL) -> RequestLoad:
    return RequestLoad(model_id, 1, (), "alice")


# Appending.


async def test_what_was_answered_is_read_by_another_connection(path: Path) -> None:
    async with opened(path) as log:
        for number in range(1, 6):
            receipt = await log.submit(fact(f"f{number}"))
            assert receipt.position == number
            assert query(path, "SELECT max(position) FROM events") == [(number,)]
            assert query(path, "SELECT position FROM projected") == [(number,)]


async def test_the_file_is_written_ahead_and_synced_at_each_commit(path: Path) -> None:
    async with opened(path) as log:
        assert log._database._connection is not None
        assert log._database._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert log._database._connection.execute("PRAGMA synchronous").fetchone() == (2,)


SUBMIT_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from support.events import facts, opened
async def main():
    async with opened(Path(sys.argv[1])) as log:
        async def client(first):
            for command in facts(10**6, first=first):
                receipt = await log.submit(command)
                print(receipt.position, flush=True)
        await asyncio.gather(*(client(number * 10**6) for number in range(8)))
asyncio.run(main())
"""


def test_nothing_that_was_acknowledged_is_lost_when_the_process_is_killed(path: Path) -> None:
    with subprocess.Popen(child(SUBMIT_FOR_EVER, path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(100)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [
            int(line) for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n"
        ]
    assert query(path, "SELECT count(*) FROM events")[0][0] >= max(acknowledged)  # type: ignore[operator]
    assert verify(path).verified


async def test_concurrent_submits_are_one_gapless_chain(path: Path) -> None:
    async with opened(path) as log:
        receipts = await asyncio.gather(*map(log.submit, facts(1_500)))
        assert sorted(receipt.position for receipt in receipts) == list(range(1, 1_501))
        head = log.head
    previous = bytes(32)
    for position, body, digest in query(path, "SELECT position, body, hash FROM events ORDER BY position"):
        assert json.loads(str(body))["position"] == position
        previous = hashlib.sha256(previous + str(body).encode()).digest()
        assert digest == previous
    assert (head.position, head.hash) == (1_500, previous)


async def test_what_waits_together_is_one_transaction(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
        before = commits(path)
        await asyncio.gather(*map(log.submit, facts(64, first=4)))
        assert commits(path) - before <= 2
        before = commits(path)
        await write(log, 5, first=100)
        assert commits(path) - before == 5


async def test_a_group_has_a_limit(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        before = commits(path)
        await asyncio.gather(*map(log.submit, facts(MAX_GROUP + 1, first=2)))
        assert commits(path) - before >= 2


async def test_facts_of_one_command_are_in_order_and_in_one_transaction(path: Path) -> None:
    drafts = tuple(Draft(f"d{number}", LoadStarted(number), SYSTEM) for number in range(1, 101))
    async with opened(path) as log:
        await write(log, 1)
        before = commits(path)
        assert await log.submit(Record(drafts)) == Receipt(None, existing=False, position=101)
        assert commits(path) - before == 1
    assert [from_body(body).id for body in bodies(path)[1:]] == [draft.id for draft in drafts]


async def test_an_event_that_cannot_be_encoded_fails_its_own_caller_alone(path: Path) -> None:
    bad = Record((Draft("ok", LoadStarted(1), SYSTEM), Draft("bad", LoadFailed("x", "\ud800"), SYSTEM)))
    async with opened(path) as log:
        results = await asyncio.gather(
            log.submit(fact("a")), log.submit(bad), log.submit(fact("b")), return_exceptions=True
        )
        assert isinstance(results[1], NotEncodable)
        assert [from_body(body).id for body in bodies(path)] == ["a", "b"]
    assert verify(path).verified


async def test_recorded_at_never_goes_back_though_the_clock_does(path: Path) -> None:
    moments = [START + timedelta(seconds=seconds) for seconds in (5, 5, 3, 9, 1, 9)]
    async with opened(path, now=iter(moments).__next__, monotonic=float) as log:
        await write(log, 5)
    async with opened(path, now=lambda: START, monotonic=float) as log:
        await write(log, 1, first=6)
    assert [from_body(body).recorded_at for body in bodies(path)] == [
        stamp(START + timedelta(seconds=seconds)) for seconds in (5, 5, 9, 9, 9, 9)
    ]


async def test_a_log_goes_on_where_it_ended(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
        head = log.head
    async with opened(path) as log:
        assert log.head == head
        assert [receipt.position for receipt in await write(log, 2, first=4)] == [4, 5]
    assert verify(path).verified


# Deciding.


async def test_two_handlers_at_once_make_one_job(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        receipts = await asyncio.gather(*(log.submit(load()) for _ in range(20)))
        assert {receipt.job_id for receipt in receipts} == {"j1"}
        assert sorted(receipt.existing for receipt in receipts) == [False] + [True] * 19
        assert len(bodies(path)) == 1


async def test_what_changes_nothing_appends_nothing(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        assert await log.submit(load()) == Receipt("j1", existing=False, position=1)
        assert await log.submit(load()) == Receipt("j1", existing=True, position=1)
        assert log.head.position == 1


@pytest.mark.parametrize(("model_id", "code"), [(None, "nothing_loaded"), (MODEL, "not_loaded")])
async def test_a_refusal_has_its_code_and_appends_nothing(
    path: Path, model_id: str | None, code: str
) -> None:
    async with opened(path) as log:
        with pytest.raises(RequestRefused) as raised:
            await log.submit(RequestUnload(model_id, "alice"))
        assert raised.value.code == code
        assert log.head.position == 0


async def test_the_end_of_a_job_is_seen_by_the_next_command_of_the_same_group(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load())
        failed = Record((Draft("e", LoadFailed("x", "y"), SYSTEM, "j1", MODEL, 1),))
        _, again = await asyncio.gather(log.submit(failed), log.submit(load()))
        assert again == Receipt("j2", existing=False, position=3)
        assert set(log.state.jobs) == {"j2"}
    assert verify(path).verified


async def test_starts_and_stops_of_the_server_say_how_the_last_one_ended(path: Path) -> None:
    async with opened(path, now=lambda: START, monotonic=float) as log:
        await log.server_started()
        await log.server_started()
        await log.server_stopped()
        await log.server_started()
    at = stamp(START)
    assert [from_body(body).data for body in bodies(path)] == [
        ServerStarted(unclean=False, down_since=None),
        ServerStarted(unclean=True, down_since=at),
        ServerStopped(),
        ServerStarted(unclean=False, down_since=at),
    ]


# What nobody may do to the table.


def body_at(position: object) -> str:
    return json.dumps({"position": position, "type": "t", "actor": "a", "recorded_at": "r"})


FORBIDDEN = [
    "UPDATE events SET body = body",
    "UPDATE events SET hash = zeroblob(32) WHERE position = 1",
    "UPDATE OR REPLACE events SET position = 2 WHERE position = 1",
    "DELETE FROM events",
    "DELETE FROM events WHERE position = 3",
    f"INSERT INTO events (position, body, hash) VALUES (5, '{body_at(5)}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (3, '{body_at(3)}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (0, '{body_at(0)}', zeroblob(32))",
    f"INSERT INTO events (body, hash) VALUES ('{body_at(4)}', zeroblob(32))",
    f"INSERT OR REPLACE INTO events (position, body, hash) VALUES (2, '{body_at(2)}', zeroblob(32))",
    f"INSERT OR IGNORE INTO events (position, body, hash) VALUES (9, '{body_at(9)}', zeroblob(32))",
    f"REPLACE INTO events (position, body, hash) VALUES (1, '{body_at(1)}', zeroblob(32))",
    """INSERT INTO events (position, body, hash) SELECT position, body, hash FROM events WHERE position = 2
       ON CONFLICT (position) DO UPDATE SET hash = zeroblob(32)""",
    "UPDATE base SET position = 1",
    "DELETE FROM base",
    "INSERT OR REPLACE INTO base (one, position, hash) VALUES (1, 7, zeroblob(32))",
    "INSERT INTO base (one, position, hash) VALUES (2, 7, zeroblob(32))",
    # At the head, but not what may stand there.
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(5)}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at('4')}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(4.0)}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(None)}', zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (4, CAST('{body_at(4)}' AS BLOB), zeroblob(32))",
    """INSERT INTO events (position, body, hash) VALUES (4, '{"position":4}', zeroblob(32))""",
    """INSERT INTO events (position, body, hash) VALUES (4, '{}', zeroblob(32))""",
    """INSERT INTO events (position, body, hash) VALUES (4, 'no JSON', zeroblob(32))""",
    "INSERT INTO events (position, body, hash) VALUES (4, NULL, zeroblob(32))",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(4)}', zeroblob(31))",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(4)}', '{'x' * 32}')",
    f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(4)}', NULL)",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_the_database_itself_refuses(path: Path, statement: str) -> None:
    async with opened(path) as log:
        await write(log, 3)
    before = query(path, "SELECT position, body, hash FROM events"), query(path, "SELECT * FROM base")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        with pytest.raises((sqlite3.IntegrityError, sqlite3.OperationalError)):
            connection.execute(statement)
        sound = f"INSERT INTO events (position, body, hash) VALUES (4, '{body_at(4)}', zeroblob(32))"
        connection.execute("BEGIN")
        connection.execute(sound)  # so that the refusals above are for what they change
        connection.execute("ROLLBACK")
    assert (
        query(path, "SELECT position, body, hash FROM events"),
        query(path, "SELECT * FROM base"),
    ) == before


async def test_what_is_queried_by_is_what_is_hashed(path: Path) -> None:
    draft = Draft("e", LoadStarted(1), "é'\U0001f600", "j", "m", 1)
    async with opened(path, now=lambda: START, monotonic=float) as log:
        await log.submit(Record((draft,)))
    assert query(path, "SELECT type, model_id, job_id, actor, recorded_at FROM events") == [
        ("LoadStarted", "m", "j", "é'\U0001f600", stamp(START))
    ]


# When writing fails.


def forbid_growth(log: Log) -> None:
    """Let this connection, and no other, find the disk full."""
    assert log._database._connection is not None
    (pages,) = log._database._connection.execute("PRAGMA page_count").fetchone()
    assert log._database._connection.execute(f"PRAGMA max_page_count = {pages}").fetchone() == (pages,)


async def test_a_full_disk_fails_the_group_and_the_log_recovers_by_itself(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await write(log, 3)
        forbid_growth(log)
        big = [log.submit(fact(f"big{number}", "x" * 4_000)) for number in range(10)]
        results = await asyncio.gather(*big, log.submit(load()), return_exceptions=True)
        assert all(type(result) is LogUnavailable for result in results), results
        assert (log.head.position, log.state.position, log.state.jobs) == (3, 3, {})
        assert len(bodies(path)) == 3
        assert await log.submit(load()) == Receipt("j2", existing=False, position=4)
        assert log.healthy
    assert verify(path).verified
    assert verify(path).position == 4


async def test_a_writer_from_outside_fails_the_group_and_the_log_recovers_by_itself(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
        assert log._database._connection is not None
        log._database._connection.execute("PRAGMA busy_timeout = 20")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LogUnavailable):
                await log.submit(fact("late"))
            other.execute("ROLLBACK")
        assert [receipt.position for receipt in await write(log, 2, first=4)] == [4, 5]
    assert [from_body(body).id for body in bodies(path)] == ["f1", "f2", "f3", "f4", "f5"]


async def test_a_connection_that_is_gone_fails_the_group_and_the_log_recovers_by_itself(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        assert log._database._connection is not None
        log._database._connection.close()
        with pytest.raises(LogUnavailable):
            await log.submit(fact("late"))
        assert [receipt.position for receipt in await write(log, 1, first=2)] == [2]
    assert verify(path).verified


FILE_SIZE_LIMIT = """
import asyncio, logging, resource, sys
from pathlib import Path
from events.errors import LogUnavailable
from events.verify import verify
from support.events import facts, opened, write
logging.disable()
async def main(path):
    async with opened(path) as log:
        await write(log, 20)
        wal = path.with_name(path.name + "-wal")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 100, hard))
        results = await asyncio.gather(*map(log.submit, facts(200, first=100)), return_exceptions=True)
        assert all(type(result) is LogUnavailable for result in results), results
        assert not log.healthy
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        async with asyncio.timeout(30):  # nobody writes: the log tries by itself
            while not log.healthy:
                await asyncio.sleep(0.01)
        receipts = await write(log, 20, first=21)
        assert [receipt.position for receipt in receipts] == list(range(21, 41)), receipts
        assert log.healthy
    assert verify(path).verified
asyncio.run(main(Path(sys.argv[1])))
"""


def run(script: str, *arguments: object, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = child(script, *arguments, first=first)
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_file_that_may_not_grow_fails_the_group_and_the_log_recovers_by_itself(path: Path) -> None:
    done = run(FILE_SIZE_LIMIT, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [from_body(body).id for body in bodies(path)] == [f"f{number}" for number in range(1, 41)]


# An fsync that fails is made by the kernel itself: a seccomp filter on the log's own thread answers EIO.
FSYNC_FAILS = """
import asyncio, ctypes, logging, os, platform, sys
from pathlib import Path
from events.errors import LogUnavailable
from events.verify import verify
from support.events import facts, opened, write
NUMBERS = {"x86_64": (74, 75), "aarch64": (82, 83)}.get(platform.machine())
LOAD, EQUAL, ANSWER, ALLOW, EIO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | 5
logging.disable()
class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte)]
    _fields_ += [("operand", ctypes.c_uint32)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]
def fail_fsync(descriptor):
    steps = [(LOAD, 0, 0, 0), (EQUAL, 1, 0, NUMBERS[0]), (EQUAL, 0, 3, NUMBERS[1])]
    only = [(LOAD, 0, 0, 16), (EQUAL, 0, 1, descriptor)]
    steps += [(LOAD, 0, 0, 0)] * 2 if descriptor is None else only
    steps += [(ANSWER, 0, 0, EIO), (ANSWER, 0, 0, ALLOW)]
    program = Program(len(steps), (Step * len(steps))(*steps))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program)):
        os._exit(77)
def descriptor_of(path):
    for entry in os.scandir("/proc/self/fd"):
        if os.path.exists(entry) and os.path.samefile(entry, path):
            return int(entry.name)
async def main(path, scope):
    if NUMBERS is None:
        os._exit(77)
    spare = os.open("/dev/null", os.O_RDONLY)
    log = None
    async with opened(path) as log:
        await write(log, 3)
        wal = descriptor_of(path.with_name(path.name + "-wal"))
        assert wal > spare
        os.close(spare)  # what is opened anew has other numbers, so that only this WAL's fsync fails
        await log._database.run(lambda: fail_fsync(wal if scope == "once" else None))
        results = await asyncio.gather(*map(log.submit, facts(5, first=4)), return_exceptions=True)
        print([getattr(result, "position", type(result).__name__) for result in results])
        print(log.healthy, log.head.position)
        if scope == "once":
            await write(log, 1, first=9)
asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize("scope", ["once", "always"])
def test_a_commit_whose_outcome_is_unknown_is_acknowledged_only_when_it_is_on_the_disk(
    path: Path, scope: str
) -> None:
    done = run(FSYNC_FAILS, path, scope)
    if done.returncode == 77:
        pytest.skip("this kernel or architecture takes no such filter")
    assert (done.returncode, done.stderr) == (0, "")
    if scope == "once":
        assert done.stdout.splitlines() == ["[4, 5, 6, 7, 8]", "True 8"]
        assert len(bodies(path)) == 9
    else:
        assert done.stdout.splitlines() == [str(["LogUnavailable"] * 5), "False 3"]
        assert len(bodies(path)) in {3, 8}  # what was not acknowledged may be there; what was, is
    assert verify(path).verified


# Closing, cancelling, dying.


async def test_close_writes_what_is_waiting_and_refuses_what_comes_later(path: Path) -> None:
    log = Log(path)
    await log.open()
    waiting = [asyncio.create_task(log.submit(command)) for command in facts(700)]
    await asyncio.sleep(0)  # each has been handed over
    closing_log = asyncio.create_task(log.close())
    await asyncio.sleep(0)
    with pytest.raises(LogClosed) as raised:
        await log.submit(fact("late"))
    assert raised.value.code == "shutting_down"
    await closing_log
    assert sorted([(await task).position for task in waiting]) == list(range(1, 701))
    with pytest.raises(LogClosed):
        await log.submit(fact("later"))
    assert not log.healthy
    assert log.closed
    assert len(bodies(path)) == 700


async def test_close_leaves_one_file_and_no_thread_behind(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
        threads = set(log._database._thread._threads)
    assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]
    assert not any(thread.is_alive() for thread in threads)


async def test_a_submitter_that_gave_up_before_its_turn_changes_nothing(path: Path) -> None:
    async with opened(path) as log:
        tasks = [asyncio.create_task(log.submit(command)) for command in facts(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [from_body(body).id for body in bodies(path)] == ["f1", "f3"]
    assert verify(path).verified


async def test_a_submitter_that_gives_up_at_any_moment_does_not_disturb_the_others(path: Path) -> None:
    async with opened(path) as log:
        for turns in range(12):
            tasks = [asyncio.create_task(log.submit(each)) for each in facts(3, first=10 * turns)]
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[1].cancel()
            first, _, third = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(first, Receipt)
            assert isinstance(third, Receipt)
    assert verify(path).verified


async def test_nobody_waits_for_a_writer_that_died(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        tasks = [asyncio.create_task(log.submit(command)) for command in facts(5, first=2)]
        await asyncio.sleep(0)
        log.writer.cancel()
        async with asyncio.timeout(LIMIT_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {LogClosed}
        with pytest.raises(LogClosed):
            await log.submit(fact("late"))
        assert not log.closed  # so that whoever watches the writer can tell


async def test_a_subscriber_is_woken_by_a_commit_and_by_the_close_and_told_nothing(path: Path) -> None:
    async with opened(path) as log:
        one, other = log.subscribe(), log.subscribe()
        await write(log, 1)
        assert one.is_set()
        assert other.is_set()
        one.clear()
        log.unsubscribe(other)
        other.clear()
        await log.submit(load())
        await log.submit(load())
        assert one.is_set()
        assert not other.is_set()
        one.clear()
        await log.submit(load())  # which appends nothing
        assert not one.is_set()
    assert one.is_set()


# Whose file it is.


async def refused(path: Path, problem: type[LedgerProblem]) -> str:
    before = content(path)
    with pytest.raises(problem) as raised:
        await Log(path).open()
    assert content(path) == before
    return str(raised.value)


async def test_a_ledger_of_the_future_is_refused_with_what_to_do(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    message = await refused(path, FutureSchema)
    assert "schema 99" in message
    assert "use the release that wrote it" in message


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE notes (text)"],
        ["CREATE TABLE events (position INTEGER PRIMARY KEY, body TEXT)"],
        ["PRAGMA application_id = 7"],
        ["PRAGMA user_version = 1"],
        ["CREATE TABLE notes (text)", "PRAGMA user_version = 1", "PRAGMA application_id = 7"],
    ],
)
async def test_the_database_of_somebody_else_is_refused_untouched(path: Path, statements: list[str]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.execute("VACUUM")  # so that there is a file
    await refused(path, ForeignDatabase)
    assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]


async def test_a_file_that_is_no_database_is_refused_untouched(path: Path) -> None:
    make(path, b"this is no database, it is a sentence\n" * 100)
    assert "not a database" in await refused(path, LogUnavailable)


@pytest.mark.parametrize("damage", ["{}", '{"id":1}', "no JSON"])
async def test_a_ledger_whose_projections_are_damaged_is_unavailable(path: Path, damage: str) -> None:
    async with opened(path) as log:
        await log.submit(load())
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE models SET body = ?", (damage,))
    await refused(path, LogUnavailable)


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable, match=r"ledger\.db cannot be opened"):
        await Log(tmp_path / "nowhere" / "ledger.db").open()


async def test_an_empty_file_becomes_a_ledger(path: Path) -> None:
    make(path, b"")
    async with opened(path) as log:
        await write(log, 1)
    assert query(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert verify(path).verified


MIGRATE = """
import sqlite3, sys
from pathlib import Path
import migrations
from events.schema import connect
assert Path(migrations.__file__).parent == Path(sys.argv[2]) / "migrations", migrations.__file__
try:
    connect(Path(sys.argv[1])).close()
except sqlite3.Error as error:
    print(error)
"""


async def test_each_migration_is_one_transaction(path: Path, tmp_path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
    before = query(path, "SELECT sql FROM sqlite_schema"), bodies(path)
    folder = tmp_path / "release" / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    number = len(list(folder.glob("*.sql"))) + 1
    script = folder / f"{number:04}_next.sql"

    script.write_text("CREATE TABLE extra (x);\nINSERT INTO nowhere VALUES (1);\n")
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("no such table: nowhere\n", "")
    assert (query(path, "SELECT sql FROM sqlite_schema"), bodies(path)) == before
    assert query(path, "PRAGMA user_version") == [(number - 1,)]

    script.write_text(
        "CREATE TABLE extra (x);\n-- the last statement lacks its semicolon\nINSERT INTO extra VALUES (1)"
    )
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("", "")
    assert query(path, "SELECT x FROM extra") == [(1,)]
    assert query(path, "PRAGMA user_version") == [(number,)]
    assert bodies(path) == before[1]
    with pytest.raises(FutureSchema):
        await Log(path).open()


async def test_a_broken_first_migration_leaves_an_empty_database(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release" / "migrations"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "0001_broken.sql").write_text("CREATE TABLE events (x);\nINSERT INTO nowhere VALUES (1);\n")
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("no such table: nowhere\n", "")
    assert query(path, "SELECT * FROM sqlite_schema") == []
    async with opened(path) as log:  # which a sound release makes a ledger of
        await write(log, 1)
    assert verify(path).verified
