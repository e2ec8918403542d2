"""Whatever somebody changes in a ledger behind our back, `verify` names the first position that is wrong."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.events import PLAIN, START, History, opened

from events.bodies import from_body
from events.canonical import canonical
from events.commands import Record
from events.errors import ForeignDatabase, FutureSchema, LedgerProblem, LogUnavailable
from events.projections import StoredJobs
from events.types import Draft, Unknown
from events.verify import Finding, Kind, Verification, verify


class Row(NamedTuple):
    position: int
    body: bytes
    hash: bytes


async def write_history(path: Path) -> None:
    """Write a ledger that has something of most things."""
    history = History()
    history.restart()
    history.load("L")
    history.ask_load("L2", version=2)
    history.start_load("L2", version=2)
    history.fail_load("L2", version=2)
    history.kill_worker("w-L")
    history.restart()
    history.load("O", of="other")
    history.ask_unload("U", "L")
    async with opened(path, now=lambda: START, monotonic=float) as log:
        for fact in history.facts:
            assert not isinstance(fact.data, Unknown)
            draft = Draft(
                fact.id, fact.data, fact.actor, fact.job_id, fact.model_id, fact.version, fact.worker_id
            )
            await log.submit(Record((draft,)))


def sound_ledger() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_history(path))
        return path.read_bytes()


LEDGER = sound_ledger()


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the ledger in a folder of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(LEDGER)
        yield path


def rows_of(path: Path) -> list[Row]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT position, CAST(body AS BLOB), hash FROM events ORDER BY position")
        return [Row(*row) for row in found]


with copy() as _path:
    ROWS = rows_of(_path)
HEAD = len(ROWS)
POSITIONS = st.integers(1, HEAD)


def change(path: Path, *statements: str) -> None:
    """Change a ledger as an attacker would, who drops what is in the way first (and is in a hurry)."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        triggers = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for (name,) in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)


def forge(path: Path, rows: list[Row]) -> None:
    """Put a table in the place of the events that takes whatever it is given."""
    change(path, "DROP TABLE events", "CREATE TABLE events (position INTEGER PRIMARY KEY, body, hash)")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO events VALUES (?, CAST(? AS TEXT), ?)", rows)
        connection.execute("COMMIT")


def rehashed(rows: list[Row]) -> list[Row]:
    """Make the chain of these rows a good one again, from the start."""
    previous, found = bytes(32), []
    for row in rows:
        previous = hashlib.sha256(previous + row.body).digest()
        found.append(row._replace(hash=previous))
    return found


def found_in(rows: list[Row]) -> Verification:
    with copy() as path:
        forge(path, rows)
        return verify(path)


def flip(data: bytes, index: int, bits: int) -> bytes:
    index %= len(data)
    return data[:index] + bytes([data[index] ^ bits]) + data[index + 1 :]


def test_a_ledger_that_nobody_touched_is_verified_and_its_head_is_told() -> None:
    with copy() as path:
        assert verify(path) == Verification(HEAD, HEAD, ROWS[-1].hash, None)
        assert verify(path).verified


def test_a_table_that_takes_anything_is_verified_as_long_as_its_rows_are_the_same() -> None:
    assert found_in(ROWS) == Verification(HEAD, HEAD, ROWS[-1].hash, None)


async def test_a_new_ledger_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path):
        pass
    assert verify(path) == Verification(0, 0, bytes(32), None)


# The chain.


@PLAIN
@given(POSITIONS, st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_of_a_body_is_found_where_it_is(position: int, index: int, bits: int) -> None:
    row = ROWS[position - 1]
    changed = row._replace(body=flip(row.body, index, bits))
    verification = found_in([*ROWS[: position - 1], changed, *ROWS[position:]])
    assert verification.finding is not None
    assert verification.finding.position == position
    assert verification.position == position - 1
    assert verification.hash == (ROWS[position - 2].hash if position > 1 else bytes(32))


@PLAIN
@given(POSITIONS, st.integers(0, 31), st.integers(1, 255))
def test_a_changed_byte_of_a_hash_is_found_where_it_is(position: int, index: int, bits: int) -> None:
    row = ROWS[position - 1]
    changed = row._replace(hash=flip(row.hash, index, bits))
    finding = found_in([*ROWS[: position - 1], changed, *ROWS[position:]]).finding
    assert finding == Finding(position, "the hash is not that of the previous hash and the body")


@PLAIN
@given(st.integers(1, HEAD - 1), st.integers(1, 3))
def test_events_that_are_gone_are_found_where_they_were(position: int, number: int) -> None:
    left = [*ROWS[: position - 1], *ROWS[position - 1 + number :]]
    finding = found_in(left).finding
    assert finding is not None
    if position + number <= HEAD:
        assert finding == Finding(position, f"missing: the next event is at position {position + number}")
    else:  # the end was cut off
        assert finding.position == position - 1


@PLAIN
@given(st.integers(1, HEAD - 1), st.integers(1, 3))
def test_events_that_are_gone_are_found_even_if_the_rest_is_numbered_anew(position: int, number: int) -> None:
    later = [row._replace(position=row.position - number) for row in ROWS[position - 1 + number :]]
    finding = found_in([*ROWS[: position - 1], *later]).finding
    assert finding is not None
    assert finding.position == (position if later else position - 1)


@PLAIN
@given(st.lists(POSITIONS, min_size=2, max_size=2, unique=True).map(sorted))
def test_events_that_were_swapped_are_found_at_the_first(positions: list[int]) -> None:
    one, other = (position - 1 for position in positions)
    swapped = list(ROWS)
    swapped[one] = ROWS[other]._replace(position=ROWS[one].position)
    swapped[other] = ROWS[one]._replace(position=ROWS[other].position)
    finding = found_in(swapped).finding
    assert finding is not None
    assert finding.position == positions[0]


@PLAIN
@given(st.integers(1, HEAD + 1), st.integers(1, HEAD))
def test_an_event_that_was_put_in_between_is_found_there(position: int, copied: int) -> None:
    new = ROWS[copied - 1]._replace(position=position)
    later = [row._replace(position=row.position + 1) for row in ROWS[position - 1 :]]
    finding = found_in([*ROWS[: position - 1], new, *later]).finding
    assert finding is not None
    assert finding.position == (position if copied != position else position + 1)


@PLAIN
@given(st.integers(0, HEAD - 1))
def test_an_end_that_was_cut_off_is_found_by_what_is_stored_beside(length: int) -> None:
    verification = found_in(ROWS[:length])
    assert verification.finding == Finding(length, f"the stored projections are at position {HEAD}")
    assert verification.position == length


@PLAIN
@given(POSITIONS)
def test_a_chain_that_was_made_anew_has_another_head_for_whoever_kept_it(position: int) -> None:
    body = canonical(json.loads(ROWS[position - 1].body) | {"actor": "mallory"}).encode()
    forged = rehashed([*ROWS[: position - 1], ROWS[position - 1]._replace(body=body), *ROWS[position:]])
    verification = found_in(forged)
    assert verification.hash != ROWS[-1].hash
    assert verification.hash == forged[-1].hash or not verification.verified


def test_an_event_whose_body_says_another_position_is_found_though_the_chain_is_good() -> None:
    body = canonical(json.loads(ROWS[4].body) | {"position": 99}).encode()
    forged = rehashed([*ROWS[:4], ROWS[4]._replace(body=body), *ROWS[5:]])
    assert found_in(forged).finding == Finding(5, "the body says position 99")


FORGERIES: tuple[dict[str, object], ...] = (
    {"data": None},
    {"data": []},
    {"type": ["LoadRequested"], "data": {}},
    {"type": "LoadStarted", "data": {"attempt": "1"}},
    {"type": "LoadStarted", "data": {}},
    {"type": "ModelLoaded", "data": {"files": 7}},
    {"job_id": {}},
    {"model_id": []},
    {"type": "ServerStarted", "data": {"unclean": True, "down_since": "yesterday"}},
    {"type": "WorkerExited", "worker_id": "w-L", "recorded_at": None},
)

FORGED_BODIES = [
    b"",
    b"no JSON",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"position":5}',
    b"[" * 100_000,
    b'{"position":' + b"9" * 5_000 + b"}",
    *(canonical(json.loads(ROWS[4].body) | changes).encode() for changes in FORGERIES),
]


@pytest.mark.parametrize("body", FORGED_BODIES, ids=lambda body: body[:40].decode())
def test_a_forged_body_in_a_good_chain_is_a_finding_and_never_an_error(body: bytes) -> None:
    verification = found_in(rehashed([*ROWS[:4], ROWS[4]._replace(body=body), *ROWS[5:]]))
    assert verification.finding is not None
    assert verification.finding.position in {5, HEAD}


@pytest.mark.parametrize(
    "change_body",
    [
        lambda body: b'{"actor":"mallory",' + body[1:],
        lambda body: body[:1] + b" " + body[1:],
        lambda body: body.replace(b"alice", b"\\u0061lice"),
        lambda body: body[:-1] + b',"z":1.5}',
    ],
    ids=["a key twice", "white space", "escapes", "a float"],
)
def test_a_body_that_is_not_in_the_canonical_form_is_found(change_body: Callable[[bytes], bytes]) -> None:
    index = next(index for index, row in enumerate(ROWS) if b'"actor":"alice"' in row.body)
    row = ROWS[index]._replace(body=change_body(ROWS[index].body))
    finding = found_in(rehashed([*ROWS[:index], row, *ROWS[index + 1 :]])).finding
    assert finding == Finding(index + 1, "the body is not in the canonical form")


@pytest.mark.parametrize("body", [b'{"position":5,"x":"\xff"}', b"\x80", b'{"a":"\xed\xa0\x80"}'])
def test_a_body_that_is_not_utf_8_is_found(body: bytes) -> None:
    forged = rehashed([*ROWS[:4], ROWS[4]._replace(body=body), *ROWS[5:]])
    assert found_in(forged).finding == Finding(5, "the body is not UTF-8")


@pytest.mark.parametrize("value", ["NULL", "7", "1.5"])
def test_a_body_that_is_no_text_is_found(value: str) -> None:
    with copy() as path:
        forge(path, ROWS)
        change(path, f"UPDATE events SET body = {value} WHERE position = 3")
        finding = verify(path).finding
        assert finding is not None
        assert finding.position == 3


@pytest.mark.parametrize("value", ["NULL", "'text'", "zeroblob(31)", "7"])
def test_a_hash_that_is_no_hash_is_found(value: str) -> None:
    with copy() as path:
        forge(path, ROWS)
        change(path, f"UPDATE events SET hash = {value} WHERE position = 3")
        finding = verify(path).finding
        assert finding is not None
        assert finding.position == 3


def test_a_type_of_a_later_release_is_verified_and_skipped() -> None:
    body = canonical(json.loads(ROWS[-1].body) | {"type": "ModelMoved", "data": {"to": "gpu"}}).encode()
    assert isinstance(from_body(body.decode()).data, Unknown)
    forged = rehashed([*ROWS[:-1], ROWS[-1]._replace(body=body)])
    finding = found_in(forged).finding
    assert finding is not None
    assert finding.problem.startswith("the stored ")  # the chain is good; the projections knew better


# The base.


def test_a_base_that_moved_is_found_at_once() -> None:
    with copy() as path:
        change(path, "UPDATE base SET hash = randomblob(32)")
        assert verify(path).finding == Finding(1, "the hash is not that of the previous hash and the body")
        change(path, "UPDATE base SET position = 3, hash = zeroblob(32)")
        assert verify(path).finding == Finding(4, "missing: the next event is at position 1")


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM base"],
        ["DROP TABLE base", "CREATE TABLE base (position, hash)", "INSERT INTO base VALUES ('0', 'text')"],
        ["DROP TABLE base", "CREATE TABLE base (position, hash)", "INSERT INTO base VALUES (NULL, NULL)"],
    ],
)
def test_a_base_that_is_gone_is_found(statements: list[str]) -> None:
    with copy() as path:
        change(path, *statements)
        assert verify(path).finding == Finding(0, "the base of the chain is missing")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO archives VALUES (3, 1, zeroblob(32), '', 'a.gz', zeroblob(32), zeroblob(32))",
        "INSERT INTO archives VALUES (3, 2, zeroblob(32), '', 'a.gz', zeroblob(32), zeroblob(32))",
    ],
)
def test_archives_that_are_told_of_where_the_log_is_whole_are_found(statement: str) -> None:
    with copy() as path:
        change(path, statement)
        finding = verify(path).finding
        assert finding is not None
        assert (finding.position, finding.kind) == (0, Kind.BASE)


# What is stored beside the log.


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE projected SET position = 3", "the stored projections are at position 3"),
        ("DELETE FROM projected", "the stored projections are at position None"),
        ("DELETE FROM models WHERE id = 'other'", "the stored models lack 'other'"),
        ("DELETE FROM jobs WHERE id = 'L2'", "the stored jobs lack 'L2'"),
        (
            "UPDATE models SET body = replace(body, 'loaded', 'failed') WHERE id = 'other'",
            "the stored models differ from the log's at 'other'",
        ),
        ("UPDATE models SET body = body || ' '", "the stored models differ from the log's at 'digits'"),
        (
            "UPDATE jobs SET body = replace(body, 'alice', 'mallory') WHERE id = 'L'",
            "the stored jobs differ from the log's at 'L'",
        ),
        (
            "UPDATE jobs SET created_position = 99 WHERE id = 'L'",
            "the stored jobs differ from the log's at 'L'",
        ),
        ("UPDATE jobs SET id = 'X' WHERE id = 'L'", "the stored jobs differ from the log's at 'X'"),
        (
            "UPDATE jobs SET id = CAST(x'ff' AS TEXT) WHERE id = 'L'",
            "the stored jobs differ from the log's at '\ufffd'",
        ),
        (
            "UPDATE jobs SET id = CAST(id AS BLOB) WHERE id = 'L'",
            "the stored jobs differ from the log's at 'L'",
        ),
        (
            "UPDATE models SET id = CAST(id AS BLOB) WHERE id = 'other'",
            "the stored models differ from the log's at 'other'",
        ),
        (
            "UPDATE models SET body = CAST(body AS BLOB) WHERE id = 'other'",
            "the stored models differ from the log's at 'other'",
        ),
        (
            "UPDATE jobs SET created_position = -1 WHERE id = 'L'",
            "the stored jobs differ from the log's at 'L'",
        ),
        ("INSERT INTO models VALUES ('ghost', '{}')", "the stored models differ from the log's at 'ghost'"),
        (
            "INSERT INTO jobs (created_position, id, body) SELECT 99, 'ghost', body FROM jobs LIMIT 1",
            "the stored jobs differ from the log's at 'ghost'",
        ),
        (
            "UPDATE models SET body = 'no JSON' WHERE id = 'other'",
            "the stored models differ from the log's at 'other'",
        ),
    ],
)
def test_projections_that_were_changed_are_named_at_the_head(statement: str, problem: str) -> None:
    with copy() as path:
        change(path, statement)
        assert verify(path) == Verification(HEAD, HEAD, ROWS[-1].hash, Finding(HEAD, problem))


def test_the_stored_body_of_a_job_need_not_even_be_json_to_be_named() -> None:
    with copy() as path:
        change(
            path,
            "CREATE TABLE forged AS SELECT created_position, id, body FROM jobs",
            "DROP TABLE jobs",
            "ALTER TABLE forged RENAME TO jobs",
            "UPDATE jobs SET body = 'no JSON' WHERE id = 'L'",
        )
        assert verify(path).finding == Finding(HEAD, "the stored jobs differ from the log's at 'L'")


@pytest.mark.parametrize("position", ["NULL", "'z'", "2.5", "x'00'"])
def test_a_job_whose_position_is_none_is_named(position: str) -> None:
    with copy() as path:
        change(
            path,
            "CREATE TABLE forged AS SELECT created_position, id, body FROM jobs",
            "DROP TABLE jobs",
            "ALTER TABLE forged RENAME TO jobs",
            f"UPDATE jobs SET created_position = {position} WHERE id = 'L'",
        )
        assert verify(path).finding == Finding(HEAD, "the stored jobs differ from the log's at 'L'")


def test_of_many_jobs_that_are_too_many_one_is_read() -> None:
    with copy() as path:
        change(
            path,
            "WITH RECURSIVE numbers (n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999)"
            " INSERT INTO jobs (created_position, id, body) SELECT n, 'x' || n, body"
            " FROM numbers, (SELECT body FROM jobs LIMIT 1)",
        )
        with closing(sqlite3.connect(path)) as connection:
            connection.text_factory = bytes
            stored = StoredJobs(connection)
            assert stored.difference(()) == "the stored jobs differ from the log's at 'L'"
            assert next(stored._walk)[1] == b"L2"


# The file.


@PLAIN
@given(st.integers(0, len(LEDGER) - 1), st.integers(1, 255))
def test_a_changed_byte_of_the_file_is_found_or_changes_no_event(index: int, bits: int) -> None:
    with copy() as path:
        path.write_bytes(flip(LEDGER, index, bits))
        try:
            verification = verify(path)
        except LedgerProblem:
            return  # it is no ledger any more, and says so
        if verification.verified:
            assert (verification.events, verification.hash) == (HEAD, ROWS[-1].hash)


@PLAIN
@given(st.integers(0, len(LEDGER) - 1))
@example(len(LEDGER) - 1)
@example(len(LEDGER) - 4_000)
@example(len(LEDGER) - 4_096)
def test_a_file_that_was_cut_off_is_never_verified(length: int) -> None:
    with copy() as path:
        path.write_bytes(LEDGER[:length])
        try:
            verification = verify(path)
        except LedgerProblem:
            return
        assert not verification.verified


def test_a_file_that_is_not_there_is_unavailable_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable):
        verify(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("this is no database, it is a sentence\n" * 100)
    with pytest.raises(LogUnavailable, match="not a database"):
        verify(path)


def test_a_ledger_of_the_future_is_not_judged() -> None:
    with copy() as path:
        change(path, "PRAGMA user_version = 99")
        with pytest.raises(FutureSchema, match="schema 99"):
            verify(path)


def test_the_database_of_somebody_else_is_not_judged() -> None:
    with copy() as path:
        change(path, "PRAGMA application_id = 7")
        with pytest.raises(ForeignDatabase):
            verify(path)


def test_verify_writes_nothing() -> None:
    with copy() as path:
        verify(path)
        assert path.read_bytes() == LEDGER
        assert all(each.stat().st_size == 0 for each in path.parent.glob("*-wal"))


async def test_verify_works_beside_a_running_log(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await write_history(path)
    async with opened(path) as log:
        last = from_body(ROWS[-1].body.decode())
        assert not isinstance(last.data, Unknown)
        draft = Draft(last.id, last.data, last.actor, None, last.model_id)
        verifying = asyncio.create_task(asyncio.to_thread(verify_often, path, 10))
        while not verifying.done():
            await log.submit(Record((replace(draft, id=f"e{log.head.position}"),)))
        found = await verifying
        assert all(verification.verified for verification in found)
        heads = [verification.position for verification in found]
        assert heads == sorted(heads)
        assert verify(path) == Verification(log.head.position, log.head.position, log.head.hash, None)


def verify_often(path: Path, times: int) -> list[Verification]:
    return [verify(path) for _ in range(times)]
