"""`GET /api/v1/overview`: the content of the console's first page, in one answer.

Models, jobs, memory and nodes are those of their own resources. Models are read first, and `as_of` is their
position: the rest is at least as new, so that a client that follows the stream from there misses no event.
"""

from __future__ import annotations

import msgspec
from aiohttp import web
from msgspec.structs import asdict

from answers.jobs import JobInfo
from answers.models import ModelInfo
from answers.overview import Overview
from events.jobs import Job, JobStatus
from events.sqlite.listing import EventFilter, EventQuery
from events.sqlite.queries import JobQuery
from events.types import ServerStarted
from server.api.jobs import present_job
from server.api.models import read_model_page
from server.api.resources import RESOURCES_CACHE
from server.api.schemas import MAX_PAGE, PageQuerySchema
from server.appkeys import LOG, READER
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.cluster import CLUSTER
from server.http.answers import respond_encoded
from server.http.validation import query_parameters
from server.routing import Routes

NEWEST = 40
"""Ended jobs in the answer, as many as people read."""


routes = Routes(tag="resources")


@routes.get(
    "/api/v1/overview",
    access=Access.ANY,
    summary="Show models, jobs, memory and nodes in one answer",
    description="What the console shows first; each part is as its own resource has it.",
    query=PageQuerySchema(),
    answers={200: (Overview, "The present state.")},
    errors=("log_unavailable", "repository_busy", "repository_unreadable"),
)
async def show_overview(request: web.Request) -> web.Response:
    app = request.app
    models = await read_model_page(app, "", query_parameters(request)["limit"])
    may_audit = not request[PRINCIPAL].roles.isdisjoint(Access.AUDIT.value)
    overview = Overview(
        models=models.models,
        next_cursor=models.next_cursor,
        jobs=await _list_jobs(app),
        failed_jobs=await _list_failed_jobs(app, models.models),
        resources=await app[RESOURCES_CACHE].read(app),
        nodes=app[CLUSTER].describe(),
        server_started=None,
        as_of=models.as_of,
    )
    start = await _read_start(app) if may_audit else None  # byte for byte, so that it can be hashed
    return respond_encoded(msgspec.json.encode({**asdict(overview), "server_started": start}))


async def _list_jobs(app: web.Application) -> list[JobInfo]:
    newest = (await app[READER].jobs(JobQuery(limit=NEWEST))).items
    jobs = {job.id: job for job in [*newest, *app[LOG].state.unended()[-MAX_PAGE:]]}
    return [present_job(app, job) for job in jobs.values()]


async def _list_failed_jobs(app: web.Application, models: list[ModelInfo]) -> list[JobInfo]:
    """Return the last failed job of each of the models with an error."""
    failed: dict[str, Job] = {}
    if with_error := {model.id for model in models if model.error is not None}:
        for job in (await app[READER].jobs(JobQuery(status=JobStatus.FAILED, limit=MAX_PAGE))).items:
            if job.model_id in with_error:
                failed.setdefault(job.model_id, job)
    return [present_job(app, job) for job in failed.values()]


async def _read_start(app: web.Application) -> msgspec.Raw | None:
    wanted = EventFilter(types=(ServerStarted.TYPE,))
    page = await app[READER].event_page(EventQuery(wanted, newest_first=True, limit=1))
    return msgspec.Raw(page.items[0].line) if page.items else None
