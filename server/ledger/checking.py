"""What `loadledger verify` checks: a ledger, with its archives or without, and files by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from events.audit import Audit, audit
from events.expected import Expected
from events.fileaudit import FileAudit, audit_files
from events.refusals import NothingThere
from server.ledger.audited import file_members, file_told, members, told
from server.ledger.key import expected_key


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of a ledger, if one was asked for, and of files, by a key that was expected, if any."""

    ledger: Audit | None
    files: Sequence[FileAudit]
    key: str | None

    @property
    def verified(self) -> bool:
        """Whether nothing is wrong."""
        found = [each.finding for each in self.files]
        return all(finding is None for finding in (*found, self.ledger and self.ledger.finding))

    def lines(self) -> list[str]:
        """Return it for people."""
        lines = [] if self.ledger is None else told(self.ledger, key=self.key)
        return lines + [line for file in self.files for line in file_told(file, key=self.key)]

    def members(self) -> dict[str, Any]:
        """Return it for programs: what is of the ledger is not there without one."""
        behind = self.ledger.behind.files if self.ledger and self.ledger.behind else ()
        files = [file_members(each, key=self.key) for each in (*behind, *self.files)]
        of_ledger = {} if self.ledger is None else members(self.ledger)
        return {**of_ledger, "verified": self.verified, "files": files}


def check(
    ledger: Path | None,
    archives: Sequence[Path],
    files: Sequence[Path],
    key: str | None,
    expected: Expected | None,
) -> Checked:
    """Check a ledger or files, or both beside one another.

    Args:
        ledger: the database's file, if it is to be checked.
        archives: of that ledger.
        files: exports or archives, each to be checked by itself.
        key: by whom files have to be signed: a key's id, or a file that has it.
        expected: what the ledger must have, or without one a file.

    Raises:
        KeyProblem: the key is none.
        LedgerProblem: nobody can say; the text says why.
        OSError: a file cannot be read.
    """
    wanted = None if key is None else expected_key(key)
    checked = audit_files(files, key=wanted, expected=expected if ledger is None else None)
    if ledger is not None:
        sound = [each for each in checked if each.finding is None]
        found = audit(ledger, expected, archives=archives, key=wanted, files=sound)
        return Checked(found, checked, wanted)
    if expected is not None and not any(each.has_expected or each.finding for each in checked):
        raise NothingThere(f"none of these files has position {expected.position}, so nobody can say")
    return Checked(None, checked, wanted)
