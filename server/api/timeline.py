"""`GET /api/v1/timeline`: the state of each model over a range of time, for the console's drawing."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate

from events.clock import format_timestamp, utc_now
from events.models import ModelState
from events.presence import NodeState, ServerState
from events.sqlite.timeline import MAX_ROWS, MarkKind, TimelineQuery, read_timeline
from events.sqlite.timetravel import parse_moment
from server.api.schemas import A_MOMENT, AnswerSchema, about, one_of
from server.api.timetravel import TIME_TRAVEL
from server.auth.access import Access
from server.http.validation import ParameterInteger, query_parameters
from server.routing import Routes

routes = Routes(tag="ledger")

MAX_LANES = 100
"""Of one answer: more do not fit on a screen."""


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


class SegmentSchema(AnswerSchema):
    """A time in which a model's state stayed the same."""

    state = fields.String(validate=one_of(ModelState))
    begin = fields.String(data_key="from")
    end = fields.String(data_key="to")
    version = fields.Integer(allow_none=True)
    next_version = fields.Integer(
        allow_none=True, **about("The version that loads beside the one that serves, or waits to be loaded.")
    )
    load_job_id = fields.String(allow_none=True, **about("Job of its load."))
    position = fields.Integer(
        allow_none=True, **about("Of the event that began it; null if that was earlier.")
    )
    by = fields.String(allow_none=True, **about("Who asked for what began it; null if not known."))
    cause = fields.String(allow_none=True, **about("Of the job that began it."))
    waiting = fields.Boolean(**about("Whether the model is not loaded, and a load of it waits to start."))
    degraded = fields.Boolean(**about("Whether some of its workers are gone."))
    error = fields.String(allow_none=True, **about("Code of the failure, in the states `failed` and `lost`."))


class MarkSchema(AnswerSchema):
    """A moment that stands out."""

    kind = fields.String(validate=one_of(MarkKind))
    at = fields.String()
    position = fields.Integer()
    version = fields.Integer(allow_none=True)
    job_id = fields.String(allow_none=True)
    by = fields.String(allow_none=True)
    code = fields.String(allow_none=True, **about("Of the failure, or how a worker ended."))


class CopyLaneSchema(AnswerSchema):
    """One model at one node over the range."""

    node_id = fields.String()
    segments = fields.List(
        fields.Nested(SegmentSchema), **about("In order, without overlap; `unloaded` without a copy there.")
    )


class LaneSchema(AnswerSchema):
    """One model over the range."""

    model_id = fields.String()
    segments = fields.List(fields.Nested(SegmentSchema), **about("In order, without overlap."))
    marks = fields.List(fields.Nested(MarkSchema))
    copies = fields.List(
        fields.Nested(CopyLaneSchema),
        **about("The nodes where it served, by name; missing if it had no copies.", is_optional=True),
    )


class ServerSegmentSchema(AnswerSchema):
    """A time in which the server ran, was stopped, or may have been either."""

    state = fields.String(validate=one_of(ServerState))
    begin = fields.String(data_key="from")
    end = fields.String(data_key="to")
    position = fields.Integer(allow_none=True)


class NodeSegmentSchema(ServerSegmentSchema):
    """A time in which a node was there, had left or was lost, or may have been there."""

    state = fields.String(validate=one_of(NodeState))


class NodeLaneSchema(AnswerSchema):
    """One node over the range."""

    node_id = fields.String()
    segments = fields.List(fields.Nested(NodeSegmentSchema), **about("In order, from where it first joined."))


class TimelineSchema(AnswerSchema):
    """A page of lanes."""

    begin = fields.String(data_key="from")
    end = fields.String(data_key="to")
    as_of = fields.Integer(**about("The position that the answer reflects."))
    known_from = fields.String(
        allow_none=True, **about("When the first event was recorded; nothing before it is shown.")
    )
    rows = fields.Integer(**about("What the history has of these models, the server and nodes in the range."))
    max_rows = fields.Integer(
        **about("With more rows than these, `lanes` and `server` are empty: ask for a shorter range.")
    )
    lanes = fields.List(
        fields.Nested(LaneSchema),
        **about(
            "Of models that changed in the range, or were loaded or to be loaded where it begins; by id."
        ),
    )
    server = fields.List(
        fields.Nested(ServerSegmentSchema),
        **about("Whether a server ran; with nodes, one runs while any node is there."),
    )
    nodes = fields.List(
        fields.Nested(NodeLaneSchema),
        **about("The nodes that were there in the range, by name; missing without any.", is_optional=True),
    )
    next_cursor = fields.String(allow_none=True, **about("`cursor` of the next page; null on the last page."))


@routes.get(
    "/api/v1/timeline",
    access=Access.AUDIT,
    summary="Show a range of time",
    description="The state of each model over a range of time, as segments, and marks of failures, swaps and "
    "losses: `?at=` any time in a segment gives the same state. A range in which the models of a page have "
    f"more than {MAX_ROWS:,} rows is answered with their number: ask for a shorter one, or for fewer models.",
    query=TimelineQuerySchema(),
    answers={200: (TimelineSchema(), "One page.")},
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
    page = await request.app[TIME_TRAVEL].run(partial(read_timeline, query=wanted))
    return web.Response(body=msgspec.json.encode(page), content_type="application/json")
