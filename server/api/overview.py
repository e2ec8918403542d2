"""`GET /api/v1/overview`: what the console's first page shows, in one answer.

Models, jobs, memory and nodes are those of their own resources. Models are read first, and `as_of` is theirs:
what comes after is at least as new, so that a client that follows the stream from there misses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import Schema, fields

from events.jobs import Job, JobStatus
from events.sqlite.listing import EventFilter, EventQuery
from events.sqlite.queries import JobQuery
from events.types import ServerStarted
from server.api.events import EventSchema
from server.api.jobs import JobSchema, present_job
from server.api.models import ModelSchema, read_model_page
from server.api.resources import RESOURCES_CACHE, ResourcesSchema
from server.api.schemas import MAX_PAGE, AnswerSchema, PageQuerySchema, about
from server.appkeys import LOG, READER
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.http.validation import query_parameters
from server.routing import Routes

NEWEST = 40
"""Jobs beside those that have not ended: what a person reads."""

NodesView = Callable[[web.Application], Sequence[Mapping[str, Any]]]
"""Returns the nodes as `GET /api/v1/nodes` lists them; none of a server alone."""


class OverviewSchema(AnswerSchema):
    """The state of the server."""

    models = fields.List(fields.Nested(ModelSchema), **about("The first `limit` models, by id."))
    next_cursor = fields.String(
        allow_none=True, **about("`cursor` of the next models in `GET /api/v1/models`.")
    )
    jobs = fields.List(
        fields.Nested(JobSchema),
        **about(f"The last {MAX_PAGE} that have not ended, and the {NEWEST} newest."),
    )
    failed_jobs = fields.List(
        fields.Nested(JobSchema),
        **about(f"Of each model with an `error`, its last failed job, if it is among the last {MAX_PAGE}."),
    )
    resources = fields.Nested(ResourcesSchema)
    server_started = fields.Nested(
        EventSchema,
        allow_none=True,
        **about("The last `ServerStarted`; null for those who may not read events."),
    )
    as_of = fields.Integer(**about("The position that the models reflect."))


def overview_routes(nodes_view: NodesView, node_schema: Schema) -> Routes:
    """Return the route of the overview.

    Args:
        nodes_view: has its nodes.
        node_schema: of one of them.
    """
    routes = Routes(tag="resources")
    nodes = fields.List(fields.Nested(node_schema), **about("None if the server is alone."))

    @routes.get(
        "/api/v1/overview",
        access=Access.ANY,
        summary="Show models, jobs, memory and nodes in one answer",
        description="What the console shows first; each part is as its own resource has it.",
        query=PageQuerySchema(),
        answers={200: (OverviewSchema.from_dict({"nodes": nodes}, name="Overview")(), "The present state.")},
        errors=("log_unavailable", "repository_busy", "repository_unreadable"),
    )
    async def show_overview(request: web.Request) -> web.Response:
        app = request.app
        models = await read_model_page(app, "", query_parameters(request)["limit"])
        may_audit = not request[PRINCIPAL].roles.isdisjoint(Access.AUDIT.value)
        body = {
            **models,
            **await _read_jobs(app, models["models"]),
            "resources": msgspec.Raw(await app[RESOURCES_CACHE].body(app)),
            "nodes": nodes_view(app),
            "server_started": await _read_start(app) if may_audit else None,
        }
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    return routes


async def _read_jobs(app: web.Application, models: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return the jobs, and of each of the models with an error the last that failed."""
    newest = (await app[READER].jobs(JobQuery(limit=NEWEST))).items
    unended = app[LOG].state.unended()[-MAX_PAGE:]
    jobs = {job.id: job for job in [*newest, *unended]}
    failed: dict[str, Job] = {}
    if with_error := {model["id"] for model in models if model["error"] is not None}:
        for job in (await app[READER].jobs(JobQuery(status=JobStatus.FAILED, limit=MAX_PAGE))).items:
            if job.model_id in with_error:
                failed.setdefault(job.model_id, job)
    return {
        "jobs": [present_job(app, job) for job in jobs.values()],
        "failed_jobs": [present_job(app, job) for job in failed.values()],
    }


async def _read_start(app: web.Application) -> msgspec.Raw | None:
    wanted = EventFilter(types=(ServerStarted.TYPE,))
    page = await app[READER].event_page(EventQuery(wanted, newest_first=True, limit=1))
    return msgspec.Raw(page.items[0].line) if page.items else None
