"""What an export or an archive proves by itself: its chain, its signed head, and whose key signed it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from events.archivefile import ExportReader, FileDamaged, lines_of
from events.expected import Expected
from events.findings import Finding, Kind
from events.refusals import LedgerDamaged
from events.signing import Base, SignedHead, key_id


@dataclass(frozen=True, slots=True)
class FileAudit:
    """What was found in a file: from where to where it is proved, and the first problem, if any.

    Attributes:
        after: where its events begin.
        proved: up to where they are proved.
        head: the signed head, which holds; null where there is a finding before it.
        sha256: of the file; empty likewise.
        has_expected: whether the position that was expected is in it.
    """

    path: Path
    after: Base
    proved: Base
    head: SignedHead | None
    sha256: bytes
    finding: Finding | None
    has_expected: bool = False

    @property
    def events(self) -> int:
        """How many events are proved."""
        return self.proved.position - self.after.position


def audit_file(path: Path, *, key: str | None = None, expected: Expected | None = None) -> FileAudit:
    """Verify an export or an archive, all of it; memory does not grow with it.

    Args:
        path: of the file.
        key: the id of the key that has to have signed it, where that is known.
        expected: what somebody kept, if it is there to be compared.

    Raises:
        LogUnavailable: `log_unavailable`, it is no regular file.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    reader: ExportReader | None = None
    finding, unexpected = None, None
    try:
        reader = ExportReader(lines_of(path, digest.update))
        unexpected = _unexpected(expected, reader.after)
        for row in reader:
            if expected is not None and row.position == expected.position:
                unexpected = _unexpected(expected, Base(row.position, row.hash))
    except FileDamaged as error:
        finding = Finding(error.position, str(error), error.kind)
    except LedgerDamaged as error:
        finding = Finding(0 if reader is None else reader.position + 1, str(error), Kind.DAMAGED)
    if reader is None:
        nothing = Base(0, bytes(32))
        return FileAudit(path, nothing, nothing, None, b"", finding)
    proved = Base(reader.position, reader.hash)
    return FileAudit(
        path,
        reader.after,
        proved,
        reader.head,
        digest.digest() if finding is None else b"",
        finding or unexpected or _signed_by_another(reader.head, key),
        expected is not None and reader.after.position <= expected.position <= proved.position,
    )


def audit_files(
    paths: Sequence[Path], *, key: str | None = None, expected: Expected | None = None
) -> list[FileAudit]:
    """Verify several, as `audit_file` does."""
    return [audit_file(path, key=key, expected=expected) for path in paths]


def _unexpected(expected: Expected | None, found: Base) -> Finding | None:
    if expected is None or expected.position != found.position or expected.hash == found.hash:
        return None
    problem = f"the hash is {found.hash.hex()}, {expected.hash.hex()} was expected"
    return Finding(found.position, problem, Kind.EXPECTATION)


def _signed_by_another(head: SignedHead | None, key: str | None) -> Finding | None:
    if head is None or key is None or key_id(head.public_key) == key:
        return None
    problem = f"the head is signed by the key {key_id(head.public_key)}, {key} was expected"
    return Finding(head.statement.position, problem, Kind.EXPECTATION)
