"""The kept head: a ledger that does not contain it was rolled back."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support import ledgers

from events.audit import kepthead
from events.audit.audit import audit
from events.audit.kepthead import KEPT_HEAD, HeadKeeper, find_rollback
from events.audit.signing import SignedHead, Statement
from events.audit.verify import FindingKind
from events.sqlite.datalock import mark_replica
from events.sqlite.queries import read_head
from events.storage import LogHead
from events.types import Anchor

LEDGER, LONG_LEDGER = ledgers.sound_ledger(), ledgers.sound_ledger(2)


def signed(path: Path, position: int | None = None) -> SignedHead:
    with closing(sqlite3.connect(path)) as connection:
        head = read_head(connection)
        if position is not None:
            found = "SELECT position, hash, recorded_at, type FROM events WHERE position = ?"
            head = LogHead(*connection.execute(found, (position,)).fetchone())
    return ledgers.SIGN(Statement(head.position, head.hash, head.recorded_at))


async def keep(data: Path, *heads: SignedHead) -> None:
    keeper = HeadKeeper(data)
    for head in heads:
        await keeper.keep(head)


def kept_position(data: Path) -> int:
    return int(json.loads((data / KEPT_HEAD).read_text())["position"])


async def test_ledger_with_its_kept_head_is_served() -> None:
    with ledgers.copy_of(LEDGER) as path:
        missing = find_rollback(path.parent, path, ledgers.SIGN.public_key)
        assert missing is not None
        assert "is missing" in missing[1]
        for head in (signed(path, 7), signed(path)):
            await keep(path.parent, head)
            assert find_rollback(path.parent, path, ledgers.SIGN.public_key) is None
        await keep(path.parent, signed(path), signed(path, 7))
        assert kept_position(path.parent) == signed(path).statement.position


def shorten(path: Path) -> None:
    ledgers.change_ledger(path, "DELETE FROM events WHERE position > 9")


def replace_event(path: Path) -> None:
    ledgers.change_ledger(path, "UPDATE events SET hash = zeroblob(32) WHERE position = 12")


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
    with ledgers.copy_of(LEDGER) as path:
        kept = signed(path, at)
        await keep(path.parent, kept)
        change(path)
        found = find_rollback(path.parent, path, ledgers.SIGN.public_key)
        assert found is not None
        accepted, reason = found
        assert words in reason
        if words != "is damaged" and "signature" not in words:
            assert (accepted.kept_position, accepted.kept_hash) == (
                kept.statement.position, kept.statement.hash.hex(),
            )  # fmt: skip


async def test_replica_needs_no_kept_head() -> None:
    with ledgers.copy_of(LEDGER) as path:
        mark_replica(path.parent, "postgresql://a/b")
        assert find_rollback(path.parent, path, ledgers.SIGN.public_key) is None


async def test_audit_finds_ledger_without_its_kept_head() -> None:
    with ledgers.copy_of(LONG_LEDGER) as longer:
        kept = signed(longer)
    with ledgers.copy_of(LEDGER) as path:  # an earlier copy of the same ledger
        head = signed(path).statement
        await keep(path.parent, kept)
        found = audit(path, kept_in=(path.parent, ledgers.SIGN.public_key)).finding
        assert found is not None
        assert (found.position, found.kind) == (head.position, FindingKind.EXPECTATION)
        words = f"the ledger ends at position {head.position}, and its last signed head was at position"
        assert found.problem == f"{words} {kept.statement.position}"
        expected = Anchor(head.position, head.hash)
        assert audit(path, expected, kept_in=(path.parent, ledgers.SIGN.public_key)).finding is None
        await keep(path.parent, signed(path))
        assert audit(path, kept_in=(path.parent, ledgers.SIGN.public_key)).finding is None


def edit_kept(data: Path, **changes: object) -> None:
    path = data / KEPT_HEAD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


async def test_head_that_cannot_be_kept_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ledgers.copy_of(LEDGER) as path:
        await keep(path.parent, signed(path, 7))
        monkeypatch.setattr(kepthead, "KEPT_HEAD", "missing/ledger.head")
        await keep(path.parent, signed(path))
        assert "could not be kept" in caplog.text
        assert kept_position(path.parent) == 7
