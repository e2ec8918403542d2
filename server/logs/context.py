"""What the log lines of a request say beside their message: its id, its trace, and the job that it made."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from aiohttp import web
from multidict import istr

from events.commands import Command
from events.group import Receipt
from events.log import Log

REQUEST_ID = istr("X-Request-Id")
"""The field in which a client may name its request, and is told the name."""

MAX_JOBS = 10_000
"""Unfinished jobs that are remembered with the request behind them; the earliest are forgotten first."""

_SANE = re.compile(r"[!-~]{1,128}")


@dataclass(slots=True)
class RequestContext:
    """One request.

    Attributes:
        request_id: its name, which its client chose, or we did.
        trace_id: of its trace, in hexadecimal digits; None where traces are not exported.
        carrier: the header fields that make what it causes a part of its span.
        job_id: the job that it made, or that stood for what it asked for.
        position: the head of the ledger after that was recorded.
    """

    request_id: str
    trace_id: str | None = None
    carrier: dict[str, str] = field(default_factory=dict)
    job_id: str | None = None
    position: int | None = None


CONTEXT: ContextVar[RequestContext | None] = ContextVar("request", default=None)
"""The request on whose behalf something happens; None where nobody asked."""


class RequestLog(Log):
    """The event log, which remembers of unfinished jobs who asked for them first.

    Attributes:
        behind: the requests behind jobs, by job; whoever tells of a job's end removes it.
        started_at: the position of this server's `ServerStarted`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.started_at = 0
        self.behind: OrderedDict[str, RequestContext] = OrderedDict()

    async def submit(self, command: Command) -> Receipt:
        """Submit as `Log` does, and note what becomes of it with the request behind it."""
        receipt = await super().submit(command)
        context = CONTEXT.get()
        if context is not None and receipt.job_id is not None:
            context.job_id, context.position = receipt.job_id, receipt.position
            if receipt.job_id in self.state.jobs:
                self.behind.setdefault(receipt.job_id, context)
            if len(self.behind) > MAX_JOBS:
                self.behind.popitem(last=False)
        return receipt

    async def server_started(self) -> Receipt:
        """Append `ServerStarted`, and note where."""
        receipt = await super().server_started()
        self.started_at = receipt.position
        return receipt


def begin_context(request: web.BaseRequest) -> RequestContext:
    """Have what is logged from here on, in this task, name the request, and return its context."""
    context = CONTEXT.get()
    if context is None:
        context = RequestContext(sane_id(request.headers.getall(REQUEST_ID, ())) or uuid4().hex)
        CONTEXT.set(context)
    return context


def sane_id(given: Sequence[str]) -> str | None:
    """Return the name that a client gave its request, if it is one, short and printable."""
    return given[0] if len(given) == 1 and _SANE.fullmatch(given[0]) else None
