"""`?at=`: models and jobs of the past, for auditors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from aiohttp import web
from marshmallow import Schema, fields

from events.presence import NodeState, ServerState
from events.sqlite.readonly import ReaderThread, open_reader_thread
from events.sqlite.timetravel import Moment, read_moment
from server.api.schemas import AnswerSchema, about, one_of
from server.appkeys import LOG

T = TypeVar("T")

TIME_TRAVEL = web.AppKey("time_travel", ReaderThread)
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


class ServerSchema(AnswerSchema):
    """The state of the server at a moment of the past."""

    state = fields.String(
        validate=one_of(ServerState),
        **about("`unknown`: after it was last seen, and before its unclean end was discovered."),
    )
    since = fields.String(allow_none=True, **about("Null if the log does not say."))


class NodePresenceSchema(AnswerSchema):
    """The state of a node at a moment of the past."""

    id = fields.String()
    state = fields.String(
        validate=one_of(NodeState),
        **about("`unknown`: after it renewed its lease last, and before it was declared lost."),
    )
    since = fields.String(allow_none=True, **about("Null if the log does not say."))


class PastSchema(AnswerSchema):
    """The members about the moment itself of an answer about the past, see `as_of`."""

    as_of = fields.Integer(**about("With `at`: the position that the answer reflects.", is_optional=True))
    as_of_time = fields.String(
        allow_none=True,
        **about(
            "With `at`: when the event at `as_of` was recorded; null if the log does not have it.",
            is_optional=True,
        ),
    )
    server = fields.Nested(
        ServerSchema,
        **about(
            "With `at`: the state of the server then. While it is not `running`, nothing is loaded. With "
            "nodes, it runs while any is there.",
            is_optional=True,
        ),
    )
    nodes = fields.List(
        fields.Nested(NodePresenceSchema),
        **about(
            "With `at`: the nodes that had joined by then, by name; missing if there were none.",
            is_optional=True,
        ),
    )


async def open_time_travel(app: web.Application) -> AsyncIterator[None]:
    async with open_reader_thread(app[LOG].path, "ledger-past") as thread:
        app[TIME_TRAVEL] = thread
        yield


async def read_past(request: web.Request, at: str, query: Callable[[Any, int], T]) -> tuple[Moment, T]:
    """Answer a query of the past when this server knows the log up to `at`.

    Raises:
        BeyondHead: `beyond_head`; and what the reader raises.
    """
    if at.isdecimal() and len(at) < 20:  # noqa: PLR2004 - a position is a 64-bit integer
        await request.app[LOG].reach(int(at))
    return await request.app[TIME_TRAVEL].run(partial(read_moment, at=at, query=query))


def as_of(moment: Moment) -> dict[str, Any]:
    server = moment.server
    nodes = [asdict(node) for node in server.nodes] if server is not None else []
    return {
        "as_of": moment.position,
        "as_of_time": moment.recorded_at,
        "server": {"state": server.state.value, "since": server.since} if server is not None else None,
        **({"nodes": nodes} if nodes else {}),
    }
