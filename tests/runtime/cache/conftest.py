"""A store of cached models in a new data directory."""

from pathlib import Path

import pytest
from support.cache import opened

from runtime.cache.store import ModelCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the cache."""
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> ModelCache:
    """An open store whose forms may take 1,000 bytes."""
    return opened(folder, 1_000)
