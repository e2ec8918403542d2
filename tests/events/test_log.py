"""The log on a SQLite file: durable, gapless, one chain; what comes of commands and of failing writes."""

import asyncio
import ctypes
import errno
import json
import os
import platform
import resource
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, START, at, child, facts, ids, opened, steady, write
from support.ledgers import (
    FAST_FOLDER,
    change_ledger,
    connection_of,
    lose_connection,
    rows_of,
    run_forked,
    stored,
    unwritable,
)
from support.workers import until

import migrations
from events.audit.verify import verify
from events.clock import format_timestamp
from events.codec import decode_event
from events.commands import OUTDATED, JobUnchanged, Receipt, Record
from events.errors import (
    ForeignHead,
    FutureSchema,
    LedgerProblem,
    LogClosed,
    LogUnavailable,
    NotEncodable,
    OutcomeUnknown,
    RequestRefused,
)
from events.jobcommands import RequestCancel, RequestLoad
from events.log import MAX_GROUP, Log
from events.sqlite.schema import APPLICATION_ID
from events.types import SYSTEM, ClockStepped, Draft, Event, LoadFailed, LoadStarted, ServerStarted

LIMIT_S = 60
"""Only against hanging."""

DAY_S = 86_400


def events_of(path: Path) -> list[Event]:
    return [decode_event(body) for _, body, _ in rows_of(path)]


def commits(path: Path) -> int:
    """Count the transactions in the WAL: the frames that carry the size of the database after them."""
    wal = path.with_name(f"{path.name}-wal").read_bytes()
    page_size = int.from_bytes(wal[8:12], "big")
    salt = wal[16:24]
    frames = range(32, len(wal), 24 + page_size)
    return sum(wal[at + 4 : at + 8] != bytes(4) and wal[at + 8 : at + 16] == salt for at in frames)


def fact(name: str, message: str = "") -> Record:
    return Record((Draft(name, LoadFailed("x", message), SYSTEM, "job", MODEL, 1),))


def load(model_id: str = MODEL) -> RequestLoad:
    return RequestLoad(model_id, 1, None, "alice")


# Appending.


def test_kill_loses_nothing_acknowledged(path: Path) -> None:
    acknowledged = path.with_name("acknowledged")

    async def submit_until_killed() -> None:
        file = os.open(acknowledged, os.O_WRONLY | os.O_CREAT)

        async def submit(first: int) -> None:
            for command in facts(10**6, first=first):
                receipt = await log.submit(command)
                os.write(file, f"{receipt.position}\n".encode())
                if receipt.position == 100:  # the kill comes in the middle of a later transaction
                    loop = asyncio.get_running_loop()
                    loop.call_later(0.02, os.kill, os.getpid(), signal.SIGKILL)

        async with opened(path) as log:
            await asyncio.gather(*(submit(number * 10**6) for number in range(8)))

    assert run_forked(lambda: asyncio.run(submit_until_killed())) == -signal.SIGKILL
    assert len(rows_of(path)) >= max(map(int, acknowledged.read_text().split()))
    assert verify(path).verified


async def test_concurrent_submits_share_transactions_in_one_gapless_chain(path: Path) -> None:
    async with opened(path) as log:
        connection = connection_of(log)
        assert [*await connection.execute_fetchall("PRAGMA journal_mode")] == [("wal",)]
        assert [*await connection.execute_fetchall("PRAGMA synchronous")] == [(2,)]
        await write(log, 3)
        before = commits(path)
        receipts = await asyncio.gather(*map(log.submit, facts(64, first=4)))
        assert sorted(receipt.position for receipt in receipts) == list(range(4, 68))
        assert commits(path) - before <= 2
        before = commits(path)
        await write(log, 5, first=100)
        assert commits(path) - before == 5
        before = commits(path)
        await asyncio.gather(*map(log.submit, facts(MAX_GROUP + 1, first=200)))
        assert commits(path) - before >= 2
        head = log.head
    assert head.position == len(rows_of(path))


async def test_record_is_one_ordered_transaction(path: Path) -> None:
    drafts = tuple(Draft(f"d{number}", LoadStarted(number), SYSTEM) for number in range(1, 101))
    async with opened(path) as log:
        for number in range(1, 6):
            assert (await log.submit(fact(f"f{number}"))).position == number
            assert len(rows_of(path)) == number  # a receipt means that it is on disk
            [(_, position, *_)] = stored(path, "projected")["projected"]
            assert position == number
        before = commits(path)
        assert await log.submit(Record(drafts)) == Receipt(None, existing=False, position=105)
        assert commits(path) - before == 1
    assert [event.id for event in events_of(path)[5:]] == [draft.id for draft in drafts]


async def test_recorded_at_never_goes_back(path: Path) -> None:
    moments = [START + timedelta(seconds=seconds) for seconds in (5, 5, 5, 3, 9, 1, 9)]
    async with opened(path, now=iter(moments).__next__, boottime=float) as log:
        await write(log, 5)
    async with opened(path, now=lambda: START, boottime=float) as log:
        await write(log, 1, first=6)
    assert [event.recorded_at for event in events_of(path)] == [
        format_timestamp(START + timedelta(seconds=seconds)) for seconds in (5, 5, 9, 9, 9, 9)
    ]


# Deciding.


async def test_concurrent_requests_make_one_job(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        receipts = await asyncio.gather(*(log.submit(load()) for _ in range(20)))
        assert {receipt.job_id for receipt in receipts} == {"j1"}
        assert sorted(receipt.existing for receipt in receipts) == [False] + [True] * 19
        assert len(rows_of(path)) == 1
        assert await log.submit(load()) == Receipt("j1", existing=True, position=1)
        assert await log.submit(RequestCancel("j1", "bob")) == Receipt("j1", existing=False, position=2)
        head = log.head
    async with opened(path, new_id=ids("k")) as log:
        assert log.head == head
        assert await log.submit(RequestCancel("j1", "bob")) == Receipt("j1", existing=True, position=2)
        assert await log.submit(RequestCancel("j1", "eve")) == Receipt("j1", existing=True, position=3)
        assert (await log.submit(load("other"))).position == 4
    assert verify(path).verified


async def test_command_sees_job_ended_in_same_transaction(path: Path) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await log.submit(load())
        failed = Record((Draft("e", LoadFailed("x", "y"), SYSTEM, "j1", MODEL, 1),))
        _, again = await asyncio.gather(log.submit(failed), log.submit(load()))
        assert again == Receipt("j2", existing=False, position=3)
        assert set(log.state.jobs) == {"j2"}
    assert verify(path).verified


async def test_step_of_clock_is_recorded_and_followed_when_it_stands(path: Path) -> None:
    """A clock that is a year ahead for a second leaves no trace in later times, over restarts too."""
    passed, ahead = [0.0], [timedelta()]
    year, day = timedelta(days=365), timedelta(days=1)

    def clock() -> dict[str, Any]:
        return {"now": lambda: START + timedelta(seconds=passed[0]) + ahead[0], "boottime": lambda: passed[0]}

    async with opened(path, **clock()) as log:
        await log.server_started()
        for passed[0], ahead[0] in (
            (10, year),
            (11, timedelta()),
            *((each, day) for each in (20, 50, 80)),
            (90, -day),
        ):
            log.now()
            await write(log, 1, first=int(passed[0]))
        await log.server_stopped()
        assert log.clock.monotonic_now() == at(90)
    steps = [(each.recorded_at, each.data) for each in events_of(path) if isinstance(each.data, ClockStepped)]
    followed = at(DAY_S + 80)
    assert steps == [
        (at(11), ClockStepped(at(10), at(365 * DAY_S + 10), taken=False)),
        (followed, ClockStepped(at(80), followed, taken=True)),
        (followed, ClockStepped(at(DAY_S + 90), at(-DAY_S + 90), taken=True)),  # times stand
    ]
    assert [event.recorded_at for event in events_of(path) if event.type == "LoadStarted"] == [
        at(10), at(11), at(20), at(50), followed, followed,
    ]  # fmt: skip
    assert events_of(path)[-1].type == "ServerStopped"
    async with opened(path, **clock()) as log:
        assert log.now() == followed
    assert sum('"data":{"from":"' in body for _, body, _ in rows_of(path)) == len(steps)
    assert verify(path).verified


async def test_server_start_names_last_note_of_unclean_end(path: Path) -> None:
    moments = {"now": START}
    seen, ended = START + timedelta(minutes=30), START + timedelta(hours=9)
    for moment, stops in ((START, False), (ended, True), (ended, False)):
        moments["now"] = moment
        async with opened(path, **steady(lambda: moments["now"])) as log:
            await log.server_started()
            if stops:
                await log.server_stopped()
            else:
                moments["now"] = seen
                await log.note_last_use({})
    first, second, _, third = (event.data for event in events_of(path))
    assert first == ServerStarted(unclean=False)
    assert second == ServerStarted(True, last_event_at=at(0), last_seen_at=format_timestamp(seen))
    assert third == ServerStarted(
        False, last_event_at=format_timestamp(ended), last_seen_at=format_timestamp(ended)
    )


async def test_foreign_event_ends_the_writer(path: Path) -> None:
    """Another process appends an event that follows, as a server on a hard link of the file would."""
    async with opened(path) as log:
        await write(log, 2)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            body = rows_of(path)[0][1].replace('"position":1', '"position":3').replace("f1", "f3")
            other.execute("INSERT INTO events (position, body, hash) VALUES (3, ?, zeroblob(32))", (body,))
        with pytest.raises(LogClosed):
            await write(log, 1, first=4)
        assert isinstance(log.writer.exception(), ForeignHead)
        assert len(rows_of(path)) == 3
        assert not log.closed


# Closing, cancelling, dying.


async def test_close_writes_pending_commands_and_leaves_one_file(path: Path) -> None:
    before, log = {*threading.enumerate()}, Log(path)
    await log.open()
    pending = [asyncio.create_task(log.submit(command)) for command in facts(700)]
    note = asyncio.create_task(log.note_last_use({"a": at(1)}))
    await asyncio.sleep(0)  # each has been handed over
    threads = {each for each in {*threading.enumerate()} - before if not each.name.startswith("asyncio")}
    assert threads
    closing_log = asyncio.create_task(log.close())
    await asyncio.sleep(0)
    with pytest.raises(LogClosed) as raised:
        await log.submit(fact("late"))
    assert raised.value.code == "shutting_down"
    await closing_log
    assert sorted([(await task).position for task in pending]) == list(range(1, 701))
    await note
    for late in (log.submit(fact("later")), log.note_last_use({"a": at(2)})):
        with pytest.raises(LogClosed):
            await late
    assert (log.healthy, log.closed) == (False, True)
    assert len(rows_of(path)) == 700
    assert await last_used(path) == {"a": at(1)}
    assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


async def test_cancelled_caller_does_not_disturb_others(path: Path) -> None:
    async with opened(path) as log:
        for turns in range(12):
            tasks = [asyncio.create_task(log.submit(each)) for each in facts(3, first=10 * turns)]
            note = asyncio.create_task(log.note_last_use({"a": at(1)}))
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[1].cancel()
            note.cancel()
            first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(first, Receipt)
            assert isinstance(third, Receipt)
            if turns == 1:  # before its turn
                assert isinstance(second, asyncio.CancelledError)
                assert "f11" not in [event.id for event in events_of(path)]
        assert log.healthy
    assert verify(path).verified


async def test_death_of_writer_fails_all_callers(path: Path) -> None:
    async with opened(path) as log:
        await write(log, 1)
        tasks = [asyncio.create_task(log.submit(command)) for command in facts(5, first=2)]
        note = asyncio.create_task(log.note_last_use({"a": at(1)}))
        await asyncio.sleep(0)
        log.writer.cancel()
        async with asyncio.timeout(LIMIT_S):
            results = await asyncio.gather(*tasks, note, return_exceptions=True)
        assert {type(result) for result in results} == {LogClosed}
        with pytest.raises(LogClosed):
            await log.submit(fact("late"))
        assert not log.closed  # so that whoever watches the writer can tell


async def test_commit_and_close_wake_subscribers(path: Path) -> None:
    with ExitStack() as stack:
        async with opened(path) as log:
            one = stack.enter_context(log.subscribed())
            with log.subscribed() as other:
                await write(log, 1)
                assert one.is_set()
                assert other.is_set()
            one.clear()
            other.clear()
            await log.submit(load())
            await log.submit(load())
            assert one.is_set()
            assert not other.is_set()
            one.clear()
            await log.submit(load())  # which appends nothing
            assert not one.is_set()
        assert one.is_set()


# When models were last used: notes beside the log.


async def last_used(path: Path) -> dict[str, str]:
    async with opened(path) as log:
        return dict(log.last_used)


NOTES = st.lists(st.dictionaries(st.text(max_size=3), st.integers(0, 10**6).map(at), max_size=3), max_size=6)


@FEWER
@given(NOTES)
def test_latest_use_of_each_model_is_kept(notes: list[dict[str, str]]) -> None:
    async def note_all(path: Path) -> dict[str, str]:
        async with opened(path) as log:
            await asyncio.gather(*map(log.note_last_use, notes))
        return await last_used(path)

    latest: dict[str, str] = {}
    for each in notes:
        latest |= {model: max(used_at, latest.get(model, "")) for model, used_at in each.items()}
    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        assert asyncio.run(note_all(Path(folder) / "ledger.db")) == latest


# When writing fails, and files that are not its own: nothing is lost, nothing foreign is touched.


def ids_of(path: Path) -> list[str]:
    return [decode_event(body).id for _, body, _ in rows_of(path)]


@pytest.mark.parametrize("failure", ["full disk", "busy database", "lost connection"])
async def test_failed_transaction_fails_its_group_and_log_recovers(path: Path, failure: str) -> None:
    async with opened(path, new_id=ids("j")) as log:
        await write(log, 3)
        connection = connection_of(log)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            match failure:
                case "full disk":
                    [(pages,)] = await connection.execute_fetchall("PRAGMA page_count")
                    await connection.execute_fetchall(f"PRAGMA max_page_count = {pages}")  # of it alone
                case "busy database":
                    await connection.execute_fetchall("PRAGMA busy_timeout = 20")
                    other.execute("BEGIN IMMEDIATE")
                case "lost connection":
                    await lose_connection(log)
            big = [log.submit(fact(f"big{number}", "x" * 4_000)) for number in range(10)]
            results = await asyncio.gather(*big, log.submit(load()), return_exceptions=True)
        assert {type(result) for result in results} == {LogUnavailable}
        assert (log.head.position, log.state.position, log.state.jobs) == (3, 3, {})
        assert len(rows_of(path)) == 3
        assert await log.submit(load()) == Receipt("j2", existing=False, position=4)
        assert log.healthy
    assert (verify(path).verified, verify(path).position) == (True, 4)


async def test_repeated_id_of_an_event_is_refused_by_name(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path) as log:
        await write(log, 2)
        with pytest.raises(LogUnavailable):
            await write(log, 1)
        assert "an event after position 2 has the id of an earlier one" in caplog.text
        assert [receipt.position for receipt in await write(log, 1, first=3)] == [3]
    assert verify(path).verified


async def test_failing_writes_are_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(path) as log:
        with unwritable(path, "LoadFailed"):
            for name in ("f1", "f2", "f3"):
                with pytest.raises(LogUnavailable):
                    await log.submit(fact(name))
        await log.submit(fact("f4"))
    first, *others = [record for record in caplog.records if record.name == "events.log"]
    assert "cannot be written" in first.message
    assert "the disk is full" in first.message
    assert first.exc_info is None  # a client can fill no disk with tracebacks
    assert [record.message for record in others] == ["the ledger can be written again"]


def wal_bytes(path: Path) -> int:
    return path.with_name("ledger.db-wal").stat().st_size


def test_file_size_limit_fails_transaction_and_log_recovers(path: Path) -> None:
    async def write_beyond_limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        async with opened(path) as log:
            await write(log, 20)
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal_bytes(path) + 100, hard))
            results = await asyncio.gather(*map(log.submit, facts(200, first=100)), return_exceptions=True)
            assert {type(result) for result in results} == {LogUnavailable}
            assert not log.healthy
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            await until(lambda: log.healthy)  # nobody writes: the log tries by itself
            assert [receipt.position for receipt in await write(log, 20, first=21)] == list(range(21, 41))
            assert log.healthy

    assert run_forked(lambda: asyncio.run(write_beyond_limit())) == 0
    assert ids_of(path) == [f"f{number}" for number in range(1, 41)]
    assert verify(path).verified


FSYNCS = {"x86_64": (74, 75), "aarch64": (82, 83)}
"""The numbers of the system calls fsync and fdatasync."""

NO_FILTER = 77


class Step(ctypes.Structure):
    """An instruction of a seccomp filter."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("operand", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """A seccomp filter."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step)))


def fail_fsync(descriptor: int | None) -> None:
    """Have the kernel answer EIO to fsync of this file, or of all files, in the present thread."""
    load, equal, answer, allow, error = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | errno.EIO
    fsync, fdatasync = FSYNCS[platform.machine()]
    steps = [(load, 0, 0, 0), (equal, 1, 0, fsync), (equal, 0, 3, fdatasync)]
    steps += [(load, 0, 0, 0)] * 2 if descriptor is None else [(load, 0, 0, 16), (equal, 0, 1, descriptor)]
    steps += [(answer, 0, 0, error), (answer, 0, 0, allow)]
    program = Program(len(steps), (Step * len(steps))(*(Step(*step) for step in steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program)):
        os._exit(NO_FILTER)


def descriptor_of(file: Path) -> int:
    open_files = Path("/proc/self/fd").iterdir()
    return next(int(each.name) for each in open_files if each.exists() and each.samefile(file))


async def lose_fsyncs(log: Log, path: Path, spare: int, *, once: bool) -> None:
    """Let the next fsync of the WAL fail, or all; `spare` is a descriptor opened before the log."""
    wal = descriptor_of(path.with_name("ledger.db-wal"))
    assert wal > spare
    os.close(spare)  # the WAL has another number when it is opened again, so only one fsync fails
    if not once:
        await asyncio.to_thread(fail_fsync, None)
        fail_fsync(None)  # and so in the threads that this one starts
    await connection_of(log).create_function("fail_fsync", 0, lambda: fail_fsync(wal if once else None))
    await connection_of(log).execute_fetchall("SELECT fail_fsync()")


def run_without_fsyncs(work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    code = run_forked(lambda: asyncio.run(work(os.open("/dev/null", os.O_RDONLY))))
    if code == NO_FILTER:
        pytest.skip("this kernel takes no such filter")
    assert code == 0


knows_fsyncs = pytest.mark.skipif(platform.machine() not in FSYNCS, reason="no numbers of system calls")


@knows_fsyncs
@pytest.mark.parametrize("fails_once", [True, False])
def test_unknown_commit_is_acknowledged_only_when_on_disk(path: Path, fails_once: bool) -> None:  # noqa: FBT001
    async def write_without_fsync(spare: int) -> None:
        async with opened(path) as log:
            await write(log, 3)
            await lose_fsyncs(log, path, spare, once=fails_once)
            results = await asyncio.gather(*map(log.submit, facts(5, first=4)), return_exceptions=True)
            found = [getattr(result, "position", type(result)) for result in results]
            assert found == ([4, 5, 6, 7, 8] if fails_once else [OutcomeUnknown] * 5)
            assert (log.healthy, log.head.position) == ((True, 8) if fails_once else (False, 3))
            if fails_once:
                await write(log, 1, first=9)

    run_without_fsyncs(write_without_fsync)
    # What was not acknowledged may be there; what was, is.
    assert len(rows_of(path)) in ({9} if fails_once else {3, 8})
    assert verify(path).verified


@knows_fsyncs
def test_fact_of_durable_commit_that_raised_is_not_repeated(path: Path) -> None:
    async def start_twice(spare: int) -> None:
        async with opened(path, new_id=ids("j")) as log:
            await log.submit(load())
            job = log.state.jobs["j1"]
            start = Draft("e", LoadStarted(1), SYSTEM, job.id, MODEL, 1)
            command = Record((start,), (JobUnchanged(job.id, job.position),))
            await lose_fsyncs(log, path, spare, once=True)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # nothing can be opened to look
            with pytest.raises(LogUnavailable, match="unknown whether the last requests were recorded"):
                await log.submit(command)
            assert log.state.jobs["j1"] == job  # as before, for who decides now
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            with pytest.raises(RequestRefused) as refused:
                await log.submit(command)
            assert (refused.value.code, log.state.jobs["j1"].attempt) == (OUTDATED, 1)

    run_without_fsyncs(start_twice)
    assert ids_of(path) == ["j1", "e"]
    assert verify(path).verified


async def test_failed_note_fails_alone(path: Path) -> None:
    invalid: list[dict[str, Any]] = [{"\ud800": at(1)}, {"a": None}]
    async with opened(path) as log:
        results = await asyncio.gather(
            *map(log.note_last_use, [*invalid, {"a": at(1)}]),
            *map(log.submit, facts(1)),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [NotEncodable, LogUnavailable, type(None), Receipt]
        assert log.healthy
        await lose_connection(log)
        with pytest.raises(LogUnavailable):
            await log.note_last_use({"a": at(1)})
        assert (await write(log, 1, first=2))[0].position == 2
        change_ledger(
            path, "ALTER TABLE last_used RENAME COLUMN used_at TO something_else", keeps_triggers=True
        )
        note, *receipts = await asyncio.gather(
            log.note_last_use({"a": at(1)}), *map(log.submit, facts(5, first=3)), return_exceptions=True
        )
        assert type(note) is LogUnavailable
        assert [each.position for each in receipts if isinstance(each, Receipt)] == [3, 4, 5, 6, 7]
        assert log.healthy
    assert verify(path).verified


# What the database itself refuses.


def body_at(position: object) -> str:
    return json.dumps({"position": position, "type": "t", "actor": "a", "recorded_at": "r"})


INSERT = "INSERT INTO events (position, body, hash) VALUES"


@pytest.fixture(scope="module")
def three_events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"

    async def write_three() -> None:
        async with opened(path) as log:
            await write(log, 2)
            await log.submit(load())

    asyncio.run(write_three())
    return path


FORBIDDEN = [
    "UPDATE events SET body = body",
    "UPDATE events SET hash = zeroblob(32) WHERE position = 1",
    "UPDATE OR REPLACE events SET position = 2 WHERE position = 1",
    "DELETE FROM events",
    "DELETE FROM events WHERE position = 3",
    *(f"{INSERT} ({position}, '{body_at(position)}', zeroblob(32))" for position in (0, 3, 5)),
    f"INSERT INTO events (body, hash) VALUES ('{body_at(4)}', zeroblob(32))",
    *(
        f"{verb} INTO events (position, body, hash) VALUES ({position}, '{body_at(position)}', zeroblob(32))"
        for verb, position in (("INSERT OR REPLACE", 2), ("INSERT OR IGNORE", 9), ("REPLACE", 1))
    ),
    """INSERT INTO events (position, body, hash) SELECT position, body, hash FROM events WHERE position = 2
       ON CONFLICT (position) DO UPDATE SET hash = zeroblob(32)""",
    # At the head, but not what may stand there.
    *(f"{INSERT} (4, '{body_at(other)}', zeroblob(32))" for other in (5, "4", 4.0, None)),
    f"{INSERT} (4, CAST('{body_at(4)}' AS BLOB), zeroblob(32))",
    *(
        f"{INSERT} (4, {body}, zeroblob(32))"
        for body in ("""'{"position":4}'""", "'{}'", "'no JSON'", "NULL")
    ),
    *(f"{INSERT} (4, '{body_at(4)}', {digest})" for digest in ("zeroblob(31)", f"'{'x' * 32}'", "NULL")),
]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_database_refuses_to_change_events(statement: str, three_events: Path) -> None:
    path, before = three_events, stored(three_events, "events")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        with pytest.raises((sqlite3.IntegrityError, sqlite3.OperationalError)):
            connection.execute(statement)
        connection.execute("BEGIN")
        connection.execute(
            f"{INSERT} (4, '{body_at(4)}', zeroblob(32))"
        )  # so that the refusals above are for what they change
        connection.execute("ROLLBACK")
    assert stored(path, "events") == before


# Files that are not the log's own.


def refused(path: Path, problem: type[LedgerProblem]) -> str:
    before = path.read_bytes()
    with pytest.raises(problem) as raised:
        asyncio.run(Log(path).open())
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]
    return str(raised.value)


@pytest.mark.parametrize(
    ("statement", "problem", "words"),
    [
        ("PRAGMA user_version = 99", FutureSchema, "schema 99"),
        ("UPDATE models SET body = '{}'", LogUnavailable, "missing required field"),
        ("UPDATE models SET body = 'no JSON'", LogUnavailable, "malformed"),
    ],
)
def test_changed_ledger_is_refused_untouched(
    path: Path, three_events: Path, statement: str, problem: type[LedgerProblem], words: str
) -> None:
    path.write_bytes(three_events.read_bytes())
    change_ledger(path, statement, keeps_triggers=True)
    assert words in refused(path, problem)


def run(script: str, *arguments: object, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = child(script, *arguments, first=first)
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


MIGRATE = """
import sqlite3, sys
from pathlib import Path
import migrations
from events.sqlite.schema import connect
assert Path(migrations.__file__).parent == Path(sys.argv[2]) / "migrations", migrations.__file__
try:
    connect(Path(sys.argv[1])).close()
except sqlite3.Error as error:
    print(error)
"""


def schema_of(path: Path) -> tuple[int, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return version, stored(path, "sqlite_schema")["sqlite_schema"]


async def test_migration_is_one_transaction(path: Path, tmp_path: Path) -> None:
    async with opened(path) as log:
        await write(log, 3)
    before, events = schema_of(path), rows_of(path)
    folder = tmp_path / "release" / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    number = before[0] + 1
    script = folder / f"{number:04}_next.sql"

    script.write_text("CREATE TABLE extra (x);\nINSERT INTO nowhere VALUES (1);\n")
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("no such table: nowhere\n", "")
    assert (schema_of(path), rows_of(path)) == (before, events)

    script.write_text(
        "CREATE TABLE extra (x);\n-- the last statement lacks its semicolon\nINSERT INTO extra VALUES (1)"
    )
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("", "")
    assert (schema_of(path)[0], stored(path, "extra"), rows_of(path)) == (number, {"extra": [(1,)]}, events)
    with pytest.raises(FutureSchema):
        await Log(path).open()


async def test_broken_first_migration_leaves_empty_database(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release" / "migrations"
    folder.mkdir(parents=True)
    shutil.copy(migrations.__file__, folder)
    (folder / "0001_broken.sql").write_text("CREATE TABLE events (x);\nINSERT INTO nowhere VALUES (1);\n")
    done = run(MIGRATE, path, folder.parent, first=folder.parent)
    assert (done.stdout, done.stderr) == ("no such table: nowhere\n", "")
    assert schema_of(path) == (0, [])
    async with opened(path) as log:  # a sound release makes a ledger of an empty file
        await write(log, 1)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert verify(path).verified
