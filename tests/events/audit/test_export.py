"""Exports: each event exactly, up to a signed head; what a file proves, and what somebody made of it."""

import asyncio
import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN, at, opened, write
from support.ledgers import (
    OTHER_SIGN,
    SIGN,
    change_ledger,
    copy_of,
    flip_byte,
    place_of,
    rows_of,
    sound_ledger,
)

from events.audit.export import HEAD_TYPE, JSONL, ExportFormat, cloudevents, export
from events.audit.exportreader import ExportReader, FileAudit, audit_file
from events.audit.signing import HeadSigner, SignedHead, Statement, as_signed_head, key_id
from events.audit.verify import Finding, FindingKind
from events.errors import LedgerDamaged, LogUnavailable, NothingThere
from events.sqlite.queries import EVENTS_PER_READ
from events.storage import RawRow, Row
from events.types import Anchor

# A signed head, byte for byte, so that anybody can check it without loadledger.

HASHES = st.binary(min_size=32, max_size=32)
STATEMENTS = st.builds(
    Statement, st.integers(0, 2**63 - 1), HASHES, st.just("") | st.integers(0, 10**9).map(at)
)
VECTOR = Statement(7, bytes(range(32)), "2026-01-01T00:00:07.000000Z")
MESSAGE = (
    b"loadledger-head-v1\n"
    b"7\n"
    b"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
    b"2026-01-01T00:00:07.000000Z\n"
)


def test_message_and_signature_have_known_bytes() -> None:
    assert VECTOR.message() == MESSAGE
    assert Statement(0, bytes(32), "").message().split(b"\n")[3] == b""
    assert SIGN(VECTOR).signature == Ed25519PrivateKey.from_private_bytes(bytes(range(32))).sign(MESSAGE)
    assert len(key_id(SIGN.public_key)) == 32
    assert SIGN(VECTOR).members()["key_id"] == key_id(SIGN.public_key)


@PLAIN
@given(STATEMENTS, STATEMENTS, st.integers(0, 63), st.integers(1, 255))
def test_only_the_signed_statement_holds(
    statement: Statement, other: Statement, index: int, bits: int
) -> None:
    signed = SIGN(statement)
    assert signed.holds()
    assert as_signed_head(json.loads(json.dumps(signed.members()))) == signed
    assert replace(signed, statement=other).holds() == (statement == other)
    broken = bytearray(signed.signature)
    broken[index] ^= bits
    assert not replace(signed, signature=bytes(broken)).holds()
    for key in (OTHER_SIGN.public_key, b"", b"no key", bytes(44)):
        assert not replace(signed, public_key=key).holds()


MEMBERS = SIGN(VECTOR).members()
NO_HEADS: list[object] = [
    *(None, [], {}, {**MEMBERS, "position": None}, {**MEMBERS, "hash": "xyz"}),
    *({**MEMBERS, "signature": "not base64!"}, {**MEMBERS, "recorded_at": "\u0661"}),
]


@pytest.mark.parametrize("members", NO_HEADS)
def test_malformed_signed_head_is_refused(members: object) -> None:
    with pytest.raises(ValueError, match="not a signed head"):
        as_signed_head(members)


@pytest.mark.skipif(which("openssl") is None, reason="openssl is not installed here")
def test_openssl_verifies_the_signature(tmp_path: Path) -> None:
    signed = SIGN(VECTOR)
    command = "openssl pkeyutl -verify -pubin -keyform DER -inkey key -rawin -in message -sigfile sig"
    (tmp_path / "key").write_bytes(signed.public_key)
    (tmp_path / "sig").write_bytes(signed.signature)
    for message in (MESSAGE, MESSAGE.replace(b"\n7\n", b"\n8\n")):
        (tmp_path / "message").write_bytes(message)
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode == 0) == (message == MESSAGE)


# What is exported.

LEDGER = sound_ledger()


def exported_from(path: Path, **bounds: int) -> list[bytes]:
    return list(export(path, JSONL, SIGN, **bounds))


def read(lines: list[bytes]) -> tuple[list[RawRow], Any]:
    reader = ExportReader(lines)
    return list(reader), reader.head


def test_export_has_each_event_and_the_signed_head() -> None:
    with copy_of(LEDGER) as path:
        lines = exported_from(path)
        whole, head = read(lines)
        assert [(position, body.decode(), digest) for position, body, digest in whole] == rows_of(path)
        assert head.holds()
        assert head.statement.recorded_at == json.loads(whole[-1][1])["recorded_at"]
        assert all(line.isascii() and line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
        for cut in range(len(whole) + 1):
            first, head = read(exported_from(path, until=cut))
            second, _ = read(exported_from(path, after=cut))
            assert first + second == whole
            after = json.loads(exported_from(path, after=cut)[0])["after"]
            assert (head.statement.position, head.statement.hash.hex()) == (after["position"], after["hash"])


async def test_export_beside_a_running_log_ends_at_its_head(path: Path) -> None:
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
        exported_from(path, **bounds)


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


def test_each_line_is_a_cloudevent_in_the_chain() -> None:
    with copy_of(LEDGER) as path:
        lines, rows = list(export(path, cloudevents(SIGN.public_key), SIGN)), rows_of(path)
    *events, head = map(json.loads, lines)
    for event in [*events, head]:
        assert event["specversion"] == "1.0"
        assert event.keys() >= {"id", "source", "type"}
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


# What a file proves.

with copy_of(LEDGER) as _path:
    ROWS = [Row(*row) for row in rows_of(_path)]
HEAD = len(ROWS)


def exported(form: ExportFormat | None = None, **bounds: int) -> bytes:
    with copy_of(LEDGER) as path:
        return b"".join(export(path, form or JSONL, SIGN, **bounds))


EXPORT = exported()
LINES = EXPORT.splitlines(keepends=True)
OPENING = LINES[0]


def audited(content: bytes, *, key: str | None = None, expected: Anchor | None = None) -> FileAudit:
    with copy_of(content) as path:
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
    assert audit.head.public_key == SIGN.public_key
    assert audited(EXPORT, key=key_id(SIGN.public_key)).finding is None
    finding = audited(EXPORT, key=key_id(OTHER_SIGN.public_key)).finding
    assert place_of(finding) == (HEAD, FindingKind.EXPECTATION)
    assert key_id(SIGN.public_key) in str(finding)


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
    assert place_of(audit.finding) == (position, FindingKind.EXPECTATION)
    assert not audited(EXPORT, expected=Anchor(HEAD + 1, bytes(32))).has_expected


# What somebody makes of a file.


@PLAIN
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_changed_byte_is_found_in_its_line(index: int, bits: int) -> None:
    finding = found(flip_byte(EXPORT, index, bits))
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


def signed(statement: Statement, by: HeadSigner = SIGN) -> bytes:
    return b"".join(LINES[:-1]) + JSONL.last(by(statement))


def test_head_that_does_not_fit_the_events_is_found() -> None:
    head = audited(EXPORT).head
    assert head is not None
    statement = head.statement
    assert audited(signed(statement)).finding is None
    assert audited(signed(statement, OTHER_SIGN)).finding is None  # who has not the key cannot know
    early = "2025-01-01T00:00:00.000000Z"
    for change in ({"position": HEAD - 1}, {"hash": bytes(32)}, {"recorded_at": early}):
        assert found(signed(replace(statement, **change))).position == HEAD
    forged = SignedHead(statement, OTHER_SIGN(statement).signature, SIGN.public_key)
    assert found(b"".join(LINES[:-1]) + JSONL.last(forged)).kind is FindingKind.SIGNATURE


def test_first_event_follows_zeros() -> None:
    digest = hashlib.sha256(b"\1" * 32 + ROWS[0].body.encode()).digest()
    row, after = Row(1, ROWS[0].body, digest), Anchor(0, b"\1" * 32)
    head = SIGN(Statement(1, digest, json.loads(row.body)["recorded_at"]))
    finding = found(JSONL.first(after) + JSONL.event(row, after.hash) + JSONL.last(head))
    assert place_of(finding) == (0, FindingKind.HASH)


def test_cloudevents_are_refused_with_a_hint() -> None:
    finding = found(exported(cloudevents(SIGN.public_key)))
    assert finding.position == 0
    assert "these are CloudEvents" in finding.problem
    assert "--format jsonl" in finding.problem


AFTER = b'{"export":"loadledger-export-v1","after":'
ZEROS = b"0" * 64
NO_EXPORTS = [
    *(b"", b"\n", b"\x00" * 100, b"\x1f\x8b\x08" + b"\xff" * 50, b"[]", b"null\n", b'"export"\n'),
    *(b'{"specversion":"1.0"}\n', b'{"specversion":1.0}\n', b'{"export":1}\n'),
    *(b'{"export":"loadledger-export-v2"}\n', b'{"export":"loadledger-export-v1"}\n', AFTER + b"5}\n"),
    AFTER + b'{"position":-1,"hash":"%b"}}\n' % ZEROS,
    AFTER + b'{"position":1e999,"hash":"%b"}}\n' % ZEROS,
    AFTER + b'{"position":0,"hash":"00"}}\n',
    AFTER + b'{"position":0,"hash":"%b"}}\n' % (b"zz" * 32),
    AFTER + b'{"position":%b,"hash":"00"}}\n' % (b"9" * 5000),
    OPENING + b"{}\n",
    *(OPENING + b'{"position":%b,"hash":"","body":""}\n' % (b"9" * digits) for digits in (20, 5000)),
    OPENING + b'{"position":1,"hash":"","body":5}\n',
    OPENING + b'{"position":1,"hash":"x","body":"{}"}\n',
    OPENING + b'{"position":1.0,"hash":"00","body":"{}"}\n',
    *(OPENING + b'{"position":1,"hash":"00","body":"%b"}\n' % text for text in (b"\\ud800", b"\xff")),
    *(OPENING + b'{"head":%b}\n' % head for head in (b"5", b"{}", b'{"position":1e999,"hash":""}')),
    OPENING + b'{"head":{"position":0,"hash":"%b","recorded_at":[]}}\n' % ZEROS,
    OPENING + b'{"x":' + b"[" * 200_000 + b"\n",
    OPENING + b'{"head":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
]


@pytest.mark.parametrize("content", NO_EXPORTS, ids=range(len(NO_EXPORTS)))
def test_file_that_is_no_export_is_a_finding(content: bytes) -> None:
    assert found(content).position <= 1


@pytest.mark.parametrize("digits", [0, 63, 65, 2**20])
def test_line_with_hash_of_another_length_is_no_event(digits: int) -> None:
    line = b'{"position":1,"hash":"%b","body":"{}"}\n' % (b"0" * digits)
    assert "is not an event" in found(OPENING + line).problem


NESTED = [f'{{"data":{"[" * depth}{"]" * depth},"position":1,"recorded_at":""}}' for depth in (500, 100_000)]
NO_EVENTS = [
    *("5", "[]", "{}", "null", '{"position":1}', '{"position":1,"recorded_at":5}'),
    *('{"position":1,"position":1,"recorded_at":""}', *NESTED),
]


@pytest.mark.parametrize("body", NO_EVENTS, ids=range(len(NO_EVENTS)))
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
    assert place_of(found(content)) == (4, FindingKind.ORDER)


def test_file_that_is_not_regular_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LogUnavailable, match="not a regular file"):
            audit_file(path)
    with pytest.raises(FileNotFoundError):
        audit_file(tmp_path / "nothing")
