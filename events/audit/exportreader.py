"""Verification of exports and archives: events one by one as they are proved, and the signed head.

An archive is an export (`events.audit.export`, format `jsonl`) compressed with gzip. A line is valid only if
it is, byte for byte, what the export writes for that event, so that it has one reading only.
"""

from __future__ import annotations

import gzip
import hashlib
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar, cast

import msgspec

from events.audit.export import FORMAT, JSONL
from events.audit.signing import SignedHead, as_signed_head, key_id
from events.audit.verify import (
    CheckedFold,
    Finding,
    FindingKind,
    VerificationError,
    compare_hash,
    raw_rows,
)
from events.codec import GENESIS, hash_body
from events.errors import ArchiveMissing, LedgerDamaged, LogUnavailable, NothingThere
from events.files import printable_name
from events.state import State
from events.storage import ArchiveRecord, Row
from events.types import Anchor

MAX_LINE = 16 * 2**20
"""Bytes: more than any event has; a hostile file with a longer line is never read into memory whole."""

LEVEL = 6
"""gzip's own default: a tenth of the size, 30 MB/s."""

T = TypeVar("T")


@contextmanager
def compress(file: BinaryIO) -> Iterator[BinaryIO]:
    """Write a compressed file through `file`; the same content gives the same bytes."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=LEVEL) as packed:
        yield cast("BinaryIO", packed)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an archive or an uncompressed export; a line longer than `MAX_LINE` is cut.

    Raises:
        LedgerDamaged: the file is truncated, or not valid gzip.
        LogUnavailable: it is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
        raise LogUnavailable(f"{printable_name(path)} is not a regular file")
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"  # RFC 1952 section 2.3.1
        file.seek(0)
        source = gzip.GzipFile(fileobj=file) if is_packed else file
        try:
            while line := source.readline(MAX_LINE):
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LedgerDamaged(f"{printable_name(path)} is damaged: {error}") from None


class ExportReader:
    """Iterates over the events of an export as they are written there; the caller checks their chain.

    Args:
        lines: of the export.
        known: whether it was read before: the same last hash then means the same content, in whatever form.

    Attributes:
        after: the position and hash after which the export begins.
        head: the signed head, once all events have been yielded.

    Raises:
        VerificationError: here or during the iteration, naming the first position whose line is wrong, or
            missing.
    """

    def __init__(self, lines: Iterable[bytes], *, known: bool = False) -> None:
        self._known = known
        self._lines = iter(lines)
        self.after = _parse_first_line(next(self._lines, b""))
        self.head: SignedHead | None = None

    def __iter__(self) -> Iterator[Row]:
        position = self.after.position
        for position, line in enumerate(self._lines, self.after.position + 1):
            try:
                found = _parse_line(line)
            except (ValueError, RecursionError) as error:
                problem = f"the line for position {position} is not an event: {error}"
                raise VerificationError(position, problem, FindingKind.EVENT) from None
            if not self._known and not _is_written(found, line):
                problem = f"the line for position {position} is not as the export writes it"
                raise VerificationError(position, problem, FindingKind.EVENT)
            if isinstance(found, SignedHead):
                if next(self._lines, None) is not None:
                    problem = "the file goes on after the signed head"
                    raise VerificationError(position - 1, problem, FindingKind.EVENT)
                self.head = found
                return
            yield found
        problem = f"the end is missing: the file ends at position {position} without a signed head"
        raise VerificationError(position + 1, problem, FindingKind.MISSING)


def _find_other_head(head: SignedHead | None, after: Anchor, chain: CheckedFold) -> Finding | None:
    """Return how the signed head of a file contradicts the events that it ends."""
    position = chain.position
    if head is None or (head.statement.position, head.statement.hash) != (position, chain.hash):
        problem = f"the signed head is not that of position {position}, the last one in the file"
        return Finding(position, problem, FindingKind.HASH)
    if not head.holds():
        problem = f"the signature of the head at position {position} does not match its key"
        return Finding(position, problem, FindingKind.SIGNATURE)
    statement = head.statement
    is_of_then = statement.recorded_at == chain.recorded_at or position == after.position
    is_before = statement.base.position < after.position and _may_begin(statement.base)
    if is_of_then and (is_before or statement.base == after):
        return None
    problem = f"the signed head does not fit the events up to position {position}"
    return Finding(position, problem, FindingKind.EVENT)


def _parse_first_line(first: bytes) -> Anchor:
    """Parse the first line of an export, and return the position and hash after which it begins."""
    try:
        found = _decode(first, _Opening).after
        after = Anchor(found.position, bytes.fromhex(found.hash))
    except ValueError:
        after = Anchor()
    if JSONL.first(after) != first:
        raise VerificationError(0, _describe_other_file(first), FindingKind.EVENT)
    if not _may_begin(after):
        problem = "the file begins after a hash that no log begins with"
        raise VerificationError(0, problem, FindingKind.BASE)
    return after


def _describe_other_file(first: bytes) -> str:
    if first.startswith(b"SQLite format 3"):
        return "this is a database, not an export: name the data directory of a ledger with --data"
    if first.startswith(b'{"specversion"'):
        return (
            "these are CloudEvents, which loadledger does not read: export the ledger with `--format jsonl`, "
            "and verify that file"
        )
    return f"the first line does not mark the file as {FORMAT}, and say where it begins"


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
_Hash = Annotated[str, msgspec.Meta(min_length=64, max_length=64)]


class _After(msgspec.Struct):
    position: _Position
    hash: _Hash


class _Opening(msgspec.Struct):
    after: _After


class _Line(msgspec.Struct, gc=False):
    position: _Position | None = None
    hash: _Hash | None = None
    body: str | None = None
    head: msgspec.Raw = msgspec.Raw()


def _may_begin(base: Anchor) -> bool:
    """Whether a log can begin after this: zeros at position 0, else the hash of an event."""
    is_first = base.hash == GENESIS
    return base.position >= 0 and len(base.hash) == len(GENESIS) and is_first == (base.position == 0)


@dataclass(frozen=True, slots=True)
class FileAudit:
    """The result of verifying an export or archive by itself.

    Attributes:
        path: of the file.
        after: the position and hash after which its events begin.
        proved: the position and hash of the last proved event.
        head: the signed head, which fits the events; None after another finding than its signer.
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
    reader, chain = None, CheckedFold(Anchor(), State())
    try:
        reader = ExportReader(read_lines(path))
        watched = () if expected is None else (expected.position,)
        chain = CheckedFold(reader.after, State(), watched, applies=False)
        finding = chain.follow(raw_rows(reader)) or _find_other_head(reader.head, reader.after, chain)
    except VerificationError as error:
        finding = error.finding
    except LedgerDamaged as error:
        finding = Finding(0 if reader is None else chain.position + 1, str(error), FindingKind.DAMAGED)
    is_sound = finding is None
    head = reader.head if reader is not None and is_sound else None
    digest = None if reader is None or expected is None else chain.hashes.get(expected.position)
    if is_sound and expected is not None and digest is not None:
        finding = compare_hash(expected, digest)
    return FileAudit(
        path,
        Anchor() if reader is None else reader.after,
        Anchor(chain.position, chain.hash),
        head,
        _hash_file(path) if is_sound else b"",
        finding or _compare_signer(head, key),
        digest is not None,
    )


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _compare_signer(head: SignedHead | None, key: str | None) -> Finding | None:
    if head is None or key is None or key_id(head.public_key) == key:
        return None
    problem = f"the head is signed by the key {key_id(head.public_key)}, {key} was expected"
    return Finding(head.statement.position, problem, FindingKind.EXPECTATION)


# Several files that follow one another.


class InvalidArchive(LedgerDamaged):
    """An archive does not verify."""

    def __init__(self, finding: Finding, at: Path) -> None:
        super().__init__(
            f"{printable_name(at)} does not verify: position {finding.position}: {finding.problem}"
        )
        self.finding = finding
        self.at = at


def prove_archives(
    paths: Sequence[Path], base: Anchor, listed: Sequence[ArchiveRecord], *, key: str | None = None
) -> list[FileAudit]:
    """Verify archives, and check that together they lead from the first event to the base of a log.

    Their events are not folded: the models and jobs of a forged file might take any memory.

    Args:
        paths: in any order; an export works like an archive if it has the same events.
        base: of the log.
        listed: the archives that the ledger lists, to name those that are missing.
        key: as for `audit_file`.

    Returns:
        The files in the order of their positions.

    Raises:
        NothingThere: `nothing_there`, the log has no archived events.
        InvalidArchive: `ledger_damaged`.
        ArchiveMissing: `archive_missing`, they do not follow one another from the first event to the base.
        LogUnavailable: `log_unavailable`, one is not a regular file.
    """
    if base.position == 0:
        raise NothingThere(
            "this ledger has no archived events: leave --archive out, and verify files by themselves, with "
            "`loadledger verify FILE`"
        )
    files = list[FileAudit]()
    for path in paths:
        files.append(file := audit_file(path, key=key))
        if file.finding is not None:
            raise InvalidArchive(file.finding, path)
    files.sort(key=lambda file: (file.after.position, file.proved.position))
    end = Anchor()
    for file in files:
        _refuse_gap(end, file.after, printable_name(file.path), listed)
        if end != file.after:
            raise InvalidArchive(Finding(end.position, _OTHER_HASH, FindingKind.BASE), file.path)
        end = file.proved
    _refuse_gap(end, base, "the log", listed)
    if end != base:
        problem = "its last hash is not the one after which the log begins"
        raise InvalidArchive(Finding(base.position, problem, FindingKind.BASE), files[-1].path)
    return files


_OTHER_HASH = "its hash there is not the last one of the archive before"


def _refuse_gap(end: Anchor, after: Anchor, name: str, listed: Sequence[ArchiveRecord]) -> None:
    if end.position < after.position:
        known = next((f": {each}" for each in listed if each.last_position > end.position), "")
        raise ArchiveMissing(
            f"positions {end.position + 1} to {after.position} are missing: {name} begins after "
            f"{after.position}; give the archive that has them, too{known}"
        )
    if end.position > after.position:
        raise ArchiveMissing(
            f"{name} begins after {after.position}, and the archive before goes on to position "
            f"{end.position}: give only archives that follow one another, each once"
        )


def read_proved(file: FileAudit) -> Iterator[Row]:
    """Yield the events of a file again that was proved.

    Raises:
        LogUnavailable: `log_unavailable`, it was changed since.
    """
    changed = LogUnavailable(f"{printable_name(file.path)} was changed while it was read: try again")
    try:
        reader = ExportReader(read_lines(file.path), known=True)
        digest = reader.after.hash
        for row in reader:
            digest = hash_body(digest, row.body)
            yield row
    except (LedgerDamaged, VerificationError):
        raise changed from None
    if (reader.after, digest) != (file.after, file.proved.hash):
        raise changed
