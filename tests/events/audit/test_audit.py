"""`audit` finds what was changed in the file of a ledger, and compares it with heads that were kept."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fleet import of_both
from support.history import FEWER, PLAIN
from support.ledgers import (
    SIGN,
    change_ledger,
    copy_of,
    flip_byte,
    forge_bodies,
    place_of,
    rows_of,
    sound_ledger,
)

from events.audit import kepthead
from events.audit.audit import audit
from events.audit.export import JSONL, export
from events.audit.exportreader import FileAudit, audit_file
from events.audit.kepthead import KEPT_HEAD, HeadKeeper, find_rollback
from events.audit.signing import SignedHead, Statement
from events.audit.verify import Finding, FindingKind, parse_expected
from events.errors import LedgerProblem
from events.sqlite import storage
from events.sqlite.datalock import mark_replica
from events.sqlite.queries import read_head
from events.sqlite.schema import connect
from events.storage import LogHead
from events.types import Anchor, RollbackAccepted

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
)
"""What anybody may ask of a ledger, through each index."""

LEDGER, LONG_LEDGER = sound_ledger(), sound_ledger(2)


def answers(path: Path) -> list[list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(sql).fetchall() for sql in ANSWERS]


def audited(path: Path, position: int, digest: bytes) -> Finding | None:
    return audit(path, Anchor(position, digest)).finding


with copy_of(LEDGER) as _path:
    ROWS = rows_of(_path)
    SOUND = answers(_path)
HEAD = len(ROWS)


# Bytes.


@MANY
@given(st.integers(0, len(LEDGER) - 1), st.integers(1, 255))
def test_changed_byte_of_the_file_is_found_or_changes_no_answer(index: int, bits: int) -> None:
    with copy_of(flip_byte(LEDGER, index, bits)) as path:
        try:
            finding = audit(path).finding
        except LedgerProblem:
            return  # it is no ledger any more, and says so
        if finding is None:
            assert answers(path) == SOUND


def test_damage_that_only_sqlite_sees_is_told_in_its_words() -> None:
    with copy_of(LEDGER) as path:
        assert audit(path).damage is None
        change_ledger(
            path,
            "UPDATE sqlite_schema SET rootpage = (SELECT sum(rootpage) FROM sqlite_schema WHERE name IN"
            " ('events_by_type', 'events_by_actor')) - rootpage"
            " WHERE name IN ('events_by_type', 'events_by_actor')",
            keeps_triggers=True,
        )
        found = audit(path)
        assert found.verification.verified
        assert found.damage is not None
        assert place_of(found.finding) == (HEAD, FindingKind.DAMAGED)


# An expected head.


@pytest.mark.parametrize("position", [0, 1, HEAD // 2, HEAD])
def test_expected_head_is_found_or_refuted(position: int) -> None:
    digest = ROWS[position - 1][2] if position else bytes(32)
    with copy_of(LEDGER) as path:
        assert audited(path, position, digest) is None
        assert place_of(audited(path, position, b"\1" * 32)) == (position, FindingKind.EXPECTATION)


def truncate(path: Path, length: int) -> None:
    with closing(connect(path)) as connection:
        (trigger,) = connection.execute(
            "SELECT sql FROM sqlite_schema WHERE name = 'events_never_go'"
        ).fetchone()
        connection.execute("DROP TRIGGER events_never_go")
        connection.execute("DELETE FROM events WHERE position > ?", (length,))
        connection.execute(trigger)
        storage.rebuild(connection)
        connection.execute("PRAGMA journal_mode = DELETE")


@FEWER
@given(st.integers(1, HEAD - 1))
def test_truncated_log_is_found_by_the_expected_head(length: int) -> None:
    with copy_of(LEDGER) as path:
        truncate(path, length)
        assert place_of(audited(path, HEAD, ROWS[-1][2])) == (length + 1, FindingKind.EXPECTATION)
        assert audited(path, length, ROWS[length - 1][2]) is None  # who kept only this cannot know


def exported(path: Path, until: int = HEAD) -> FileAudit:
    file = path.with_name(f"{until}.jsonl")
    file.write_bytes(b"".join(export(path, JSONL, SIGN, until=until)))
    return audit_file(file)


def test_newer_export_shows_that_the_log_was_truncated() -> None:
    with copy_of(LEDGER) as path:
        late = exported(path)
        assert audit(path, files=[late]).finding is None
        truncate(path, HEAD - 1)
        found = audit(path, files=[late])
        assert (found.at, *place_of(found.finding)) == (late.path, HEAD, FindingKind.EXPECTATION)


@pytest.mark.parametrize("end", [1, 5, HEAD])
def test_export_of_another_ledger_is_found(end: int) -> None:
    with copy_of(LEDGER) as path, copy_of(LEDGER) as other:
        forge_bodies(other, lambda _, body: body.replace('"id":"', '"id":"x'))
        own, foreign = exported(path, end), exported(other, end)
        assert audit(path, files=[own]).finding is None
        found = audit(path, files=[own, foreign])
        assert (found.at, *place_of(found.finding)) == (foreign.path, end, FindingKind.EXPECTATION)


def test_damaged_position_goes_before_the_expected_head() -> None:
    with copy_of(flip_byte(LEDGER, LEDGER.index(ROWS[4][2]), 1)) as path:
        assert place_of(audited(path, HEAD + 9, bytes(32))) == (5, FindingKind.HASH)


def test_expected_head_is_parsed() -> None:
    assert parse_expected("5:" + "aB" * 32) == Anchor(5, b"\xab" * 32)
    for text in ("", "5", "5:", ":", "5:" + "0" * 63, "-1:" + "0" * 64, "5:" + "g" * 64):
        with pytest.raises(ValueError, match="POSITION:HASH"):
            parse_expected(text)


# The kept head: a ledger that does not contain it was rolled back.


def signed(path: Path, position: int | None = None) -> SignedHead:
    with closing(sqlite3.connect(path)) as connection:
        head = read_head(connection)
        if position is not None:
            found = "SELECT position, hash, recorded_at, type FROM events WHERE position = ?"
            head = LogHead(*connection.execute(found, (position,)).fetchone())
    return SIGN(Statement(head.position, head.hash, head.recorded_at))


async def keep(data: Path, *heads: SignedHead) -> None:
    keeper = HeadKeeper(data)
    for head in heads:
        await keeper.keep(head)


def kept_position(data: Path) -> int:
    return int(json.loads((data / KEPT_HEAD).read_text())["position"])


def find_rolled_back(path: Path) -> tuple[RollbackAccepted, str] | None:
    return find_rollback(path.parent, path, SIGN.public_key)


async def test_ledger_with_its_kept_head_is_served() -> None:
    with copy_of(LEDGER) as path:
        missing = find_rolled_back(path)
        assert missing is not None
        assert "is missing" in missing[1]
        for head in (signed(path, 7), signed(path)):
            await keep(path.parent, head)
            assert find_rolled_back(path) is None
        await keep(path.parent, signed(path), signed(path, 7))
        assert kept_position(path.parent) == signed(path).statement.position
        (path.parent / KEPT_HEAD).unlink()
        mark_replica(path.parent, "postgresql://a/b")
        assert find_rolled_back(path) is None  # a replica needs none


def shorten(path: Path) -> None:
    change_ledger(path, "DELETE FROM events WHERE position > 9")


def replace_event(path: Path) -> None:
    change_ledger(path, "UPDATE events SET hash = zeroblob(32) WHERE position = 12")


@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        (shorten, None, "the ledger ends at position 9, and its last signed head was at position"),
        (replace_event, 12, "the ledger's event at position 12 is not the one that was signed"),
        (Path.unlink, 12, "the ledger is empty"),
        (lambda path: path.write_bytes(b""), 12, "the ledger is empty"),
        (lambda path: (path.parent / KEPT_HEAD).write_text("{"), 12, "is damaged"),
        (lambda path: edit_kept(path.parent, position=3), 12, "the signature in ledger.head does not hold"),
    ],
)
async def test_ledger_without_its_kept_head_is_refused(
    change: Callable[[Path], object], at: int | None, words: str
) -> None:
    with copy_of(LEDGER) as path:
        kept = signed(path, at)
        await keep(path.parent, kept)
        change(path)
        found = find_rolled_back(path)
        assert found is not None
        accepted, reason = found
        assert words in reason
        if words != "is damaged" and "signature" not in words:
            assert (accepted.kept_position, accepted.kept_hash) == (
                kept.statement.position, kept.statement.hash.hex(),
            )  # fmt: skip


async def test_audit_finds_ledger_without_its_kept_head() -> None:
    with copy_of(LONG_LEDGER) as longer:
        kept = signed(longer)
    with copy_of(LEDGER) as path:  # an earlier copy of the same ledger
        head = signed(path).statement
        kept_in = path.parent, SIGN.public_key
        await keep(path.parent, kept)
        found = audit(path, kept_in=kept_in).finding
        assert found is not None
        assert (found.position, found.kind) == (head.position, FindingKind.EXPECTATION)
        words = f"the ledger ends at position {head.position}, and its last signed head was at position"
        assert found.problem == f"{words} {kept.statement.position}"
        expected = Anchor(head.position, head.hash)
        assert audit(path, expected, kept_in=kept_in).finding is None
        await keep(path.parent, signed(path))
        assert audit(path, kept_in=kept_in).finding is None


def edit_kept(data: Path, **changes: object) -> None:
    path = data / KEPT_HEAD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


async def test_head_that_cannot_be_kept_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with copy_of(LEDGER) as path:
        await keep(path.parent, signed(path, 7))
        monkeypatch.setattr(kepthead, "KEPT_HEAD", "missing/ledger.head")
        await keep(path.parent, signed(path))
        assert "could not be kept" in caplog.text
        assert kept_position(path.parent) == 7
