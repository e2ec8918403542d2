"""The management API: jobs, and the answer to what becomes one."""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web
from aiohttp_apispec import (
    docs,
    headers_schema,
    json_schema,
    match_info_schema,
    querystring_schema,
    response_schema,
)

from events.commands import Command, RequestCancel
from events.errors import LedgerProblem
from events.jobs import Job, JobStatus
from server.api.idempotency import IdempotencySchema, idempotency
from server.api.prefer import wait_s
from server.api.schemas import (
    AtQuerySchema,
    CancelBodySchema,
    JobListSchema,
    JobPathSchema,
    JobSchema,
    JobsQuerySchema,
)
from server.api.timetravel import past_job, past_jobs
from server.api.views import job_view
from server.appkeys import CONSUMER, LOG, PRINCIPAL, READER, STOPPING
from server.errors import ServerProblem, errors
from server.routes import Access, LimitClass, Route
from server.validation import NothingSchema, path_parameters, query_parameters

POLL_AFTER_S = 1
"""A hint for clients that poll: most loads take less."""

PREFER = {
    "in": "header",
    "name": "Prefer",
    "schema": {"type": "string"},
    "description": "`wait=N`: answer when the job has ended, or after N seconds, at most 60.",
}
"""How a route that answers with `submit` documents what it prefers."""


class UnknownJob(LedgerProblem):
    """There is no such job."""

    code = "unknown_job"


class ShuttingDown(ServerProblem):
    """The server stops; nobody waits for the job any more, but it goes on at the next start."""

    code = "shutting_down"


@docs(tags=["jobs"], summary="List the jobs, newest first")
@querystring_schema(JobsQuerySchema())
@response_schema(JobListSchema(), 200, description="One page.")
@errors("beyond_head", "archived", "log_unavailable")
async def list_jobs(request: web.Request) -> web.Response:
    """Answer with a page of jobs."""
    query = query_parameters(request)
    if query["at"] is not None:
        return web.json_response(await past_jobs(request, query["at"], query))
    page = await request.app[READER].jobs(
        before=query["cursor"],
        limit=query["limit"],
        model_id=query["model"],
        status=JobStatus(query["status"]) if query["status"] is not None else None,
    )
    jobs = [job_view(job, request.app[CONSUMER]) for job in page.items]
    return web.json_response({"jobs": jobs, "as_of": page.as_of, "next_cursor": page.next_cursor})


@docs(tags=["jobs"], summary="Show a job")
@match_info_schema(JobPathSchema())
@querystring_schema(AtQuerySchema())
@response_schema(JobSchema(), 200, description="The job, ended or not.")
@errors("unknown_job", "beyond_head", "archived", "log_unavailable")
async def show_job(request: web.Request) -> web.Response:
    """Answer with one job; that it failed is not an error of this request."""
    job_id, at = path_parameters(request)["job_id"], query_parameters(request)["at"]
    if at is not None:
        past = await past_job(request, at, job_id)
        if past is None:
            raise UnknownJob(f"there was no job {job_id!r} then")
        return web.json_response(past)
    return web.json_response(job_view(await _job(request.app, job_id), request.app[CONSUMER]))


@docs(
    tags=["jobs"],
    summary="Cancel a job",
    description="Ends a load that has not loaded its model, or an unload that has not begun. Who is too late "
    "changes nothing: the job may complete between this answer and the end, so its `status` is what counts. "
    "A job that is being cancelled already is answered as it is.",
    parameters=[PREFER],
)
@match_info_schema(JobPathSchema())
@querystring_schema(NothingSchema())
@headers_schema(IdempotencySchema())
@json_schema(CancelBodySchema())
@response_schema(JobSchema(), 202, description="Accepted: follow the job at `Location`.")
@response_schema(JobSchema(), 200, description="The job ended within `Prefer: wait=N`, whatever its outcome.")
@errors("unknown_job", "idempotency_mismatch", "already_finished", "already_started")
@errors("log_unavailable", "shutting_down")
async def cancel_job(request: web.Request) -> web.Response:
    """Append `CancelRequested`, unless the job is past it."""
    job = await _job(request.app, path_parameters(request)["job_id"])
    return await submit(request, RequestCancel(job.id, request[PRINCIPAL].subject, idempotency(request)))


def job_routes() -> list[Route]:
    """Return the routes of this module."""
    read = (Access.ANY, LimitClass.READS)
    return [
        Route("GET", "/api/v1/jobs", list_jobs, *read),
        Route("GET", "/api/v1/jobs/{job_id}", show_job, *read),
        Route("POST", "/api/v1/jobs/{job_id}/cancel", cancel_job, Access.ADMIN, LimitClass.MANAGEMENT),
    ]


async def submit(request: web.Request, command: Command) -> web.Response:
    """Submit what becomes a job, and answer with it: 200 where it has ended, else 202 and where to look."""
    receipt = await request.app[LOG].submit(command)
    assert receipt.job_id is not None
    seconds = wait_s(request.headers.getall("Prefer", []))
    job = await _ended(request.app, receipt.job_id, seconds)
    headers = {hdrs.LOCATION: job_path(job.id), hdrs.VARY: "Prefer"}
    if not job.ended:
        headers[hdrs.RETRY_AFTER] = str(POLL_AFTER_S)
    view = job_view(job, request.app[CONSUMER])
    return web.json_response(view, status=200 if job.ended else 202, headers=headers)


async def carry_out(app: web.Application, command: Command) -> Job:
    """Submit what becomes a job, and return it when it has ended, however that took: it has its own limits.

    Raises:
        ShuttingDown: `shutting_down`, the server stops before the job has ended.
        LedgerProblem: `log_unavailable`, or what the command is refused with.
    """
    receipt = await app[LOG].submit(command)
    assert receipt.job_id is not None
    job = await _ended(app, receipt.job_id, None)
    if not job.ended:
        where = job_path(job.id)
        raise ShuttingDown(
            f"the server stops; at its next start the {job.kind} goes on, see {where}",
            http_headers={hdrs.LOCATION: where},
        )
    return job


def job_path(job_id: str) -> str:
    """Return where a job is to be looked at."""
    return f"/api/v1/jobs/{job_id}"


async def _ended(app: web.Application, job_id: str, seconds: float | None) -> Job:
    """Return the job when it has ended, or as it is when time, if limited, is up or the server stops."""
    if seconds == 0:
        return await _job(app, job_id)
    log, stopping = app[LOG], app[STOPPING]
    wakeup = log.subscribe()
    try:
        async with asyncio.timeout(seconds):
            while job_id in log.state.jobs and not stopping.is_set():
                wakeup.clear()
                await wakeup.wait()
    except TimeoutError:
        pass
    finally:
        log.unsubscribe(wakeup)
    return await _job(app, job_id)


async def _job(app: web.Application, job_id: str) -> Job:
    job = app[LOG].state.jobs.get(job_id) or await app[READER].job(job_id)
    if job is None:
        raise UnknownJob(f"there is no job {job_id!r}; GET /api/v1/jobs lists them")
    return job
