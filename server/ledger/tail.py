"""The tail of the ledger over HTTP: a stream that catches up, says when it is live, and follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from aiohttp import hdrs, web
from aiohttp_apispec import docs, headers_schema, querystring_schema
from marshmallow import Schema, fields, validate

from events.reader import open_reader
from events.tail import Tails
from server.appkeys import CONFIG, CONSUMER, LOG, STREAMS, VERIFIER
from server.auth.gate import PRINCIPAL
from server.errors import errors
from server.ledger.listing import filter_fields, wanted_events
from server.ledger.sse import NDJSON, SSE, chosen_form
from server.ledger.stream import STAGE, Stages, Stream, Streams, Ticket
from server.routes import Access, LimitClass, Route
from server.validation import ParameterInteger, header_fields, query_parameters

READERS = 2
"""Tails that read the log at once, because they are behind what all share: others wait for their turn."""

HEADERS = {
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",  # nginx, and what is like it, would collect the stream before it passes it on
    hdrs.VARY: hdrs.ACCEPT,
}

_DOCUMENT = (
    "Each event of the log has its position as `id`, its type as `event`, and as `data`, in one line, what "
    "the list has. A client that comes back sends the last `id` in Last-Event-ID and misses nothing; an "
    "`id` alone is a bookmark, for a stream whose filters let little pass. Without `id`, since they are not "
    "in the log, come `live`, once all that had happened before was told, and `stage`: the stage of an "
    "unfinished job (`job_id, model_id, stage, waiting_for`), unless the filters leave it out. Comments are "
    "signs of life, every 15 s.\n\n"
    "With `Accept: application/x-ndjson`, each event is a line; lines with a member `stream` (`bookmark`, "
    "`live`, `stage`, `end`) are no events. The stream ends when the server stops, the token expires or its "
    "key is revoked, and when what was sent is not taken for 30 s; who reads slowly lags and misses nothing."
)


class StreamQuerySchema(Schema):
    """From where, and which events."""

    after = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=0),
        metadata={"description": "Begin after this position; if left out, with what happens from now on."},
    )

    class Meta:
        """The filters, which the list has as well."""

        include = filter_fields(STAGE)


class LastEventIdSchema(Schema):
    """What a client that comes back has seen."""

    last_event_id = fields.String(
        data_key="Last-Event-ID",
        load_default="",
        validate=validate.Regexp(r"[0-9]{0,18}\Z", error="Must be the id of an event, a position."),
        metadata={"description": "The last `id` that was seen. It goes before `after`, which is older then."},
    )


@docs(
    tags=["ledger"],
    summary="Follow the events",
    description=_DOCUMENT,
    responses={
        "200": {
            "description": "A stream that goes on until one side ends it.",
            "content": {
                form.media_type: {"schema": {"type": "string"}, "example": example}
                for form, example in (
                    (SSE, "id: 17\nevent: UnloadStarted\ndata: {…}\n\n"),
                    (NDJSON, "{…}\n"),
                )
            },
        }
    },
)
@querystring_schema(StreamQuerySchema())
@headers_schema(LastEventIdSchema())
@errors("beyond_head", "archived", "too_many_streams", "log_unavailable")
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Answer with a stream; what is wrong is said before it begins."""
    streams, form = request.app[STREAMS], chosen_form(request.headers.get(hdrs.ACCEPT))
    query, seen = query_parameters(request), header_fields(request)["last_event_id"]
    after = int(seen) if seen else query["after"]
    if after is not None:
        await streams.tails.reaches(after)
    response = web.StreamResponse(headers={**HEADERS, hdrs.CONTENT_TYPE: form.media_type})
    with (
        streams.admit(request[PRINCIPAL].subject),
        streams.tails.open(after, wanted_events(query)) as tail,
    ):
        batch = await tail.read()
        await response.prepare(request)
        if request.method == hdrs.METH_GET:
            ticket = Ticket.of(request, request.app[VERIFIER])
            stream = Stream(request, response, streams=streams, form=form, tail=tail, ticket=ticket)
            await stream.run(batch)
    return response


async def streaming(app: web.Application) -> AsyncIterator[None]:
    """Open what streams read from, and what keeps them going; a resource of the application."""
    log, consumer = app[LOG], app[CONSUMER]
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(open_reader(log.path)) for _ in range(1 + READERS)]
        tails = Tails(log, readers[0], readers[1:])
        stages = Stages(log, consumer.stage, consumer.waiting_for)
        app[STREAMS] = streams = Streams(log, tails, stages, per_subject=app[CONFIG].streams_per_subject)
        streams.tasks = {
            "tails": asyncio.create_task(tails.run(), name="tails"),
            "streams": asyncio.create_task(streams.run(), name="streams"),
        }
        yield
        for task in streams.tasks.values():
            task.cancel()
        await asyncio.wait(streams.tasks.values())


def stream_routes() -> list[Route]:
    """Return the routes of this module."""
    return [Route("GET", "/api/v1/events/stream", stream_events, Access.AUDIT, LimitClass.READS)]
