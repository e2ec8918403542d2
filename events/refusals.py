"""What proof, export, archive and backup refuse; each class carries a stable `code`."""

from __future__ import annotations

from events.errors import LedgerProblem


class IncompleteCopy(LedgerProblem):
    """The file is a copy of a running server's ledger without its newest events."""

    code = "incomplete_copy"


class Archived(LedgerProblem):
    """What is asked for was archived; the archive has it.

    Args:
        message: in words.
        oldest: the first position that can be asked for in this way.
        head: the last one.
    """

    code = "archived"

    def __init__(self, message: str, oldest: int, head: int) -> None:
        super().__init__(message)
        self.problem_members = {"oldest": oldest, "head": head}


class ArchiveMissing(LedgerProblem):
    """The archives do not follow one another up to where the log begins."""

    code = "archive_missing"


class LedgerDamaged(LedgerProblem):
    """The ledger, or what was written of it, does not verify."""

    code = "ledger_damaged"


class NothingThere(LedgerProblem):
    """The log has no events where they were asked for."""

    code = "nothing_there"


class MustStay(LedgerProblem):
    """These events cannot be archived yet."""

    code = "must_stay"


class WrongTarget(LedgerProblem):
    """The file cannot be written where it was asked for."""

    code = "wrong_target"
