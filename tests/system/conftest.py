"""What tests of real servers share."""

from pathlib import Path

import pytest

from server.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """An empty model repository, and a data directory that is not there yet."""
    (tmp_path / "repository").mkdir()
    return Config(repository=tmp_path / "repository", data=tmp_path / "data")
