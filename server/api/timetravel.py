"""`?at=`: models and jobs of the past, for auditors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from aiohttp import web
from marshmallow import Schema, fields

from events.sqlite.liveness import NodeState, ServerState
from events.sqlite.timetravel import Moment, TimeTravelReader, open_time_travel_reader
from server.api.schemas import AnswerSchema, about, one_of
from server.appkeys import LOG

T = TypeVar("T")

TIME_TRAVEL = web.AppKey("time_travel", TimeTravelReader)
"""The time travel reader."""

AS_OF_IN_THE_PAST = "With `at`: the position that the answer reflects."
AS_OF_TIME = "With `at`: when the event at `as_of` was recorded; null if the log does not have it."
SERVER_THEN = (
    "With `at`: the state of the server then. While it is not `running`, nothing is loaded. With nodes, "
    "it runs while any is there."
)
NODES_THEN = "With `at`: the nodes that had joined by then, by name; missing if there were none."


class AtQuerySchema(Schema):
    """Time travel."""

    at = fields.String(
        load_default=None,
        **about(
            "Answer as of this moment; for the roles `audit` and `admin`. A position of the "
            "log (digits), or a time with its offset (RFC 3339), which means the last position recorded by "
            "then. 0 is before the first event.",
            example="2026-01-31T14:02:00Z",
        ),
    )


class ServerSchema(AnswerSchema):
    """The state of the server at a moment of the past."""

    state = fields.String(
        required=True,
        validate=one_of(ServerState),
        **about("`unknown`: after it was last seen, and before its unclean end was discovered."),
    )
    since = fields.String(required=True, allow_none=True, **about("Null if the log does not say."))


class NodePresenceSchema(AnswerSchema):
    """The state of a node at a moment of the past."""

    id = fields.String(required=True)
    state = fields.String(
        required=True,
        validate=one_of(NodeState),
        **about("`unknown`: after it renewed its lease last, and before it was declared lost."),
    )
    since = fields.String(required=True, allow_none=True, **about("Null if the log does not say."))


async def open_time_travel(app: web.Application) -> AsyncIterator[None]:
    async with open_time_travel_reader(app[LOG].path) as reader:
        app[TIME_TRAVEL] = reader
        yield


async def read_past(request: web.Request, at: str, query: Callable[[Any, int], T]) -> tuple[Moment, T]:
    """Answer a query of the past when this server knows the log up to `at`.

    Raises:
        BeyondHead: `beyond_head`; and what the reader raises.
    """
    if at.isdecimal() and len(at) < 20:  # noqa: PLR2004 - a position is a 64-bit integer
        await request.app[LOG].reach(int(at))
    return await request.app[TIME_TRAVEL].read(at, query)


def as_of(moment: Moment) -> dict[str, Any]:
    server = moment.server
    nodes = [asdict(node) for node in server.nodes] if server is not None else []
    return {
        "as_of": moment.position,
        "as_of_time": moment.recorded_at,
        "server": {"state": server.state.value, "since": server.since} if server is not None else None,
        **({"nodes": nodes} if nodes else {}),
    }
