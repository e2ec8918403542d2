"""The last signed head, kept beside the ledger's key: a ledger that does not contain it was rolled back.

A server keeps each head that it hands out, and one each minute and at its stop. A ledger that was replaced by
an older one, or by another, does not contain it. Who can also replace the kept head is not found out by it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from events.audit.files import write_file
from events.audit.signing import SignedHead, as_signed_head
from events.errors import LedgerProblem
from events.sqlite.proof import open_log_reader
from events.storage import LogHead
from events.types import RollbackAccepted

KEPT_HEAD = "ledger.head"
"""The file in the data directory, as `GET /api/v1/events/head` answers."""

_log = logging.getLogger(__name__)


class HeadKeeper:
    """Keeps the latest signed head durably; one write at a time, for all that were signed meanwhile."""

    def __init__(self, data: Path) -> None:
        self._path = data / KEPT_HEAD
        self._writing = asyncio.Lock()
        self._kept = -1

    async def keep(self, head: SignedHead) -> None:
        """Keep a head whose event is durable, unless a later one was kept; log a failure.

        Without it an older head stays kept, which a ledger with this one contains, too.
        """
        async with self._writing:
            if head.statement.position <= self._kept:
                return
            try:
                await asyncio.to_thread(self._write, head)
            except (OSError, LedgerProblem) as error:
                _log.warning("the signed head could not be kept in %s: %s", self._path, error)
                return
            self._kept = head.statement.position

    def _write(self, head: SignedHead) -> None:
        with write_file(self._path, replace=True) as file:
            file.write(json.dumps(head.members(), indent=1).encode() + b"\n")


def find_rollback(data: Path, ledger: Path) -> tuple[RollbackAccepted, str] | None:
    """Return what accepting the ledger would record, and why it is refused; None if it is not.

    Events up to the kept head may have been archived since: then only the end of an archive can be compared.

    Raises:
        LedgerProblem: the ledger cannot be read.
    """
    try:
        text = (data / KEPT_HEAD).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return RollbackAccepted(0, "", 0, ""), f"{KEPT_HEAD} cannot be read: {error.strerror}"
    try:
        kept = as_signed_head(json.loads(text))
    except ValueError as error:
        return RollbackAccepted(0, "", 0, ""), f"{KEPT_HEAD} is damaged: {error}"
    head, reason = _compare(ledger, kept)
    if not kept.holds():
        reason = f"the signature in {KEPT_HEAD} does not hold"
    if reason is None:
        return None
    said = kept.statement
    return RollbackAccepted(said.position, said.hash.hex(), head.position, head.hash.hex()), reason


def _compare(ledger: Path, kept: SignedHead) -> tuple[LogHead, str | None]:
    """Return the ledger's head, and how the ledger contradicts the kept one, in words."""
    position, digest = kept.statement.position, kept.statement.hash
    if not ledger.exists() or ledger.stat().st_size == 0:
        return LogHead(), f"the ledger is empty, and its last signed head was at position {position}"
    with open_log_reader(ledger) as log:
        base, head = log.base(), log.head()
        if position > head.position:
            shorter = f"the ledger ends at position {head.position}"
            return head, f"{shorter}, and its last signed head was at position {position}"
        found = log.find_hash(position)
    if found is None and position < base.position:  # it is within an archive
        return head, None
    if found != digest:
        return head, f"the ledger's event at position {position} is not the one that was signed"
    return head, None
