"""The ledger's events as they are stored, a page at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp_apispec import docs, querystring_schema, response_schema
from marshmallow import fields, validate

from events.history import parse_time
from events.listing import LAST, Asked
from events.stored import EventFilter
from events.types import TYPES
from server.api.schemas import AnswerSchema, PageQuerySchema
from server.appkeys import READER
from server.errors import errors
from server.routes import Access, LimitClass, Route
from server.validation import ParameterInteger, query_parameters

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


@docs(
    tags=["ledger"],
    summary="List the events",
    description="By position, from the oldest on, or backwards with `before`. What is asked for in several "
    "fields has to fit in all of them. A page may have fewer events than its limit, or none, and still be "
    "followed by others: `next_cursor` says so.",
)
@querystring_schema(EventsQuerySchema())
@response_schema(EventListSchema(), 200, description="One page.")
@errors("beyond_head", "archived", "log_unavailable")
async def list_events(request: web.Request) -> web.Response:
    """Answer with a page of events, their texts as they are stored."""
    page = await request.app[READER].event_page(_asked(query_parameters(request)))
    about = {"as_of": page.as_of, "oldest": page.base + 1, "next_cursor": page.next_cursor}
    lines = b",".join(event.line for event in page.items)
    body = b'{"events":[%b],%b' % (lines, json.dumps(about)[1:].encode())
    return web.Response(body=body, content_type="application/json")


def event_routes() -> list[Route]:
    """Return the routes of this module."""
    return [Route("GET", "/api/v1/events", list_events, Access.AUDIT, LimitClass.READS)]


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


def _asked(query: Mapping[str, Any]) -> Asked:
    return Asked(
        wanted_events(query),
        after=query["after"],
        before=query["before"],
        since=place(query["since"]),
        until=place(query["until"]),
        newest_first=query["before"] is not None,
        limit=query["limit"],
    )
