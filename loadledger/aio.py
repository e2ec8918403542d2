"""`AsyncClient`: the operations for event loops."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from loadledger.address import MAX_ANSWER_BYTES, Address, ConnectionOptions
from loadledger.aiotransport import AioTransport
from loadledger.operations import Operations
from loadledger.requests import CallContext


class AsyncClient(Operations):
    """An asynchronous client of one server, with the methods of `Client`.

    Use `async with`, or await `close`. It belongs to the event loop of its first use, whose tasks may share
    it. Cancelling a task closes its connection and leaves its job running. An iterator that is left early
    holds its connection until it is closed: use `contextlib.aclosing`.

    The arguments are those of `Client`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        ca_file: Path | str | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        options = ConnectionOptions(Address.of(url, token), timeout_s, ca_file, max_answer_bytes)
        self._transport = AioTransport(options)
        super().__init__(CallContext(options.address, timeout_s, self._transport))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"

    async def close(self) -> None:
        """Close the connections; pending and later calls raise RuntimeError."""
        await self._transport.close()
