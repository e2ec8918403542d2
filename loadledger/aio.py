"""`AsyncClient`: the operations for event loops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from loadledger.address import MAX_ANSWER_BYTES, Address, ConnectionOptions
from loadledger.operations import Operations
from loadledger.profiles import find_target
from loadledger.requests import CallContext
from loadledger.transports.asynchronous import AioTransport
from loadledger.transports.failover import FailoverTransport


class AsyncClient(Operations):
    """An asynchronous client of a server, with the methods of `Client`.

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
        options = [
            ConnectionOptions(address, timeout_s, ca_file, max_answer_bytes)
            for address in Address.each_of(url, token)
        ]
        self._transport = FailoverTransport(options, AioTransport)
        super().__init__(CallContext(options[0].address, timeout_s, self._transport))

    @classmethod
    def from_profile(
        cls,
        profile: str | None = None,
        *,
        timeout_s: float = 30.0,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> Self:
        """Return a client of the server that the command line talks to.

        The variables LOADLEDGER_URL, LOADLEDGER_TOKEN and LOADLEDGER_CA count first, then the profile that
        `loadledger login` wrote, then http://127.0.0.1:8080. A profile's token goes to its own URL only.

        Args:
            profile: name or path of the profile; default: LOADLEDGER_PROFILE, then the one without a name.
            timeout_s: as of the client.
            max_answer_bytes: as of the client.

        Raises:
            ProfileProblem: the profile does not exist, or cannot be used.
        """
        target = find_target(None, profile, os.environ)
        return cls(
            target.url,
            token=target.token,
            timeout_s=timeout_s,
            ca_file=target.ca,
            max_answer_bytes=max_answer_bytes,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"

    async def close(self) -> None:
        """Close the connections; pending and later calls raise RuntimeError."""
        for transport in self._transport.close_all():
            await transport.close()
