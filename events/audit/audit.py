"""Audit of a ledger: the file, the chain, the stored projections, exports, an expected head.

`verify` proves the log; `audit` also checks the file as SQLite does, its schema, and its agreement with
exports and a head that an auditor kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from events.audit.exportreader import FileAudit
from events.audit.kepthead import find_rollback
from events.audit.verify import Finding, FindingKind, Verification, compare_hash, verify_ledger
from events.sqlite.proof import open_proof_reader
from events.sqlite.readonly import lacks_wal
from events.sqlite.schema import schema_difference
from events.types import Anchor


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        verification: that of the log and its stored projections.
        finding: the first problem; a problem of the file itself is at the last proved position.
        at: the file with that problem; None is the ledger.
        damage: the result of SQLite's integrity check; None if it passes.
    """

    verification: Verification
    finding: Finding | None
    at: Path | None = None
    damage: str | None = None


ExpectedHead = tuple[Anchor, Path | None]
"""A head that a ledger must have, and the file that ends with it, if any."""


def list_expected(head: Anchor | None, files: Iterable[FileAudit] = ()) -> list[ExpectedHead]:
    """Return the head that an auditor kept, and the heads of exports, each verified by itself."""
    kept: list[ExpectedHead] = [] if head is None else [(head, None)]
    return kept + [(file.proved, file.path) for file in files]


def compare_heads(
    expected: Iterable[ExpectedHead], verification: Verification
) -> tuple[Finding, Path | None] | None:
    """Return the first difference and its file, if any.

    Args:
        expected: heads whose positions were watched.
        verification: of the ledger, which has no finding.
    """
    end = verification.position
    for anchor, path in expected:
        if anchor.position > end:
            problem = f"the log ends at position {end}, {anchor.position} was expected"
            return Finding(end + 1, problem, FindingKind.EXPECTATION), path
        finding = compare_hash(anchor, verification.hashes[anchor.position])
        if finding is not None:
            return finding, path
    return None


def audit(
    path: Path,
    expected: Anchor | None = None,
    *,
    files: Sequence[FileAudit] = (),
    kept_in: tuple[Path, bytes] | None = None,
) -> Audit:
    """Audit the ledger at `path`, read-only and in one snapshot; works beside a running server.

    Args:
        path: of the ledger.
        expected: a head that the ledger must have.
        files: exports, each verified by itself, to be compared with the ledger.
        kept_in: the data directory whose kept head the ledger must have, unless `expected` is given, and the
            public key that must have signed it.

    Raises:
        IncompleteCopy: `incomplete_copy`, the newest events may be missing, and no head was expected.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, a file cannot be read, or is not a database.
    """
    found = _audit_own_file(path, list_expected(expected, files), may_lack_events=expected is None)
    if found.finding is None and expected is None and kept_in is not None:
        data, public_key = kept_in
        if (rollback := find_rollback(data, path, public_key)) is not None:
            finding = Finding(found.verification.position, rollback[1], FindingKind.EXPECTATION)
            return replace(found, finding=finding)
    return found


def _audit_own_file(path: Path, heads: Sequence[ExpectedHead], *, may_lack_events: bool) -> Audit:
    may_lack_events = may_lack_events and lacks_wal(path)
    with open_proof_reader(path) as ledger:
        damage = ledger.find_damage()
        verification = verify_ledger(ledger, [head.position for head, _ in heads])
        schema = schema_difference(ledger.connection)
        if may_lack_events and verification.verified and schema is None:
            ledger.refuse_incomplete()
    at_end, finding, at = verification.position, verification.finding, None
    if finding is None and damage is not None:
        finding = Finding(at_end, f"SQLite's integrity check says: {damage}", FindingKind.DAMAGED)
    if finding is None and (difference := compare_heads(heads, verification)):
        finding, at = difference
    if finding is None and schema is not None:
        finding = Finding(at_end, f"the database's schema: {schema}", FindingKind.SCHEMA)
    return Audit(verification, finding, at, damage)
