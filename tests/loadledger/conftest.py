"""A server for the commands and clients of a module that do not disturb each other."""

from collections.abc import Iterator

import pytest
from support.http import LocalApi, local_server
from support.sources import in_thread


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """A server in a thread of this process, with an empty repository; each test has models of its own."""
    with in_thread(local_server(tmp_path_factory.mktemp("server"))) as server:
        yield server
