"""Both clients as one, so that each test asks both: the one for event loops is run to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from loadledger import AsyncClient, Client

KINDS = ["Client", "AsyncClient"]
"""What tests are repeated for."""

LIMIT_S = 60.0
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""


class Blocked:
    """An asynchronous client that blocks: each call runs to its answer; its iterators can be closed.

    Attributes:
        client: ours, or somebody else's.
    """

    def __init__(self, client: Any, runner: asyncio.Runner) -> None:
        self.client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            made = getattr(self.client, name)(*arguments, **options)
            if name in ("jobs", "models", "events"):
                return self._iterated(made)
            return self._runner.run(_in_time(made))

        return called

    def _iterated(self, made: Any) -> Generator[Any, None, None]:
        try:
            while True:
                try:
                    value = self._runner.run(_in_time(anext(made)))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self._runner.run(made.aclose())


@contextmanager
def connected(kind: str, url: str, token: str | None = None, **options: Any) -> Iterator[Client]:
    """Give a client of this kind; it is closed in the end."""
    if kind == "Client":
        with Client(url, token=token, **options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        client_of_loop = AsyncClient(url, token=token, **options)
        try:
            blocked: Any = Blocked(client_of_loop, runner)
            yield blocked
        finally:
            runner.run(client_of_loop.close())


async def _in_time(coroutine: Any) -> Any:
    async with asyncio.timeout(LIMIT_S):
        return await coroutine
