"""Audit of a ledger: the file, the chain, the stored projections, archives, other files, an expected head.

`verify` proves the log; `audit` adds SQLite's integrity check, the schema, the events that were archived, and
a comparison with exports and with a head that somebody kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from events.audit.exportreader import FileAudit, InvalidArchive, prove_archives, read_proved
from events.audit.kepthead import find_rollback
from events.audit.verify import (
    CheckedFold,
    Finding,
    FindingKind,
    Verification,
    compare_hash,
    raw_rows,
    verify_ledger,
)
from events.codec import GENESIS
from events.errors import Archived, LogUnavailable
from events.files import printable_name
from events.sqlite.bases import entities_of, list_archives
from events.sqlite.proof import open_proof_reader
from events.sqlite.queries import find_base, read_base
from events.sqlite.readonly import lacks_wal, open_read_only
from events.sqlite.schema import schema_difference
from events.state import State
from events.storage import ArchiveRecord, digest_state
from events.types import Anchor


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        base: of the log.
        verification: of the log and its stored projections.
        finding: the first problem; one of the file itself is at the last proved position.
        at: the file with that problem; None if it is the ledger.
        damage: what SQLite's integrity check says; None if it passes.
        archives: the archives that the ledger lists.
        behind: the given archives, which prove the events from the first one to the base.
    """

    base: Anchor
    verification: Verification
    finding: Finding | None
    at: Path | None = None
    damage: str | None = None
    archives: tuple[ArchiveRecord, ...] = ()
    behind: tuple[FileAudit, ...] = ()


ExpectedHead = tuple[Anchor, Path | None]
"""A head that a ledger must have, with its archives, and the file that ends with it, if any."""


def list_expected(head: Anchor | None, files: Iterable[FileAudit] = ()) -> list[ExpectedHead]:
    """Return the head that somebody kept, and those of exports, verified by themselves."""
    kept: list[ExpectedHead] = [] if head is None else [(head, None)]
    return kept + [(file.proved, file.path) for file in files]


def compare_heads(
    expected: Iterable[ExpectedHead], verification: Verification, archives: Iterable[ArchiveRecord]
) -> tuple[Finding, Path | None] | None:
    """Return the first difference and its file, if any.

    Args:
        expected: heads whose positions were watched.
        verification: of the ledger.
        archives: that the ledger lists, to name the one that has a position.

    Raises:
        Archived: `archived`, a position is in an archive that was not given.
    """
    end = verification.position
    for anchor, path in expected:
        digest = verification.hashes.get(anchor.position)
        if digest is not None:
            finding = compare_hash(anchor, digest)
        elif anchor.position > end:
            problem = f"the log ends at position {end}, {anchor.position} was expected"
            finding = Finding(end + 1, problem, FindingKind.EXPECTATION)
        else:
            what = "the expected position" if path is None else f"the end of {printable_name(path)}, at"
            known = next((f", in {each}" for each in archives if each.last_position >= anchor.position), "")
            base = end - verification.events
            raise Archived(
                f"{what} {anchor.position} is archived{known}: events up to position {base} are; give all "
                "archives with --archive",
                base,
                end,
            )
        if finding is not None:
            return finding, path
    return None


def audit(
    path: Path,
    expected: Anchor | None = None,
    *,
    archives: Sequence[Path] = (),
    key: str | None = None,
    files: Sequence[FileAudit] = (),
    kept_in: tuple[Path, bytes] | None = None,
) -> Audit:
    """Audit the ledger at `path`, read-only and in one snapshot; works beside a running server.

    Args:
        path: of the ledger.
        expected: a head that the ledger, or one of `archives`, must have.
        archives: of the ledger, all of them, in any order: they have to lead to its base and to the state
            that it has stored there. Memory does not grow with them.
        key: the id of the archives' expected signer's key; None accepts any.
        files: exports and archives, verified by themselves, to be compared with the ledger.
        kept_in: the data directory whose kept head the ledger must have, unless another one is expected, and
            the public key that has to have signed it.

    Raises:
        IncompleteCopy: `incomplete_copy`, the newest events may be missing, and no head was expected.
        Archived: `archived`, the expected position, or the end of one of `files`, is in an archive that was
            not given.
        ArchiveMissing: `archive_missing`, the archives do not follow one another from the first event to the
            base.
        NothingThere: `nothing_there`, archives were given for a ledger without archived events.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, a file cannot be read, or is not a database.
    """
    heads, fold, behind = list_expected(expected, files), None, list[FileAudit]()
    if archives:
        with open_read_only(path) as own:
            base, listed = find_base(own), list_archives(own)
        if base is None:
            return _audit_own_file(path, (), None)  # which finds that
        try:
            behind = prove_archives(archives, base, listed, key=key)
            fold = fold_archives(behind, [head.position for head, _ in heads])
        except InvalidArchive as invalid:
            return audit_of_invalid(invalid, base, listed)
    found = _audit_own_file(path, heads, fold)
    if found.finding is None and expected is None and kept_in is not None:
        found = replace(found, finding=_compare_with_kept_head(*kept_in, path, found))
    return replace(found, behind=tuple(behind))


def audit_of_invalid(invalid: InvalidArchive, base: Anchor, listed: tuple[ArchiveRecord, ...]) -> Audit:
    """Return the audit that ends with an archive's finding; nothing is proved then."""
    verification = Verification(0, 0, GENESIS, invalid.finding)
    return Audit(base, verification, invalid.finding, invalid.at, archives=listed)


def fold_archives(files: Sequence[FileAudit], watched: Iterable[int] = ()) -> CheckedFold:
    """Return the fold of all events of archives that are proved to follow one another.

    At the end of each file it has to give the state whose digest the signed head says.

    Raises:
        InvalidArchive: `ledger_damaged`.
        LogUnavailable: `log_unavailable`, a file was changed meanwhile.
    """
    fold = CheckedFold(Anchor(), State(), watched)
    for file in files:
        finding = fold.follow(raw_rows(read_proved(file))) or _compare_state(file, fold)
        if finding is not None:
            raise InvalidArchive(finding, file.path)
    return fold


def _compare_state(file: FileAudit, fold: CheckedFold) -> Finding | None:
    stated = b"" if file.head is None else file.head.statement.state_sha256
    if not stated or stated == digest_state(entities_of(fold.state())):
        return None
    return Finding(fold.position, "its signed head has the digest of another state", FindingKind.BASE)


def _audit_own_file(path: Path, heads: Sequence[ExpectedHead], fold: CheckedFold | None) -> Audit:
    may_lack_events = lacks_wal(path) and all(file is not None for _, file in heads)
    with open_proof_reader(path) as ledger:
        base = read_base(ledger.connection)
        if fold is not None and Anchor(fold.position, fold.hash) != base:
            raise LogUnavailable("events were archived meanwhile: give that archive, too")
        damage = ledger.find_damage()
        verification = verify_ledger(ledger, fold, [head.position for head, _ in heads])
        schema = schema_difference(ledger.connection)
        listed = list_archives(ledger.connection) if verification.verified else ()
        if may_lack_events and verification.verified and schema is None:
            ledger.refuse_incomplete()
    at_end, finding, at = verification.position, verification.finding, None
    if finding is None and damage is not None:
        finding = Finding(at_end, f"SQLite's integrity check says: {damage}", FindingKind.DAMAGED)
    if finding is None and (difference := compare_heads(heads, verification, listed)):
        finding, at = difference
    if finding is None and schema is not None:
        finding = Finding(at_end, f"the database's schema: {schema}", FindingKind.SCHEMA)
    return Audit(base, verification, finding, at, damage, listed)


def _compare_with_kept_head(data: Path, public_key: bytes, path: Path, found: Audit) -> Finding | None:
    rollback = find_rollback(data, path, public_key)
    if rollback is None:
        return None
    _, reason = rollback
    return Finding(found.verification.position, reason, FindingKind.EXPECTATION)
