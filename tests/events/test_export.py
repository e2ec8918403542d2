"""Exports: complete, exact, verifying by themselves, whatever the log does and whoever changes them."""

import asyncio
import gzip
import hashlib
import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN, opened, write
from support.ledgers import SIGN, rows_of, write_ledger

from events.archivefile import ExportReader, audit_file
from events.errors import IncompleteCopy, LedgerDamaged, LogUnavailable, NothingThere
from events.export import HEAD_TYPE, PAGE, cloudevents, export, jsonl
from events.signing import Base, as_signed_head
from events.store import Row


@pytest.fixture
async def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    await write_ledger(path)
    return path


def exported(path: Path, **bounds: int) -> list[bytes]:
    return list(export(path, jsonl(), SIGN, **bounds))


def read(lines: list[bytes]) -> tuple[list[Row], Any]:
    """Return the events of an export, and its head."""
    reader = ExportReader(lines)
    return list(reader), reader.head


def test_an_export_has_each_event_exactly_and_ends_with_the_signed_head(ledger: Path) -> None:
    rows, head = read(exported(ledger))
    assert [(row.position, row.body, row.hash) for row in rows] == rows_of(ledger)
    assert head.holds()
    assert (head.statement.position, head.statement.hash) == (rows[-1].position, rows[-1].hash)
    assert head.statement.recorded_at == json.loads(rows[-1].body)["recorded_at"]


def test_parts_of_a_log_are_exports_that_fit_together(ledger: Path) -> None:
    whole, _ = read(exported(ledger))
    for cut in range(len(whole) + 1):
        first, head = read(exported(ledger, until=cut))
        second, _ = read(exported(ledger, after=cut))
        assert first + second == whole
        after = json.loads(exported(ledger, after=cut)[0])["after"]
        assert (head.statement.position, head.statement.hash.hex()) == (after["position"], after["hash"])


def test_each_line_is_ascii_and_one_line(ledger: Path) -> None:
    for line in exported(ledger):
        assert line.isascii()
        assert line.endswith(b"\n")
        assert len(line.splitlines()) == 1


@pytest.mark.parametrize("bounds", [{"after": 99}, {"until": 99}, {"after": 5, "until": 4}])
def test_what_is_not_there_is_not_exported(ledger: Path, bounds: dict[str, int]) -> None:
    with pytest.raises(NothingThere):
        exported(ledger, **bounds)


async def test_an_export_beside_a_log_that_goes_on_ends_where_the_log_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path) as log:
        await asyncio.gather(*(write(log, 1, first=number) for number in range(1, PAGE + 100)))
        lines = export(path, jsonl(), SIGN)
        some = [next(lines) for _ in range(10)]
        await write(log, 5, first=10_000)
        rows, _ = read([*some, *lines])
        assert len(rows) == PAGE + 99


def test_a_ledger_that_was_changed_is_not_signed(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET body = replace(body, 'alice', 'mallory') WHERE position = 2")
    lines: list[bytes] = []
    with pytest.raises(LedgerDamaged, match="position 2"):
        lines.extend(export(ledger, jsonl(), SIGN))
    assert not any(b'"head"' in line for line in lines)


def test_a_ledger_with_a_gap_is_not_signed(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER events_never_go")
        connection.execute("DELETE FROM events WHERE position = 4")
    with pytest.raises(LedgerDamaged, match="position 4 is missing"):
        exported(ledger)


async def test_a_copy_that_may_lack_events_is_not_signed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await write_ledger(path, stopped=False)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # as a copy of a running server's has it
    with pytest.raises(IncompleteCopy, match=r"ledger\.db-wal"):
        exported(path)


def test_a_ledger_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable):
        exported(tmp_path / "ledger.db")


# What somebody makes of an export.


def sound_export() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_ledger(path))
        return b"".join(exported(path))


EXPORT = sound_export()
LINES = EXPORT.splitlines(keepends=True)


def proved(lines: list[bytes]) -> list[Row] | None:
    with suppress(LedgerDamaged):
        return read(lines)[0]
    return None


@PLAIN
@given(st.integers(0, len(EXPORT) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found_or_changes_nothing_that_is_said(index: int, bits: int) -> None:
    changed = EXPORT[:index] + bytes([EXPORT[index] ^ bits]) + EXPORT[index + 1 :]
    found = proved(changed.splitlines(keepends=True))
    assert found is None or found == proved(LINES)


@PLAIN
@given(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES) - 1))
def test_lines_that_are_cut_swapped_or_left_out_are_found(one: int, other: int) -> None:
    assert proved(LINES[:one]) is None
    assert proved(LINES[:one] + LINES[one + 1 :]) is None
    assert proved([*LINES[:one], LINES[other], *LINES[one:]]) is None
    swapped = list(LINES)
    swapped[one], swapped[other] = LINES[other], LINES[one]
    assert (proved(swapped) is None) == (one != other)


@PLAIN
@given(st.integers(0, len(EXPORT) - 1), st.integers(0, 10_000), st.integers(1, 255))
def test_a_compressed_export_that_is_damaged_is_never_verified(cut: int, index: int, bits: int) -> None:
    packed = gzip.compress(EXPORT)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "export.gz"
        path.write_bytes(packed)
        head = audit_file(path).head
        path.write_bytes(packed[: cut % len(packed)])
        assert audit_file(path).finding is not None
        index %= len(packed)
        path.write_bytes(packed[:index] + bytes([packed[index] ^ bits]) + packed[index + 1 :])
        found = audit_file(path)
        assert found.finding is not None or found.head == head  # a byte of gzip's header, which says nothing


def test_an_export_is_checked_like_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(EXPORT)
    check = audit_file(path)
    assert check.after == Base(0, bytes(32))
    assert check.sha256 == hashlib.sha256(EXPORT).digest()


def test_a_body_with_a_key_twice_is_not_proved_though_it_is_what_was_hashed() -> None:
    body = '{"position":1,"position":1}'
    digest = hashlib.sha256(bytes(32) + body.encode()).hexdigest()
    line = json.dumps({"position": 1, "hash": digest, "body": body}).encode()
    with pytest.raises(LedgerDamaged, match="position 1 is not in the canonical form"):
        list(ExportReader([LINES[0], line]))


# CloudEvents.


def as_cloudevents(path: Path, **bounds: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in export(path, cloudevents(SIGN.public_key), SIGN, **bounds)]


def test_each_line_is_a_cloudevent_with_what_the_specification_requires(ledger: Path) -> None:
    *events, head = as_cloudevents(ledger)
    for event in [*events, head]:
        assert event["specversion"] == "1.0"
        for name in ("id", "source", "type"):
            assert isinstance(event[name], str)
            assert event[name]
        assert all(name.isascii() and name.isalnum() and name == name.lower() for name in event)
        assert all(isinstance(value, str) and value for name, value in event.items() if name != "data")
        assert event["source"].startswith("urn:loadledger:")
        assert event["type"].startswith("dev.loadledger.")
    assert len({event["id"] for event in events}) == len(events)
    assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)
    assert head["type"] == HEAD_TYPE
    assert as_signed_head(head["data"]).holds()


def test_the_chain_can_be_verified_from_cloudevents_too(ledger: Path) -> None:
    digest = bytes(32)
    *lines, _ = export(ledger, cloudevents(SIGN.public_key), SIGN)
    for line, (position, body, stored) in zip(lines, rows_of(ledger), strict=True):
        event = json.loads(line)
        assert event["data"]["position"] == position
        written = line.decode()
        assert written[written.index('"data":') + len('"data":') : -2] == body
        assert event["ledgerprevious"] == digest.hex()
        digest = hashlib.sha256(digest + body.encode()).digest()
        assert event["ledgerhash"] == digest.hex() == stored.hex()


def test_a_cloudevent_says_of_what_when_and_by_whom(ledger: Path) -> None:
    event = as_cloudevents(ledger, after=1, until=2)[0]
    data = event["data"]
    assert (event["type"], event["subject"], event["time"], event["authid"]) == (
        f"dev.loadledger.{data['type']}",
        data["model_id"],
        data["recorded_at"],
        data["actor"],
    )
    assert event["correlationid"] == data["job_id"]
    started = as_cloudevents(ledger, until=1)[0]
    assert "subject" not in started
    assert started["authtype"] == "system"
