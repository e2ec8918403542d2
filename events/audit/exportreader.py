"""Verification of one export or archive: events one by one as they are proved, and the signed head.

An archive is an export (`events.audit.export`, format `jsonl`) compressed with gzip. A line is valid only if
it is, byte for byte, what the export writes for that event, so that it has one reading only.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar, cast

import msgspec

from events.audit.export import FORMAT, JSONL
from events.audit.signing import SignedHead, as_signed_head, key_id
from events.audit.verify import Finding, FindingKind, compare_hash
from events.codec import GENESIS, hash_body, is_canonical
from events.errors import LedgerDamaged, LogUnavailable
from events.files import printable_name
from events.storage import Row
from events.types import Anchor

MAX_LINE = 16 * 2**20
"""Bytes: more than any event has; a hostile file with a longer line is never read into memory whole."""

LEVEL = 6
"""gzip's own default: a tenth of the size, 30 MB/s."""

BUFFER = 2**18
"""Bytes read at once."""

T = TypeVar("T")


class FileDamaged(LedgerDamaged):
    """An export or archive does not verify; `position` is the first that is wrong or missing."""

    def __init__(self, problem: str, position: int, kind: FindingKind = FindingKind.EVENT) -> None:
        super().__init__(problem)
        self.position = position
        self.kind = kind


@contextmanager
def compress(file: BinaryIO) -> Iterator[BinaryIO]:
    """Write a compressed file through `file`; the same content gives the same bytes."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=LEVEL) as packed:
        yield cast("BinaryIO", packed)


def read_lines(path: Path, seen: Callable[[memoryview], None] = lambda _: None) -> Iterator[bytes]:
    """Yield the lines of an archive or an uncompressed export; a line longer than `MAX_LINE` is cut.

    Args:
        path: of a regular file.
        seen: is called with the file's own bytes as they are read.

    Raises:
        LedgerDamaged: the file is truncated, or not valid gzip.
        LogUnavailable: it is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
        raise LogUnavailable(f"{printable_name(path)} is not a regular file")
    with io.BufferedReader(_Seen(path, seen), BUFFER) as file:
        is_packed = file.peek(2)[:2] == b"\x1f\x8b"  # RFC 1952 section 2.3.1
        source = gzip.GzipFile(fileobj=file) if is_packed else file
        try:
            while line := source.readline(MAX_LINE):
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LedgerDamaged(f"{printable_name(path)} is damaged: {error}") from None


class _Seen(io.FileIO):
    """A file that passes on the bytes that are read."""

    def __init__(self, path: Path, seen: Callable[[memoryview], None]) -> None:
        super().__init__(path)
        self._seen = seen

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io passes nothing else
        count = super().readinto(buffer)
        self._seen(buffer[:count])
        return count


class ExportReader:
    """Iterates over the events of an export; each event is proved when it is yielded.

    Attributes:
        after: the position and hash after which the export begins.
        position: of the last proved event.
        hash: of the last proved event.
        head: the signed head, once all events have been yielded.

    Args:
        lines: of the export.
        known: whether the file was verified before: then only the chain is checked, since the same last hash
            means the same content.

    Raises:
        FileDamaged: here or during the iteration, naming the first position that is wrong, or missing.
    """

    def __init__(self, lines: Iterable[bytes], *, known: bool = False) -> None:
        self._known = known
        self._lines = iter(lines)
        try:
            self.after = _parse_first_line(next(self._lines, b""))
        except ValueError as error:
            raise FileDamaged(str(error), 0) from None
        if not _may_begin(self.after):
            raise FileDamaged("the file begins after a hash that no log begins with", 0, FindingKind.BASE)
        self.position, self.hash = self.after.position, self.after.hash
        self.head: SignedHead | None = None
        self._recorded_at = ""

    def __iter__(self) -> Iterator[Row]:
        for line in self._lines:
            found = self._read(line)
            if isinstance(found, SignedHead):
                if not self._known:
                    self._check_head(found, line)
                self.head = found
                return
            self._check(found, line)
            yield found
        raise FileDamaged(
            f"the end is missing: the file ends at position {self.position} without a signed head",
            self.position + 1,
            FindingKind.MISSING,
        )

    def _read(self, line: bytes) -> Row | SignedHead:
        try:
            return _parse_line(line)
        except (ValueError, RecursionError) as error:
            position = self.position + 1
            raise FileDamaged(
                f"the line for position {position} is not an event: {error}", position
            ) from None

    def _check(self, row: Row, line: bytes) -> None:
        position = self.position + 1
        if row.position != position:
            problem = f"position {position} is missing: the next event is at {row.position}"
            raise FileDamaged(problem, position, FindingKind.MISSING)
        digest = hash_body(self.hash, row.body)
        if digest != row.hash:
            raise FileDamaged(
                f"the event at position {position} is not what was hashed", position, FindingKind.HASH
            )
        if not self._known:
            self._check_text(row, line)
        self.position, self.hash = position, digest

    def _check_text(self, row: Row, line: bytes) -> None:
        """Check that the hashed body has one reading only, and that the line has the same."""
        position, body = row.position, row.body.encode()
        if not is_canonical(body):
            raise FileDamaged(f"the body at position {position} is not in the canonical form", position)
        recorded_at = _read_recorded_at(body, position)
        if recorded_at < self._recorded_at:
            problem = f"the event at position {position} was recorded before the one before it"
            raise FileDamaged(problem, position, FindingKind.ORDER)
        if not _is_written(row, line):
            raise FileDamaged(f"the line for position {position} is not as the export writes it", position)
        self._recorded_at = recorded_at

    def _check_head(self, head: SignedHead, line: bytes) -> None:
        statement, position = head.statement, self.position
        if (statement.position, statement.hash) != (position, self.hash):
            problem = f"the signed head is not that of position {position}, the last one in the file"
            raise FileDamaged(problem, position, FindingKind.HASH)
        if not head.holds():
            problem = f"the signature of the head at position {position} does not match its key"
            raise FileDamaged(problem, position, FindingKind.SIGNATURE)
        is_of_then = statement.recorded_at == self._recorded_at or position == self.after.position
        is_before = statement.base.position < self.after.position and _may_begin(statement.base)
        is_complete = is_before or statement.base == self.after
        if not (is_of_then and is_complete and _is_written(head, line)):
            raise FileDamaged(f"the signed head does not fit the events up to position {position}", position)
        if next(self._lines, None) is not None:
            raise FileDamaged("the file goes on after the signed head", position)


def _parse_first_line(first: bytes) -> Anchor:
    """Parse the first line of an export, and return the position and hash after which it begins."""
    if first.startswith(b"SQLite format 3"):
        raise ValueError("this is a database, not an export: name the data directory of a ledger with --data")
    unknown = f"the first line does not mark the file as {FORMAT}"
    try:
        mark = _decode(first, _Mark)
    except ValueError:
        raise ValueError(unknown) from None
    if mark.specversion is not None:
        raise ValueError(
            "these are CloudEvents, which loadledger does not read: export the ledger with `--format jsonl`, "
            "and verify that file"
        )
    if mark.export != FORMAT:
        raise ValueError(unknown)
    try:
        after = _decode(first, _Opening).after
        base = Anchor(after.position, bytes.fromhex(after.hash))
    except ValueError as error:
        raise ValueError(f"the first line does not say where the export begins: {error}") from None
    if JSONL.first(base) != first:
        raise ValueError("the first line is not as the export writes it")
    return base


def _parse_line(line: bytes) -> Row | SignedHead:
    members = _decode(line, _Line)
    if members.head:
        return as_signed_head(msgspec.json.decode(members.head))
    if members.position is None or members.hash is None or members.body is None:
        raise ValueError("it has no position, hash and body")
    return Row(members.position, members.body, bytes.fromhex(members.hash))


def _is_written(found: Row | SignedHead, line: bytes) -> bool:
    """Whether `line` is what the export writes for its content."""
    try:
        written = JSONL.last(found) if isinstance(found, SignedHead) else JSONL.event(found, b"")
    except ValueError:  # a lone surrogate
        return False
    return written == line


def _decode(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


_Position = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Mark(msgspec.Struct):
    export: str | None = None
    specversion: str | None = None


class _After(msgspec.Struct):
    position: _Position
    hash: str


class _Opening(msgspec.Struct):
    after: _After


class _Line(msgspec.Struct, gc=False):
    position: _Position | None = None
    hash: str | None = None
    body: str | None = None
    head: msgspec.Raw = msgspec.Raw()


def _may_begin(base: Anchor) -> bool:
    """Whether a log can begin after this: zeros at position 0, else the hash of an event."""
    is_first = base.hash == GENESIS
    return base.position >= 0 and len(base.hash) == len(GENESIS) and is_first == (base.position == 0)


class _Stated(msgspec.Struct, gc=False):
    position: int
    recorded_at: str


_STATED = msgspec.json.Decoder(_Stated)


def _read_recorded_at(body: bytes, position: int) -> str:
    try:
        stated = _STATED.decode(body)
    except (RecursionError, ValueError) as error:
        raise FileDamaged(f"the body at position {position} is not an event: {error}", position) from None
    if stated.position != position:
        raise FileDamaged(f"the body at position {position} says position {stated.position}", position)
    return stated.recorded_at


@dataclass(frozen=True, slots=True)
class FileAudit:
    """The result of verifying an export or archive by itself.

    Attributes:
        path: of the file.
        after: the position and hash after which its events begin.
        proved: the position and hash of the last proved event.
        head: the signed head, whose signature is valid; None after a finding.
        sha256: of the file's bytes; empty after a finding.
        finding: the first problem; None if there is none.
        has_expected: whether the file has the position of the expected head.
    """

    path: Path
    after: Anchor
    proved: Anchor
    head: SignedHead | None
    sha256: bytes
    finding: Finding | None
    has_expected: bool = False

    @property
    def events(self) -> int:
        return self.proved.position - self.after.position


def audit_file(path: Path, *, key: str | None = None, expected: Anchor | None = None) -> FileAudit:
    """Verify an export or an archive to its end; memory does not grow with the file.

    Args:
        path: of the file.
        key: the id of the expected signer's key; None accepts any.
        expected: a head that the file must have, if it has the position.

    Raises:
        LogUnavailable: `log_unavailable`, it is not a regular file.
    """
    digest = hashlib.sha256()
    reader: ExportReader | None = None
    finding, unexpected = None, None
    try:
        reader = ExportReader(read_lines(path, digest.update))
        unexpected = _compare_with_anchor(expected, reader.after)
        for row in reader:
            if expected is not None and row.position == expected.position:
                unexpected = _compare_with_anchor(expected, Anchor(row.position, row.hash))
    except FileDamaged as error:
        finding = Finding(error.position, str(error), error.kind)
    except LedgerDamaged as error:
        finding = Finding(0 if reader is None else reader.position + 1, str(error), FindingKind.DAMAGED)
    if reader is None:
        return FileAudit(path, Anchor(), Anchor(), None, b"", finding)
    proved = Anchor(reader.position, reader.hash)
    return FileAudit(
        path,
        reader.after,
        proved,
        reader.head,
        digest.digest() if finding is None else b"",
        finding or unexpected or _compare_signer(reader.head, key),
        expected is not None and reader.after.position <= expected.position <= proved.position,
    )


def _compare_with_anchor(expected: Anchor | None, found: Anchor) -> Finding | None:
    if expected is None or expected.position != found.position:
        return None
    return compare_hash(expected, found.hash)


def _compare_signer(head: SignedHead | None, key: str | None) -> Finding | None:
    if head is None or key is None or key_id(head.public_key) == key:
        return None
    problem = f"the head is signed by the key {key_id(head.public_key)}, {key} was expected"
    return Finding(head.statement.position, problem, FindingKind.EXPECTATION)
