"""Stored jobs, models and history: `verify` names what differs from a fold of the log, a rebuild mends it."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.history import FEWER, MODEL, History, as_event, at, opened, with_own_ids, write
from support.ledgers import (
    FAST_FOLDER,
    change_ledger,
    copy_of,
    place_of,
    rows_of,
    sample_history,
    sound_ledger,
    store_events,
    stored,
)
from support.strategies import drafts

from events.audit.verify import Finding, FindingKind, Verification, verify
from events.codec import decode_event, encode_event
from events.commands import Record
from events.errors import LogUnavailable
from events.jobs import Job
from events.sqlite import queries, storage
from events.sqlite.projections import StoredJobs
from events.sqlite.queries import EVENTS_PER_READ
from events.sqlite.schema import connect
from events.sqlite.storage import FOLDS, is_current, rebuild_file
from events.sqlite.writing import WRITE_GROUP, group_of
from events.state import Changes, State
from events.storage import LogHead, Row
from events.types import SYSTEM, Draft, Event, LoadFailed, TokenRevoked

LEDGER = sound_ledger()
LONG_LEDGER = sound_ledger(3)
with copy_of(LEDGER) as _path:
    HEAD, _, HEAD_HASH = rows_of(_path)[-1]
OPEN_JOBS = (
    "CREATE TABLE forged AS SELECT created_position, id, body, landmark FROM jobs; DROP TABLE jobs;"
    "ALTER TABLE forged RENAME TO jobs;"
)
"""Put a table in the place of the jobs that takes whatever it is given."""
ADD, KEY_AS_BYTES = "INSERT INTO model_history SELECT", "SET id = CAST(id AS BLOB) WHERE id ="
SURPLUS = "had, and the log does not give,"
TABLES = ("models", "jobs", "model_history", "presence", "projected")


# Jobs and models.


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE projected SET position = 3", "projections are at position 3"),
        ("DELETE FROM projected", "projections are at position None"),
        ("DELETE FROM models WHERE id = 'other'", "models lack 'other'"),
        ("DELETE FROM jobs WHERE id = 'F0'", "jobs lack 'F0'"),
    ],
)
def test_missing_projection_is_named_at_the_head(statement: str, problem: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, statement)
        assert verify(path) == Verification(HEAD, HEAD_HASH, Finding(HEAD, f"the stored {problem}"))


@pytest.mark.parametrize(
    ("table", "change", "key"),
    [
        ("models", "UPDATE models SET body = replace(body, 'loaded', 'failed') WHERE id = 'other'", "other"),
        ("models", "UPDATE models SET body = body || ' '", "digits"),
        ("models", "UPDATE models SET body = CAST(body AS BLOB) WHERE id = 'other'", "other"),
        ("models", "UPDATE models SET body = 'no JSON' WHERE id = 'other'", "other"),
        ("models", "INSERT INTO models VALUES ('ghost', '{}')", "ghost"),
        ("jobs", "UPDATE jobs SET body = replace(body, 'alice', 'mallory') WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET created_position = 99 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET created_position = -1 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET landmark = 1 WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET landmark = NULL WHERE id = 'L0'", "L0"),
        ("jobs", "UPDATE jobs SET id = 'X' WHERE id = 'L0'", "X"),
        ("jobs", "UPDATE jobs SET id = CAST(x'ff' AS TEXT) WHERE id = 'L0'", "\ufffd"),
        ("jobs", "INSERT INTO jobs (created_position, id, body) SELECT 99, 'X', body FROM jobs LIMIT 1", "X"),
        *(
            ("jobs", f"{OPEN_JOBS} UPDATE jobs SET {value} WHERE id = 'L0'", "L0")
            for value in (
                "created_position = NULL",
                "created_position = 'z'",
                "created_position = 2.5",
                "created_position = x'00'",
                "body = 'no JSON'",
            )
        ),
    ],
)
def test_changed_projection_is_named_at_the_head(table: str, change: str, key: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, *change.split(";"))
        problem = f"the stored {table} differ from the log's at {key!r}"
        assert verify(path) == Verification(HEAD, HEAD_HASH, Finding(HEAD, problem))


def test_surplus_jobs_are_read_one_by_one() -> None:
    with copy_of(LEDGER) as path:
        change_ledger(
            path,
            "WITH RECURSIVE numbers (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999)"
            " INSERT INTO jobs (created_position, id, body) SELECT n, 'x' || n, body"
            " FROM numbers, (SELECT body FROM jobs LIMIT 1)",
        )
        with closing(sqlite3.connect(path)) as connection:
            connection.text_factory = bytes
            stored = StoredJobs(connection)
            assert stored.difference(()) == "the stored jobs differ from the log's at 'L0'"
            assert next(stored._walk)[1] == b"F0"


# History.


@FEWER
@given(st.data())
def test_changed_character_of_the_history_is_found(data: st.DataObject) -> None:
    with copy_of(LONG_LEDGER) as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            rows = connection.execute("SELECT position, model_id, body FROM model_history").fetchall()
            position, model_id, body = data.draw(st.sampled_from(rows))
            index = data.draw(st.integers(0, len(body) - 1))
            other = body[:index] + chr(ord(body[index]) ^ 1) + body[index + 1 :]
            connection.execute(
                "UPDATE model_history SET body = ? WHERE position = ? AND model_id = ?",
                (other, position, model_id),
            )
        finding = verify(path).finding
        assert place_of(finding) == (position, FindingKind.PROJECTIONS)
        assert f"the stored history of the model {model_id!r} differs" in str(finding)


AT_14 = "model_history differed at position 14"
REBUILT: list[tuple[str, int, list[str]]] = [
    # what somebody did; where `verify` finds that; what the rebuild says of it
    ("DELETE FROM model_history WHERE position = 14", 14, [AT_14]),
    ("UPDATE model_history SET model_id = 'digits2' WHERE position = 14", 14, [AT_14]),
    ("UPDATE model_history SET is_common = 1 WHERE position = 14", 14, [AT_14]),
    ("UPDATE model_history SET position = 1000 WHERE position = 14", 14, [AT_14]),
    (f"{ADD} 14, 'zoo', 0, body FROM model_history LIMIT 1", 15, [AT_14]),
    (
        f"{ADD} 1000, 'zoo', 0, body FROM model_history LIMIT 1",
        54,
        ["model_history differed at position 1000"],
    ),
    (f"{ADD} -1, 'zoo', 0, body FROM model_history LIMIT 1", 2, ["model_history differed at position -1"]),
    ("UPDATE presence SET state = 'stopped' WHERE position = 1", 1, ["presence differed at position 1"]),
    ("UPDATE presence SET seen_at = at WHERE position = 1", 1, ["presence differed at position 1"]),
    ("DELETE FROM presence WHERE position = 1", 1, ["presence differed at position 1"]),
    (
        "INSERT INTO presence VALUES (1000, '', 'running', 'x', '')",
        54,
        ["presence differed at position 1000"],
    ),
    ("UPDATE jobs SET landmark = landmark + 1 WHERE id = 'L0'", 54, ["jobs differed at 'L0'"]),
    (f"UPDATE jobs {KEY_AS_BYTES} 'L0'", 54, ["jobs lacked 'L0'", f"jobs {SURPLUS} b'L0'"]),
    (f"UPDATE models {KEY_AS_BYTES} 'other'", 54, ["models lacked 'other'", f"models {SURPLUS} b'other'"]),
]


@pytest.mark.parametrize(("statement", "position", "differences"), REBUILT)
def test_tampered_projection_is_found_and_a_rebuild_mends_it(
    statement: str, position: int, differences: list[str]
) -> None:
    with copy_of(LONG_LEDGER) as path:
        sound = stored(path, *TABLES)
        assert change_ledger(path, statement, keeps_triggers=True) > 0
        finding = verify(path).finding
        assert place_of(finding) == (position, FindingKind.PROJECTIONS)
        assert rebuild_file(path).differences == [f"the stored {each}" for each in differences]
        assert verify(path).finding is None
        assert stored(path, *TABLES) == sound
        assert rebuild_file(path).differences == []


# Projections of other folds are made anew before anything uses them.

HISTORY = sample_history()


def write_outdated(path: Path, facts: list[Event]) -> None:
    """Write a ledger whose stored jobs and models are of folds that knew less."""
    with closing(connect(path)) as connection:
        store_events(connection, facts)
        connection.execute("UPDATE jobs SET body = json_remove(body, '$.cancel_requested')")
        connection.execute("UPDATE models SET body = json_remove(body, '$.incidents')")
        connection.execute("UPDATE projected SET folds = 0")


def projections(path: Path) -> dict[str, list[tuple[object, ...]]]:
    return stored(path, "jobs", "models", "projected")


async def open_once(path: Path) -> None:
    async with opened(path):
        pass


def long_history() -> list[Event]:
    history = History()
    for number in range(EVENTS_PER_READ):
        history.ask_load(f"L{number}", of=f"m{number % 7}")
        history.start_load(f"L{number}", of=f"m{number % 7}")
        if number % 3:
            history.fail_load(f"L{number}", of=f"m{number % 7}")
    return history.facts


@pytest.mark.parametrize("facts", [HISTORY, [], long_history()], ids=["history", "empty", "pages"])
async def test_outdated_projections_are_rebuilt_once(
    path: Path, facts: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_outdated(path, facts)
    before, state = verify(path), State()
    assert before.verified
    assert not before.compared  # nothing is reported before, and nothing is claimed either
    for event in facts:
        state.apply(event)
    async with opened(path) as log:
        assert (f"{len(facts)} events are folded anew" in caplog.text) == bool(caplog.text) == bool(facts)
        assert log.state.models == state.models
        assert log.state.unended() == state.unended()
        await write(log, 1)
    after = verify(path)
    assert after.verified, after.finding
    assert after.compared
    caplog.clear()
    async with opened(path) as log:
        assert log.head.position == len(facts) + 1
    assert not caplog.text


async def test_projections_are_rebuilt_for_other_folds_only(path: Path) -> None:
    with closing(connect(path.with_name("new.db"))) as connection:
        assert is_current(connection)
    write_outdated(path, HISTORY)
    await open_once(path)
    sound = projections(path)
    for folds in (0, FOLDS + 1):
        change_ledger(
            path,
            f"UPDATE projected SET folds = {folds}",
            "DELETE FROM models",
            "DELETE FROM jobs WHERE id = 'L0'",
            keeps_triggers=True,
        )
        assert not verify(path).compared
        await open_once(path)
        assert projections(path) == sound
    with closing(connect(path)) as connection:
        assert is_current(connection)
        storage.rebuild(connection)
    assert projections(path) == sound
    change_ledger(path, "DELETE FROM models WHERE id = 'other'")
    await open_once(path)
    finding = verify(path).finding  # what somebody changed is not mended in passing
    assert finding is not None
    assert finding.problem == "the stored models lack 'other'"
    change_ledger(path, "DELETE FROM projected")
    with pytest.raises(LogUnavailable, match="position of the stored projections is missing"):
        await open_once(path)


async def test_failed_rebuild_changes_nothing_and_names_the_event(path: Path) -> None:
    write_outdated(path, HISTORY)
    before = stored(path, "jobs", "models")
    change_ledger(
        path,
        "UPDATE events SET body = json_set(body, '$.data', 7, '$.type', 'LoadStarted') WHERE position = 3",
    )
    with pytest.raises(LogUnavailable, match="its event 3 is not valid"):
        await open_once(path)
    assert stored(path, "jobs", "models") == before


# Every body is stored to the byte, however events were grouped.

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
"""All that UTF-8 has."""
GROUPS = st.lists(st.lists(st.lists(drafts(), min_size=1, max_size=3), min_size=1, max_size=6), max_size=6)
"""Groups of commands of facts: each group is submitted at once."""


@FEWER
@given(GROUPS)
@example(
    [
        [
            [Draft(key, TokenRevoked(jti, at(1)), SYSTEM)]
            for key, jti in (("1", "a\0b"), ("2", "a\0c"), ("3", "é"))
        ]
    ]
)
def test_stored_tables_equal_a_fold_of_the_log(groups: list[list[list[Draft]]]) -> None:
    async def write(path: Path, to_write: list[list[list[Draft]]]) -> State:
        known = set[str]()
        async with opened(path) as log:
            for group in to_write:
                commands = [Record(tuple(with_own_ids(command, known))) for command in group]
                await asyncio.gather(*map(log.submit, commands))
            return log.state

    with TemporaryDirectory(dir=FAST_FOLDER) as folder:
        path = Path(folder) / "ledger.db"
        live = asyncio.run(write(path, groups))
        state, jobs = State(), dict[str, Job]()
        with closing(connect(path)) as connection:
            for body, *columns in connection.execute(
                "SELECT body, type, model_id, job_id, actor, recorded_at FROM events ORDER BY position"
            ):
                event = decode_event(body)
                assert columns == [event.type, event.model_id, event.job_id, event.actor, event.recorded_at]
                jobs.update(state.apply(event).jobs)
            assert state.position == sum(len(command) for group in groups for command in group)
            assert connection.execute("SELECT position FROM projected").fetchall() == [(state.position,)]
            models = connection.execute("SELECT id, body FROM models").fetchall()
            assert {key: queries.as_model(body) for key, body in models} == state.models == live.models
            rows = connection.execute("SELECT body, id, created_position, model_id, status FROM jobs")
            for body, *columns in rows.fetchall():
                job = jobs.pop(columns[0])
                assert queries.as_job(body) == job
                assert columns == [job.id, job.created_position, job.model_id, str(job.status)]
            assert not jobs
            assert live.unended() == state.unended()
            assert live.jobs.keys() == {job.id for job in state.unended()}
            by_writer = stored(path, "jobs", "models", "projected")
            storage.rebuild(connection)
        assert stored(path, "jobs", "models", "projected") == by_writer
        assert asyncio.run(write(path, [])) == live
        verification = verify(path)
        assert verification.verified, verification.finding
        assert verification.position == state.position


@FEWER
@given(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
@example(["\0", "a\0b", '"', "\\", "\\u0000", "\x1f\x7f\x85\u2028\ufeff", "é\U0001f600\uffff", "[{"])
def test_any_text_is_stored_as_it_is_hashed(texts: list[str]) -> None:
    drafts = [Draft(text, LoadFailed(text, text), SYSTEM, None, text, 1) for text in texts]
    events = [as_event(draft, number, number) for number, draft in enumerate(drafts, 1)]
    with closing(connect(Path(":memory:"))) as connection:
        store_events(connection, events)
        found = connection.execute("SELECT body FROM events ORDER BY position").fetchall()
        assert found == [(encode_event(event),) for event in events]
        types = connection.execute("SELECT DISTINCT typeof(position), typeof(body), typeof(hash) FROM events")
        assert types.fetchall() == [("integer", "text", "blob")]


def test_group_beside_the_head_is_not_written() -> None:
    history = History()
    history.ask_load("L")
    one, two = (Row(position, encode_event(history.facts[0]), bytes(32)) for position in (1, 3))
    with closing(connect(Path(":memory:"))) as connection:
        changes = Changes(history.state.models, history.state.jobs)
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(WRITE_GROUP, group_of([one, two], changes, LogHead()))
        assert not connection.in_transaction
        for sql in ("SELECT * FROM events", "SELECT * FROM jobs", "SELECT * FROM projected WHERE position"):
            assert connection.execute(sql).fetchall() == []


def test_removed_rows_are_stored_again_with_the_next_event() -> None:
    history = History()
    history.ask_load("L")
    history.ask_load("M", of="other")
    with closing(connect(Path(":memory:"))) as connection:
        store_events(connection, history.facts)
        connection.execute("DELETE FROM jobs WHERE id = 'L'")
        connection.execute("DELETE FROM models")
        history.start_load("L")
        history.start_load("M", of="other")
        changes = Changes(history.state.models, history.state.jobs)
        connection.execute(WRITE_GROUP, group_of((), changes, LogHead(4)))
        stored_models = connection.execute("SELECT body FROM models ORDER BY id").fetchall()
        assert stored_models == [(queries.as_text(history.model(each)),) for each in (MODEL, "other")]
        stored_jobs = connection.execute("SELECT created_position, body FROM jobs ORDER BY 1").fetchall()
        assert stored_jobs == [
            (job.created_position, queries.as_text(job)) for job in history.state.unended()
        ]
