"""Log lines of recorded events.

The ledger is the record and these lines are a copy, so nothing waits for them. A line has the event's own
time and follows it within `PACE_S`. The observer also passes ended jobs on, for their traces.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import Context

import msgspec
from aiohttp import web

from events.clock import parse_timestamp, seconds_between
from events.errors import LedgerProblem
from events.eventtext import is_bad, log_fields
from events.jobs import Job
from events.log import Log
from events.sqlite.listing import Reader
from events.sqlite.queries import EVENTS_PER_READ
from events.types import (
    Event,
    JobCancelled,
    LoadFailed,
    LoadJoined,
    ModelLoaded,
    ModelSettingsChanged,
    ModelUnloaded,
    Unknown,
    UnloadJoined,
)
from server.api.jobs import JOB_REQUESTS, JobRequests
from server.appkeys import LOG, READER
from server.observability.output import CONTEXT, make_extra

_log = logging.getLogger(__name__)

OnJobEnd = Callable[[Job, Event, Mapping[str, str]], None]
"""Called with an ended job, its last event, and the `carrier` of the request behind it."""

PACE_S = 0.1
"""Pause between two reads of the log, so that a burst of events is one read."""

READ_RETRY_S = 1.0
"""Pause after a failed read of the log."""

JOINS = (LoadJoined, UnloadJoined)
"""The events of requests that were answered with a job of another one."""

ENDS = (ModelLoaded, ModelSettingsChanged, LoadFailed, ModelUnloaded, JobCancelled)
"""The events that end a job."""


class EventLogger:
    """Logs each event since the start of the server, and calls `on_job_end` for each job that has ended."""

    def __init__(self, log: Log, requests: JobRequests, reader: Reader, on_job_end: OnJobEnd | None) -> None:
        self._log = log
        self._requests = requests
        self._reader = reader
        self._on_job_end = on_job_end
        self._position = max(0, requests.started_at - 1)
        self._closing = False

    async def run(self) -> None:
        """Log events until `close`, and then the rest recorded by then; log a defect and end."""
        try:
            with self._log.subscribed() as wakeup:
                while not self._closing:
                    await self._catch_up()
                    await asyncio.sleep(PACE_S)
                    await wakeup.wait()
                    wakeup.clear()
                await self._catch_up()
        except Exception:  # noqa: BLE001 - a defect here costs log lines, nothing else
            _log.exception("events are not logged any more; the server goes on")

    def close(self) -> None:
        self._closing = True
        self._log.notify()

    async def _catch_up(self) -> None:
        """Log new events up to the present head: the requests behind later events are not known yet."""
        while self._position < (head := self._log.head.position):
            try:
                events = await self._reader.events(
                    self._position, min(EVENTS_PER_READ, head - self._position)
                )
                for event in events:
                    await self._log_event(event)
                    self._position = event.position
            except LedgerProblem as error:
                _log.warning("events are logged later, the ledger cannot be read: %s", error)
                await asyncio.sleep(READ_RETRY_S)
                return

    async def _log_event(self, event: Event) -> None:
        behind, job = self._requests.behind.get(event.job_id or ""), None
        if isinstance(event.data, JOINS):  # the request's own line names the job
            behind = None
        if isinstance(event.data, ENDS) and event.job_id is not None:
            job = await self._reader.job(event.job_id)
            self._requests.behind.pop(event.job_id, None)
        context = Context()
        context.run(CONTEXT.set, behind)
        context.run(_write, event, job)
        if self._on_job_end is not None and job is not None:
            self._on_job_end(job, event, behind.carrier if behind is not None else {})


def _write(event: Event, job: Job | None) -> None:
    data = None if isinstance(event.data, Unknown) else msgspec.to_builtins(event.data)
    level = logging.WARNING if data is not None and is_bad(event.type, data) else logging.INFO
    if not _log.isEnabledFor(level):
        return
    duration_s = None
    if job is not None and job.finished_at is not None:
        duration_s = round(seconds_between(job.created_at, job.finished_at), 6)
    extra = make_extra(
        event=event.type,
        position=event.position,
        job=event.job_id,
        model=event.model_id,
        version=event.version,
        subject=event.actor,
        worker=event.worker_id,
        duration_s=duration_s,
        **({} if data is None else log_fields(event.type, data)),
    )
    record = _log.makeRecord(_log.name, level, __file__, 0, _message(event), (), None, extra=extra)
    record.created = parse_timestamp(event.recorded_at).timestamp()
    _log.handle(record)


def _message(event: Event) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", event.type).lower()
    if event.model_id is None:
        return words
    return f"{words}: {event.model_id}" + (f" version {event.version}" if event.version is not None else "")


async def log_events(app: web.Application, on_job_end: OnJobEnd | None = None) -> AsyncIterator[None]:
    """Log events while the application runs; for `cleanup_ctx`, as its last resource."""
    lines = EventLogger(app[LOG], app[JOB_REQUESTS], app[READER], on_job_end)
    task = asyncio.create_task(lines.run(), name="event log lines")
    yield
    lines.close()
    await task
