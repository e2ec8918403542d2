"""Verification of exports of the format `jsonl` (`events.audit.export`): events as proved, and the head.

A line is valid only if the export writes the same bytes for that event, so it has one reading only.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from events.audit.export import FORMAT, JSONL
from events.audit.signing import SignedHead, as_signed_head, key_id
from events.audit.verify import CheckedFold, Finding, FindingKind, VerificationError, compare_hash
from events.codec import GENESIS
from events.errors import LogUnavailable
from events.files import printable_name
from events.storage import RawRow, Row
from events.types import Anchor

MAX_LINE = 16 * 2**20
"""Longer than the line of any event, in bytes: a hostile longer line is never read into memory whole."""

T = TypeVar("T")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an export; a line longer than `MAX_LINE` is cut.

    Raises:
        LogUnavailable: the path is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
        raise LogUnavailable(f"{printable_name(path)} is not a regular file")
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            yield line


class ExportReader:
    """Iterates over the events of an export as written there; the caller checks their chain.

    Args:
        lines: the export's lines.

    Attributes:
        after: the position and hash after which the export begins.
        head: the signed head, once all events have been yielded.

    Raises:
        VerificationError: at once or during the iteration, naming the first wrong or missing line.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.after = _parse_first_line(next(self._lines, b""))
        self.head: SignedHead | None = None

    def __iter__(self) -> Iterator[RawRow]:
        position = self.after.position
        for position, line in enumerate(self._lines, self.after.position + 1):
            try:
                found = _parse_line(line)
            except (ValueError, RecursionError) as error:
                problem = f"the line for position {position} is not an event: {error}"
                raise VerificationError(position, problem, FindingKind.EVENT) from None
            if not _is_written(found, line):
                problem = f"the line for position {position} is not as the export writes it"
                raise VerificationError(position, problem, FindingKind.EVENT)
            if isinstance(found, SignedHead):
                if next(self._lines, None) is not None:
                    problem = "the file goes on after the signed head"
                    raise VerificationError(position - 1, problem, FindingKind.EVENT)
                self.head = found
                return
            yield found.position, found.body.encode(), found.hash
        problem = f"the end is missing: the file ends at position {position} without a signed head"
        raise VerificationError(position + 1, problem, FindingKind.MISSING)


def _find_other_head(head: SignedHead | None, after: Anchor, chain: CheckedFold) -> Finding | None:
    """Return how the signed head of a file contradicts its events, or None."""
    position = chain.position
    if head is None or (head.statement.position, head.statement.hash) != (position, chain.hash):
        problem = f"the signed head is not that of position {position}, the last one in the file"
        return Finding(position, problem, FindingKind.HASH)
    if not head.holds():
        problem = f"the signature of the head at position {position} does not match its key"
        return Finding(position, problem, FindingKind.SIGNATURE)
    if head.statement.recorded_at == chain.recorded_at or position == after.position:
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
    if (after.hash == GENESIS) != (after.position == 0):
        problem = "the file begins after a hash that no log begins with"
        raise VerificationError(0, problem, FindingKind.HASH)
    return after


def _describe_other_file(first: bytes) -> str:
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
    """Whether `line` is the export's line for its content."""
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


@dataclass(frozen=True, slots=True)
class FileAudit:
    """The result of verifying an export by itself.

    Attributes:
        path: the file's path.
        after: the position and hash after which its events begin.
        proved: the position and hash of the last proved event.
        head: the signed head, which fits the events; after a finding other than its signer, None.
        finding: the first problem, or None.
        has_expected: whether the file has the position of the expected head.
    """

    path: Path
    after: Anchor
    proved: Anchor
    head: SignedHead | None
    finding: Finding | None
    has_expected: bool = False

    @property
    def events(self) -> int:
        return self.proved.position - self.after.position


def audit_file(path: Path, *, key: str | None = None, expected: Anchor | None = None) -> FileAudit:
    """Verify an export to its end; memory does not grow with the file.

    Args:
        path: the file's path.
        key: the id of the expected signer's key; None accepts any.
        expected: a head that the file must have, if it has the position.

    Raises:
        LogUnavailable: `log_unavailable`, the path is no regular file.
    """
    reader, chain = None, CheckedFold(Anchor())
    try:
        reader = ExportReader(read_lines(path))
        watched = () if expected is None else (expected.position,)
        chain = CheckedFold(reader.after, watched, applies=False)
        finding = chain.follow(reader) or _find_other_head(reader.head, reader.after, chain)
    except VerificationError as error:
        finding = error.finding
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
        finding or _compare_signer(head, key),
        digest is not None,
    )


def _compare_signer(head: SignedHead | None, key: str | None) -> Finding | None:
    if head is None or key is None or key_id(head.public_key) == key:
        return None
    problem = f"the head is signed by the key {key_id(head.public_key)}, {key} was expected"
    return Finding(head.statement.position, problem, FindingKind.EXPECTATION)
