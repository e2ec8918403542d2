"""Exports and archives by themselves: what is proved, up to where, and what somebody made of them."""

import asyncio
import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN, child
from support.ledgers import SIGN, rows_of, write_ledger

from events.archivefile import MAX_LINE, FileAudit, audit_file
from events.errors import LogUnavailable
from events.export import cloudevents, export, jsonl
from events.findings import Expected, Finding, Kind
from events.signing import Base, HeadSigner, SignedHead, Statement, key_id
from events.store import Row

OTHER = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))


def sound_files() -> tuple[bytes, list[Row], dict[str, bytes]]:
    """Return a ledger, its rows, and what is read again of it: an export, and the same compressed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_ledger(path))
        lines = b"".join(export(path, jsonl(), SIGN))
        files = {"jsonl": lines, "archive": gzip.compress(lines, mtime=0)}
        return path.read_bytes(), [Row(*row) for row in rows_of(path)], files


LEDGER, ROWS, FILES = sound_files()
HEAD = len(ROWS)
FORMS = pytest.mark.parametrize("form", sorted(FILES))


@contextmanager
def written(content: bytes) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        yield path


def audited(content: bytes, *, key: str | None = None, expected: Expected | None = None) -> FileAudit:
    with written(content) as path:
        return audit_file(path, key=key, expected=expected)


def found(content: bytes) -> Finding:
    """Return what is wrong with a file; something has to be."""
    finding = audited(content).finding
    assert finding is not None
    return finding


@FORMS
def test_a_sound_file_is_proved_from_where_it_begins_to_its_signed_head(form: str) -> None:
    audit = audited(FILES[form])
    assert (audit.finding, audit.events) == (None, HEAD)
    assert (audit.after, audit.proved) == (Base(0, bytes(32)), Base(HEAD, ROWS[-1].hash))
    assert audit.head is not None
    assert audit.head.public_key == SIGN.public_key
    assert audit.sha256 == hashlib.sha256(FILES[form]).digest()


@pytest.mark.parametrize(
    "bounds", [{"after": 4}, {"until": 9}, {"after": 3, "until": 8}, {"after": 5, "until": 5}]
)
def test_a_part_of_a_log_is_proved_from_where_it_begins(tmp_path: Path, bounds: dict[str, int]) -> None:
    (tmp_path / "ledger.db").write_bytes(LEDGER)
    audit = audited(b"".join(export(tmp_path / "ledger.db", jsonl(), SIGN, **bounds)))
    first, last = bounds.get("after", 0), bounds.get("until", HEAD)
    assert audit.finding is None
    assert audit.after == Base(first, ROWS[first - 1].hash if first else bytes(32))
    assert audit.proved == Base(last, ROWS[last - 1].hash)


@FORMS
def test_whose_signature_is_expected_decides(form: str) -> None:
    assert audited(FILES[form], key=key_id(SIGN.public_key)).finding is None
    finding = audited(FILES[form], key=key_id(OTHER.public_key)).finding
    assert finding is not None
    assert (finding.position, finding.kind) == (HEAD, Kind.EXPECTATION)
    assert key_id(SIGN.public_key) in finding.problem


@FORMS
@pytest.mark.parametrize("position", [0, 1, 7, HEAD])
def test_a_head_that_was_kept_is_found_in_it(form: str, position: int) -> None:
    digest = ROWS[position - 1].hash if position else bytes(32)
    audit = audited(FILES[form], expected=Expected(position, digest))
    assert (audit.finding, audit.has_expected) == (None, True)
    audit = audited(FILES[form], expected=Expected(position, b"\1" * 32))
    assert audit.finding is not None
    assert (audit.finding.position, audit.finding.kind) == (position, Kind.EXPECTATION)
    assert not audited(FILES[form], expected=Expected(HEAD + 1, digest)).has_expected


# What somebody makes of a file.


@PLAIN
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_found_wherever_it_is(index: int, bits: int) -> None:
    content = FILES["jsonl"]
    index %= len(content)
    changed = content[:index] + bytes([content[index] ^ bits]) + content[index + 1 :]
    finding = found(changed)
    line = content[:index].count(b"\n")
    assert finding.position in {line - 1, line, line + 1}


@PLAIN
@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6))
def test_a_file_that_is_cut_off_or_goes_on_is_found(form: str, index: int) -> None:
    content = FILES[form]
    found(content[: index % len(content)])
    found(content + b"x")


@PLAIN
@given(st.integers(0, HEAD), st.integers(0, HEAD))
def test_lines_that_are_gone_doubled_or_swapped_are_found(one: int, other: int) -> None:
    lines = FILES["jsonl"].splitlines(keepends=True)
    one, other = one % len(lines), other % len(lines)
    if one:
        found(b"".join(lines[:one] + lines[one + 1 :]))
    found(b"".join([*lines[:one], lines[one], *lines[one:]]))
    swapped = list(lines)
    swapped[one], swapped[other] = lines[other], lines[one]
    if one != other:
        found(b"".join(swapped))


def signed(statement: Statement, by: HeadSigner = SIGN) -> bytes:
    """Return a sound export whose head is another."""
    return b"".join(FILES["jsonl"].splitlines(keepends=True)[:-1]) + jsonl().last(by(statement))


def test_a_head_that_does_not_fit_what_is_before_it_is_found() -> None:
    head = audited(FILES["jsonl"]).head
    assert head is not None
    statement = head.statement
    assert audited(signed(statement)).finding is None
    assert audited(signed(statement, OTHER)).finding is None  # who has not the key cannot know
    for change in (
        {"position": HEAD - 1},
        {"hash": bytes(32)},
        {"recorded_at": "2025-01-01T00:00:00.000000Z"},
        {"base": Base(1, bytes(32))},
        {"base": Base(0, b"\1" * 32)},
        {"base": Base(-1, bytes(32))},
    ):
        assert found(signed(replace(statement, **change))).position == HEAD
    forged = SignedHead(statement, OTHER(statement).signature, SIGN.public_key)
    content = b"".join(FILES["jsonl"].splitlines(keepends=True)[:-1]) + jsonl().last(forged)
    assert found(content).kind is Kind.SIGNATURE


@pytest.mark.parametrize(
    ("base", "is_sound"),
    [
        (Base(0, bytes(32)), True),
        (Base(2, b"\1" * 32), True),  # what is before this export nobody can say
        (Base(-1, bytes(32)), False),
        (Base(-1, b"\1" * 32), False),
        (Base(0, b"\1" * 32), False),
        (Base(2, bytes(32)), False),
        (Base(2, b"\1"), False),
        (Base(2, b""), False),
        (Base(5, b"\1" * 32), False),
        (Base(HEAD, bytes(32)), False),
    ],
    ids=str,
)
def test_a_signed_base_has_to_be_one_that_logs_have(base: Base, is_sound: bool) -> None:  # noqa: FBT001 - of the table
    lines = jsonl()
    after, last = ROWS[3], ROWS[5]
    recorded_at = json.loads(last.body)["recorded_at"]
    content = [
        lines.first(Base(after.position, after.hash)),
        *(lines.event(row, before.hash) for before, row in pairwise(ROWS[3:6])),
        lines.last(SIGN(Statement(last.position, last.hash, recorded_at, base))),
    ]
    assert (audited(b"".join(content)).finding is None) == is_sound
    head = lines.last(SIGN(Statement(last.position, last.hash, "", base)))  # an export without events
    alone = lines.first(Base(last.position, last.hash)) + head
    assert (audited(alone).finding is None) == (is_sound or base.position == 5)


def test_the_first_event_follows_zeros() -> None:
    digest = hashlib.sha256(b"\1" * 32 + ROWS[0].body.encode()).digest()
    row, after = Row(1, ROWS[0].body, digest), Base(0, b"\1" * 32)
    head = SIGN(Statement(1, digest, json.loads(row.body)["recorded_at"], after))
    lines = jsonl()
    finding = found(lines.first(after) + lines.event(row, after.hash) + lines.last(head))
    assert (finding.position, finding.kind) == (0, Kind.BASE)


def test_cloudevents_are_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(LEDGER)
    content = b"".join(export(tmp_path / "ledger.db", cloudevents(SIGN.public_key), SIGN))
    finding = found(content)
    assert finding.position == 0
    assert "these are CloudEvents" in finding.problem
    assert "--format jsonl" in finding.problem


OPENING = FILES["jsonl"].splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\x00" * 100,
        b"\x1f\x8b",
        b"\x1f\x8b\x08" + b"\xff" * 50,
        gzip.compress(b"", mtime=0),  # the same name for the test whenever it is collected
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
        OPENING + b'{"head":{"position":1e999,"hash":"","base":{}}}\n',
        OPENING + b'{"head":{"position":0,"hash":"%b","recorded_at":[],"base":{"position":0,"hash":""}}}\n'
        % (b"0" * 64),
        OPENING + b'{"x":' + b"[" * 200_000 + b"\n",
        OPENING + b'{"head":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
    ],
    ids=lambda content: ascii(content.removeprefix(OPENING)[:100]),
)  # fmt: skip
def test_what_is_no_export_is_told_and_never_a_crash(content: bytes) -> None:
    assert found(content).position <= 1
    assert found(gzip.compress(content)).position <= 1


@pytest.mark.parametrize(
    "body", ["5", "[]", "{}", "null", '{"position":1}', '{"position":1,"recorded_at":5}']
)
def test_a_body_that_is_no_event_is_found_though_it_is_what_was_hashed(body: str) -> None:
    digest = hashlib.sha256(bytes(32) + body.encode()).hexdigest()
    line = json.dumps({"position": 1, "hash": digest, "body": body}, separators=(",", ":")).encode()
    finding = found(OPENING + line + b"\n")
    assert (finding.position, finding.kind) == (1, Kind.EVENT)


@pytest.mark.parametrize("depth", [10, 500, 5_000, 100_000])
def test_a_body_that_is_nested_deep_is_told_and_never_a_crash(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    body = f'{{"data":{deep},"position":1,"recorded_at":""}}'
    digest = hashlib.sha256(bytes(32) + body.encode()).hexdigest()
    line = json.dumps({"position": 1, "hash": digest, "body": body}, separators=(",", ":")).encode()
    assert found(OPENING + line + b"\n").position in {1, 2}


def test_an_event_recorded_before_the_one_before_it_is_found() -> None:
    digest, content = bytes(32), OPENING
    for row in ROWS[:5]:
        body = row.body.replace("2026-01-01T", "2025-01-01T") if row.position == 4 else row.body
        digest = hashlib.sha256(digest + body.encode()).digest()
        content += jsonl().event(Row(row.position, body, digest), b"")
    finding = found(content)
    assert (finding.position, finding.kind) == (4, Kind.ORDER)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LogUnavailable, match="no regular file"):
            audit_file(path)
    with pytest.raises(FileNotFoundError):
        audit_file(tmp_path / "nothing")


AUDIT = """
import resource, sys
from pathlib import Path
from events.archivefile import audit_file
resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20, 300 * 2**20))
print(audit_file(Path(sys.argv[1])).finding.problem[:200])
"""
BOMBS = {
    "one line": lambda: b"\0" * 2**26,
    "lines": lambda: b"\n" * 2**26,
    "nested": lambda: b"[" * 2**26,
    "numbers": lambda: b'{"position":1,"x":[' + b"0," * 2**25,
    "text": lambda: b'{"export":"' + b"x" * 2**26,
    "more than a line": lambda: b'{"export":"' + b"x" * MAX_LINE + b'"}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_unpacks_to_a_gigabyte_takes_little_memory(tmp_path: Path, bomb: str) -> None:
    packed = gzip.compress(BOMBS[bomb](), 1)
    path = tmp_path / "bomb.gz"
    for content in (b"", gzip.compress(OPENING), gzip.compress(FILES["jsonl"])):
        path.write_bytes(content + packed * 16)
        done = subprocess.run(child(AUDIT, path), capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout
