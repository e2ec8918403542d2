"""A data directory with a ledger, for the commands that read one."""

from pathlib import Path

import pytest
from support.ledgers import DATA_ROUNDS, sound_ledger

from events.sqlite.datalock import LEDGER
from server.auth.keys import ensure_data_dir


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with keys and a ledger that ended in order."""
    folder = tmp_path / "data"
    ensure_data_dir(folder)
    (folder / LEDGER).write_bytes(sound_ledger(DATA_ROUNDS))
    return folder
