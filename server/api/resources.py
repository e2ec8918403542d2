"""The management API: what of the memory budget is taken, by whom, and who waits for it."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web
from marshmallow import fields, validate

from runtime.memory import pressure
from server.api.schemas import AnswerSchema
from server.appkeys import CONSUMER, LIMIT, LOG
from server.http.validation import NothingSchema
from server.routing import Access, Routes

routes = Routes()

KEPT_S = 0.1
"""How long an answer stands: any role may ask, and often."""


class LoadUseSchema(AnswerSchema):
    """What one load takes until its processes have exited."""

    model_id = fields.String(required=True)
    version = fields.Integer(required=True)
    job_id = fields.String(required=True, metadata={"description": "Of the load."})
    phase = fields.String(
        required=True, validate=validate.OneOf(["loading", "failed", "serving", "draining"])
    )
    workers = fields.Integer(required=True)
    reserved_bytes = fields.Integer(
        required=True, metadata={"description": "What it may take while it loads; 0 from then on."}
    )
    memory_bytes = fields.Integer(
        required=True, metadata={"description": "Private bytes of its workers, measured every few seconds."}
    )
    in_flight = fields.Integer(required=True, metadata={"description": "Inferences queued or running."})
    last_used_at = fields.String(
        required=True, allow_none=True, metadata={"description": "The end of its last inference."}
    )
    pinned = fields.Boolean(required=True)
    keep_alive_s = fields.Integer(required=True, allow_none=True)


class WaitSchema(AnswerSchema):
    """A job that waits."""

    job_id = fields.String(required=True)
    model_id = fields.String(required=True)
    needs_bytes = fields.Integer(required=True, allow_none=True)
    waiting_for = fields.String(required=True)


class PreparationSchema(AnswerSchema):
    """What is being prepared, so that it loads faster later."""

    model_id = fields.String(required=True)
    version = fields.Integer(required=True)
    reserved_bytes = fields.Integer(
        required=True, metadata={"description": "What it may take until its processes have exited."}
    )
    stopping = fields.Boolean(required=True, metadata={"description": "A load needs what it takes."})


class PressureSchema(AnswerSchema):
    """Of the last ten seconds, how much of the time something waited for this, in percent (PSI)."""

    memory_some_percent = fields.Float(required=True, allow_none=True)
    cpu_some_percent = fields.Float(required=True, allow_none=True)


class ResourcesSchema(AnswerSchema):
    """The budget for workers and what is taken of it."""

    limit_bytes = fields.Integer(required=True, metadata={"description": "What may be used here at all."})
    limit_source = fields.String(required=True, metadata={"description": "cgroup v2, cgroup v1 or machine."})
    budget_bytes = fields.Integer(required=True)
    reserved_bytes = fields.Integer(required=True)
    used_bytes = fields.Integer(required=True)
    free_bytes = fields.Integer(
        required=True, metadata={"description": "Less than 0 where models have grown beyond the budget."}
    )
    max_loaded = fields.Integer(required=True, allow_none=True)
    models = fields.List(fields.Nested(LoadUseSchema), required=True)
    waiting = fields.List(fields.Nested(WaitSchema), required=True)
    preparing = fields.Nested(PreparationSchema, required=True, allow_none=True)
    pressure = fields.Nested(
        PressureSchema, required=True, allow_none=True, metadata={"description": "Null without PSI."}
    )
    as_of = fields.Integer(required=True, metadata={"description": "The position this reflects."})


class LastLook:
    """The last answer, which stands for a moment unless something is recorded: 1,000 loads take 18 ms."""

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None
        self._body = b""

    def body(self, app: web.Application) -> bytes:
        """Return the answer as it is now, or was a moment ago."""
        position, now_s = app[LOG].state.position, asyncio.get_running_loop().time()
        if self._seen is None or self._seen[0] != position or now_s - self._seen[1] > KEPT_S:
            self._body = msgspec.json.encode(_resources(app))
            self._seen = position, now_s
        return self._body


@routes.get(
    "/api/v1/resources",
    access=Access.ANY,
    tag="resources",
    summary="Show the memory budget, and what is taken of it",
    query=NothingSchema(),
    answers={200: (ResourcesSchema(), "As it is now, or was a tenth of a second ago.")},
)
async def show_resources(request: web.Request) -> web.Response:
    """Answer with the budget and every load that has a process."""
    body = request.app[LAST_LOOK].body(request.app)
    return web.Response(body=body, content_type="application/json")


LAST_LOOK = web.AppKey("last_look", LastLook)


def _resources(app: web.Application) -> dict[str, object]:
    consumer, limit = app[CONSUMER], app[LIMIT]
    models, waiting = consumer.uses(), consumer.waits()
    budget = consumer.policy.budget_bytes or limit.bytes
    reserved, used = sum(use.reserved_bytes for use in models), sum(use.memory_bytes for use in models)
    preparing = consumer.preparation()
    reserved += preparing.reserved_bytes if preparing is not None else 0
    return {
        "limit_bytes": limit.bytes,
        "limit_source": limit.source,
        "budget_bytes": budget,
        "reserved_bytes": reserved,
        "used_bytes": used,
        "free_bytes": budget - reserved - used,
        "max_loaded": consumer.policy.max_loaded,
        "models": models,
        "waiting": waiting,
        "preparing": preparing,
        "pressure": pressure(),
        "as_of": app[LOG].state.position,
    }
