"""The verifier of the page "Verify it yourself", on sound and on changed ledgers."""

import asyncio
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.history import PLAIN
from support.ledgers import SIGN, rows_of, write_ledger
from support.pages import ROOT

from events.audit.export import JSONL, export
from events.audit.verify import verify

PAGE = "docs/verify-it-yourself.md"
VERIFIER = re.search(
    r"^cat > verify.py <<'END'\n(.*?)^END$", (ROOT / PAGE).read_text(), re.MULTILINE | re.DOTALL
)
assert VERIFIER is not None
CODE: CodeType = compile(VERIFIER[1], "verify.py", "exec")
ROUNDS = 2


def test_verifier_is_short_and_needs_only_the_standard_library() -> None:
    assert VERIFIER is not None
    lines = VERIFIER[1].splitlines()
    assert len(lines) <= 35
    (imported,) = re.findall(r"^import (.*)$", VERIFIER[1], re.MULTILINE)
    assert set(imported.split(", ")) <= sys.stdlib_module_names


def complaint(path: Path, *kept: str) -> str | None:
    """Run the verifier; return its complaint, or None."""
    before, sys.argv = sys.argv, ["verify.py", str(path), *kept]
    names: dict[str, object] = {"print": lambda *_: None}
    try:
        exec(CODE, names)
    except SystemExit as end:
        return str(end.code)
    finally:
        sys.argv = before
        names.clear()  # or a collection in another thread closes the ledger, which only this one may
    return None


def sound_ledger() -> tuple[bytes, bytes]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_ledger(path, ROUNDS))
        return path.read_bytes(), b"".join(export(path, JSONL, SIGN))


LEDGER, EXPORT = sound_ledger()
LINES = EXPORT.splitlines(keepends=True)


@contextmanager
def copy(data: bytes = LEDGER, name: str = "ledger.db") -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


with copy() as _path:
    ROWS = rows_of(_path)
HEAD = len(ROWS)
POSITIONS = st.integers(1, HEAD)
MANY = settings(PLAIN, max_examples=60)


def flip(data: bytes, index: int, bits: int) -> bytes:
    index %= len(data)
    return data[:index] + bytes([data[index] ^ bits]) + data[index + 1 :]


def change(path: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(sql, values)


def head_at(position: int) -> str:
    return f"{position}:{ROWS[position - 1][2].hex()}"


@pytest.mark.parametrize(("data", "name"), [(LEDGER, "ledger.db"), (EXPORT, "export.jsonl")])
def test_unchanged_ledger_is_verified_with_each_head(data: bytes, name: str) -> None:
    with copy(data, name) as path:
        assert complaint(path) is None
        assert complaint(path, *map(head_at, range(1, HEAD + 1))) is None
        assert complaint(path, f"{HEAD + 1}:{'00' * 32}") == f"not here: {HEAD + 1}:{'00' * 32}"


@MANY
@given(POSITIONS, st.integers(0, 10_000), st.integers(1, 255))
def test_changed_byte_of_body_or_hash_is_located(position: int, index: int, bits: int) -> None:
    body, digest = ROWS[position - 1][1].encode(), ROWS[position - 1][2]
    expected = f"position {position} is not what it was"
    for stored in (body, digest):
        at = LEDGER.index(stored) + index % len(stored)
        with copy(flip(LEDGER, at, bits)) as path:
            assert complaint(path) == expected
            finding = verify(path).finding
            assert finding is not None
            assert finding.position == position


@PLAIN
@given(POSITIONS, POSITIONS)
def test_removed_and_swapped_events_are_located(position: int, other: int) -> None:
    with copy() as path:
        change(path, "DELETE FROM events WHERE position = ?", position)
        assert complaint(path, head_at(HEAD)) is not None
    for cut in (LINES[:-1], LINES[: position + 1]):
        with copy(b"".join(cut), "export.jsonl") as path:
            assert complaint(path) == "the end is missing"
    swapped = list(LINES)
    swapped[position], swapped[other] = LINES[other], LINES[position]
    with copy(b"".join(swapped), "export.jsonl") as path:
        first = min(position, other)
        assert complaint(path) == (None if position == other else f"position {first} is not what it was")
