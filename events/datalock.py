"""The data directory: the file of its ledger, and its lock (`flock`), which ends with its process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from events.errors import DataInUse

LEDGER = "ledger.db"
"""The log's file in the data directory."""


@contextmanager
def lock_data(data: Path) -> Iterator[None]:
    """Lock the data directory `data`; the lock file holds the process id.

    Raises:
        DataInUse: `data_in_use`, with the process id of the holder.
    """
    path = data / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "an unknown process"
            raise DataInUse(
                f"{data} is in use by process {holder}; stop it, or choose another --data"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
