"""Verification of ledgers, files and stores for `verify` and `backup`: results as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from click import UsageError, format_filename

from events.audit.audit import Audit, audit
from events.audit.exportreader import FileAudit, audit_file
from events.audit.signing import key_id
from events.audit.verify import Finding
from events.errors import NothingThere
from events.sqlite.datalock import LEDGER
from events.types import Anchor
from features.audit import MAX_REMARKS, Remark
from loadledger.cli.output import count_of, to_printable
from runtime.store.folder import STORE
from runtime.store.store import verify_store
from server.auth.keys import KeyProblem, expected_key, open_signer

_SQLITE = b"SQLite format 3\0"
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PK\x03\x04")
"""Beginnings of files of gzip, zstd, xz and zip."""


def format_audit(found: Audit, files: Sequence[FileAudit] = ()) -> list[str]:
    """Return a ledger's audit as lines of text; `files` were compared with the ledger."""
    verification, finding = found.verification, found.finding
    head = f"{verification.position}:{verification.hash.hex()}"
    if finding is not None:
        return list(_finding_lines(found, finding, head))
    lines = [f"verified: {count_of(verification.position, 'event')}", f"head: {head}"]
    if not verification.compared:
        lines.append("not compared: the stored projections, made by another release; `serve` rebuilds them")
    lines += [f"matches the ledger: {format_filename(each.path)}" for each in files if not each.finding]
    return [*lines, *_remark_lines(verification.remarks)]


def _finding_lines(found: Audit, finding: Finding, head: str) -> Iterator[str]:
    at = "" if found.at is None else f"{format_filename(found.at)}: "
    yield _describe_finding(at, finding)
    if found.damage is not None:
        yield f"SQLite's integrity check: {found.damage}"
    yield f"proved up to: {head}"


def _describe_finding(at: str, finding: Finding) -> str:
    return f"NOT verified: {at}position {finding.position}: {finding.problem} ({finding.kind})"


def _remark_lines(remarks: Sequence[Remark]) -> Iterator[str]:
    for each in remarks:
        yield f"remark: position {each.position}: {to_printable(each.text)} ({each.kind})"
    if len(remarks) == MAX_REMARKS:
        yield f"only the first {MAX_REMARKS} remarks are listed"


def _format_file_audit(file: FileAudit, *, key: str | None = None) -> list[str]:
    name, end = format_filename(file.path), f"{file.proved.position}:{file.proved.hash.hex()}"
    if file.finding is not None:
        return [f"{name}: {_describe_finding('', file.finding)}", f"{name}: proved up to: {end}"]
    signer = _signer_id(file)
    signed = f"key {signer}; use --key to check who owns it" if key is None else f"expected key {signer}"
    return [
        f"{name}: verified: {file.events} events after position {file.after.position}",
        f"{name}: head: {end}",
        f"{name}: signed by the {signed}",
    ]


def _signer_id(file: FileAudit) -> str:
    """Return the id of the key that signed a file; empty after a finding."""
    return "" if file.head is None else key_id(file.head.public_key)


def audit_members(found: Audit) -> dict[str, Any]:
    verification, finding = found.verification, found.finding
    return {
        "verified": finding is None,
        "position": verification.position,
        "hash": verification.hash.hex(),
        "integrity": found.damage or "ok",
        "projections_compared": verification.compared,
        "finding": _finding(finding, found.at),
        "remarks": [asdict(each) for each in verification.remarks],
    }


def _file_members(file: FileAudit, *, key: str | None = None) -> dict[str, Any]:
    """Return a file's audit as JSON members; `key_expected` is null without an expected key."""
    head, signer = file.head, _signer_id(file)
    return {
        "file": str(file.path),
        "verified": file.finding is None,
        "events": file.events,
        "after": {"position": file.after.position, "hash": file.after.hash.hex()},
        "position": file.proved.position,
        "hash": file.proved.hash.hex(),
        "recorded_at": head and (head.statement.recorded_at or None),
        "key_id": signer or None,
        "key_expected": signer == key if signer and key else None,
        "finding": _finding(file.finding, file.path),
    }


def _finding(finding: Finding | None, at: Path | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {
        "position": finding.position,
        "kind": str(finding.kind),
        "problem": finding.problem,
        "file": None if at is None else str(at),
    }


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Result of `verify`: the audits of a ledger and of files, and the expected key.

    `may_lack_end` is True of a ledger that was compared with no head that somebody kept.
    """

    ledger: Audit | None
    files: Sequence[FileAudit]
    key: str | None
    may_lack_end: bool = False

    @property
    def verified(self) -> bool:
        found = [each.finding for each in self.files]
        return all(finding is None for finding in (*found, self.ledger and self.ledger.finding))

    def lines(self) -> list[str]:
        lines = [] if self.ledger is None else format_audit(self.ledger, self.files)
        if self.may_lack_end and self.verified:
            lines.append("not compared: a head that was kept; --expect HEAD shows that no events are missing")
        return lines + [line for file in self.files for line in _format_file_audit(file, key=self.key)]

    def members(self) -> dict[str, Any]:
        """Return the result as JSON members; the ledger's only if there was one."""
        files = [_file_members(each, key=self.key) for each in self.files]
        of_ledger = {} if self.ledger is None else audit_members(self.ledger)
        return {**of_ledger, "verified": self.verified, "files": files}


def verify_ledger_and_files(
    data: Path | None, files: Sequence[Path], key: str | None, expected: Anchor | None
) -> VerifyResult:
    """Verify a ledger, files by themselves, or both against each other.

    Args:
        data: the data directory of the ledger; None takes a copy of a ledger among the files, if any.
        files: exports.
        key: the expected key of the exports: an id, or a file.
        expected: an anchor that the ledger, or without one a file, has to contain.

    Raises:
        UsageError: there are two ledgers, a file is compressed, or the key is for none.
        KeyProblem: the key is invalid.
        LedgerProblem: verification is impossible.
        OSError: a file cannot be read.
    """
    copies = [each for each in files if _is_database(each)]
    if len(copies) > (data is None):
        raise UsageError(f"{copies[-1]} is a second ledger: verify one at a time")
    ledger = data / LEDGER if data is not None else next(iter(copies), None)
    files = [each for each in files if each not in copies]
    if key is not None and not files:
        raise UsageError("--key is for signed files: name an export, too")
    wanted = None if key is None else expected_key(key)
    alone = expected if ledger is None else None
    checked = [audit_file(each, key=wanted, expected=alone) for each in files]
    if ledger is not None:
        sound = [each for each in checked if each.finding is None]
        kept = None
        with suppress(KeyProblem):  # a folder with only a copy of the ledger has no key
            kept = None if data is None else (data, open_signer(data).public_key)
        found = audit(ledger, expected, files=sound, kept_in=kept)
        return VerifyResult(found, checked, wanted, may_lack_end=kept is None and expected is None)
    if expected is not None and not any(each.has_expected or each.finding for each in checked):
        raise NothingThere(f"none of these files has position {expected.position}: name one that has it")
    return VerifyResult(None, checked, wanted)


def _is_database(path: Path) -> bool:
    """Whether a file is a ledger's, and no export.

    Raises:
        UsageError: it is compressed.
    """
    if not path.is_file():  # `audit_file` refuses a pipe
        return False
    with path.open("rb") as file:
        begin = file.read(len(_SQLITE))
    if begin.startswith(_COMPRESSED):
        raise UsageError(f"{path} is compressed: unpack it first")
    return begin == _SQLITE


@dataclass(slots=True)
class CheckedStore:
    """The result of verifying a store: the number of hashed files, and all findings."""

    versions: int = 0
    bytes: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        return not self.findings

    def members(self) -> dict[str, Any]:
        return {"verified": self.verified, **asdict(self)}

    def lines(self) -> Iterator[str]:
        for finding in self.findings:
            yield f"NOT verified: version {finding['digest']}: {to_printable(finding['reason'])}"
        if self.verified:
            yield f"verified: {count_of(self.versions, 'version')}, {self.bytes} bytes"


def verify_local_store(data: Path) -> CheckedStore:
    """Hash all files in the store of a data directory; a directory without a store passes.

    Raises:
        UsageError: the directory does not exist.
        StoreUnavailable: `store_unavailable`, the store cannot be listed.
    """
    if not data.is_dir():
        raise UsageError(f"--data: {data} is no directory")
    checked = CheckedStore()
    for version in verify_store(data / STORE):
        checked.versions += 1
        checked.bytes += version.bytes
        checked.findings += [{"digest": version.digest, "reason": reason} for reason in version.findings]
    return checked
