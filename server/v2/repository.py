"""The repository extension, through which Triton's clients load and unload: index, load, unload.

These clients take any status but 200 for a failure and cannot follow a job, so the answer comes when the job
has ended. A job goes on if its client leaves; the client's next request joins it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import msgspec
from aiohttp import hdrs, web

from answers.inference import IndexEntry
from events.errors import RequestRefused
from events.jobcommands import RequestUnload
from events.jobs import Job, JobStatus
from events.models import Model, ModelState
from features.rules import POLICY_CODES
from server.api.jobs import job_path, run_job
from server.api.loads import make_load_command
from server.api.models import is_known, list_versions, read_declared
from server.api.schemas import ModelPathSchema
from server.appkeys import CONFIG, LOG, VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.errors import ERRORS, ServerProblem
from server.http.answers import respond_encoded
from server.http.validation import path_parameters
from server.routing import Routes
from server.v2 import tritonconfig

routes = Routes(tag="repository")

ReadyState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
"""Triton's states, without UNKNOWN, which does not occur."""

UNLOADED = "unloaded"
"""Triton's own reason, by which its clients distinguish an unload from a failed load."""


def index(models: Mapping[str, Model], found: Iterable[str], *, only_ready: bool = False) -> list[IndexEntry]:
    """Return an entry per version, by name and version; a model that was never loaded has only a name.

    A model has no entry if it is neither loaded nor among `found`, the ids of those that are listed.
    """
    listed = set(found)
    entries: list[IndexEntry] = []
    for name in sorted(listed | models.keys()):
        model = models.get(name) or Model(name)
        if name in listed or model.serving is not None or model.loads:
            versions = [entry for _, entry in sorted(_versions(model).items())] or [IndexEntry(name=name)]
            entries += [each for each in versions if not only_ready or each.state == "READY"]
    return entries


def _versions(model: Model) -> dict[int, IndexEntry]:
    entries: dict[int, IndexEntry] = {}

    def add(number: int, state: ReadyState, reason: str = "") -> None:
        entries[number] = IndexEntry(name=model.id, version=str(number), state=state, reason=reason or None)

    error = model.error
    if model.last_version is not None:
        add(model.last_version, "UNAVAILABLE", UNLOADED if error is None else error.message)
    if model.previous is not None:
        add(model.previous.version, "UNAVAILABLE", "it was replaced by another version")
    for load in model.loads:
        add(load.version, "LOADING")
    for other in model.others:
        add(other.version, "READY")
    if model.serving is not None:  # in the end: a serving version stays ready during its reload
        version = model.serving.version
        if model.phase is ModelState.LOADED:
            add(version, "READY")
        elif model.phase is ModelState.UNLOADING:
            add(version, "UNLOADING")
        elif all(load.version != version for load in model.loads):
            why = "the server was restarted" if error is None else error.message
            add(version, "UNAVAILABLE", f"lost, and being reloaded: {why}")
    return entries


MAX_INDEX_BYTES = 4096
"""Length of an index's body, which any role may send, some thousand times a minute."""

_BODY_ERRORS = ("invalid_body", "not_supported", "body_timeout", "body_too_large", "unsupported_media_type")
_LOAD_ERRORS = (
    "device_unavailable", "fallback_refused",
    "invalid_defaults", "invalid_model", "warm_up_failed", "rows_depend", "model_changed", "unsafe_file",
    *POLICY_CODES, "policy_differs", "not_encodable", "crash_loop", "job_failed", "cancelled",
    "unknown_model", "unknown_version", "queue_full", "worker_died", "out_of_memory", "insufficient_memory",
    "too_many_loaded", "timeout", "no_progress", "fork_server_died", "fork_server_unavailable",
    "repository_busy", "repository_unreadable",
)  # fmt: skip
_LOG_ERRORS = ("log_unavailable", "shutting_down")


class JobDidNotComplete(ServerProblem):
    """The job did not complete; has the job's reason and code."""

    def __init__(self, job: Job) -> None:
        error = job.error
        if error is not None:
            reason = error.message
            code = error.code if error.code in ERRORS else "job_failed"
        else:
            reason = "it was cancelled" if job.cancel_requested else "an unload cancelled it"
            code = "cancelled"
        version = "" if job.version is None else f"version {job.version}: "
        super().__init__(
            f"{job.kind} failed for model '{job.model_id}': {version}{reason}",
            code=code,
            http_headers={hdrs.LOCATION: job_path(job.id)},
        )


_ENDED = {
    200: {
        "description": "Done; the body is empty.",
        "headers": {"Location": {"schema": {"type": "string"}, "description": "The job, if there is one."}},
    }
}


@routes.post(
    "/v2/repository/index",
    access=Access.ANY,
    summary="List the versions of all models with their states",
    request_body=tritonconfig.INDEX_BODY,
    answers={200: (list[IndexEntry], "By name and version.")},
    errors=(
        *("invalid_body", "body_timeout", "body_too_large", "unsupported_media_type", "repository_busy"),
        "repository_unreadable",
    ),
)
async def show_index(request: web.Request) -> web.Response:
    only_ready = tritonconfig.read_only_ready(await tritonconfig.read_object(request, MAX_INDEX_BYTES))
    app, listed = request.app, set[str]()
    recorded = dict(app[LOG].state.models)  # a copy, which does not change under the thread
    if not only_ready:
        found = await list_versions(app[VERSIONS], lambda *_: None, recorded)
        listed = {seen.id for seen in found if seen.versions}
        listed |= {model.id for model in recorded.values() if is_known(app, model)}
    entries = await asyncio.to_thread(_encoded_index, recorded, listed, only_ready=only_ready)
    return respond_encoded(entries)


@routes.post(
    "/v2/repository/models/{id}/load",
    access=Access.ADMIN,
    summary="Load a model, and wait until it is ready",
    path=ModelPathSchema(),
    request_body=tritonconfig.LOAD_BODY,
    answers=_ENDED,
    errors=(*_BODY_ERRORS, *_LOAD_ERRORS, *_LOG_ERRORS),
)
async def load_and_wait(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless that load is done or in progress, and wait for the job's end."""
    model_id, person = path_parameters(request)["id"], request[PRINCIPAL]
    parameters, config = tritonconfig.read_load(await tritonconfig.read_object(request), model_id)
    command = await make_load_command(request.app, model_id, parameters, person.subject, person=person)
    if config.input or config.output:
        tensors = await read_declared(request.app, model_id, command.version)
        tritonconfig.check_tensors(config, *tensors)
    return _respond_completed(await run_job(request.app, command))


@routes.post(
    "/v2/repository/models/{id}/unload",
    access=Access.ADMIN,
    summary="Unload a model, and wait until its memory is freed",
    path=ModelPathSchema(),
    request_body=tritonconfig.UNLOAD_BODY,
    answers=_ENDED,
    errors=(*_BODY_ERRORS, "job_failed", "cancelled", *_LOG_ERRORS),
)
async def unload_and_wait(request: web.Request) -> web.Response:
    """Append `UnloadRequested` if the model is loaded or loading, and wait for the job's end."""
    model_id = path_parameters(request)["id"]
    tritonconfig.check_unload(await tritonconfig.read_object(request))
    job = await _unload(request.app, model_id, request[PRINCIPAL].subject)
    return _respond_completed(job)


def _encoded_index(recorded: Mapping[str, Model], listed: Collection[str], *, only_ready: bool) -> bytes:
    return msgspec.json.encode(index(recorded, listed, only_ready=only_ready))


async def _unload(app: web.Application, model_id: str, subject: str) -> Job | None:
    """Unload the serving version, or else cancel the load, as Triton does; returns None without either."""
    takes_out = app[CONFIG].loads_for_inferences
    for force in (False, True):
        try:
            return await run_job(app, RequestUnload(model_id, subject, force, takes_out_of_service=takes_out))
        except RequestRefused as refusal:
            if refusal.code != "not_loaded":
                raise
        if not app[LOG].state.queue(model_id):
            return None
    return None


def _respond_completed(job: Job | None) -> web.Response:
    """Return the empty response of a completed job, or of an unload without a job.

    Raises:
        JobDidNotComplete: with the job's own code.
    """
    if job is None:
        return web.Response()
    if job.status is not JobStatus.COMPLETED:
        raise JobDidNotComplete(job)
    return web.Response(headers={hdrs.LOCATION: job_path(job.id)})
