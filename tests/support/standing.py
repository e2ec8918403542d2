"""A server that stands while the tests of a module ask it: `serve` as a process, for clients that block."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.config import Config
from support.process import UNHURRIED, Server, serving


@contextmanager
def standing(repository: Path, *arguments: str) -> Iterator[Server]:
    """Start `serve` on a repository, and on `data` beside it; stop it in the end."""
    config = Config(repository=repository, data=repository.with_name("data"))
    with asyncio.Runner() as runner:
        context = serving(config, *arguments, command=UNHURRIED)
        server = runner.run(context.__aenter__())
        try:
            yield server
        finally:
            runner.run(context.__aexit__(None, None, None))


def bearer(server: Server, *roles: str) -> dict[str, str]:
    """Return the header that a client has to send."""
    return {"Authorization": f"Bearer {server.api.token(*roles)}"}


def address(server: Server) -> str:
    """Return host and port, as some clients want them."""
    return server.url.removeprefix("http://")
