"""`GET /api/v1/timeline`: the state of each model over a range of time, for the console's drawing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate

from events.clock import format_timestamp, utc_now
from events.models import ModelState
from events.presence import NodeState, ServerState
from events.sqlite.lanes import FILES_SHOWN, MarkKind
from events.sqlite.readonly import ReaderThread, open_reader_thread
from events.sqlite.timeline import TimelineQuery, read_timeline
from events.sqlite.timetravel import parse_moment
from server.api.schemas import A_MOMENT, AnswerSchema, about, one_of
from server.appkeys import LOG
from server.http.validation import ParameterBoolean, ParameterInteger, query_parameters
from server.routing import Access, Routes

routes = Routes(tag="ledger")

TIMELINE = web.AppKey("timeline", ReaderThread)
"""Reads the timeline."""

MAX_LANES = 100
"""Of one answer: more do not fit on a screen."""

MIN_RESOLUTION, MAX_RESOLUTION = 100, 2000
"""Buckets: about one for each pixel of a narrow and of a wide screen."""


async def open_timeline(app: web.Application) -> AsyncIterator[None]:
    async with open_reader_thread(app[LOG].path, "ledger-timeline") as thread:
        app[TIMELINE] = thread
        yield


class TimelineQuerySchema(Schema):
    """Range, page and resolution of the timeline."""

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
    active = ParameterBoolean(
        load_default=False,
        **about("Only models that had events in the range, or were loaded or to be loaded where it begins."),
    )
    resolution = ParameterInteger(
        load_default=600,
        validate=validate.Range(MIN_RESOLUTION, MAX_RESOLUTION),
        **about("Buckets of the range; what is shorter than one is merged into summaries."),
    )


class SegmentSchema(AnswerSchema):
    """A time in which a model's state stayed the same, or a summary of several."""

    state = fields.String(validate=one_of(ModelState))
    begin = fields.String(data_key="from")
    end = fields.String(data_key="to")
    version = fields.Integer(allow_none=True)
    next_version = fields.Integer(
        allow_none=True, **about("The version that loads beside the one that serves, or waits to be loaded.")
    )
    load_job_id = fields.String(allow_none=True, **about("Job of its load; see `loads` of the lane."))
    position = fields.Integer(
        allow_none=True, **about("Of the event that began it; null if that was earlier.")
    )
    by = fields.String(allow_none=True, **about("Who asked for what began it; null if not known."))
    cause = fields.String(allow_none=True, **about("Of the job that began it."))
    waiting = fields.Boolean(**about("Whether the model is not loaded, and a load of it waits to start."))
    degraded = fields.Boolean(**about("Whether some of its workers are gone."))
    error = fields.String(allow_none=True, **about("Code of the failure, in the states `failed` and `lost`."))
    events = fields.Integer(**about("Events of the model in this time."))
    summary = fields.Boolean(
        **about("Whether this may be several states, too short or too many; `state` is that of the end.")
    )


class MarkSchema(AnswerSchema):
    """A moment that stands out; those of a kind within one bucket are one, with the last one's members."""

    kind = fields.String(validate=one_of(MarkKind))
    at = fields.String()
    position = fields.Integer()
    version = fields.Integer(allow_none=True)
    job_id = fields.String(allow_none=True)
    by = fields.String(allow_none=True)
    code = fields.String(allow_none=True, **about("Of the failure, or how a worker ended."))
    count = fields.Integer()


class FileHashSchema(AnswerSchema):
    """A file of a loaded version."""

    path = fields.String()
    sha256 = fields.String()


class LaneLoadSchema(AnswerSchema):
    """A load that took effect, and its bytes."""

    job_id = fields.String()
    version = fields.Integer()
    loaded_at = fields.String()
    loaded_by = fields.String()
    position = fields.Integer(**about("Of its `ModelLoaded`."))
    files = fields.List(fields.Nested(FileHashSchema), **about(f"The first {FILES_SHOWN} of its files."))
    file_count = fields.Integer()


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
    its_loads = fields.List(fields.Nested(LaneLoadSchema), data_key="loads")
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
    restarts = fields.Integer(**about("Starts of the server that are merged into it."))


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
        allow_none=True,
        **about("When the first event was recorded; nothing before it is shown."),
    )
    lanes = fields.List(fields.Nested(LaneSchema), **about("Of models that the ledger knows, by id."))
    server = fields.List(
        fields.Nested(ServerSegmentSchema),
        **about("Whether a server ran; with nodes, one runs while any node is there."),
    )
    nodes = fields.List(
        fields.Nested(NodeLaneSchema),
        **about("The nodes that were there in the range, by name; missing without any.", is_optional=True),
    )
    marks_from = fields.String(
        allow_none=True,
        **about("Marks of failures begin here, because there are too many; null if all are there."),
    )
    models = fields.Integer(**about("Models on all pages."))
    next_cursor = fields.String(allow_none=True, **about("`cursor` of the next page; null on the last page."))


@routes.get(
    "/api/v1/timeline",
    access=Access.AUDIT,
    summary="Summarise a range of time",
    description="The state of each model over a range of time, as segments, and marks of failures, swaps and "
    "losses. What is shorter than a bucket of the range is merged: the answer is bounded, however long the "
    "log is. A segment that is no `summary` is exact: `?at=` any time in it gives the same state.",
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
        is_active=query["active"],
        resolution=query["resolution"],
    )
    page = await request.app[TIMELINE].run(partial(read_timeline, query=wanted))
    return web.Response(body=msgspec.json.encode(page), content_type="application/json")
