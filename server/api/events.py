"""Events over HTTP: pages of the log, the stream that follows it, and its signed head.

Events are sent as they are stored, byte for byte, so that a client can check their hashes. An auditor keeps
the signed head where the operator cannot reach it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import hdrs, web
from marshmallow import Schema, fields, validate

from answers.events import EventList, Head
from events.audit.kepthead import HeadKeeper
from events.audit.signing import HeadSigner, SignedHead, Statement, key_id
from events.log import Log
from events.sqlite.listing import EventFilter, EventQuery, open_reader
from events.sqlite.timetravel import parse_moment
from events.tail import Tails
from events.types import TYPES
from server.api.schemas import A_MOMENT, PageQuerySchema, about
from server.api.stream import NDJSON, SSE, STAGE, EventStream, Stages, Streams, chosen_form
from server.appkeys import CONFIG, CONSUMER, GATE, LOG, READER, STREAMS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.http.answers import respond, respond_encoded, show
from server.http.validation import NothingSchema, ParameterInteger, header_fields, query_parameters
from server.routing import Routes

routes = Routes(tag="ledger")

MAX_FILTER_VALUES = 16
"""Values of one filter: each is a scan of an index."""


def _repeatable(description: str, *checks: Any) -> fields.List[Any]:
    """Return a repeatable parameter: it matches events with any of its values."""
    return fields.List(
        fields.String(validate=[validate.Length(1, 128), *checks]),
        load_default=(),
        validate=validate.Length(
            max=MAX_FILTER_VALUES, error=f"Must be given {MAX_FILTER_VALUES} times at most."
        ),
        **about(f"{description} Repeatable: any of the values."),
    )


def filter_fields(*kinds: str) -> dict[str, fields.Field[Any]]:
    """Return the filters of events, with further values of `type`; events must match all filters."""
    return {
        "type": _repeatable("Only events of this type.", validate.OneOf([*TYPES, *kinds])),
        "model": _repeatable("Only events of this model."),
        "job": _repeatable("Only events of the job with this id."),
        "actor": _repeatable("Only events by this actor: a token's subject, or `system`."),
    }


class EventsQuerySchema(PageQuerySchema):
    """Page of the events, and filters."""

    after = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=0),
        **about("Only events after this position, oldest first."),
    )
    before = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=1),
        **about("Only events before this position, newest first."),
    )
    since = fields.String(load_default=None, **about(f"Only events from there on. {A_MOMENT}"))
    until = fields.String(load_default=None, **about(f"Only events up to there. {A_MOMENT}"))

    class Meta:
        """The filters; the stream has the same."""

        include = filter_fields()


@routes.get(
    "/api/v1/events",
    access=Access.AUDIT,
    summary="List the events",
    description="By position, oldest first, or newest first with `before`. An event must match all filters. "
    "A page may have fewer events than its limit although others follow: see `next_cursor`.",
    query=EventsQuerySchema(),
    answers={200: (EventList, "One page.")},
    errors=("beyond_head", "log_unavailable"),
)
async def list_events(request: web.Request) -> web.Response:
    query = query_parameters(request)
    await request.app[LOG].reach(query["after"] or 0)
    page = await request.app[READER].event_page(_event_query(query))
    more = {"as_of": page.as_of, "next_cursor": page.next_cursor}
    events = [msgspec.Raw(event.line) for event in page.items]  # byte for byte, as in `EventList`
    return respond_encoded(msgspec.json.encode({"events": events, **more}))


def event_filter(query: Mapping[str, Any]) -> EventFilter:
    return EventFilter(
        types=tuple(query["type"]),
        models=tuple(query["model"]),
        jobs=tuple(query["job"]),
        actors=tuple(query["actor"]),
    )


def _event_query(query: Mapping[str, Any]) -> EventQuery:
    return EventQuery(
        event_filter(query),
        after=query["after"],
        before=query["before"],
        since=parse_moment(query["since"]),
        until=parse_moment(query["until"]),
        newest_first=query["before"] is not None,
        limit=query["limit"],
    )


READERS = 2
"""Tails behind the shared ring that may read the log at the same time; others queue."""

HEADERS = {
    "X-Accel-Buffering": "no",  # otherwise nginx buffers the stream
    hdrs.VARY: hdrs.ACCEPT,
}

_DOCUMENT = (
    "Each event has its position as `id`, its type as `event`, and one line of `data`: the event as in "
    "the list. To resume, send the last `id` in Last-Event-ID; no event is missed. An `id` alone is a "
    "bookmark of a stream whose filters match few events. Signals that are not in the log have no `id`: "
    "`live`, when the client has caught up, and `stage`, the stage of an unfinished job (`job_id, "
    "model_id, stage, waiting_for`), if the filters match. Comments are heartbeats, every 15 s.\n\n"
    "With `Accept: application/x-ndjson`, each event is a line; lines with a member `stream` (`bookmark`, "
    "`live`, `stage`, `end`) are signals. The stream ends when the server stops, when the token expires "
    "or its key is revoked, or when the client reads nothing for 30 s. A slow client lags but misses "
    "nothing."
)


class StreamQuerySchema(Schema):
    """Start of a stream, and filters."""

    after = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=0),
        **about("Start after this position. Default: only new events."),
    )

    class Meta:
        """The filters; the list has the same."""

        include = filter_fields(STAGE)


class LastEventIdSchema(Schema):
    """The position at which a client resumes."""

    last_event_id = fields.String(
        data_key="Last-Event-ID",
        load_default="",
        validate=validate.Regexp(r"[0-9]{0,18}\Z", error="Must be the id of an event, a position."),
        **about("The last `id` that was received; overrides `after`."),
    )


@routes.get(
    "/api/v1/events/stream",
    access=Access.AUDIT,
    summary="Follow the events",
    description=_DOCUMENT,
    query=StreamQuerySchema(),
    headers=LastEventIdSchema(),
    answers={
        200: {
            "description": "A stream until one side ends it.",
            "content": {
                form.media_type: {"schema": {"type": "string"}, "example": example}
                for form, example in ((SSE, "id: 17\nevent: UnloadStarted\ndata: {…}\n\n"), (NDJSON, "{…}\n"))
            },
        }
    },
    errors=("beyond_head", "too_many_streams", "log_unavailable"),
)
async def stream_events(request: web.Request) -> web.StreamResponse:
    """Answer with a stream; errors are answered before it begins."""
    streams, form = request.app[STREAMS], chosen_form(request.headers.get(hdrs.ACCEPT))
    query, seen = query_parameters(request), header_fields(request)["last_event_id"]
    after = int(seen) if seen else query["after"]
    if after is not None:
        await streams.tails.reaches(after)
    response = web.StreamResponse(headers={**HEADERS, hdrs.CONTENT_TYPE: form.media_type})
    with streams.admit(request[PRINCIPAL].subject), streams.tails.open(after, event_filter(query)) as tail:
        batch = await tail.read()
        with suppress(ConnectionError):  # if the client has left, aiohttp notices it, too
            await response.prepare(request)
        if response.prepared and request.method == hdrs.METH_GET:
            stream = EventStream(
                request=request,
                response=response,
                streams=streams,
                form=form,
                tail=tail,
                verifier=request.app[GATE].verifier,
            )
            await stream.run(batch)
    return response


async def open_streams(app: web.Application) -> AsyncIterator[None]:
    log = app[LOG]
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(open_reader(log.path)) for _ in range(1 + READERS)]
        tails = Tails(log, readers[0], readers[1:])
        stages = Stages(log, app[CONSUMER])
        app[STREAMS] = streams = Streams(log, tails, stages, per_subject=app[CONFIG].streams_per_subject)
        streams.tasks = {
            "tails": asyncio.create_task(tails.run(), name="tails"),
            "streams": asyncio.create_task(streams.run(), name="streams"),
        }
        yield
        for task in streams.tasks.values():
            task.cancel()
        await asyncio.wait(streams.tasks.values())


@dataclass(frozen=True, slots=True)
class Prover:
    """Signs heads of this ledger."""

    signer: HeadSigner

    @property
    def ledger_name(self) -> str:
        """The name of this ledger among servers that share a repository: its key's id."""
        return key_id(self.signer.public_key)

    def head(self, log: Log) -> SignedHead:
        """Sign the writer's head, which moves only after its events are durable."""
        head = log.head
        return self.signer(Statement(head.position, head.hash, head.recorded_at))


PROVER = web.AppKey("prover", Prover)
HEAD_KEEPER = web.AppKey("head_keeper", HeadKeeper)


@routes.get(
    "/api/v1/events/head",
    access=Access.AUDIT,
    summary="Show the signed head of the ledger",
    query=NothingSchema(),
    answers={200: (Head, "The current head.")},
)
async def show_head(request: web.Request) -> web.Response:
    """Answer with the signed head, with which its keeper can later prove the events before it."""
    app = request.app
    signed = app[PROVER].head(app[LOG])
    await app[HEAD_KEEPER].keep(signed)
    return respond(show(signed.members(), Head))
