"""Reading beside the writer: pages, cursors, filters, and the position that an answer reflects."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.events import MODEL, facts, ids, load_requested, opened, write

from events.commands import Record
from events.errors import ForeignDatabase, FutureSchema, LogUnavailable
from events.jobs import JobStatus
from events.log import Log
from events.reader import Page, Reader, open_reader
from events.types import SYSTEM, Draft, LoadFailed, LoadStarted


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


async def ask(log: Log, job: str, model_id: str = MODEL) -> None:
    await log.submit(Record((Draft(job, load_requested(), "alice", job, model_id, 1),)))


async def end(log: Log, job: str, model_id: str = MODEL) -> None:
    await log.submit(Record((Draft(f"end of {job}", LoadFailed("x", "y"), SYSTEM, job, model_id, 1),)))


async def start(log: Log, job: str, model_id: str = MODEL) -> None:
    await log.submit(Record((Draft(f"start of {job}", LoadStarted(1), SYSTEM, job, model_id, 1),)))


async def pages(reader: Reader, limit: int, **filters: object) -> list[list[str]]:
    """Return the ids of all pages, following the cursor."""
    found: list[list[str]] = []
    cursor: int | None = None
    while not found or cursor is not None:
        page = await reader.jobs(before=cursor, limit=limit, **filters)  # type: ignore[arg-type]
        found.append([job.id for job in page.items])
        cursor = page.next_cursor
    return found


async def test_events_come_in_order_after_a_position_and_in_short_pages(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        await write(log, 7)
        assert [event.position for event in await reader.events(0)] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.position for event in await reader.events(2, 3)] == [3, 4, 5]
        assert await reader.events(7) == []
        assert await reader.events(700) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 100])
async def test_the_cursor_pages_through_all_jobs_newest_first(path: Path, limit: int) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        for number in range(1, 6):
            await ask(log, f"j{number}")
        newest_first = ["j5", "j4", "j3", "j2", "j1"]
        cut = [newest_first[first : first + limit] for first in range(0, 5, limit)]
        assert await pages(reader, limit) == cut


async def test_jobs_that_are_new_do_not_shift_the_pages_behind_the_cursor(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        for number in range(1, 5):
            await ask(log, f"j{number}")
        first = await reader.jobs(limit=2)
        await ask(log, "j5")
        second = await reader.jobs(before=first.next_cursor, limit=2)
        assert [job.id for job in [*first.items, *second.items]] == ["j4", "j3", "j2", "j1"]
        assert second.next_cursor is None
        assert (first.as_of, second.as_of) == (4, 5)


async def test_filters_take_model_and_status_alone_and_together(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        for number in range(1, 7):
            await ask(log, f"j{number}", "odd" if number % 2 else "even")
        await end(log, "j1", "odd")
        await end(log, "j2", "even")
        await start(log, "j3", "odd")
        assert await pages(reader, 2, model_id="odd") == [["j5", "j3"], ["j1"]]
        assert await pages(reader, 2, status=JobStatus.FAILED) == [["j2", "j1"]]
        assert await pages(reader, 9, status=JobStatus.PENDING) == [["j6", "j5", "j4"]]
        assert await pages(reader, 9, model_id="odd", status=JobStatus.IN_PROGRESS) == [["j3"]]
        assert await pages(reader, 9, model_id="nobody's") == [[]]
        assert await pages(reader, 9, status=JobStatus.CANCELLED) == [[]]


@pytest.mark.parametrize(
    ("clause", "index"), [("model_id = 'm'", "jobs_by_model"), ("status = 'pending'", "jobs_by_status")]
)
async def test_a_filter_uses_its_index(path: Path, clause: str, index: str) -> None:
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        sql = f"SELECT body FROM jobs WHERE {clause} ORDER BY created_position DESC LIMIT 5"
        plan = str(connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall())
        assert index in plan
        assert "TEMP B-TREE" not in plan


async def test_a_page_says_which_position_it_reflects_even_if_it_is_empty(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        assert await reader.jobs() == Page([], as_of=0, next_cursor=None)
        await write(log, 3)
        assert await reader.jobs() == Page([], as_of=3, next_cursor=None)
        await ask(log, "j")
        page = await reader.jobs()
        assert (page.as_of, [job.id for job in page.items]) == (4, ["j"])


async def test_a_job_is_found_by_its_id_ended_or_not(path: Path) -> None:
    async with opened(path, new_id=ids()) as log, open_reader(path) as reader:
        await ask(log, "j")
        assert await reader.job("j") == log.state.jobs["j"]
        await end(log, "j")
        found = await reader.job("j")
        assert found is not None
        assert (found.status, found.position) == (JobStatus.FAILED, 2)
        assert await reader.job("nobody's") is None


async def test_a_reader_sees_each_commit_and_can_write_nothing(path: Path) -> None:
    async with opened(path) as log, open_reader(path) as reader:
        for number, command in enumerate(facts(5), 1):
            await log.submit(command)
            assert len(await reader.events(0)) == number
        with pytest.raises(LogUnavailable, match="readonly"):
            await reader._all("DELETE FROM jobs", ())


async def test_a_ledger_that_is_not_there_is_unavailable_and_is_not_made(path: Path) -> None:
    with pytest.raises(LogUnavailable, match=r"ledger\.db cannot be opened"):
        async with open_reader(path):
            pass
    assert list_of(path.parent) == []


async def test_a_file_that_is_no_database_cannot_be_read(path: Path) -> None:
    make(path, b"this is no database, it is a sentence\n" * 100)
    with pytest.raises(LogUnavailable, match="not a database"):
        async with open_reader(path):
            pass


async def test_a_ledger_of_the_future_is_not_read(path: Path) -> None:
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(FutureSchema, match="schema 99"):
        async with open_reader(path):
            pass


async def test_the_database_of_somebody_else_is_not_read(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    with pytest.raises(ForeignDatabase):
        async with open_reader(path):
            pass


async def test_a_path_with_characters_that_mean_something_in_an_address_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c%41 ü"
    make_folder(folder)
    async with opened(folder / "ledger.db") as log, open_reader(folder / "ledger.db") as reader:
        await write(log, 2)
        assert len(await reader.events(0)) == 2


def list_of(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def make(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def make_folder(path: Path) -> None:
    path.mkdir()
