"""One open stream of events: what its client is told, how it is kept alive, and what ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import jwt
from aiohttp import hdrs, web

from events.errors import LedgerProblem
from events.tail import Batch, Tail
from server.auth.credentials import InvalidToken, bearer_token
from server.auth.gate import Verifier
from server.ledger.sse import Form
from server.ledger.stages import STAGE
from server.ledger.streams import Streams

HEARTBEAT_S = 15.0
"""Between signs of life: less than what proxies wait for."""

STOPPING_S = 1.0
"""How long the end of the server waits for a client that does not take what was sent to it."""

STALLED_S = 30.0
"""How long a client may leave what was sent to it: some tens of kilobytes. It can come back and go on."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The token that a stream was opened with: the stream ends with it."""

    verifier: Verifier
    token: str
    expires_at: float

    @classmethod
    def of(cls, request: web.Request, verifier: Verifier) -> Ticket:
        """Return that of a request, which the gate has let in."""
        token = bearer_token(request.headers.getall(hdrs.AUTHORIZATION, []))
        claims = jwt.decode(token, options={"verify_signature": False})
        return cls(verifier, token, float(claims["exp"]))

    def valid(self) -> bool:
        """Whether it would still be let in."""
        try:
            self.verifier.verify(self.token, time.time())
        except InvalidToken:
            return False
        return True


class Stream:
    """One client that is told what happens.

    Attributes:
        due: when it wants to be woken, though nothing has happened, on the loop's clock.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        *,
        streams: Streams,
        form: Form,
        tail: Tail,
        ticket: Ticket,
    ) -> None:
        self._request = request
        self._response = response
        self._form = form
        self._tail = tail
        self._ticket = ticket
        self._streams = streams
        self._told = 0
        self._live = False
        self._stages = 0
        self._writing: asyncio.Timeout | None = None
        self.due = 0.0
        self._next_beat()

    def wake(self) -> None:
        """Have it look at what there is to do."""
        self._tail.wakeup.set()

    def hurry(self) -> None:
        """Have it give up soon what its client does not take: the server stops."""
        if self._writing is not None and not self._writing.expired():
            until, soon = self._writing.when(), self._now() + STOPPING_S
            self._writing.reschedule(soon if until is None else min(until, soon))

    async def run(self, batch: Batch) -> None:
        """Tell what happens, beginning with a batch, until something ends it or the client goes."""
        with suppress(ConnectionError), self._streams.beating(self):
            try:
                await self._write(self._form.end(await self._tell(batch)))
            except TimeoutError:  # what was sent is not taken: nothing more can be said
                self._abort()

    async def _tell(self, batch: Batch) -> str:
        """Tell what happens until it is over, and return why."""
        self._told = batch.after
        try:
            await self._write(self._form.opening(batch.after) + self._news(batch))
            while (reason := self._over()) is None:
                batch = await self._tail.read()
                await self._write(self._news(batch))
                if batch.live:
                    await self._tail.wakeup.wait()
                    self._tail.wakeup.clear()
        except LedgerProblem as error:
            return str(error)
        return reason

    def _news(self, batch: Batch) -> bytes:
        news = [self._events(batch)]
        if batch.live and batch.upto >= self._tail.opened_at:
            news += self._live_news(batch.upto)
        if self._now() >= self.due:
            if not any(news):
                news.append(self._sign_of_life(batch.upto))
            self._next_beat()
        return b"".join(news)

    def _events(self, batch: Batch) -> bytes:
        """Return a batch as this form has it, which is made once for all that share it."""
        if not batch.events:
            return b""
        self._told = batch.events[-1].position
        form = self._form.media_type
        made = batch.made.get(form)
        if made is None:
            made = batch.made[form] = self._form.events(batch.events)
        return made

    def _live_news(self, position: int) -> Iterator[bytes]:
        if not self._live:
            self._live = True
            yield self._bookmark(position)
            yield self._form.notice("live", {"position": position})
        for stage in self._streams.stages.since(self._stages, self._tail.wanted):
            yield self._form.notice(STAGE, stage.members)
        self._stages = self._streams.stages.changes

    def _bookmark(self, position: int) -> bytes:
        if position == self._told:
            return b""
        self._told = position
        return self._form.bookmark(position)

    def _sign_of_life(self, position: int) -> bytes:
        return self._bookmark(position) or self._form.heartbeat(position)

    def _over(self) -> str | None:
        """Return why the stream has to end, if it has to: who may not be told any more is told no more."""
        if self._streams.tails.closed:
            return "the server stops"
        if self._ticket.valid():
            return None
        return "the token is not valid any more: come back with a new one"

    def _next_beat(self) -> None:
        left_s = self._ticket.expires_at - time.time()
        self.due = self._now() + max(0.0, min(HEARTBEAT_S, left_s))

    async def _write(self, chunk: bytes) -> None:
        """Send a chunk, and wait until nearly all of it is on its way.

        Raises:
            TimeoutError: it is not taken.
            ConnectionError: nobody is there any more.
        """
        if chunk:
            limit_s = STOPPING_S if self._streams.tails.closed else STALLED_S
            async with asyncio.timeout(limit_s) as self._writing:
                await self._response.write(chunk)
                await self._request.writer.drain()
            self._writing = None

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
