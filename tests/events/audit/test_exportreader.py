"""Exports read again: what a file proves by itself, and what somebody made of it."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ledgers
from support.history import PLAIN

from events.audit.export import JSONL, ExportFormat, cloudevents, export
from events.audit.exportreader import FileAudit, audit_file
from events.audit.signing import HeadSigner, SignedHead, Statement, key_id
from events.audit.verify import Finding, FindingKind
from events.errors import LogUnavailable
from events.storage import Row
from events.types import Anchor

with ledgers.copy_of(ledgers.sound_ledger()) as _path:
    ROWS = [Row(*row) for row in ledgers.rows_of(_path)]
HEAD = len(ROWS)


def exported(form: ExportFormat | None = None, **bounds: int) -> bytes:
    with ledgers.copy_of(ledgers.sound_ledger()) as path:
        return b"".join(export(path, form or JSONL, ledgers.SIGN, **bounds))


EXPORT = exported()
LINES = EXPORT.splitlines(keepends=True)
OPENING = LINES[0]


def audited(content: bytes, *, key: str | None = None, expected: Anchor | None = None) -> FileAudit:
    with ledgers.copy_of(content) as path:
        return audit_file(path, key=key, expected=expected)


def found(content: bytes) -> Finding:
    finding = audited(content).finding
    assert finding is not None
    return finding


def hash_at(position: int) -> bytes:
    return ROWS[position - 1].hash if position else bytes(32)


def test_sound_file_is_proved_up_to_its_signed_head() -> None:
    audit = audited(EXPORT)
    assert (audit.finding, audit.events) == (None, HEAD)
    assert (audit.after, audit.proved) == (Anchor(0, bytes(32)), Anchor(HEAD, ROWS[-1].hash))
    assert audit.head is not None
    assert audit.head.public_key == ledgers.SIGN.public_key
    assert audited(EXPORT, key=key_id(ledgers.SIGN.public_key)).finding is None
    finding = audited(EXPORT, key=key_id(ledgers.OTHER_SIGN.public_key)).finding
    assert ledgers.place_of(finding) == (HEAD, FindingKind.EXPECTATION)
    assert key_id(ledgers.SIGN.public_key) in str(finding)


@pytest.mark.parametrize(("after", "until"), [(4, HEAD), (0, 9), (3, 8), (5, 5)])
def test_part_of_a_log_is_proved_from_where_it_begins(after: int, until: int) -> None:
    audit = audited(exported(after=after, until=until))
    assert audit.finding is None
    assert (audit.after, audit.proved) == (Anchor(after, hash_at(after)), Anchor(until, hash_at(until)))


@pytest.mark.parametrize("position", [0, 1, 7, HEAD])
def test_expected_head_is_found_in_a_file(position: int) -> None:
    audit = audited(EXPORT, expected=Anchor(position, hash_at(position)))
    assert (audit.finding, audit.has_expected) == (None, True)
    audit = audited(EXPORT, expected=Anchor(position, b"\1" * 32))
    assert ledgers.place_of(audit.finding) == (position, FindingKind.EXPECTATION)
    assert not audited(EXPORT, expected=Anchor(HEAD + 1, bytes(32))).has_expected


# What somebody makes of a file.


@PLAIN
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_changed_byte_is_found_in_its_line(index: int, bits: int) -> None:
    finding = found(ledgers.flip_byte(EXPORT, index, bits))
    line = EXPORT[: index % len(EXPORT)].count(b"\n")
    assert finding.position in {line - 1, line, line + 1}


@PLAIN
@given(st.integers(0, 10**6))
def test_truncated_or_extended_file_is_found(index: int) -> None:
    found(EXPORT[: index % len(EXPORT)])
    found(EXPORT + b"x")


@PLAIN
@given(st.integers(0, HEAD), st.integers(0, HEAD))
def test_missing_repeated_or_swapped_line_is_found(one: int, other: int) -> None:
    found(b"".join(LINES[:one] + LINES[one + 1 :]))
    found(b"".join([*LINES[:one], LINES[other], *LINES[one:]]))
    swapped = list(LINES)
    swapped[one], swapped[other] = LINES[other], LINES[one]
    if one != other:
        found(b"".join(swapped))


def signed(statement: Statement, by: HeadSigner = ledgers.SIGN) -> bytes:
    return b"".join(LINES[:-1]) + JSONL.last(by(statement))


def test_head_that_does_not_fit_the_events_is_found() -> None:
    head = audited(EXPORT).head
    assert head is not None
    statement = head.statement
    assert audited(signed(statement)).finding is None
    assert audited(signed(statement, ledgers.OTHER_SIGN)).finding is None  # who has not the key cannot know
    for change in (
        {"position": HEAD - 1},
        {"hash": bytes(32)},
        {"recorded_at": "2025-01-01T00:00:00.000000Z"},
    ):
        assert found(signed(replace(statement, **change))).position == HEAD
    forged = SignedHead(statement, ledgers.OTHER_SIGN(statement).signature, ledgers.SIGN.public_key)
    assert found(b"".join(LINES[:-1]) + JSONL.last(forged)).kind is FindingKind.SIGNATURE


def test_first_event_follows_zeros() -> None:
    digest = hashlib.sha256(b"\1" * 32 + ROWS[0].body.encode()).digest()
    row, after = Row(1, ROWS[0].body, digest), Anchor(0, b"\1" * 32)
    head = ledgers.SIGN(Statement(1, digest, json.loads(row.body)["recorded_at"]))
    finding = found(JSONL.first(after) + JSONL.event(row, after.hash) + JSONL.last(head))
    assert ledgers.place_of(finding) == (0, FindingKind.HASH)


def test_cloudevents_are_refused_with_a_hint() -> None:
    finding = found(exported(cloudevents(ledgers.SIGN.public_key)))
    assert finding.position == 0
    assert "these are CloudEvents" in finding.problem
    assert "--format jsonl" in finding.problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\x00" * 100,
        b"\x1f\x8b\x08" + b"\xff" * 50,
        b"[]",
        b"null\n",
        b'"export"\n',
        b'{"export":"loadledger-export-v2"}\n',
        b'{"export":1}\n',
        b'{"export":"loadledger-export-v1"}\n',
        b'{"export":"loadledger-export-v1","after":5}\n',
        b'{"export":"loadledger-export-v1","after":{"position":-1,"hash":"%b"}}\n' % (b"0" * 64),
        b'{"export":"loadledger-export-v1","after":{"position":1e999,"hash":"%b"}}\n' % (b"0" * 64),
        b'{"export":"loadledger-export-v1","after":{"position":0,"hash":"00"}}\n',
        b'{"export":"loadledger-export-v1","after":{"position":0,"hash":"%b"}}\n' % (b"zz" * 32),
        b'{"export":"loadledger-export-v1","after":{"position":%b,"hash":"00"}}\n' % (b"9" * 5000),
        b'{"specversion":"1.0"}\n',
        b'{"specversion":1.0}\n',
        OPENING + b"{}\n",
        OPENING + b'{"position":%b,"hash":"","body":""}\n' % (b"9" * 5000),
        OPENING + b'{"position":%b,"hash":"","body":""}\n' % (b"9" * 20),
        OPENING + b'{"position":1,"hash":"","body":5}\n',
        OPENING + b'{"position":1,"hash":"x","body":"{}"}\n',
        OPENING + b'{"position":1.0,"hash":"00","body":"{}"}\n',
        OPENING + b'{"position":1,"hash":"00","body":"\\ud800"}\n',
        OPENING + b'{"position":1,"hash":"00","body":"\xff"}\n',
        OPENING + b'{"head":5}\n',
        OPENING + b'{"head":{}}\n',
        OPENING + b'{"head":{"position":1e999,"hash":""}}\n',
        OPENING + b'{"head":{"position":0,"hash":"%b","recorded_at":[]}}\n' % (b"0" * 64),
        OPENING + b'{"x":' + b"[" * 200_000 + b"\n",
        OPENING + b'{"head":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
    ],
    ids=lambda content: ascii(content.removeprefix(OPENING)[:100]),
)  # fmt: skip
def test_file_that_is_no_export_is_a_finding(content: bytes) -> None:
    assert found(content).position <= 1


@pytest.mark.parametrize("digits", [0, 63, 65, 2**20])
def test_line_with_hash_of_another_length_is_no_event(digits: int) -> None:
    line = b'{"position":1,"hash":"%b","body":"{}"}\n' % (b"0" * digits)
    assert "is not an event" in found(OPENING + line).problem


NESTED = [f'{{"data":{"[" * depth}{"]" * depth},"position":1,"recorded_at":""}}' for depth in (500, 100_000)]


@pytest.mark.parametrize(
    "body",
    ["5", "[]", "{}", "null", '{"position":1}', '{"position":1,"recorded_at":5}',
     '{"position":1,"position":1,"recorded_at":""}', *NESTED],
    ids=lambda body: body[:50],
)  # fmt: skip
def test_hashed_body_that_is_no_event_is_found(body: str) -> None:
    digest = hashlib.sha256(bytes(32) + body.encode()).hexdigest()
    line = json.dumps({"position": 1, "hash": digest, "body": body}, separators=(",", ":")).encode()
    finding = found(OPENING + line + b"\n")
    assert finding.position in {1, 2}
    assert finding.kind is (FindingKind.EVENT if finding.position == 1 else FindingKind.MISSING)


def test_event_recorded_before_its_predecessor_is_found() -> None:
    digest, content = bytes(32), OPENING
    for row in ROWS[:5]:
        body = row.body.replace("2026-01-01T", "2025-01-01T") if row.position == 4 else row.body
        digest = hashlib.sha256(digest + body.encode()).digest()
        content += JSONL.event(Row(row.position, body, digest), b"")
    assert ledgers.place_of(found(content)) == (4, FindingKind.ORDER)


def test_file_that_is_not_regular_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LogUnavailable, match="not a regular file"):
            audit_file(path)
    with pytest.raises(FileNotFoundError):
        audit_file(tmp_path / "nothing")
