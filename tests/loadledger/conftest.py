"""One server for the commands and clients that do not disturb each other: each test has models of its own."""

from collections.abc import Iterator

import pytest
from support.servers import Server, standing


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty repository."""
    repository = tmp_path_factory.mktemp("standing") / "repository"
    repository.mkdir()
    with standing(repository) as server:
        yield server
