"""Archives: what moved is proved by the file, what stays by the log, and together they replay to the same."""

import asyncio
import json
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, START, child, opened, write
from support.ledgers import SIGN, rows_of, stored, told_history, write_ledger
from support.soak import of_both

from events import archive as module
from events import history, rebuild, snapshots
from events.archive import Moved, archive
from events.archivefile import ExportReader, audit_file, lines_of
from events.archives import ArchivedTo
from events.audit import audit
from events.basestate import base_state_digest, read_base, read_base_state
from events.bodies import from_body
from events.clock import stamp
from events.commands import Record
from events.errors import IncompleteCopy, LedgerDamaged, MustStay, NothingThere, WrongTarget
from events.history import BadMoment
from events.schema import connect, schema_of
from events.signing import Base
from events.state import State
from events.store import Row, as_text
from events.types import Draft, Unknown
from events.verify import Kind, verify

LATER = START + timedelta(days=30)
ROUNDS = 3
HISTORY = told_history(ROUNDS)
HEAD = len(HISTORY) + 1
"""The position of the last event: `ServerStopped`."""
CUTS = st.integers(2, HEAD)


def sound_ledger() -> bytes:
    """Return a ledger that has snapshots at odd places, as a long one has."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(_written(path))
        return path.read_bytes()


async def _written(path: Path) -> None:
    for begin in range(0, len(HISTORY), 13):
        async with opened(path, now=lambda: START, monotonic=float) as log:
            for fact in HISTORY[begin : begin + 13]:
                assert not isinstance(fact.data, Unknown)
                draft = Draft(fact.id, fact.data, fact.actor, fact.job_id, fact.model_id, fact.version)
                await log.submit(Record((draft,)))
            if begin + 13 >= len(HISTORY):
                await log.server_stopped()
        with closing(connect(path)) as connection:
            (position,) = connection.execute("SELECT position FROM projected").fetchone()
            snapshots.write(connection, position)


LEDGER = sound_ledger()


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the ledger in a folder of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(LEDGER)
        yield path


def archived(path: Path, before: int | str, name: str = "archive.gz") -> Moved:
    return archive(path, str(before), path.with_name(name), SIGN, LATER)


def rows_in(path: Path) -> list[Row]:
    return list(ExportReader(lines_of(path)))


def folded(rows: list[Row], state: State | None = None) -> State:
    state = state or State()
    for row in rows:
        changes = state.apply(from_body(row.body))
        state.forget_ended(changes.jobs.values())
    return state


def texts(state: State) -> tuple[list[str], list[str]]:
    """Return what a live state says, to compare: all models, and the jobs that have not ended."""
    jobs = [job for job in state.jobs.values() if not job.ended]
    return sorted(map(as_text, state.models.values())), sorted(map(as_text, jobs))


def states(path: Path, positions: Iterator[int] | range) -> list[tuple[list[str], list[str]]]:
    with closing(connect(path)) as connection:
        return [texts(history.state_at(connection, position)) for position in positions]


with copy() as _path:
    ROWS = [Row(*row) for row in rows_of(_path)]
    STATES = states(_path, range(HEAD + 1))


# What moved and what stays.


@FEWER
@given(CUTS)
def test_archive_and_log_together_are_what_the_log_was(before: int) -> None:
    with copy() as path:
        done = archived(path, before)
        assert (done.first_position, done.last_position) == (1, before - 1)
        gone = rows_in(path.with_name("archive.gz"))
        assert gone + [Row(*row) for row in rows_of(path)] == ROWS
        assert texts(folded(ROWS[before - 1 :], folded(gone))) == STATES[-1]
        found = audit(path)
        assert found.finding is None
        assert found.base == Base(before - 1, ROWS[before - 2].hash)
        assert (found.verification.position, found.verification.hash) == (HEAD, ROWS[-1].hash)


@FEWER
@given(CUTS)
def test_each_moment_that_is_left_is_answered_as_before(before: int) -> None:
    with copy() as path:
        archived(path, before)
        assert states(path, range(before - 1, HEAD + 1)) == STATES[before - 1 :]
        with closing(connect(path)) as connection:
            base = read_base_state(connection, before - 1)
        assert texts(base) == STATES[before - 1]


@FEWER
@given(CUTS, st.data())
def test_archives_follow_one_another(before: int, data: st.DataObject) -> None:
    cuts = sorted({before, *data.draw(st.lists(CUTS, max_size=2))})
    with copy() as path:
        rows: list[Row] = []
        for number, cut in enumerate(cuts):
            archived(path, cut, f"{number}.gz")
            check = audit_file(path.with_name(f"{number}.gz"))
            assert check.after == Base(len(rows), rows[-1].hash if rows else bytes(32))
            rows += rows_in(path.with_name(f"{number}.gz"))
        assert rows + [Row(*row) for row in rows_of(path)] == ROWS
        assert audit(path).finding is None
        assert states(path, range(cuts[-1] - 1, HEAD + 1)) == STATES[cuts[-1] - 1 :]
        with closing(sqlite3.connect(path)) as connection:
            told = connection.execute("SELECT first_position, last_position, file FROM archives").fetchall()
        firsts = [1, *cuts[:-1]]
        assert told == [
            (first, cut - 1, f"{n}.gz") for n, (first, cut) in enumerate(zip(firsts, cuts, strict=True))
        ]


@FEWER
@given(CUTS)
def test_projections_made_anew_after_an_archive_are_those_that_are_stored(before: int) -> None:
    with copy() as path:
        archived(path, before)
        kept = stored(path, "jobs", "models")
        with closing(connect(path)) as connection:
            rebuild.rebuild(connection)
        assert stored(path, "jobs", "models") == kept
        assert verify(path).verified


@FEWER
@given(CUTS)
def test_jobs_that_models_are_loaded_by_stay_and_others_that_had_ended_go(before: int) -> None:
    with copy() as path:
        jobs = {str(row[1]) for row in stored(path, "jobs")["jobs"]}
        done = archived(path, before)
        left = {str(row[1]) for row in stored(path, "jobs")["jobs"]}
        assert len(jobs) - len(left) == done.jobs
        with closing(connect(path)) as connection:
            state = history.state_at(connection, HEAD)
        for model in state.models.values():
            assert model.serving is None or model.serving.load_job_id in left
        with closing(sqlite3.connect(path)) as connection:
            created = connection.execute("SELECT job_id FROM events WHERE job_id IS NOT NULL").fetchall()
        assert {job_id for (job_id,) in created} <= left


def triggers(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"))


async def test_the_log_goes_on_after_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(LEDGER)
    before = triggers(path)
    archived(path, 20)
    assert triggers(path) == before
    async with opened(path) as log:
        assert (log.head.position, log.head.hash) == (HEAD, ROWS[-1].hash)
        assert texts(log.state) == STATES[-1]
        await log.server_started()
        await write(log, 3)
        await log.server_stopped()
    assert audit(path).finding is None
    assert verify(path).position == HEAD + 5


def test_a_time_means_what_was_recorded_before_it() -> None:
    with copy() as path:
        with pytest.raises(NothingThere):
            archived(path, "2026-01-01T00:00:00Z")  # when all of it was recorded
        with pytest.raises(MustStay, match=f"--before {HEAD} at most"):
            archived(path, "2026-01-01T00:00:01+00:00")
        with pytest.raises(BadMoment):
            archived(path, "yesterday")


# What must stay.


@pytest.mark.parametrize("before", ["0", "1"])
def test_there_is_nothing_before_the_first_event(before: str) -> None:
    with copy() as path, pytest.raises(NothingThere):
        archived(path, before)


def test_the_last_event_stays() -> None:
    with copy() as path:
        with pytest.raises(MustStay):
            archived(path, HEAD + 1)
        archived(path, HEAD)
        assert [position for position, _, _ in rows_of(path)] == [HEAD]


async def test_idempotency_keys_of_the_last_24_hours_stay(tmp_path: Path) -> None:
    path, target = tmp_path / "ledger.db", tmp_path / "archive.gz"
    await write_ledger(path, key_at=5)
    almost, then = START + timedelta(hours=24, microseconds=-1), START + timedelta(hours=24)
    with pytest.raises(MustStay, match=r"position 5 .* --before 5 at most"):
        archive(path, "6", target, SIGN, almost)
    assert not target.exists()
    archive(path, "5", target, SIGN, almost)
    archive(path, "6", tmp_path / "second.gz", SIGN, then)


async def test_a_copy_that_may_lack_events_is_not_archived(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await write_ledger(path, stopped=False)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # as a copy of a running server's has it
    with pytest.raises(IncompleteCopy):
        archived(path, 5)


# What is in the way.


def test_a_ledger_that_does_not_verify_is_not_archived() -> None:
    with copy() as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("DROP TRIGGER events_never_change")
            connection.execute("UPDATE events SET hash = zeroblob(32) WHERE position = 30")
        with pytest.raises(LedgerDamaged, match="position 30"):
            archived(path, 5)
        assert len(rows_of(path)) == HEAD
        assert not path.with_name("archive.gz").exists()


def test_a_file_that_is_there_is_never_replaced() -> None:
    with copy() as path:
        archived(path, 5)
        first = path.with_name("archive.gz").read_bytes()
        with pytest.raises(WrongTarget):
            archived(path, 9)
        path.with_name("other.gz").write_text("somebody's diary")
        with pytest.raises(WrongTarget):
            archived(path, 9, "other.gz")
        assert path.with_name("archive.gz").read_bytes() == first
        assert path.with_name("other.gz").read_text() == "somebody's diary"
        assert len(rows_of(path)) == HEAD - 4


ARCHIVE_AND_DIE = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from events.archive import archive
from events.signing import HeadSigner
path, last = Path(sys.argv[1]), int(sys.argv[2])
left = last
def at_each_line(frame, event, argument):
    global left
    if not frame.f_code.co_filename.endswith(("archive.py", "files.py", "basestate.py")):
        return None
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return at_each_line
sys.settrace(at_each_line)
sign = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
archive(path, "20", path.with_name("archive.gz"), sign, datetime(2026, 2, 1, tzinfo=UTC))
sys.settrace(None)
print(last - left)
"""


def run(path: Path, lines: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        child(ARCHIVE_AND_DIE, path, lines), capture_output=True, text=True, timeout=60, check=False
    )


def test_who_is_killed_at_any_line_leaves_all_or_nothing_and_may_try_again() -> None:
    with copy() as path:
        lines = int(run(path, 10**9).stdout)
    moved = 0
    for line in [*range(3, lines, max(1, lines // of_both(short=4, long=100))), lines]:
        with copy() as path:
            assert run(path, line).returncode == -signal.SIGKILL
            first = rows_of(path)[0][0]
            assert first in {1, 20}
            moved += first == 20
            assert verify(path).verified
            assert len(rows_of(path)) == HEAD + 1 - first
            target = path.with_name("archive.gz")
            if first == 20 or target.exists():
                assert rows_in(target) == ROWS[:19]
            if first == 1:
                assert run(path, 10**9).returncode == 0
            assert audit(path).finding is None
            assert rows_in(target) + [Row(*row) for row in rows_of(path)] == ROWS
    assert moved


# What stands for the archived events.


def written_before(value: object) -> object:
    """Return JSON as a release wrote it that did not know what was added since."""
    if isinstance(value, dict):
        return {
            name: written_before(each) for name, each in value.items() if name not in {"form", "prepared"}
        }
    return value


def test_what_an_earlier_release_stored_of_archived_events_is_taken_for_what_it_means() -> None:
    with copy() as path:
        archived(path, 20)
        with closing(connect(path)) as connection:
            for table in ("model_snapshots", "models", "jobs"):
                rows = connection.execute(f"SELECT rowid, body FROM {table}").fetchall()
                for number, body in rows:
                    text = json.dumps(written_before(json.loads(body)), separators=(",", ":"), sort_keys=True)
                    connection.execute(f"UPDATE {table} SET body = ? WHERE rowid = ?", (text, number))
            connection.execute("UPDATE archives SET state_sha256 = ?", (base_state_digest(connection, 19),))
            connection.execute("UPDATE projected SET folds = 1")
            snapshots.forget(connection, 19)
            rebuild.rebuild(connection)
            snapshots.write(connection, HEAD)
            bodies = connection.execute("SELECT position, body FROM model_snapshots").fetchall()
        assert {position for position, body in bodies if "prepared" in body} == {HEAD}
        assert {position for position, _ in bodies} == {19, HEAD}
        found = audit(path, archives=[path.with_name("archive.gz")])
        assert found.finding is None
        assert found.behind is not None
        assert found.behind.is_folded
        archived(path, 33, "second.gz")
        assert audit(path).finding is None
        assert states(path, range(32, HEAD + 1)) == STATES[32:]


def test_what_archiving_would_leave_is_verified_before_anything_is_moved() -> None:
    with copy() as path, closing(connect(path)) as connection:
        connection.execute(
            "CREATE TEMP TRIGGER meddles AFTER INSERT ON main.archives"
            " BEGIN UPDATE jobs SET body = replace(body, 'alice', 'mallory'); END"
        )
        base, now = read_base(connection), stamp(LATER)
        check = module._write(connection, base, 19, path.with_name("archive.gz"), SIGN)

        def move() -> None:
            with module._all_or_nothing(connection):
                module._move(connection, base, check, "archive.gz", now)
                module._refuse_wrong(connection, path)

        with pytest.raises(LedgerDamaged, match="nothing was moved"):
            move()
        connection.execute("DROP TRIGGER meddles")
        assert read_base(connection) == base
        assert audit(path).finding is None
        assert len(rows_of(path)) == HEAD


def test_archiving_leaves_the_schema_as_it_was() -> None:
    with copy() as path:
        with closing(sqlite3.connect(path)) as connection:
            before = schema_of(connection)
        archived(path, 20)
        with closing(sqlite3.connect(path)) as connection:
            assert schema_of(connection) == before


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM model_snapshots WHERE model_id = 'digits'",
        "DELETE FROM job_snapshots",
        "UPDATE model_snapshots SET body = replace(body, 'alice', 'mallory')",
        "UPDATE model_snapshots SET body = 'no JSON'",
        "UPDATE job_snapshots SET body = '[]'",
        "UPDATE model_snapshots SET body = NULL",
        "DELETE FROM models WHERE id = 'digits'",
    ],
)
def test_a_changed_base_state_is_found(statement: str) -> None:
    with copy() as path:
        archived(path, 8)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            try:
                connection.execute(statement)
            except sqlite3.IntegrityError:
                return  # the schema itself refuses
        finding = verify(path).finding
        assert finding is not None
        assert finding.kind in {Kind.BASE, Kind.PROJECTIONS}
        assert finding.position in {7, HEAD}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM archives",
        "DELETE FROM archives WHERE last_position = 7",
        "DELETE FROM archives WHERE last_position = 19",
        "UPDATE archives SET first_position = 9 WHERE last_position = 19",
        "UPDATE archives SET first_position = 2 WHERE last_position = 7",
        "UPDATE archives SET hash = zeroblob(32) WHERE last_position = 19",
    ],
)
def test_archives_that_are_not_told_of_from_the_first_event_to_the_base_are_found(statement: str) -> None:
    with copy() as path:
        archived(path, 8, "first.gz")
        archived(path, 20, "second.gz")
        assert audit(path).archives == (ArchivedTo(1, 7, "first.gz"), ArchivedTo(8, 19, "second.gz"))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(statement)
        finding = verify(path).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (19, Kind.BASE)


def test_an_archive_that_is_refused_after_a_server_was_killed_leaves_a_file_that_can_be_verified(
    tmp_path: Path,
) -> None:
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
    with pytest.raises(MustStay):
        archived(path, 5)
    assert audit(path).finding is None
