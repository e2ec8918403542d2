"""Exports: each event exactly, up to a signed head, in our own form and as CloudEvents."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.history import opened, write
from support.ledgers import SIGN, change_ledger, copy_of, rows_of, sound_ledger

from events.audit.export import HEAD_TYPE, JSONL, cloudevents, export
from events.audit.exportreader import ExportReader
from events.audit.signing import as_signed_head
from events.errors import LedgerDamaged, NothingThere
from events.sqlite.queries import EVENTS_PER_READ
from events.storage import RawRow

LEDGER = sound_ledger()


def exported(path: Path, **bounds: int) -> list[bytes]:
    return list(export(path, JSONL, SIGN, **bounds))


def read(lines: list[bytes]) -> tuple[list[RawRow], Any]:
    reader = ExportReader(lines)
    return list(reader), reader.head


def test_export_has_each_event_and_the_signed_head() -> None:
    with copy_of(LEDGER) as path:
        lines = exported(path)
        whole, head = read(lines)
        assert [(position, body.decode(), digest) for position, body, digest in whole] == rows_of(path)
        assert head.holds()
        assert head.statement.recorded_at == json.loads(whole[-1][1])["recorded_at"]
        assert all(line.isascii() and line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
        for cut in range(len(whole) + 1):
            first, head = read(exported(path, until=cut))
            second, _ = read(exported(path, after=cut))
            assert first + second == whole
            after = json.loads(exported(path, after=cut)[0])["after"]
            assert (head.statement.position, head.statement.hash.hex()) == (after["position"], after["hash"])


async def test_export_beside_a_running_log_ends_at_its_head(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with opened(path) as log:
        await asyncio.gather(*(write(log, 1, first=number) for number in range(1, EVENTS_PER_READ + 100)))
        lines = export(path, JSONL, SIGN)
        some = [next(lines) for _ in range(10)]
        await write(log, 5, first=10_000)
        rows, _ = read([*some, *lines])
        assert len(rows) == EVENTS_PER_READ + 99


@pytest.mark.parametrize("bounds", [{"after": 99}, {"until": 99}, {"after": 5, "until": 4}])
def test_export_outside_the_log_is_refused(bounds: dict[str, int]) -> None:
    with copy_of(LEDGER) as path, pytest.raises(NothingThere):
        exported(path, **bounds)


@pytest.mark.parametrize(
    ("statement", "after", "words"),
    [
        ("UPDATE events SET body = replace(body, 'alice', 'mallory') WHERE position = 2", 0, "position 2"),
        ("DELETE FROM events WHERE position = 4", 0, "position 4 is missing"),
        ("DELETE FROM events WHERE position = 4", 4, "position 4 is missing"),
    ],
)
def test_damaged_ledger_is_not_signed(statement: str, after: int, words: str) -> None:
    with copy_of(LEDGER) as path:
        change_ledger(path, statement)
        lines: list[bytes] = []
        with pytest.raises(LedgerDamaged, match=words):
            lines.extend(export(path, JSONL, SIGN, after=after))
        assert not any(b'"head"' in line for line in lines)


# CloudEvents.


def test_each_line_is_a_cloudevent_in_the_chain() -> None:
    with copy_of(LEDGER) as path:
        lines, rows = list(export(path, cloudevents(SIGN.public_key), SIGN)), rows_of(path)
    *events, head = map(json.loads, lines)
    for event in [*events, head]:
        assert event["specversion"] == "1.0"
        for name in ("id", "source", "type"):
            assert isinstance(event[name], str)
            assert event[name]
        assert all(name.isascii() and name.isalnum() and name == name.lower() for name in event)
        assert all(isinstance(value, str) and value for name, value in event.items() if name != "data")
        assert event["source"].startswith("urn:loadledger:")
    assert len({event["id"] for event in events}) == len(events)
    assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)
    assert head["type"] == HEAD_TYPE
    assert as_signed_head(head["data"]).holds()
    digest = bytes(32)
    for line, event, (position, body, stored) in zip(lines[:-1], events, rows, strict=True):
        data = event["data"]
        assert data["position"] == position
        assert event["type"] == f"dev.loadledger.{data['type']}"
        assert (event["time"], event["authid"]) == (data["recorded_at"], data["actor"])
        assert (event.get("subject"), event.get("correlationid")) == (data["model_id"], data["job_id"])
        assert event["authtype"] == ("system" if data["actor"] == "system" else "unknown")
        written = line.decode()
        assert written[written.index('"data":') + len('"data":') : -2] == body
        assert event["ledgerprevious"] == digest.hex()
        digest = hashlib.sha256(digest + body.encode()).digest()
        assert event["ledgerhash"] == digest.hex() == stored.hex()
