"""The management API: load, unload, models and jobs. Handlers parse, make one call, and serialise."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import hdrs, web
from aiohttp_apispec import docs, json_schema, match_info_schema, querystring_schema, response_schema

from events.accept import Command, FileStat, RequestLoad, RequestUnload
from events.errors import LedgerProblem
from events.jobs import Job, JobStatus, LoadParameters
from events.models import Model, ModelState
from runtime.errors import UnknownModel
from runtime.repository import Repository
from server.appkeys import CONFIG, CONSUMER, LOG, PRINCIPAL, READER, REPOSITORY, STOPPING
from server.errors import ServerProblem, errors
from server.prefer import wait_s
from server.routes import Access, LimitClass, Route
from server.schemas import (
    JobListSchema,
    JobPathSchema,
    JobSchema,
    JobsQuerySchema,
    LoadBodySchema,
    ModelListSchema,
    ModelPathSchema,
    ModelSchema,
    ModelsQuerySchema,
    UnloadBodySchema,
    UnloadQuerySchema,
)
from server.validation import NothingSchema, json_body, path_parameters, query_parameters
from server.views import job_view, model_view

POLL_AFTER_S = 1
"""A hint for clients that poll: most loads take less."""

_PREFER = {
    "in": "header",
    "name": "Prefer",
    "schema": {"type": "string"},
    "description": "`wait=N`: answer when the job has ended, or after N seconds, at most 60.",
}
_ACCEPTED = "Accepted: follow the job at `Location`."
_ENDED = "Nothing to do, or the job ended within `Prefer: wait=N`, whatever its outcome."


class NotSupported(ServerProblem):
    """This release does not do that yet."""

    code = "not_supported"


class UnknownJob(LedgerProblem):
    """There is no such job."""

    code = "unknown_job"


@docs(tags=["models"], summary="Load a model, or another version of it", parameters=[_PREFER])
@match_info_schema(ModelPathSchema())
@querystring_schema(NothingSchema())
@json_schema(LoadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("unknown_model", "unknown_version", "queue_full", "not_supported", "log_unavailable", "shutting_down")
async def load_model(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless what is asked for is so or under way."""
    _refuse_idempotency_key(request)
    model_id, body = path_parameters(request)["id"], json_body(request)
    parameters = load_parameters(body, request.app[CONFIG].timeout_s)
    found = await asyncio.to_thread(request.app[REPOSITORY].resolve, model_id, body.get("version"))
    files = tuple(FileStat(file.path, file.bytes, file.mtime_ns) for file in found.files)
    subject = request[PRINCIPAL].subject
    return await _submit(request, RequestLoad(model_id, found.version, files, subject, parameters))


@docs(tags=["models"], summary="Unload the active model", parameters=[_PREFER])
@querystring_schema(UnloadQuerySchema())
@json_schema(UnloadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("nothing_loaded", "not_supported", "log_unavailable", "shutting_down")
async def unload_active(request: web.Request) -> web.Response:
    """Append `UnloadRequested` for the model loaded last."""
    _refuse_idempotency_key(request)
    force = query_parameters(request)["force"]
    return await _submit(request, RequestUnload(None, request[PRINCIPAL].subject, force))


@docs(tags=["models"], summary="Unload a model", parameters=[_PREFER])
@match_info_schema(ModelPathSchema())
@querystring_schema(UnloadQuerySchema())
@json_schema(UnloadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("unknown_model", "not_loaded", "not_supported", "log_unavailable", "shutting_down")
async def unload_model(request: web.Request) -> web.Response:
    """Append `UnloadRequested`, unless an unload is under way."""
    _refuse_idempotency_key(request)
    model_id = path_parameters(request)["id"]
    await _versions(request, model_id)
    force = query_parameters(request)["force"]
    return await _submit(request, RequestUnload(model_id, request[PRINCIPAL].subject, force))


@docs(tags=["models"], summary="List the models, in the repository or loaded")
@querystring_schema(ModelsQuerySchema())
@response_schema(ModelListSchema(), 200, description="One page, by id.")
async def list_models(request: web.Request) -> web.Response:
    """Answer with a page of models, from the recorded state and the repository as it is now."""
    query, state = query_parameters(request), request.app[LOG].state
    known = {model.id for model in state.models.values() if _is_live(model)}
    page = await asyncio.to_thread(
        _page_of_models,
        request.app[REPOSITORY],
        known,
        query["cursor"],
        query["limit"],
    )
    models = [model_view(model_id, state, versions) for model_id, versions in page[: query["limit"]]]
    more = len(page) > query["limit"]
    next_cursor = models[-1]["id"] if more else None
    return web.json_response({"models": models, "as_of": state.position, "next_cursor": next_cursor})


@docs(tags=["models"], summary="Show a model")
@match_info_schema(ModelPathSchema())
@querystring_schema(NothingSchema())
@response_schema(ModelSchema(), 200, description="The model.")
@errors("unknown_model")
async def show_model(request: web.Request) -> web.Response:
    """Answer with one model."""
    model_id = path_parameters(request)["id"]
    versions = await _versions(request, model_id)
    return web.json_response(model_view(model_id, request.app[LOG].state, versions))


@docs(tags=["jobs"], summary="List the jobs, newest first")
@querystring_schema(JobsQuerySchema())
@response_schema(JobListSchema(), 200, description="One page.")
@errors("log_unavailable")
async def list_jobs(request: web.Request) -> web.Response:
    """Answer with a page of jobs."""
    query = query_parameters(request)
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
@querystring_schema(NothingSchema())
@response_schema(JobSchema(), 200, description="The job, ended or not.")
@errors("unknown_job", "log_unavailable")
async def show_job(request: web.Request) -> web.Response:
    """Answer with one job; that it failed is not an error of this request."""
    job = await _job(request, path_parameters(request)["job_id"])
    return web.json_response(job_view(job, request.app[CONSUMER]))


def management_routes() -> list[Route]:
    """Return the routes of this module."""
    manage = (Access.ADMIN, LimitClass.MANAGEMENT)
    read = (Access.ANY, LimitClass.READS)
    return [
        Route("GET", "/api/v1/models", list_models, *read),
        Route("GET", "/api/v1/models/{id}", show_model, *read),
        Route("POST", "/api/v1/models/unload", unload_active, *manage),
        Route("POST", "/api/v1/models/{id}/load", load_model, *manage),
        Route("POST", "/api/v1/models/{id}/unload", unload_model, *manage),
        Route("GET", "/api/v1/jobs", list_jobs, *read),
        Route("GET", "/api/v1/jobs/{job_id}", show_job, *read),
    ]


def load_parameters(body: dict[str, Any], timeout_s: int) -> LoadParameters:
    """Return what a load's body asks for, with the server's `timeout_s` where it names none.

    Raises:
        NotSupported: `not_supported`, rather than record what would not be done.
    """
    asked = {"timeout_s": timeout_s} | body
    parameters = LoadParameters(**{name: value for name, value in asked.items() if name != "version"})
    supported = LoadParameters(
        timeout_s=parameters.timeout_s,
        memory_limit_bytes=parameters.memory_limit_bytes,
    )
    for name in ("priority", "keep_alive_s", "strategy", "pinned", "instances"):
        value = getattr(parameters, name)
        if value != getattr(supported, name):
            raise NotSupported(f"{name}: {value!r} is not supported yet; leave it out")
    return parameters


def _refuse_idempotency_key(request: web.Request) -> None:
    if "Idempotency-Key" in request.headers:
        raise NotSupported("Idempotency-Key is not supported yet; an identical load is joined without it")


async def _submit(request: web.Request, command: Command) -> web.Response:
    receipt = await request.app[LOG].submit(command)
    assert receipt.job_id is not None
    seconds = wait_s(request.headers.getall("Prefer", []))
    job = await _ended(request, receipt.job_id, seconds)
    headers = {hdrs.LOCATION: f"/api/v1/jobs/{job.id}", hdrs.VARY: "Prefer"}
    if not job.ended:
        headers[hdrs.RETRY_AFTER] = str(POLL_AFTER_S)
    view = job_view(job, request.app[CONSUMER])
    return web.json_response(view, status=200 if job.ended else 202, headers=headers)


async def _ended(request: web.Request, job_id: str, seconds: float) -> Job:
    """Return the job when it has ended, or as it is when time is up or the server stops."""
    if seconds == 0:
        return await _job(request, job_id)
    log, stopping = request.app[LOG], request.app[STOPPING]
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
    return await _job(request, job_id)


async def _job(request: web.Request, job_id: str) -> Job:
    job = request.app[LOG].state.jobs.get(job_id) or await request.app[READER].job(job_id)
    if job is None:
        raise UnknownJob(f"there is no job {job_id!r}; GET /api/v1/jobs lists them")
    return job


async def _versions(request: web.Request, model_id: str) -> list[int]:
    """Return the model's versions in the repository; none is an error unless it is loaded all the same."""
    versions = await asyncio.to_thread(_versions_or_none, request.app[REPOSITORY], model_id)
    model = request.app[LOG].state.models.get(model_id)
    if not versions and (model is None or not _is_live(model)):
        raise UnknownModel(model_id)
    return versions


def _is_live(model: Model) -> bool:
    """Whether there is something to show, and to unload, of a model that is not in the repository."""
    return bool(model.loads) or model.state not in (ModelState.UNLOADED, ModelState.FAILED)


def _versions_or_none(repository: Repository, model_id: str) -> list[int]:
    try:
        return repository.versions(model_id)
    except UnknownModel:
        return []


def _page_of_models(
    repository: Repository,
    known: set[str],
    cursor: str,
    limit: int,
) -> list[tuple[str, list[int]]]:
    """Return ids after the cursor with their versions, one more than the page so that its end is known."""
    ids = sorted(model_id for model_id in {*repository.models(), *known} if model_id > cursor)
    return [(model_id, _versions_or_none(repository, model_id)) for model_id in ids[: limit + 1]]
