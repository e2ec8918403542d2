"""The last signed head, kept beside the ledger's key: a ledger that does not contain it was rolled back.

A server keeps each head that it hands out, one each minute, one at its stop, and the first before the first
event. A ledger that was replaced by an older or another one does not contain the kept head. The holder of the
ledger's key can replace both, which this does not detect.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from pathlib import Path

from events.audit.signing import Sign, SignedHead, Statement, as_signed_head, key_id
from events.codec import GENESIS
from events.errors import LedgerProblem
from events.files import write_file
from events.sqlite.datalock import LEDGER, is_replica
from events.sqlite.queries import find_hash, read_head
from events.sqlite.readonly import open_read_only
from events.storage import LogHead
from events.types import RollbackAccepted

KEPT_HEAD = "ledger.head"
"""The file in the data directory, in the form of `GET /api/v1/events/head`."""

_log = logging.getLogger(__name__)


class HeadKeeper:
    """Keeps the latest signed head durably; one write at a time, for all heads signed in the meantime."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._writing = asyncio.Lock()
        self._kept = -1

    async def keep(self, head: SignedHead) -> None:
        """Keep a head whose event is durable, unless a later one was kept; log a failure.

        After a failure an older head stays kept, which a ledger with this head contains, too.
        """
        async with self._writing:
            if head.statement.position <= self._kept:
                return
            try:
                await asyncio.to_thread(_write, self._data, head)
            except (OSError, LedgerProblem) as error:
                _log.warning("the signed head could not be kept in %s: %s", self._data / KEPT_HEAD, error)
                return
            self._kept = head.statement.position


def _write(data: Path, head: SignedHead) -> None:
    with write_file(data / KEPT_HEAD, replace=True) as file:
        file.write(json.dumps(head.members(), indent=1).encode() + b"\n")


def keep_first(data: Path, sign: Sign) -> None:
    """Keep a head of no events durably where there is no ledger yet, so that each ledger has a kept head."""
    if not (data / KEPT_HEAD).exists() and not (data / LEDGER).exists():
        _write(data, sign(Statement(0, GENESIS, "")))


def sign_anew(data: Path, sign: Sign) -> None:
    """Sign the kept head with a new key, after the loss of the old one; an invalid head stays as it is."""
    with suppress(FileNotFoundError, ValueError):
        kept = as_signed_head(json.loads((data / KEPT_HEAD).read_bytes()))
        if kept.holds():
            _write(data, sign(kept.statement))


def find_rollback(data: Path, ledger: Path, public_key: bytes) -> tuple[RollbackAccepted, str] | None:
    """Return what accepting the ledger would record, and why it is refused, or None if it is valid.

    A replica needs no kept head, since it was compared with its database.

    Args:
        data: the data directory.
        ledger: the ledger's file.
        public_key: the key that must have signed the kept head (DER).

    Raises:
        LedgerProblem: the ledger cannot be read.
    """
    try:
        text = (data / KEPT_HEAD).read_bytes()
    except FileNotFoundError:
        head = _read_head(ledger)
        if head.position == 0 or is_replica(data):
            return None
        missing = f"{KEPT_HEAD} is missing, which each ledger has from its first event on"
        return RollbackAccepted(0, "", head.position, head.hash.hex()), missing
    except OSError as error:
        return RollbackAccepted(0, "", 0, ""), f"{KEPT_HEAD} cannot be read: {error.strerror}"
    try:
        kept = as_signed_head(json.loads(text))
    except ValueError as error:
        return RollbackAccepted(0, "", 0, ""), f"{KEPT_HEAD} is damaged: {error}"
    head, reason = _compare(ledger, kept)
    if kept.public_key != public_key:
        reason = f"{KEPT_HEAD} is signed by another key than this ledger's: {key_id(kept.public_key)}"
    elif not kept.holds():
        reason = f"the signature in {KEPT_HEAD} does not hold"
    if reason is None:
        return None
    said = kept.statement
    return RollbackAccepted(said.position, said.hash.hex(), head.position, head.hash.hex()), reason


def _compare(ledger: Path, kept: SignedHead) -> tuple[LogHead, str | None]:
    """Return the ledger's head, and how the ledger contradicts the kept one, in words."""
    position, digest = kept.statement.position, kept.statement.hash
    if position == 0:
        return _read_head(ledger), None
    if not ledger.exists() or ledger.stat().st_size == 0:
        return LogHead(), f"the ledger is empty, and its last signed head was at position {position}"
    with open_read_only(ledger) as connection:
        head = read_head(connection)
        if position > head.position:
            shorter = f"the ledger ends at position {head.position}"
            return head, f"{shorter}, and its last signed head was at position {position}"
        found = find_hash(connection, position)
    if found != digest:
        return head, f"the ledger's event at position {position} is not the one that was signed"
    return head, None


def _read_head(ledger: Path) -> LogHead:
    if not ledger.exists() or ledger.stat().st_size == 0:
        return LogHead()
    with open_read_only(ledger) as connection:
        return read_head(connection)
