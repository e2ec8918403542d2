"""A store of optimised models in a new data directory."""

from pathlib import Path

import pytest
from support.optimised import opened

from runtime.optimised.store import OptimisedStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the store."""
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> OptimisedStore:
    """An open store whose optimised models may take 1,000 bytes."""
    return opened(folder, 1_000)
