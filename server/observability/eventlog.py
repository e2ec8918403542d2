"""Log lines of what the ledger says: one observer reads each event after it was recorded.

The ledger is the record; these lines are a copy for who reads logs, and nothing waits for them. An event's
line has the event's time, and comes up to `PACE_S` after it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import Context
from typing import Any

import msgspec
from aiohttp import web

from events.clock import parse_timestamp, seconds_between
from events.errors import LedgerProblem
from events.eventtext import is_bad, log_fields
from events.jobs import Job
from events.log import Log
from events.sqlite.reader import PAGE, Reader
from events.types import (
    Event,
    JobCancelled,
    LoadFailed,
    ModelLoaded,
    ModelUnloaded,
    Unknown,
    UnloadFailed,
)
from server.appkeys import LOG, READER, REQUEST_LOG
from server.observability.output import CONTEXT, RequestLog, fields

_log = logging.getLogger(__name__)

OnJobEnd = Callable[[Job, Event, Mapping[str, str]], None]
"""Takes a job, the event with which it ended, and the `carrier` of the request behind it."""

PACE_S = 0.1
"""Between two looks at the log: many events of a moment are read at once."""

RETRY_S = 1.0
"""How long to wait before the log is read again when it could not be."""

ENDS = (ModelLoaded, LoadFailed, ModelUnloaded, UnloadFailed, JobCancelled)
"""The events with which a job ends."""


class LedgerLines:
    """Tells each event from the start of the server on, and `on_job_end` of each job that has ended."""

    def __init__(self, log: Log, requests: RequestLog, reader: Reader, on_job_end: OnJobEnd | None) -> None:
        self._log = log
        self._requests = requests
        self._reader = reader
        self._on_job_end = on_job_end
        self._told = max(0, requests.started_at - 1)
        self._closing = False

    async def run(self) -> None:
        """Tell what happens until `close`, and then what had happened by then; a defect is logged."""
        wakeup = self._log.subscribe()
        try:
            while not self._closing:
                await self._catch_up()
                await asyncio.sleep(PACE_S)
                await wakeup.wait()
                wakeup.clear()
            await self._catch_up()
        except Exception:  # noqa: BLE001 - whatever it is, it is about log lines alone
            _log.exception("what the ledger says is not logged any more; the server goes on")
        finally:
            self._log.unsubscribe(wakeup)

    def close(self) -> None:
        """Have `run` return soon."""
        self._closing = True
        self._log.notify()

    async def _catch_up(self) -> None:
        """Tell what is new, but not beyond the head as it is here: who asked for that is not known yet."""
        while self._told < (head := self._log.head.position):
            try:
                events = await self._reader.events(self._told, min(PAGE, head - self._told))
                for event in events:
                    await self._tell(event)
                    self._told = event.position
            except LedgerProblem as error:
                _log.warning("the ledger's log lines wait: %s", error)
                await asyncio.sleep(RETRY_S)
                return
            if not events:  # what is archived by now was not told
                self._told = head

    async def _tell(self, event: Event) -> None:
        behind, job = self._requests.behind.get(event.job_id or ""), None
        if isinstance(event.data, ENDS) and event.job_id is not None:
            job = await self._reader.job(event.job_id)
            self._requests.behind.pop(event.job_id, None)
        context = Context()
        context.run(CONTEXT.set, behind)
        context.run(_write, event, job)
        if self._on_job_end is not None and job is not None:
            self._on_job_end(job, event, behind.carrier if behind is not None else {})


def _write(event: Event, job: Job | None) -> None:
    data: dict[str, Any] = {} if isinstance(event.data, Unknown) else msgspec.to_builtins(event.data)
    level = logging.WARNING if is_bad(event.type, data) else logging.INFO
    if not _log.isEnabledFor(level):
        return
    named = fields(
        event=event.type,
        position=event.position,
        job=event.job_id,
        model=event.model_id,
        version=event.version,
        subject=event.actor,
        worker=event.worker_id,
        duration_s=_duration_s(job),
        **log_fields(event.type, data),
    )
    record = _log.makeRecord(_log.name, level, __file__, 0, _message(event), (), None, extra=named)
    record.created = parse_timestamp(event.recorded_at).timestamp()
    _log.handle(record)


def _message(event: Event) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", event.type).lower()
    if event.model_id is None:
        return words
    return f"{words}: {event.model_id}" + (f" version {event.version}" if event.version is not None else "")


def _duration_s(job: Job | None) -> float | None:
    """Return how long a job took that has ended, from its request."""
    if job is None or job.finished_at is None:
        return None
    return round(seconds_between(job.created_at, job.finished_at), 6)


async def telling(app: web.Application, on_job_end: OnJobEnd | None = None) -> AsyncIterator[None]:
    """Have the ledger's events told while the application runs; a resource of it, the last to be opened."""
    lines = LedgerLines(app[LOG], app[REQUEST_LOG], app[READER], on_job_end)
    task = asyncio.create_task(lines.run(), name="ledger lines")
    yield
    lines.close()
    await task
