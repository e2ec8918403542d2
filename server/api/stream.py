"""Open streams of events: forms, heartbeats, stages of jobs, and the end of a stream.

A stream is written as server-sent events (WHATWG HTML, section 9.2) or JSON lines. Events carry their
position as `id`; signals carry none, so a client resumes after the last event or bookmark received. Stages of
unfinished jobs are such signals: they are not in the log, and only the latest stage of each job is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

from aiohttp import hdrs, web

from events.errors import LedgerProblem
from events.log import Log
from events.sqlite.listing import EventFilter, StoredEvent
from events.tail import PACE_S, Batch, Tail, Tails
from runtime.consumer.consumer import Consumer
from server.api.livejobs import NOT_LIVE, describe_live
from server.auth.gate import PRINCIPAL, InvalidToken, Verifier, bearer_token
from server.errors import ServerProblem
from server.http.compression import parse_accept

RETRY_MS = 1000
"""Milliseconds until a browser reconnects."""

_FIELD = re.compile(r"[ -~]+")


class ServerSentEvents:
    """`text/event-stream`, the form that browsers read."""

    media_type = "text/event-stream"

    def opening(self, position: int) -> bytes:
        return b"retry: %d\nid: %d\n\n" % (RETRY_MS, position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        return b"".join(
            b"id: %d\n%bdata: %b\n\n" % (event.position, _event_line(event.type), event.line)
            for event in events
        )

    def bookmark(self, position: int) -> bytes:
        """Return an id alone, which a browser keeps for its reconnect."""
        return b"id: %d\n\n" % position

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return a signal: an event without id."""
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json(members))

    def heartbeat(self, position: int) -> bytes:  # noqa: ARG002 -- other forms send it
        return b": heartbeat\n\n"

    def end(self, reason: str) -> bytes:
        return b": %b\n\n" % reason.encode()


class JsonLines:
    """`application/x-ndjson`: a line for each event; lines with a member `stream` are about the stream."""

    media_type = "application/x-ndjson"

    def opening(self, position: int) -> bytes:
        return self.bookmark(position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        return b"".join(b"%b\n" % event.line for event in events)

    def bookmark(self, position: int) -> bytes:
        return self.notice("bookmark", {"position": position})

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return a line whose member `stream` names the signal."""
        return _json({"stream": kind, **members}) + b"\n"

    def heartbeat(self, position: int) -> bytes:
        return self.bookmark(position)

    def end(self, reason: str) -> bytes:
        return self.notice("end", {"reason": reason})


Form = ServerSentEvents | JsonLines
"""A form of a stream; each part is complete by itself."""

SSE = ServerSentEvents()
NDJSON = JsonLines()


def chosen_form(accept: str | None) -> Form:
    """Return the form that Accept prefers; JSON lines only if it names them."""
    weights = parse_accept(accept)
    lines = weights.get(NDJSON.media_type, 0.0)
    return NDJSON if lines > weights.get(SSE.media_type, 0.0) else SSE


def _event_line(kind: str) -> bytes:
    return b"event: %b\n" % kind.encode() if _FIELD.fullmatch(kind) else b""


def _json(members: Mapping[str, object]) -> bytes:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


STAGE = "stage"
"""The signal of a stage; also a value of the filter `type`."""


@dataclass(frozen=True, slots=True)
class JobStage:
    """The stage of a job, and the number of its change."""

    number: int
    job_id: str
    model_id: str
    stage: str | None
    waiting_for: str | None

    @property
    def members(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name != "number"}


class Stages:
    """The latest stage of each unfinished job of the log, as reported by this server's work."""

    def __init__(self, log: Log, consumer: Consumer) -> None:
        self._log = log
        self._consumer = consumer
        self._seen = dict[str, JobStage]()
        self.changes = 0

    @property
    def has_unfinished_jobs(self) -> bool:
        return bool(self._log.state.jobs)

    def refresh(self) -> bool:
        before, jobs = self.changes, self._log.state.jobs
        for job_id in self._seen.keys() - jobs.keys():
            del self._seen[job_id]
        for job in jobs.values():
            seen, now = self._seen.get(job.id), describe_live(self._consumer, job)
            if now != ({name: getattr(seen, name) for name in now} if seen is not None else NOT_LIVE):
                self.changes += 1
                self._seen[job.id] = JobStage(self.changes, job.id, job.model_id, **now)
        return self.changes > before

    def changed_since(self, change: int, wanted: EventFilter) -> Iterator[JobStage]:
        if change >= self.changes or wanted.actors or (wanted.types and STAGE not in wanted.types):
            return
        for stage in self._seen.values():
            if (
                stage.number > change
                and (not wanted.models or stage.model_id in wanted.models)
                and (not wanted.jobs or stage.job_id in wanted.jobs)
            ):
                yield stage


HEARTBEAT_CHECK_S = 1.0
"""Seconds between checks for due heartbeats."""


class TooManyStreams(ServerProblem):
    """The subject has too many open streams."""

    code = "too_many_streams"
    retry_after_s = 5.0


class Streams:
    """The open streams of a server; `run` sends their heartbeats and stages.

    Attributes:
        tasks: the vital tasks of streams, by name.
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
        """Wake streams for stages and heartbeats; if this task fails, all streams end."""
        try:
            with self._log.subscribed(self._wakeup):
                while True:
                    await self._pause()
                    if self.tails.closed:
                        self._shorten_timeouts()
                    if self._open and self.stages.refresh():
                        self.tails.wake()
                    now = asyncio.get_running_loop().time()
                    for stream in self._open:
                        if stream.heartbeat_due <= now:
                            stream.wake()
        finally:
            self.tails.close()
            self._shorten_timeouts()

    @contextmanager
    def admit(self, subject: str) -> Iterator[None]:
        """Count a stream of a subject for as long as it is open.

        Raises:
            TooManyStreams: `too_many_streams`.
        """
        if self._by_subject[subject] >= self._per_subject:
            raise TooManyStreams(
                f"{subject} has {self._per_subject} open streams, as many as a subject may; close one first"
            )
        self._by_subject[subject] += 1
        try:
            yield
        finally:
            self._by_subject[subject] -= 1
            if not self._by_subject[subject]:
                del self._by_subject[subject]

    @contextmanager
    def register(self, stream: EventStream) -> Iterator[None]:
        self._open.add(stream)
        self._wakeup.set()
        try:
            yield
        finally:
            self._open.discard(stream)

    def _shorten_timeouts(self) -> None:
        """Shorten timeouts, so that slow clients do not delay the end of the server."""
        for stream in self._open:
            stream.shorten_timeout()

    async def _pause(self) -> None:
        """Wait for the next check: briefly while stages may change, without limit without streams."""
        self._wakeup.clear()
        if self._open and self.stages.has_unfinished_jobs:
            await asyncio.sleep(PACE_S)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_CHECK_S if self._open else None):
                await self._wakeup.wait()


HEARTBEAT_S = 15.0
"""Seconds between heartbeats: less than the timeouts of proxies."""

STOPPING_S = 1.0
"""Seconds that the end of the server waits for a slow client."""

STALLED_S = 30.0
"""Seconds in which a client must read some tens of kilobytes; it can reconnect and resume."""


@dataclass(eq=False, slots=True, kw_only=True)
class EventStream:
    """The stream of one client, which ends when its token is no longer valid.

    Attributes:
        heartbeat_due: time of the next heartbeat or of the token's end, on the loop's clock.
    """

    request: web.Request
    response: web.StreamResponse
    streams: Streams
    form: Form
    tail: Tail
    verifier: Verifier
    heartbeat_due: float = field(default=0.0, init=False)
    _sent: int = field(default=0, init=False)
    _live: bool = field(default=False, init=False)
    _stages: int = field(default=0, init=False)
    _writing: asyncio.Timeout | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._schedule_heartbeat()

    def wake(self) -> None:
        self.tail.wakeup.set()

    def shorten_timeout(self) -> None:
        """Shorten the current write's timeout: the server stops."""
        if self._writing is not None and not self._writing.expired():
            until, soon = self._writing.when(), self._now() + STOPPING_S
            self._writing.reschedule(soon if until is None else min(until, soon))

    async def run(self, batch: Batch) -> None:
        """Send events from a batch on, until the stream ends or the client disconnects."""
        with suppress(ConnectionError), self.streams.register(self):
            try:
                await self._write(self.form.end(await self._send_events(batch)))
            except TimeoutError:  # the client reads nothing
                if self.request.transport is not None:
                    self.request.transport.abort()

    async def _send_events(self, batch: Batch) -> str:
        self._sent = batch.after
        try:
            await self._write(self.form.opening(batch.after) + self._next_chunk(batch))
            while (reason := self._end_reason()) is None:
                batch = await self.tail.read()
                await self._write(self._next_chunk(batch))
                if batch.live:
                    await self.tail.wakeup.wait()
                    self.tail.wakeup.clear()
        except LedgerProblem as error:
            return str(error)
        return reason

    def _next_chunk(self, batch: Batch) -> bytes:
        news = [self._events(batch)]
        if batch.live and batch.upto >= self.tail.opened_at:
            news += self._live_chunks(batch.upto)
        if self._now() >= self.heartbeat_due:
            if not any(news):
                news.append(self._bookmark(batch.upto) or self.form.heartbeat(batch.upto))
            self._schedule_heartbeat()
        return b"".join(news)

    def _events(self, batch: Batch) -> bytes:
        """Return a batch in this form; streams share the encoded text."""
        if not batch.events:
            return b""
        self._sent = batch.events[-1].position
        form = self.form.media_type
        made = batch.encoded.get(form)
        if made is None:
            made = batch.encoded[form] = self.form.events(batch.events)
        return made

    def _live_chunks(self, position: int) -> Iterator[bytes]:
        if not self._live:
            self._live = True
            yield self._bookmark(position)
            yield self.form.notice("live", {"position": position})
        for stage in self.streams.stages.changed_since(self._stages, self.tail.event_filter):
            yield self.form.notice(STAGE, stage.members)
        self._stages = self.streams.stages.changes

    def _bookmark(self, position: int) -> bytes:
        if position == self._sent:
            return b""
        self._sent = position
        return self.form.bookmark(position)

    def _end_reason(self) -> str | None:
        if self.streams.tails.closed:
            return "the server stops"
        token = bearer_token(self.request.headers.getall(hdrs.AUTHORIZATION, []))
        try:
            self.verifier.verify(token, time.time())
        except InvalidToken:
            return "the token is no longer valid: reconnect with a new one"
        return None

    def _schedule_heartbeat(self) -> None:
        left_s = self.request[PRINCIPAL].expires_at - time.time()
        self.heartbeat_due = self._now() + max(0.0, min(HEARTBEAT_S, left_s))

    async def _write(self, chunk: bytes) -> None:
        """Send a chunk and wait until the client has read nearly all of it.

        Raises:
            TimeoutError: the client reads too slowly.
            ConnectionError: the client has disconnected.
        """
        if chunk:
            limit_s = STOPPING_S if self.streams.tails.closed else STALLED_S
            async with asyncio.timeout(limit_s) as self._writing:
                await self.response.write(chunk)
                await self.request.writer.drain()
            self._writing = None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
