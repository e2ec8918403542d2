"""The repository extension of the Open Inference Protocol: index, load and unload, which wait for their end.

Its clients take any status but 200 for a failure and cannot follow a job, so the answer comes when the job
has ended. A client that goes away changes nothing about its job; who asks again joins it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec
from aiohttp import hdrs, web
from marshmallow import fields

from events.commands import RequestUnload
from events.errors import RequestRefused
from events.jobs import Job, JobStatus
from events.models import Model, ModelState
from runtime.repository import Repository
from server.api.jobs import job_path, run_job
from server.api.models import make_load_command
from server.api.schemas import AnswerSchema, ModelPathSchema
from server.appkeys import LOG, REPOSITORY
from server.auth.gate import PRINCIPAL
from server.errors import ERRORS, ServerProblem
from server.http.validation import path_parameters
from server.routing import Access, Routes
from server.v2.tritonconfig import (
    INDEX_BODY,
    LOAD_BODY,
    UNLOAD_BODY,
    check_unload,
    read_load,
    read_object,
    read_only_ready,
)

routes = Routes(tag="repository")

Entry = dict[str, str]
ReadyState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
"""Of Triton's. UNKNOWN does not happen here."""

UNLOADED = "unloaded"
"""The reason that Triton gives; its clients tell by it an unload from a failed load."""


class _Version(NamedTuple):
    """What is to be said of one version."""

    state: ReadyState
    reason: str = ""


def index(models: Mapping[str, Model], found: Iterable[str], *, only_ready: bool = False) -> list[Entry]:
    """Return an entry per version, by name and version; a model that was never loaded has its name alone.

    A model of which nothing is loaded, and which is not in the repository any more, has none.

    Args:
        models: the recorded state.
        found: the ids of the models in the repository.
        only_ready: give only versions that can be asked.
    """
    in_repository = set(found)
    entries: list[Entry] = []
    for name in sorted(in_repository | models.keys()):
        model = models.get(name) or Model(name)
        if name in in_repository or _is_live(model):
            entries += _entries(model, only_ready=only_ready)
    return entries


def _entries(model: Model, *, only_ready: bool) -> list[Entry]:
    versions = sorted(_versions(model).items())
    if only_ready:
        return [_entry(model.id, *known) for known in versions if known[1].state == "READY"]
    return [_entry(model.id, *known) for known in versions] or [{"name": model.id}]


def _versions(model: Model) -> dict[int, _Version]:
    """Return the versions that the state still knows of."""
    versions: dict[int, _Version] = {}
    if model.last_version is not None:
        reason = model.error.message if model.error is not None else UNLOADED
        versions[model.last_version] = _Version("UNAVAILABLE", reason)
    if model.previous is not None:
        versions[model.previous.version] = _Version("UNAVAILABLE", "it made way for another version")
    versions |= {load.version: _Version("LOADING") for load in model.loads}
    serving = model.serving
    if serving is not None:  # said last: a version that serves can be asked while it is loaded anew
        lost = model.phase is ModelState.LOST
        if not lost or all(load.version != serving.version for load in model.loads):
            versions[serving.version] = _serving(model)
    return versions


def _serving(model: Model) -> _Version:
    if model.phase is ModelState.LOADED:
        return _Version("READY")
    if model.phase is ModelState.UNLOADING:
        return _Version("UNLOADING")
    why = model.error.message if model.error is not None else "the server was started again"
    return _Version("UNAVAILABLE", f"lost, and to be loaded again: {why}")


def _is_live(model: Model) -> bool:
    return model.serving is not None or bool(model.loads)


def _entry(name: str, number: int, version: _Version) -> Entry:
    entry: Entry = {"name": name, "version": str(number), "state": version.state}
    return {**entry, "reason": version.reason} if version.reason else entry


_BODY_ERRORS = ("invalid_body", "not_supported", "body_timeout", "body_too_large", "unsupported_media_type")
_LOAD_ERRORS = (
    "invalid_defaults",
    "invalid_model",
    "warm_up_failed",
    "model_changed",
    "unsafe_file",
    "crash_loop",
    "job_failed",
    "cancelled",
    "unknown_model",
    "unknown_version",
    "queue_full",
    "worker_died",
    "out_of_memory",
    "insufficient_memory",
    "too_many_loaded",
    "timeout",
    "fork_server_died",
    "fork_server_unavailable",
)
_LOG_ERRORS = ("log_unavailable", "shutting_down")


class JobDidNotComplete(ServerProblem):
    """The job ended without its effect; says why, with the code that the job has."""

    def __init__(self, job: Job) -> None:
        error = job.error
        reason = error.message if error is not None else _how_cancelled(job)
        version = "" if job.version is None else f"version {job.version}: "
        super().__init__(
            f"{job.kind} failed for model '{job.model_id}': {version}{reason}",
            http_headers={hdrs.LOCATION: job_path(job.id)},
        )
        # One class for all: the job says which.
        self.code = _code_of(job)  # type: ignore[misc]


class IndexEntrySchema(AnswerSchema):
    """One version of a model; of one that was never loaded, its name alone."""

    name = fields.String(required=True)
    version = fields.String()
    state = fields.String(metadata={"description": "READY, LOADING, UNLOADING or UNAVAILABLE."})
    reason = fields.String(metadata={"description": "Why it is UNAVAILABLE."})


_ENDED = {
    200: {
        "description": "It is so; the body is empty.",
        "headers": {
            "Location": {
                "schema": {"type": "string"},
                "description": "The job behind it, where there is one.",
            }
        },
    }
}


@routes.post(
    "/v2/repository/index",
    access=Access.ANY,
    summary="List the versions of all models and their states",
    request_body=INDEX_BODY,
    answers={200: (IndexEntrySchema(many=True), "By name and version.")},
    errors=("invalid_body", "body_timeout", "body_too_large", "unsupported_media_type"),
)
async def show_index(request: web.Request) -> web.Response:
    """Answer with what is recorded, and with what the repository has beside it."""
    only_ready = read_only_ready(await read_object(request))
    recorded = dict(request.app[LOG].state.models)  # of now: the thread must not see it change
    entries = await asyncio.to_thread(
        _encoded_index, recorded, request.app[REPOSITORY], only_ready=only_ready
    )
    return web.Response(body=entries, content_type="application/json")


@routes.post(
    "/v2/repository/models/{id}/load",
    access=Access.ADMIN,
    summary="Load a model, and wait until it can be asked",
    path=ModelPathSchema(),
    request_body=LOAD_BODY,
    answers=_ENDED,
    errors=(*_BODY_ERRORS, *_LOAD_ERRORS, *_LOG_ERRORS),
)
async def load_and_wait(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless what is asked for is so or under way, and wait for the job's end."""
    model_id, subject = path_parameters(request)["id"], request[PRINCIPAL].subject
    asked = read_load(await read_object(request), model_id)
    job = await run_job(request.app, await make_load_command(request.app, model_id, asked, subject))
    return _done(job)


@routes.post(
    "/v2/repository/models/{id}/unload",
    access=Access.ADMIN,
    summary="Unload a model, and wait until its memory is back",
    path=ModelPathSchema(),
    request_body=UNLOAD_BODY,
    answers=_ENDED,
    errors=(*_BODY_ERRORS, "job_failed", "cancelled", *_LOG_ERRORS),
)
async def unload_and_wait(request: web.Request) -> web.Response:
    """Append `UnloadRequested` unless nothing of the model is there, and wait for the job's end."""
    model_id = path_parameters(request)["id"]
    check_unload(await read_object(request))
    job = await _unload(request.app, model_id, request[PRINCIPAL].subject)
    return _done(job)


def _encoded_index(recorded: Mapping[str, Model], repository: Repository, *, only_ready: bool) -> bytes:
    """Look into the repository only for what cannot be asked: what can be is recorded."""
    found = [] if only_ready else repository.models()
    return msgspec.json.encode(index(recorded, found, only_ready=only_ready))


async def _unload(app: web.Application, model_id: str, subject: str) -> Job | None:
    """Unload what serves, else end what loads, as Triton does; None when there was neither."""
    for force in (False, True):
        try:
            return await run_job(app, RequestUnload(model_id, subject, force))
        except RequestRefused as refusal:
            if refusal.code != "not_loaded":
                raise
        if not app[LOG].state.queue(model_id):
            return None
    return None


def _how_cancelled(job: Job) -> str:
    return "it was cancelled" if job.cancel_requested else "it was ended by an unload"


def _code_of(job: Job) -> str:
    if job.error is None:
        return "cancelled"
    return job.error.code if job.error.code in ERRORS else "job_failed"


def _done(job: Job | None) -> web.Response:
    """Return the empty answer of a job that completed, or that was not needed.

    Raises:
        JobDidNotComplete: with the job's own code.
    """
    if job is None:
        return web.Response()
    if job.status is not JobStatus.COMPLETED:
        raise JobDidNotComplete(job)
    return web.Response(headers={hdrs.LOCATION: job_path(job.id)})
