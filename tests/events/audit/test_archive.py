"""Archives: the file proves what moved, the log proves what stays, and together they replay to the same."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ledgers
from support.crashes import run_counted, run_traced
from support.fleet import of_both
from support.history import FEWER, START, opened, write

from events.audit.archive import archive, move_events
from events.audit.audit import audit
from events.audit.exportreader import ExportReader, FileAudit, audit_file, read_lines
from events.audit.replay import replay
from events.audit.verify import FindingKind, verify
from events.errors import LedgerDamaged, LogUnavailable, MustStay, NothingThere, WrongTarget
from events.sqlite import queries, storage
from events.sqlite.bases import LedgerFile, read_stored_base, state_at_base
from events.sqlite.queries import as_text
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import connect, schema_of
from events.sqlite.timetravel import InvalidMoment
from events.state import State
from events.storage import Row, digest_state
from events.types import Anchor

LATER = START + timedelta(days=30)
LEDGER = ledgers.sound_ledger(3)


def archived(path: Path, before: int | str, name: str = "archive.gz") -> FileAudit:
    return archive(path, str(before), path.with_name(name), ledgers.SIGN, LATER)


def rows_in(path: Path) -> list[Row]:
    return list(ExportReader(read_lines(path)))


def texts(state: State) -> tuple[list[str], list[str]]:
    return sorted(map(as_text, state.models.values())), sorted(map(as_text, state.unended()))


def states(path: Path, positions: Iterable[int]) -> list[tuple[list[str], list[str]]]:
    found = []
    with closing(connect(path)) as connection:
        for position in positions:
            found.append(texts(replay(connection, str(position))[1]))
            connection.rollback()
    return found


def job_ids(path: Path) -> set[str]:
    return {str(row[1]) for row in ledgers.stored(path, "jobs")["jobs"]}


with ledgers.copy_of(LEDGER) as _path:
    ROWS = [Row(*row) for row in ledgers.rows_of(_path)]
    HEAD = len(ROWS)
    STATES = states(_path, range(HEAD + 1))
CUTS = st.lists(st.integers(2, HEAD), min_size=1, max_size=3, unique=True).map(sorted)


# What moves and what stays.


@FEWER
@given(CUTS)
def test_archives_and_log_together_are_the_log_before(cuts: list[int]) -> None:
    with ledgers.copy_of(LEDGER) as path:
        gone, listed, stated = list[Row](), list[tuple[int, str, str]](), b""
        for cut in cuts:
            file = path.with_name(f"{cut}.gz")
            done = archived(path, cut, file.name)
            assert done == audit_file(file)
            assert done.after == Anchor(len(gone), gone[-1].hash if gone else bytes(32))
            gone += rows_in(file)
            assert done.proved == Anchor(cut - 1, gone[-1].hash)
            stated = done.head.statement.state_sha256 if done.head else b""
            listed.append((cut - 1, json.loads(gone[-1].body)["recorded_at"], file.name))
        left = [Row(*row) for row in ledgers.rows_of(path)]
        assert gone + left == ROWS
        found = audit(path)
        assert found.finding is None
        assert found.base == Anchor(len(gone), gone[-1].hash)
        assert (found.verification.position, found.verification.hash) == (HEAD, ROWS[-1].hash)
        assert list(found.archives) == listed
        assert states(path, range(len(gone), HEAD + 1)) == STATES[len(gone) :]
        assert job_ids(path) >= {job_id for row in left if (job_id := json.loads(row.body)["job_id"])}
        with closing(connect(path)) as connection:
            stored = read_stored_base(connection)
            assert texts(state_at_base(stored)) == STATES[len(gone)]
            assert stated == stored.state_sha256
            for model in queries.read_state(connection).models.values():
                assert model.serving is None or model.serving.load_job_id in job_ids(path)
            kept = ledgers.stored(path, "jobs", "models")
            storage.rebuild(connection)
        assert ledgers.stored(path, "jobs", "models") == kept
        assert verify(path).verified


async def test_log_goes_on_after_an_archive() -> None:
    with ledgers.copy_of(LEDGER) as path, closing(sqlite3.connect(path)) as connection:
        before = schema_of(connection)
    with ledgers.archived_copy(LEDGER, 20) as (path, _):
        with closing(sqlite3.connect(path)) as connection:
            assert schema_of(connection) == before
        async with opened(path) as log:
            assert (log.head.position, log.head.hash) == (HEAD, ROWS[-1].hash)
            assert texts(log.state) == STATES[-1]
            await log.server_started()
            await write(log, 3)
            await log.server_stopped()
        assert audit(path).finding is None
        assert verify(path).position == HEAD + 5


@pytest.mark.parametrize(
    ("before", "error", "words"),
    [
        ("0", NothingThere, "the log begins after position 0"),
        ("1", NothingThere, "the log begins after position 0"),
        ("2026-01-01T00:00:00Z", NothingThere, "no events before that"),  # all of it was recorded then
        (str(HEAD + 1), MustStay, f"--before {HEAD} at most"),
        ("2026-01-01T00:00:01+00:00", MustStay, f"--before {HEAD} at most"),
        ("yesterday", InvalidMoment, "yesterday"),
    ],
)
def test_moment_that_cannot_be_archived_to_is_refused(
    before: str, error: type[Exception], words: str
) -> None:
    with ledgers.copy_of(LEDGER) as path:
        with pytest.raises(error, match=words):
            archived(path, before)
        assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]


def test_name_that_is_not_utf_8_is_refused() -> None:
    with ledgers.copy_of(LEDGER) as path:
        odd = path.with_name(os.fsdecode(b"\xff.gz"))
        with pytest.raises(WrongTarget, match="not UTF-8: choose another"):
            archive(path, "8", odd, ledgers.SIGN, START + timedelta(days=30))
        assert [each.name for each in path.parent.iterdir()] == ["ledger.db"]


async def test_idempotency_keys_of_the_last_24_hours_stay(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "archive.gz"
    await ledgers.write_ledger(path, key_at=5)
    almost, then = START + timedelta(hours=24, microseconds=-1), START + timedelta(hours=24)
    with pytest.raises(MustStay, match=r"position 5 .* --before 5 at most"):
        archive(path, "6", target, ledgers.SIGN, almost)
    assert not target.exists()
    archive(path, "5", target, ledgers.SIGN, almost)
    archive(path, "6", tmp_path / "second.gz", ledgers.SIGN, then)


# What is in the way.


def test_damaged_ledger_is_not_archived() -> None:
    with ledgers.copy_of(LEDGER) as path:
        ledgers.change_ledger(path, "UPDATE events SET hash = zeroblob(32) WHERE position = 30")
        with pytest.raises(LedgerDamaged, match="position 30"):
            archived(path, 5)
        assert len(ledgers.rows_of(path)) == HEAD
        assert not path.with_name("archive.gz").exists()


def test_existing_file_is_never_replaced() -> None:
    with ledgers.copy_of(LEDGER) as path:
        archived(path, 5)
        first = path.with_name("archive.gz").read_bytes()
        path.with_name("other.gz").write_text("somebody's diary")
        for name in ("archive.gz", "other.gz"):
            with pytest.raises(WrongTarget):
                archived(path, 9, name)
        assert path.with_name("archive.gz").read_bytes() == first
        assert path.with_name("other.gz").read_text() == "somebody's diary"
        assert len(ledgers.rows_of(path)) == HEAD - 4


def test_refused_archive_of_a_killed_server_leaves_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledgers.write_and_be_killed(path, 3)
    with pytest.raises(MustStay):
        archived(path, 5)
    assert audit(path).finding is None


def test_cut_that_would_remove_other_events_changes_nothing() -> None:
    with ledgers.copy_of(LEDGER) as path, closing(connect(path)) as connection:
        connection.execute(
            "CREATE TEMP TRIGGER meddles AFTER INSERT ON main.archives"
            " BEGIN DELETE FROM events WHERE position = 5; END"
        )
        with pytest.raises(LedgerDamaged, match="nothing was moved"):
            move_events(LedgerFile(connection), "20", path.with_name("archive.gz"), ledgers.SIGN, LATER)
        connection.execute("DROP TRIGGER meddles")
        assert audit(path).finding is None
        assert len(ledgers.rows_of(path)) == HEAD


TRACED = ("/archive.py", "/bases.py", "/files.py", "/sqlite/history.py")


def archive_traced(path: Path, killed_at: int | None = None) -> int:
    return run_traced(lambda: archived(path, 20), TRACED, killed_at)


def archive_counted(path: Path, killed_at: int | None = None) -> int:
    return run_counted(lambda: archived(path, 20), killed_at)


@pytest.mark.parametrize("run", [archive_traced, archive_counted])
def test_archive_killed_at_any_moment_moves_all_or_nothing(run: Callable[..., int]) -> None:
    with ledgers.copy_of(LEDGER) as path:
        moments = run(path)
    moved = 0
    for moment in [*range(3, moments, max(1, moments // of_both(short=10, long=100))), moments]:
        with ledgers.copy_of(LEDGER) as path:
            assert ledgers.run_forked(partial(run, path, moment)) == -signal.SIGKILL
            assert verify(path).verified
            first = ledgers.rows_of(path)[0][0]
            assert first in {1, 20}
            moved += first == 20
            assert len(ledgers.rows_of(path)) == HEAD + 1 - first
            target = path.with_name("archive.gz")
            if first == 20 or target.exists():
                assert rows_in(target) == ROWS[:19]
            if first == 1:
                assert archived(path, 20).proved.position == 19
            assert audit(path).finding is None
            assert rows_in(target) + [Row(*row) for row in ledgers.rows_of(path)] == ROWS
    assert moved


# What is stored in place of archived events.


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM base_state WHERE key = 'digits'",
        "DELETE FROM base_state WHERE kind = 'job'",
        "UPDATE base_state SET body = replace(body, 'alice', 'mallory')",
        "UPDATE base_state SET body = 'no JSON' WHERE kind = 'model'",
        "UPDATE base_state SET body = '[]' WHERE kind = 'job'",
        "DELETE FROM models WHERE id = 'digits'",
        "INSERT INTO base_state VALUES ('token', 't', '{}')",
    ],
)
def test_changed_base_state_is_found(statement: str) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, _):
        assert ledgers.change_ledger(path, statement) > 0
        expected = (HEAD, FindingKind.PROJECTIONS) if " models " in statement else (19, FindingKind.BASE)
        assert ledgers.place_of(verify(path).finding) == expected


NULLABLE = "UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '') WHERE name = '{}'"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ([NULLABLE.format("base_state"), "UPDATE base_state SET body = NULL"], (19, FindingKind.BASE)),
        ([NULLABLE.format("archives"), "UPDATE archives SET file = NULL"], (HEAD, FindingKind.SCHEMA)),
        (["UPDATE base SET position = 'text'"], (0, FindingKind.BASE)),
        (["DELETE FROM base"], (0, FindingKind.BASE)),
    ],
)
def test_base_of_other_types_is_found(changes: list[str], place: tuple[int, FindingKind]) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        for change in changes:  # each in a connection that reads the schema anew
            assert ledgers.change_ledger(path, change) > 0
        for archives in ([], files):
            assert ledgers.place_of(audit(path, archives=archives).finding) == place
        if place[0] == 0:
            with open_read_only(path) as ledger, pytest.raises(LogUnavailable, match="the base of the chain"):
                replay(ledger, "25")


def test_forged_job_that_ended_as_it_was_created_is_found() -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, _):
        ledgers.change_ledger(
            path,
            "UPDATE base_state SET body = json_set(body, '$.status', 'completed',"
            " '$.position', json_extract(body, '$.created_position')) WHERE kind = 'job'",
        )
        with open_read_only(path) as ledger:
            digest = digest_state(read_stored_base(ledger).entities)
        ledgers.change_ledger(path, f"UPDATE base SET state_sha256 = x'{digest.hex()}'")
        assert ledgers.place_of(verify(path).finding) == (HEAD, FindingKind.PROJECTIONS)
