"""The ledger's events as they are stored, a page at a time.

The management API: the signed head, which an auditor keeps where the operator cannot reach it.

The tail of the ledger over HTTP: a stream that catches up, says when it is live, and follows.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import hdrs, web
from marshmallow import Schema, fields, validate

from events.audit.signing import HeadSigner, SignedHead, Statement
from events.log import Log
from events.sqlite.history import parse_time
from events.sqlite.queries import LogBase, read_base
from events.sqlite.reader import LAST, EventFilter, EventQuery, open_reader
from events.sqlite.readonly import open_read_only
from events.tail import Tails
from events.types import TYPES
from server.api.schemas import AnswerSchema, PageQuerySchema
from server.api.stream import NDJSON, SSE, STAGE, EventStream, Stages, Streams, Ticket, chosen_form
from server.appkeys import CONFIG, CONSUMER, LOG, READER, STREAMS, VERIFIER
from server.auth.gate import PRINCIPAL
from server.auth.keys import open_signer
from server.http.validation import NothingSchema, ParameterInteger, header_fields, query_parameters
from server.routing import Access, Routes

routes = Routes()

MAX_VALUES = 16
"""Of one field: each is a walk of its own along an index."""

_WHERE = "A position, all digits, or a time with its offset (RFC 3339), such as 2026-01-31T14:02:00Z."


def _several(description: str, *checks: Any) -> fields.List[Any]:
    """Return a parameter that may be repeated: events with any of its values match."""
    return fields.List(
        fields.String(validate=[validate.Length(1, 128), *checks]),
        load_default=(),
        validate=validate.Length(max=MAX_VALUES, error=f"Must be given {MAX_VALUES} times at most."),
        metadata={"description": f"{description} May be repeated: any of them."},
    )


def filter_fields(*kinds: str) -> dict[str, fields.Field[Any]]:
    """Return the parameters that choose events; all that are given have to fit.

    Args:
        kinds: names that `type` takes beside those of the events.
    """
    return {
        "type": _several("Only events of this type.", validate.OneOf([*TYPES, *kinds])),
        "model": _several("Only events of this model."),
        "job": _several("Only events of the job with this id."),
        "actor": _several("Only events by this actor: a token's subject, or `system`."),
    }


class EventsQuerySchema(PageQuerySchema):
    """Which page of which events."""

    after = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=0),
        metadata={"description": "Only events above this position; the oldest come first."},
    )
    before = ParameterInteger(
        load_default=None,
        validate=validate.Range(min=1),
        metadata={"description": "Only events below this position; the newest come first."},
    )
    since = fields.String(load_default=None, metadata={"description": f"Only from there on. {_WHERE}"})
    until = fields.String(load_default=None, metadata={"description": f"Only up to there. {_WHERE}"})

    class Meta:
        """The filters, which the stream has as well."""

        include = filter_fields()


class EventSchema(AnswerSchema):
    """An event, exactly as it is stored and hashed, and its hash."""

    position = fields.Integer(required=True)
    id = fields.String(required=True)
    type = fields.String(required=True)
    schema = fields.Integer(required=True)
    job_id = fields.String(required=True, allow_none=True)
    model_id = fields.String(required=True, allow_none=True)
    version = fields.Integer(required=True, allow_none=True)
    worker_id = fields.String(required=True, allow_none=True)
    actor = fields.String(required=True)
    recorded_at = fields.String(required=True)
    data = fields.Dict(required=True)
    hash = fields.String(
        required=True,
        metadata={
            "description": "In hexadecimal, SHA-256 of the hash before and the UTF-8 text of the event as it "
            "stands here without this member, which is the last.",
        },
    )


class EventListSchema(AnswerSchema):
    """One page of the events."""

    events = fields.List(fields.Nested(EventSchema), required=True)
    as_of = fields.Integer(
        required=True,
        metadata={"description": "The position this reflects. A stream goes on from there."},
    )
    oldest = fields.Integer(
        required=True,
        metadata={"description": "The position of the oldest event that is not archived."},
    )
    next_cursor = fields.Integer(
        required=True,
        allow_none=True,
        metadata={
            "description": "The `after`, or `before`, of the next page; null on the last one.",
        },
    )


@routes.get(
    "/api/v1/events",
    access=Access.AUDIT,
    tag="ledger",
    summary="List the events",
    description="By position, from the oldest on, or backwards with `before`. What is asked for in several "
    "fields has to fit in all of them. A page may have fewer events than its limit, or none, and still be "
    "followed by others: `next_cursor` says so.",
    query=EventsQuerySchema(),
    answers={200: (EventListSchema(), "One page.")},
    errors=("beyond_head", "archived", "log_unavailable"),
)
async def list_events(request: web.Request) -> web.Response:
    """Answer with a page of events, their texts as they are stored."""
    page = await request.app[READER].event_page(_asked(query_parameters(request)))
    about = {"as_of": page.as_of, "oldest": page.base + 1, "next_cursor": page.next_cursor}
    lines = b",".join(event.line for event in page.items)
    body = b'{"events":[%b],%b' % (lines, json.dumps(about)[1:].encode())
    return web.Response(body=body, content_type="application/json")


def wanted_events(query: Mapping[str, Any]) -> EventFilter:
    """Return what the parameters of `filter_fields` ask for."""
    return EventFilter(
        types=tuple(query["type"]),
        models=tuple(query["model"]),
        jobs=tuple(query["job"]),
        actors=tuple(query["actor"]),
    )


def place(text: str | None) -> int | str | None:
    """Return a position, or the stamp of a time; None if there is none.

    Raises:
        BadMoment: `invalid_parameter`, it is neither.
    """
    if text is None:
        return None
    return min(int(text), LAST) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else parse_time(text)


def _asked(query: Mapping[str, Any]) -> EventQuery:
    return EventQuery(
        wanted_events(query),
        after=query["after"],
        before=query["before"],
        since=place(query["since"]),
        until=place(query["until"]),
        newest_first=query["before"] is not None,
        limit=query["limit"],
    )


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


@routes.get(
    "/api/v1/events/stream",
    access=Access.AUDIT,
    tag="ledger",
    summary="Follow the events",
    description=_DOCUMENT,
    query=StreamQuerySchema(),
    headers=LastEventIdSchema(),
    answers={
        200: {
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
    errors=("beyond_head", "archived", "too_many_streams", "log_unavailable"),
)
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
            stream = EventStream(request, response, streams=streams, form=form, tail=tail, ticket=ticket)
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


class BaseSchema(AnswerSchema):
    """Where the log begins: after this event, which was the last one to be archived."""

    position = fields.Integer(required=True, metadata={"description": "0 as long as nothing was archived."})
    hash = fields.String(required=True, metadata={"description": "In hexadecimal."})


class HeadSchema(AnswerSchema):
    """The last event, signed with the ledger's key; docs/verify-it-yourself.md says what is signed."""

    position = fields.Integer(required=True)
    hash = fields.String(required=True, metadata={"description": "In hexadecimal."})
    recorded_at = fields.String(required=True, allow_none=True)
    base = fields.Nested(BaseSchema, required=True)
    algorithm = fields.String(required=True, metadata={"description": "Ed25519."})
    key_id = fields.String(
        required=True, metadata={"description": "32 digits of the public key's SHA-256, in hexadecimal."}
    )
    public_key = fields.String(required=True, metadata={"description": "DER (RFC 8410), in base64."})
    signature = fields.String(required=True, metadata={"description": "64 bytes, in base64."})


@dataclass(frozen=True, slots=True)
class Prover:
    """What signs heads of this ledger. Its base stays where it is as long as a server runs."""

    signer: HeadSigner
    base: LogBase

    def head(self, log: Log) -> SignedHead:
        """Sign the head as the writer has it: it moves only when what it stands for is on the disk."""
        head = log.head
        return self.signer(Statement(head.position, head.hash, head.recorded_at, self.base))


PROVER = web.AppKey("prover", Prover)


async def open_prover(data: Path, ledger: Path) -> Prover:
    """Return what signs heads.

    Raises:
        KeyProblem: the ledger's key cannot be used.
    """

    def read() -> Prover:
        with open_read_only(ledger) as connection:
            return Prover(open_signer(data), read_base(connection))

    return await asyncio.to_thread(read)


@routes.get(
    "/api/v1/events/head",
    access=Access.AUDIT,
    tag="ledger",
    summary="Show the head of the ledger, signed",
    query=NothingSchema(),
    answers={200: (HeadSchema(), "As it is now.")},
)
async def show_head(request: web.Request) -> web.Response:
    """Answer with position and hash of the last event: whoever keeps them can prove later what was there."""
    app = request.app
    return web.json_response(app[PROVER].head(app[LOG]).members())
