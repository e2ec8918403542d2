"""Open streams of events: what a client is told, how a stream is kept alive, and what ends it.

Beside events they tell the live stages of unfinished jobs: the latest of each, not what was in between. Those
are no facts and not in the log, so there is nothing to catch up with: who comes later gets the present.

How a stream of events is written down: as server-sent events (WHATWG HTML, section 9.2) or JSON lines.

Events carry their position as `id`. What is not in the log has none, so that a client that comes back says
the position of the last event, or bookmark, that it has seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import jwt
from aiohttp import hdrs, web

from events.errors import LedgerProblem
from events.jobs import Job
from events.log import Log
from events.sqlite.reader import EventFilter, StoredEvent
from events.tail import PACE_S, Batch, Tail, Tails
from server.auth.gate import InvalidToken, Verifier, bearer_token
from server.errors import ServerProblem
from server.http.compression import accepted

RETRY_MS = 1000
"""How long a browser waits before it connects again."""

_FIELD = re.compile(r"[ -~]+")


class ServerSentEvents:
    """`text/event-stream`, which browsers read by themselves."""

    media_type = "text/event-stream"

    def opening(self, position: int) -> bytes:
        """Return how long to wait before coming back, and from where to go on then."""
        return b"retry: %d\nid: %d\n\n" % (RETRY_MS, position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        """Return an event for each, named by its type."""
        return b"".join(
            b"id: %d\n%bdata: %b\n\n" % (event.position, _named(event.type), event.line) for event in events
        )

    def bookmark(self, position: int) -> bytes:
        """Return an id alone, which a browser keeps and tells nobody."""
        return b"id: %d\n\n" % position

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return an event without id."""
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json(members))

    def heartbeat(self, position: int) -> bytes:  # noqa: ARG002 - other forms say it
        """Return a comment."""
        return b": heartbeat\n\n"

    def end(self, reason: str) -> bytes:
        """Return a comment."""
        return b": %b\n\n" % reason.encode()


class JsonLines:
    """`application/x-ndjson`: a line for each event; lines with a member `stream` are about the stream."""

    media_type = "application/x-ndjson"

    def opening(self, position: int) -> bytes:
        """Return a bookmark."""
        return self.bookmark(position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        """Return a line for each."""
        return b"".join(b"%b\n" % event.line for event in events)

    def bookmark(self, position: int) -> bytes:
        """Return a line that says the position."""
        return self.notice("bookmark", {"position": position})

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return a line whose member `stream` says what it is."""
        return _json({"stream": kind, **members}) + b"\n"

    def heartbeat(self, position: int) -> bytes:
        """Return a bookmark: it may be the same as the last."""
        return self.bookmark(position)

    def end(self, reason: str) -> bytes:
        """Return a line that says why."""
        return self.notice("end", {"reason": reason})


Form = ServerSentEvents | JsonLines
"""A way to write a stream; each part ends so that it can be read without what follows."""

SSE = ServerSentEvents()
NDJSON = JsonLines()


def chosen_form(accept: str | None) -> Form:
    """Return what the field Accept asks for: JSON lines where it names them and prefers nothing else here."""
    weights = accepted(accept)
    lines = weights.get(NDJSON.media_type, 0.0)
    return NDJSON if lines > weights.get(SSE.media_type, 0.0) else SSE


def _named(kind: str) -> bytes:
    """Return the line that names an event; there is none for a type that could break out of its line."""
    return b"event: %b\n" % kind.encode() if _FIELD.fullmatch(kind) else b""


def _json(members: Mapping[str, object]) -> bytes:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


STAGE = "stage"
"""The name of such a notice, which a filter on `type` may ask for."""


@dataclass(frozen=True, slots=True)
class JobStage:
    """Where a job is, and as which change that became known."""

    number: int
    job_id: str
    model_id: str
    stage: str | None
    waiting_for: str | None

    @property
    def members(self) -> dict[str, object]:
        """Return what is told of it."""
        return {
            "job_id": self.job_id,
            "model_id": self.model_id,
            "stage": self.stage,
            "waiting_for": self.waiting_for,
        }


class Stages:
    """What was last seen of each unfinished job.

    Args:
        log: whose unfinished jobs they are.
        stage: tells the stage of a job.
        waiting_for: tells what a job waits for.
    """

    def __init__(
        self,
        log: Log,
        stage: Callable[[Job], str | None],
        waiting_for: Callable[[Job], str | None],
    ) -> None:
        self._log = log
        self._stage = stage
        self._waiting_for = waiting_for
        self._seen = dict[str, JobStage]()
        self.changes = 0

    @property
    def any_to_come(self) -> bool:
        """Whether there is a job whose stage may change."""
        return bool(self._log.state.jobs)

    def look(self) -> bool:
        """Look at all unfinished jobs; returns whether something has changed."""
        before, jobs = self.changes, self._log.state.jobs
        for job_id in self._seen.keys() - jobs.keys():
            del self._seen[job_id]
        for job in jobs.values():
            seen, now = self._seen.get(job.id), (self._stage(job), self._waiting_for(job))
            if now != ((seen.stage, seen.waiting_for) if seen is not None else (None, None)):
                self.changes += 1
                self._seen[job.id] = JobStage(self.changes, job.id, job.model_id, *now)
        return self.changes > before

    def since(self, change: int, wanted: EventFilter) -> Iterator[JobStage]:
        """Return what became known after a change; filters on the model, the job and the type apply.

        Stages have no actor: a filter on that lets none pass.
        """
        if change >= self.changes or wanted.actors or (wanted.types and STAGE not in wanted.types):
            return
        for stage in self._seen.values():
            if (
                stage.number > change
                and (not wanted.models or stage.model_id in wanted.models)
                and (not wanted.jobs or stage.job_id in wanted.jobs)
            ):
                yield stage


BEAT_S = 1.0
"""How often it is looked whose heartbeat is due."""


class TooManyStreams(ServerProblem):
    """The subject has as many streams open as it may."""

    code = "too_many_streams"
    retry_after_s = 5.0


class Streams:
    """The open streams of a server; `run` has to run for them to have heartbeats and stages.

    Attributes:
        tasks: what has to run for there to be streams, by name.
    """

    def __init__(self, log: Log, tails: Tails, stages: Stages, *, per_subject: int) -> None:
        self._log = log
        self._per_subject = per_subject
        self._by_subject = Counter[str]()
        self._open = set[EventStream]()
        self._wakeup = asyncio.Event()
        self.tails = tails
        self.stages = stages
        self.tasks = dict[str, asyncio.Task[None]]()

    def __len__(self) -> int:
        return len(self._open)

    async def run(self) -> None:
        """Wake streams that have something to say of their own; a defect ends all of them."""
        self._wakeup = self._log.subscribe()
        try:
            while True:
                await self._pause()
                if self.tails.closed:
                    self._hurry()
                if self._open and self.stages.look():
                    self.tails.wake()
                now = asyncio.get_running_loop().time()
                for stream in self._open:
                    if stream.due <= now:
                        stream.wake()
        finally:
            self._log.unsubscribe(self._wakeup)
            self.tails.close()
            self._hurry()

    @contextmanager
    def admit(self, subject: str) -> Iterator[None]:
        """Count a stream of a subject for as long as it is open.

        Raises:
            TooManyStreams: `too_many_streams`.
        """
        if self._by_subject[subject] >= self._per_subject:
            raise TooManyStreams(
                f"{subject} has {self._per_subject} streams open, as many as --streams-per-subject allows;"
                " close one first"
            )
        self._by_subject[subject] += 1
        try:
            yield
        finally:
            self._by_subject[subject] -= 1
            if not self._by_subject[subject]:
                del self._by_subject[subject]

    @contextmanager
    def beating(self, stream: EventStream) -> Iterator[None]:
        """Wake a stream when it is due, for as long as it is open."""
        self._open.add(stream)
        self._wakeup.set()
        try:
            yield
        finally:
            self._open.discard(stream)

    def _hurry(self) -> None:
        """Let none of them hold up the end of the server."""
        for stream in self._open:
            stream.hurry()

    async def _pause(self) -> None:
        """Wait for the next look: soon while stages may change, long when nobody listens."""
        self._wakeup.clear()
        if self._open and self.stages.any_to_come:
            await asyncio.sleep(PACE_S)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S if self._open else None):
                await self._wakeup.wait()


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


class EventStream:
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
        made = batch.encoded.get(form)
        if made is None:
            made = batch.encoded[form] = self._form.events(batch.events)
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
