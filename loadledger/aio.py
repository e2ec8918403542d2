"""`AsyncClient`: the operations for event loops."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
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

    Args:
        url: such as http://127.0.0.1:8080, or https://example.org/loadledger behind a proxy.
        token: as `loadledger token` prints it.
        timeout_s: limit of each answer; `wait_s` limits the wait for a job.
        ca_file: certificates to trust, in PEM, instead of the system's.
        max_answer_bytes: longest answer that is accepted.

    Raises:
        ValueError: an argument is invalid.
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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"

    async def close(self) -> None:
        """Close the connections; pending and later calls raise RuntimeError."""
        await self._transport.close()
