"""`GET /api/v1/timeline`: the state of each model over a range of time, for the console's drawing."""

from __future__ import annotations

from functools import partial

from aiohttp import web
from marshmallow import Schema, fields, validate

from answers.timeline import Timeline
from events.clock import format_timestamp, utc_now
from events.sqlite.timeline import MAX_ROWS, TimelineQuery, read_timeline
from events.sqlite.timetravel import parse_moment
from server.api.schemas import A_MOMENT, about
from server.api.timetravel import TIME_TRAVEL
from server.auth.access import Access
from server.http.answers import respond
from server.http.validation import ParameterInteger, query_parameters
from server.routing import Routes

routes = Routes(tag="ledger")

MAX_LANES = 100
"""Lanes of one answer, as many as fit on a screen."""


class TimelineQuerySchema(Schema):
    """Range and page of the timeline."""

    begin = fields.String(
        data_key="from",
        load_default=None,
        **about(f"Begin of the range. {A_MOMENT} Default: the first event."),
    )
    end = fields.String(
        data_key="to", load_default=None, **about(f"End of the range. {A_MOMENT} Default: the present.")
    )
    find = fields.String(
        load_default="",
        validate=validate.Length(max=128),
        **about("Only models whose id contains this text, in capitals or not."),
    )
    cursor = fields.String(
        load_default="",
        validate=validate.Length(max=128),
        **about("Only models after this id: the `next_cursor` of the page before."),
    )
    limit = ParameterInteger(
        load_default=50, validate=validate.Range(1, MAX_LANES), **about("Lanes in the page at most.")
    )


@routes.get(
    "/api/v1/timeline",
    access=Access.AUDIT,
    summary="Show a range of time",
    description="The state of each model over a range of time, as segments, and marks of failures, swaps and "
    "losses: `?at=` any time in a segment gives the same state. A range in which the models of a page have "
    f"more than {MAX_ROWS:,} rows is answered with their number: ask for a shorter one, or for fewer models.",
    query=TimelineQuerySchema(),
    answers={200: (Timeline, "One page.")},
    errors=("invalid_parameter", "log_unavailable"),
)
async def show_timeline(request: web.Request) -> web.Response:
    query = query_parameters(request)
    wanted = TimelineQuery(
        now=format_timestamp(utc_now()),
        begin=parse_moment(query["begin"]),
        end=parse_moment(query["end"]),
        find=query["find"],
        cursor=query["cursor"],
        limit=query["limit"],
    )
    return respond(await request.app[TIME_TRAVEL].run(partial(read_timeline, query=wanted)))
