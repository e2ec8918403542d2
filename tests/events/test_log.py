"""The log on a real SQLite file: durable, gapless, one chain; what a command or a note comes to."""

import asyncio
import os
import signal
import sqlite3
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, START, at, facts, ids, opened, steady, write
from support.ledgers import FAST_FOLDER, connection_of, database_of, rows_of, run_forked, stored

from events.audit.verify import verify
from events.clock import format_timestamp
from events.codec import decode_event
from events.commands import Receipt, Record
from events.errors import ForeignHead, LogClosed
from events.jobcommands import RequestCancel, RequestLoad
from events.log import MAX_GROUP, Log
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
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
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
    log = Log(path)
    await log.open()
    pending = [asyncio.create_task(log.submit(command)) for command in facts(700)]
    note = asyncio.create_task(log.note_last_use({"a": at(1)}))
    await asyncio.sleep(0)  # each has been handed over
    threads = set(database_of(log)._thread._threads)
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
    assert not any(thread.is_alive() for thread in threads)


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
