"""The stream of events over HTTP, as a client reads it."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from support.http import LIMIT_S, Api


@dataclass(frozen=True, slots=True)
class Message:
    """What stands between two blank lines."""

    id: int | None = None
    event: str = ""
    data: str = ""
    comment: str = ""
    retry: int | None = None

    @property
    def json(self) -> Any:
        """The data."""
        return json.loads(self.data)


class Following:
    """An open stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id: int | None = None

    async def message(self) -> Message:
        """Return what comes next.

        Raises:
            EOFError: the server has ended the stream.
        """
        fields: dict[str, Any] = {}
        async with asyncio.timeout(LIMIT_S):
            while (line := await self.response.content.readline()) != b"\n":
                if not line.endswith(b"\n"):  # what is not ended does not count
                    raise EOFError
                name, _, value = line[:-1].decode().partition(":")
                fields[name or "comment"] = value.removeprefix(" ")
        if "id" in fields:
            self.last_id = int(fields["id"])
        for name in fields.keys() & {"id", "retry"}:
            fields[name] = int(fields[name])
        return Message(**fields)

    async def event(self) -> Any:
        """Return the next event of the log, whatever else comes before it."""
        async with asyncio.timeout(LIMIT_S):
            while not ((message := await self.message()).id is not None and message.data):
                pass
        event = message.json
        assert (message.id, message.event) == (event["position"], event["type"])
        return event

    async def events(self, number: int) -> list[Any]:
        """Return the next events of the log."""
        return [await self.event() for _ in range(number)]

    async def until(self, event: str) -> list[Message]:
        """Return all messages up to the one of this name."""
        found = [await self.message()]
        async with asyncio.timeout(LIMIT_S):
            while found[-1].event != event:
                found.append(await self.message())
        return found

    async def rest(self) -> list[Message]:
        """Return all messages up to the end of the stream, which has to come."""
        found: list[Message] = []
        while True:
            try:
                found.append(await self.message())
            except EOFError:
                return found

    async def line(self) -> Any:
        """Return the next line of a stream of JSON lines."""
        async with asyncio.timeout(LIMIT_S):
            return json.loads(await self.response.content.readline())


@asynccontextmanager
async def following(
    api: Api,
    query: str = "",
    *,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    session: aiohttp.ClientSession | None = None,
    subject: str = "alice",
) -> AsyncIterator[Following]:
    """Open a stream, which has to be one; leave it at the end.

    Args:
        api: the server's client.
        query: `?after=…`.
        headers: beside the token.
        token: of another one than `subject` with the role `audit`.
        session: other than the client's.
        subject: whose stream it is.
    """
    sent = {"Authorization": f"Bearer {token or api.token('audit', subject=subject)}", **(headers or {})}
    url = f"{api.url}/api/v1/events/stream{query}"
    timeout = aiohttp.ClientTimeout(total=None)
    async with (session or api.session).get(url, headers=sent, timeout=timeout) as response:
        assert response.status == 200, await response.read()
        yield Following(response)
