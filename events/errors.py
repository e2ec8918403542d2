"""Refusals and failures of the ledger; each class carries a stable `code`."""

from __future__ import annotations


class LedgerProblem(Exception):
    """Something is wrong with the ledger."""

    code = "ledger_problem"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])


class NotEncodable(LedgerProblem):
    """The event holds a value that has no canonical form."""

    code = "not_encodable"


class LogUnavailable(LedgerProblem):
    """The ledger cannot be read or written, so nothing was accepted; the server's log says why."""

    code = "log_unavailable"


class UnreadableEvent(LogUnavailable):
    """An event in the database cannot be folded."""

    def __init__(self, position: int, error: Exception) -> None:
        super().__init__(
            f"the ledger's event {position} cannot be folded: {error!r}; use the release that wrote it, or, "
            "if none did, see `loadledger discard`"
        )
        self.position = position


class OutcomeUnknown(LogUnavailable):
    """It is unknown whether the request was recorded: read the ledger before you repeat it."""


class LogClosed(LogUnavailable):
    """The server is stopping and has closed the ledger; nothing was accepted."""

    code = "shutting_down"


class FutureSchema(LedgerProblem):
    """The database was written by a newer loadledger; run that version, or a later one, on it."""

    code = "future_schema"


DEVELOPMENT = (
    "a version of loadledger before 0.1.0 wrote this ledger, and this one does not read it: keep it with the "
    "version that wrote it, and start with a new data directory or database; nothing in it was touched"
)
"""Why a ledger of the time before format 1 is refused."""


class ForeignDatabase(LedgerProblem):
    """The file is a database, but not a ledger of loadledger; nothing in it was touched."""

    code = "foreign_database"


class DataInUse(LedgerProblem):
    """Another process is using this data directory."""

    code = "data_in_use"


class IsReplica(LedgerProblem):
    """The ledger's file is a replica of a ledger in a database: only a server of that ledger writes it."""

    code = "is_replica"


class RequestRefused(LedgerProblem):
    """The present state does not allow the request; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class IncompleteCopy(LedgerProblem):
    """The file is a copy of a running server's ledger without its newest events."""

    code = "incomplete_copy"


class RolledBack(LedgerProblem):
    """The ledger does not contain the last head that the server signed."""

    code = "rolled_back"


class ForeignHead(Exception):
    """The ledger has events that this writer did not write. No caller handles this: the writer ends."""

    code = "foreign_head"


class LedgerForked(ForeignHead):
    """The database does not have the events that this server has read from it: its history is another one."""

    code = "ledger_forked"


class EpochOver(LogUnavailable):
    """The other servers gave this one up: nothing was accepted, and it joins again; try again shortly."""


class NameInUse(LedgerProblem):
    """Another server that shares the ledger has this one's name."""

    code = "node_name_in_use"


class LedgerDamaged(LedgerProblem):
    """The ledger, or a file written from it, does not verify."""

    code = "ledger_damaged"


class NothingThere(LedgerProblem):
    """The log has no events at the requested positions."""

    code = "nothing_there"


class WrongTarget(LedgerProblem):
    """The file cannot be written at the requested path."""

    code = "wrong_target"
