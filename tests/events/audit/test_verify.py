"""`verify` names the first position of the log that is wrong, whatever somebody changed in the file."""

import asyncio
import hashlib
import json
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fleet import of_both
from support.history import PLAIN, child, facts, opened
from support.ledgers import change_ledger, copy_of, flip_byte, place_of, rows_of, sound_ledger

from events.audit.verify import CheckedFold, Finding, FindingKind, Verification, verify
from events.codec import decode_event, encode_canonical
from events.errors import LedgerProblem
from events.sqlite.proof import KnownIds
from events.storage import StorageError
from events.types import Anchor


class Row(NamedTuple):
    position: int
    body: bytes
    hash: bytes


LEDGER = sound_ledger()
with copy_of(LEDGER) as _path:
    ROWS = [Row(position, body.encode(), digest) for position, body, digest in rows_of(_path)]
HEAD = len(ROWS)
POSITIONS = st.integers(1, HEAD)


with copy_of(LEDGER) as _path:
    change_ledger(
        _path, "DROP TABLE events", "CREATE TABLE events (position INTEGER PRIMARY KEY, body, hash)"
    )
    OPEN_LEDGER = _path.read_bytes()
"""A ledger whose table of events takes whatever it is given."""


def verify_stored(rows: list[Row]) -> Verification:
    with copy_of(OPEN_LEDGER) as path:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.executemany("INSERT INTO events VALUES (?, CAST(? AS TEXT), ?)", rows)
            connection.commit()
        return verify(path)


def rehashed(rows: list[Row]) -> list[Row]:
    previous, found = bytes(32), []
    for row in rows:
        previous = hashlib.sha256(previous + row.body).digest()
        found.append(row._replace(hash=previous))
    return found


def with_body(position: int, body: bytes) -> list[Row]:
    return rehashed([*ROWS[: position - 1], ROWS[position - 1]._replace(body=body), *ROWS[position:]])


def edited(position: int, /, **members: object) -> bytes:
    return encode_canonical(json.loads(ROWS[position - 1].body) | members).encode()


async def test_sound_ledger_verifies_and_is_not_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "new.db"):
        pass
    assert verify(tmp_path / "new.db") == Verification(0, bytes(32), None)
    assert verify_stored(ROWS) == Verification(HEAD, ROWS[-1].hash, None)
    with copy_of(LEDGER) as path:
        assert verify(path) == Verification(HEAD, ROWS[-1].hash, None)
        assert path.read_bytes() == LEDGER
        assert all(each.stat().st_size == 0 for each in path.parent.glob("*-wal"))


# The chain.


@st.composite
def tampered(draw: st.DrawFn) -> list[Row]:
    """Return rows of which some are missing, moved or repeated, or one has another byte."""
    if draw(st.booleans()):
        row, index, bits = (
            draw(st.sampled_from(ROWS)),
            draw(st.integers(0, 10_000)),
            draw(st.integers(1, 255)),
        )
        if draw(st.booleans()):
            forged = row._replace(hash=flip_byte(row.hash, index, bits))
        else:
            forged = row._replace(body=flip_byte(row.body, index, bits))
        return [*ROWS[: row.position - 1], forged, *ROWS[row.position :]]
    end, first, last, again = (draw(POSITIONS) for _ in range(4))
    pieces = [*ROWS[: end - 1], *ROWS[first - 1 : last], *ROWS[again:]]
    if draw(st.booleans()):
        return sorted(set(pieces))
    return [row._replace(position=position) for position, row in enumerate(pieces, 1)]


@settings(PLAIN, max_examples=of_both(short=300, long=2_000))
@given(tampered())
@example(ROWS)
@example([])
@example(ROWS[:-1])
@example([*ROWS[:3], ROWS[4]._replace(position=4), ROWS[3]._replace(position=5), *ROWS[5:]])
def test_tampered_chain_is_found_at_the_first_position(rows: list[Row]) -> None:
    wrong = next((at for at, (row, sound) in enumerate(zip(rows, ROWS, strict=False), 1) if row != sound), 0)
    found = verify_stored(rows)
    if wrong or len(rows) > HEAD:
        assert place_of(found.finding)[0] == (wrong or HEAD + 1)
        assert found.position == (wrong or HEAD + 1) - 1
        assert found.hash == (ROWS[found.position - 1].hash if found.position else bytes(32))
    elif len(rows) < HEAD:
        assert found.finding == Finding(len(rows), f"the stored projections are at position {HEAD}")
    else:
        assert found.finding is None


# Bodies that are in a good chain.


OTHER_FORMS = [
    *(b"", b"no JSON", b"null", b"[]", b'"text"', b"{}", b'{"position":5}', b"[" * 100_000),
    b'{"position":' + b"9" * 5_000 + b"}",
    *(edited(5, data=None), edited(5, data=[]), edited(5, type=["LoadRequested"], data={})),
    *(edited(5, type="LoadStarted", data={"attempt": "1"}), edited(5, type="LoadStarted", data={})),
    *(edited(5, type="ModelLoaded", data={"files": 7}), edited(5, job_id={}), edited(5, model_id=[])),
    edited(5, type="ServerStarted", data={"unclean": True, "last_seen_at": "yesterday"}),
    edited(5, type="WorkerExited", worker_id="w-L0", recorded_at=None),
]
NOT_UTF_8, NOT_CANONICAL = "the body is not UTF-8", "the body is not in the canonical form"
FORGED = [
    *((body, "") for body in OTHER_FORMS),
    (edited(5, position=99), "the body says position 99"),
    (b'{"position":5,"x":"\xff"}', NOT_UTF_8),
    (b"\x80", NOT_UTF_8),
    (b'{"a":"\xed\xa0\x80"}', NOT_UTF_8),
    (b'{"actor":"mallory",' + ROWS[4].body[1:], NOT_CANONICAL),
    (b"{ " + ROWS[4].body[1:], NOT_CANONICAL),
    (ROWS[4].body.replace(b"alice", b"\\u0061lice"), NOT_CANONICAL),
    (ROWS[4].body[:-1] + b',"z":1.5}', NOT_CANONICAL),
]


@pytest.mark.parametrize(("body", "problem"), FORGED, ids=range(len(FORGED)))
def test_forged_body_in_a_good_chain_is_a_finding(body: bytes, problem: str) -> None:
    found = verify_stored(with_body(5, body)).finding
    assert place_of(found)[0] in {5, HEAD}
    assert not problem or found == Finding(5, problem)


def test_event_recorded_before_its_predecessor_is_found() -> None:
    body = ROWS[4].body.replace(b"2026-01-01T", b"2025-01-01T")
    assert place_of(verify_stored(with_body(5, body)).finding) == (5, FindingKind.ORDER)


# The tables.

NEW_EVENTS = (
    "CREATE TABLE forged AS SELECT position, body, hash FROM events",
    "DROP TABLE events",
    "ALTER TABLE forged RENAME TO events",
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("body = NULL", "not UTF-8"),
        ("body = 7", "the hash is not"),
        ("body = 1.5", "the hash is not"),
        ("hash = NULL", "the hash is not"),
        ("hash = 'text'", "the hash is not"),
        ("hash = zeroblob(31)", "the hash is not"),
    ],
)
def test_changed_table_is_found(change: str, problem: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, *NEW_EVENTS, f"UPDATE events SET {change} WHERE position = 3")
        finding = verify(path).finding
        assert place_of(finding)[0] == 3
        assert problem in str(finding)


# The file.


@PLAIN
@given(st.integers(0, len(LEDGER) - 1))
@example(len(LEDGER) - 1)
@example(len(LEDGER) - 4_000)
@example(len(LEDGER) - 4_096)
def test_truncated_file_never_verifies(length: int) -> None:
    with copy_of(LEDGER[:length]) as path:
        try:
            verification = verify(path)
        except LedgerProblem:
            return
        assert not verification.verified


async def test_verify_works_beside_a_running_log() -> None:
    with copy_of(LEDGER) as path:
        async with opened(path) as log:
            often = asyncio.to_thread(lambda: [verify(path) for _ in range(10)])
            verifying = asyncio.ensure_future(often)
            commands = facts(100_000)
            while not verifying.done():
                await log.submit(next(commands))
            heads = [each.position for each in await verifying if each.verified]
            assert len(heads) == 10
            assert heads == sorted(heads)
            assert verify(path) == Verification(log.head.position, log.head.hash, None)


# Rows of a log that is not in a file.


def verify_rows(rows: Iterable[Row]) -> Verification:
    fold = CheckedFold(Anchor())
    return fold.result(fold.follow(rows), compared=False)


def test_event_with_the_id_of_an_earlier_one_is_named() -> None:
    known = decode_event(ROWS[2].body).id
    found = verify_stored(with_body(HEAD, edited(HEAD, id=known)))
    assert place_of(found.finding) == (HEAD, FindingKind.EVENT)
    assert found.finding is not None
    assert known in found.finding.problem


def test_changed_row_of_any_log_is_named() -> None:
    changed = [*ROWS[:2], ROWS[2]._replace(body=edited(3, actor="mallory")), *ROWS[3:]]
    found = verify_rows(changed)
    assert (found.position, *place_of(found.finding)) == (2, 3, FindingKind.HASH)


def test_long_hashes_are_read_a_few_at_a_time() -> None:
    rows = iter([Row(position, b"{}", bytes(2**20)) for position in range(1, 101)])
    found = verify_rows(rows)
    assert place_of(found.finding) == (1, FindingKind.HASH)
    assert len(list(rows)) > 90


def test_failure_to_read_rows_is_no_finding() -> None:
    def rows() -> Iterator[Row]:
        yield from ROWS[:3]
        raise StorageError("the connection was lost")

    with pytest.raises(StorageError, match="was lost"):
        verify_rows(rows())


# The ids that are kept in a temporary file.

FILL = """
import resource
from events.errors import LogUnavailable
from events.sqlite.proof import KnownIds
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    KnownIds().add([f"{each:036}" for each in range(10**5)])
except LogUnavailable as error:
    print(error.code, error)
"""


def test_ids_are_added_up_to_the_first_known_one() -> None:
    ids = KnownIds()
    assert ids.add(["a", "b"]) == 2
    assert ids.add(["c", "a", "d"]) == 1
    assert ids.add(["d"]) == 1


def test_full_disk_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        child(FILL), env={"SQLITE_TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("log_unavailable the events' ids cannot be kept in a temporary file: ")
    assert "SQLITE_TMPDIR" in done.stdout
    assert list(tmp_path.iterdir()) == []
