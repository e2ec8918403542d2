"""Audit of a ledger: the file, the chain, the stored projections, archives, other files, an expected head.

`verify` proves the log; `audit` adds SQLite's integrity check, the schema, the state at the base as archives
give it, and a comparison with exports and with a head that somebody kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from events.audit.archivechain import ArchiveProof, check_archives, compare_with_base, find_archived_hash
from events.audit.exportreader import FileAudit
from events.audit.kepthead import find_rollback
from events.audit.verify import Finding, FindingKind, Verification, compare_hash, verify_ledger
from events.errors import Archived, ArchiveMissing, NothingThere
from events.files import printable_name
from events.sqlite.proof import ProofReader, open_proof_reader
from events.sqlite.queries import list_archives
from events.sqlite.readonly import lacks_wal
from events.sqlite.schema import schema_difference
from events.sqlite.snapshots import read_base_state
from events.state import State
from events.storage import ArchiveRecord
from events.types import Anchor


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        base: of the log.
        verification: of the log and its stored projections.
        damage: what SQLite's integrity check says; None if it passes.
        unexpected: how the ledger differs from the expected head; None if it does not.
        archives: the archives that the ledger lists.
        behind: what the given archives prove of the events up to the base; None if none were given.
        compared: the files that were compared with the ledger, each with its difference, if any.
        schema: how the schema differs from that of the migrations; None if it does not.
    """

    base: Anchor
    verification: Verification
    damage: str | None
    unexpected: Finding | None
    archives: tuple[ArchiveRecord, ...] = ()
    behind: ArchiveProof | None = None
    compared: tuple[tuple[Path, Finding | None], ...] = ()
    schema: str | None = None

    @property
    def finding(self) -> Finding | None:
        """The first problem; a problem of the file itself is at the last proved position."""
        return next(self._findings(), (None, None))[0]

    @property
    def at(self) -> Path | None:
        """The file with the first problem; None if that is the ledger."""
        return next(self._findings(), (None, None))[1]

    def _findings(self) -> Iterator[tuple[Finding, Path | None]]:
        def at_end(what: str, problem: str | None, kind: FindingKind) -> Finding | None:
            position = self.verification.position
            return None if problem is None else Finding(position, f"{what}: {problem}", kind)

        found = (
            (self.verification.finding, None),
            (at_end("SQLite's integrity check says", self.damage, FindingKind.DAMAGED), None),
            (self.unexpected, None),
            *(() if self.behind is None else [(self.behind.finding, self.behind.at)]),
            *((finding, path) for path, finding in self.compared),
            (at_end("the database's schema", self.schema, FindingKind.SCHEMA), None),
        )
        return ((finding, at) for finding, at in found if finding is not None)


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
        archives: of the ledger, in any order: they must verify, lead to its base, and fold to the state that
            it has stored there. Memory does not grow with them.
        key: the id of the archives' expected signer's key; None accepts any.
        files: exports and archives, verified by themselves, to be compared with the ledger.
        kept_in: the data directory whose kept head the ledger must have, unless another one is expected, and
            the public key that has to have signed it.

    Raises:
        IncompleteCopy: `incomplete_copy`, the newest events may be missing, and no head was expected.
        Archived: `archived`, the expected position is before the base, or before the first archive.
        ArchiveMissing: `archive_missing`, the archives do not follow one another up to the base, or do not
            have the last position of one of `files`.
        NothingThere: `nothing_there`, archives were given for a ledger without archived events.
        FutureSchema: `future_schema`.
        ForeignDatabase: `foreign_database`.
        LogUnavailable: `log_unavailable`, a file cannot be read, or is not a database.
    """
    found, stored = _audit_own_file(path, expected, files, with_archives=bool(archives))
    if stored is not None and expected is None and kept_in is not None:
        found = replace(found, unexpected=_compare_with_kept_head(*kept_in, path, found))
    if stored is None or found.finding is not None:
        return found
    if archives:
        found = prove_base(found, stored, archives, key=key, expected=expected)
    if found.finding is not None:
        return found
    archived = tuple(
        (each.path, _compare_with_archives(found, each)) for each in files if _is_behind(each, found)
    )
    return replace(found, compared=(*found.compared, *archived))


def prove_base(
    found: Audit, stored: State, archives: Sequence[Path], *, key: str | None, expected: Anchor | None
) -> Audit:
    """Add what archives prove of the events up to the base, where the ledger has stored a state.

    Raises:
        Archived: `archived`, the expected position is before the first archive.
        ArchiveMissing: `archive_missing`, the archives do not follow one another up to the base.
        NothingThere: `nothing_there`, the ledger has no archived events.
        LogUnavailable: `log_unavailable`, an archive was changed meanwhile.
    """
    if found.base.position == 0:
        raise NothingThere(
            "this ledger has no archived events: its log begins with the first event. Verify files by "
            "themselves, with `loadledger verify FILE`"
        )
    behind = check_archives(archives, found.base, found.archives, key=key, expected=expected)
    if expected is not None and expected.position < behind.after.position and behind.finding is None:
        raise archived_error(behind.after, found)
    return replace(found, behind=compare_with_base(behind, stored, found.archives[-1].folds))


def _audit_own_file(
    path: Path, expected: Anchor | None, files: Sequence[FileAudit], *, with_archives: bool
) -> tuple[Audit, State | None]:
    """Audit the ledger's own file; return also the state at its base, unless there is a finding.

    Archives are read later: an open read transaction keeps the writer from beginning its write-ahead log
    anew.
    """
    without_wal = lacks_wal(path)
    with open_proof_reader(path) as ledger:
        damage = ledger.find_damage()
        verification = verify_ledger(ledger)
        base, schema = ledger.base() or Anchor(), schema_difference(ledger.connection)
        found = Audit(base, verification, damage, None, schema=schema)
        if verification.verified and found.schema is None and without_wal and expected is None:
            ledger.refuse_incomplete()
        if not verification.verified:
            return found, None
        found = replace(found, archives=list_archives(ledger.connection) if base.position else ())
        found = replace(
            found,
            unexpected=_compare_with_head(ledger, found, expected, with_archives=with_archives),
            compared=tuple(  # if the last hash of a file is the chain's, so are all events before it
                (
                    each.path,
                    _compare_with_log(ledger, found, each.proved),
                )
                for each in files
                if not _is_behind(each, found)
            ),
        )
        return found, read_base_state(ledger.connection, base.position) if found.finding is None else None


def _compare_with_kept_head(data: Path, public_key: bytes, path: Path, found: Audit) -> Finding | None:
    rollback = find_rollback(data, path, public_key)
    if rollback is None:
        return None
    _, reason = rollback
    return Finding(found.verification.position, reason, FindingKind.EXPECTATION)


def _compare_with_head(
    ledger: ProofReader, found: Audit, expected: Anchor | None, *, with_archives: bool
) -> Finding | None:
    """Compare with the expected head; positions before the base are left to the archives."""
    if expected is None:
        return None
    if expected.position >= found.base.position:
        return _compare_with_log(ledger, found, expected)
    if with_archives:
        return None
    raise archived_error(found.base, found)


def archived_error(after: Anchor, found: Audit) -> Archived:
    """Return the error of an expected event that is in an archive which was not given."""
    problem = (
        f"events up to position {after.position} are archived: expect a later position, or give the archives "
        "with --archive"
    )
    return Archived(problem, after.position, found.verification.position)


def _is_behind(file: FileAudit, found: Audit) -> bool:
    return file.proved.position < found.base.position


def _compare_with_archives(found: Audit, file: FileAudit) -> Finding | None:
    """Compare a file that ends before the base with the archives; one must have its last position."""
    end = file.proved
    digest = None if found.behind is None else find_archived_hash(found.behind.files, end.position)
    if digest is None:
        known = next(
            (f", listed as: {each}" for each in found.archives if each.last_position >= end.position),
            "",
        )
        raise ArchiveMissing(
            f"{printable_name(file.path)} ends at position {end.position}, and the log begins after "
            f"{found.base.position}: only the archive with that position can show whether its events were "
            f"this ledger's; give it with --archive{known}"
        )
    return compare_hash(end, digest)


def _compare_with_log(ledger: ProofReader, found: Audit, expected: Anchor) -> Finding | None:
    head = found.verification.position
    if expected.position > head:
        problem = f"the log ends at position {head}, {expected.position} was expected"
        return Finding(head + 1, problem, FindingKind.EXPECTATION)
    return compare_hash(expected, ledger.hash_at(expected.position))
