"""The client for event loops."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from loadledger.address import MAX_ANSWER_BYTES, Address, Options
from loadledger.aiotransport import Transport
from loadledger.operations import Calls
from loadledger.requests import Setting


class AsyncClient(Calls):
    """What `Client` is, for a program with an event loop: the same methods, to be awaited or iterated.

    Use `async with`, or await `close`. It belongs to the event loop that it is first used in, whose tasks may
    share it. Who is cancelled lets go of the connection; a job that was asked for goes on. An iterator that
    is left before its end holds its connection until it is closed: use `contextlib.aclosing`.

    Args:
        url: such as http://127.0.0.1:8080, or https://example.org/loadledger behind a proxy.
        token: as `loadledger token` prints it.
        timeout_s: for each answer, but not for a job that is waited for.
        ca_file: certificates to trust, in PEM, instead of the system's.
        max_answer_bytes: what is longer is not taken.

    Raises:
        ValueError: one of these cannot be.
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
        options = Options(Address.of(url, token), timeout_s, ca_file, max_answer_bytes)
        self._transport = Transport(options)
        super().__init__(Setting(options.address, timeout_s, self._transport))

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
        """Close the connections; what waits for one in other tasks, or wants one later, has RuntimeError."""
        await self._transport.close()
