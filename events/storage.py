"""The interface between the writer and a storage, and the values they exchange. `Log` knows no SQL.

`events.sqlite` keeps a ledger in one file; a database can keep one for several servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import msgspec

from events.codec import GENESIS
from events.state import Changes, KnownRequests, State


class LogHead(msgspec.Struct, frozen=True, gc=False):
    """The last event: position, hash (32 bytes), time, type; position 0 is an empty log."""

    position: int = 0
    hash: bytes = GENESIS
    recorded_at: str = ""
    type: str = ""


class Row(msgspec.Struct, frozen=True, gc=False):
    """One event as it is stored."""

    position: int
    body: str
    hash: bytes


RawRow = tuple[int, bytes, bytes]
"""The position, body and hash of an event as a verifier reads them; a forged ledger may have other types."""


@dataclass(frozen=True, slots=True)
class StoredLedger:
    """A ledger just opened: its head, the live state there, last uses, and when the server was last seen."""

    head: LogHead
    state: State
    last_used: Mapping[str, str]
    last_seen: str


class StorageError(Exception):
    """A storage failed, and its state is unknown: close it, and open it anew.

    Attributes:
        is_disk_error: whether the disk failed: readable data need not be on it then.
        is_refusal: whether the storage answered that nothing was written.
        cure: what an operator can do.
    """

    def __init__(
        self,
        message: str,
        *,
        is_disk_error: bool = False,
        is_refusal: bool = False,
        cure: str = "see the server's log",
    ) -> None:
        super().__init__(message)
        self.cure = cure
        self.is_disk_error = is_disk_error
        self.is_refusal = is_refusal


class StorageDamaged(StorageError):
    """Stored data cannot be read, because it is damaged."""


class Storage(Protocol):
    """The writer's place for a ledger. Its methods raise StorageError unless they say otherwise.

    The writer makes one call at a time.
    """

    @property
    def is_open(self) -> bool:
        """Whether the storage is open; only then it can be used."""

    async def open(self) -> StoredLedger:
        """Connect, rebuild projections of other folds, and read the stored state.

        Raises:
            FutureSchema: `future_schema`.
            ForeignDatabase: `foreign_database`.
            LogUnavailable: `log_unavailable`, the ledger cannot be opened, or its content is damaged.
        """

    async def append(self, rows: Sequence[Row], changes: Changes, after: LogHead) -> None:
        """Append a group of events and store the changed entities, durably.

        Args:
            rows: the events.
            changes: the entities that they change.
            after: the head that the group follows.

        Raises:
            ForeignHead: the log's head is not `after`, although there is no other writer.
        """

    async def contains(self, head: LogHead) -> bool:
        """Whether the log has this event, as durably as after `append`."""

    async def read_requests(
        self, hashes: AbstractSet[str], joinable: AbstractSet[tuple[str, str]]
    ) -> KnownRequests:
        """Return the log's idempotency keys with these hashes, and the joins of these actors to these jobs.

        Raises:
            LogUnavailable: `log_unavailable`, the log cannot be read; the storage is closed.
        """

    async def note_last_use(self, used: Mapping[str, str], seen_at: str) -> None:
        """Store when models were last used, and that the server is alive.

        Raises:
            UnicodeEncodeError: an id is not valid text.
        """

    async def probe(self) -> None:
        """Commit a durable transaction that changes nothing, to see whether the ledger can be written."""

    async def checkpoint(self) -> bool:
        """Copy the WAL into the ledger's file; return False if that is not possible yet."""

    async def close_after_error(self, error: StorageError | None = None) -> None:
        """Close the connection after an error; the next `open` verifies what the disk has."""

    async def close(self) -> None:
        """Leave one complete file, and close."""
