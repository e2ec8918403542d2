"""The models of `support.running` for tests that start the runtime themselves."""

from pathlib import Path

import pytest
from support.running import save_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models of `save_models`, for `running`."""
    return save_models(tmp_path)
