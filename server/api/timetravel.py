"""`?at=`: models and jobs of the past, for auditors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from marshmallow import Schema, fields

from answers.past import PastAnswer, ServerPresence
from events.sqlite.readonly import Past
from events.sqlite.timetravel import Moment, read_moment
from features.server import OF_MOMENTS, collect
from server.api.schemas import about
from server.appkeys import LOG
from server.http.answers import show_optional

T = TypeVar("T")
P = TypeVar("P", bound=PastAnswer)

TIME_TRAVEL = web.AppKey("time_travel", Past)
"""Reads the past, one query at a time, so that readers of the present do not wait."""


PAST_ERRORS = ("beyond_head", "before_first_event", "log_unavailable")
"""Codes of routes with `at`."""


class AtQuerySchema(Schema):
    """Time travel."""

    at = fields.String(
        load_default=None,
        **about(
            "Answer as of this moment; for the roles `audit` and `admin`. A position of the "
            "log (digits), or a time with its offset (RFC 3339), which means the last position recorded by "
            "then. 0 is before the first event; a time before that is refused.",
            example="2026-01-31T14:02:00Z",
        ),
    )


async def read_past(request: web.Request, at: str, query: Callable[[Any, int], T]) -> tuple[Moment, T]:
    """Answer a query about the past once this server knows the log up to `at`.

    Raises:
        BeyondHead: `beyond_head`; also errors of the reader.
    """
    if at.isdecimal() and len(at) < 20:  # noqa: PLR2004 - a position is a 64-bit integer
        await request.app[LOG].reach(int(at))
    return await request.app[TIME_TRAVEL].run(partial(read_moment, at=at, query=query))


def at_moment(answer: P, moment: Moment) -> P:
    """Return an answer about the past with its members about the moment."""
    return msgspec.structs.replace(
        answer,
        as_of=moment.position,
        as_of_time=moment.recorded_at,
        server=show_optional(moment.server, ServerPresence),
        **collect(OF_MOMENTS, moment.server),
    )
