"""How much of a file system prepared forms may take: never what others there, the ledger first, will need."""

import os
from pathlib import Path

RESERVE_BYTES = 2**30
RESERVE_SHARE = 20
"""What is never taken: `RESERVE_BYTES`, of a small file system its twentieth part. A ledger grows by some
hundred bytes with each event, so that there is time to notice."""


def room(folder: Path) -> int:
    """Return the bytes that may be taken where this folder is; less than none where it is too full already.

    Raises:
        OSError: it cannot be asked.
    """
    seen = os.statvfs(folder)
    reserve = min(RESERVE_BYTES, seen.f_blocks * seen.f_frsize // RESERVE_SHARE)
    return seen.f_bavail * seen.f_frsize - reserve
