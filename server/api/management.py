"""The management API: models, load and unload. Handlers parse, make one call, and serialise."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp_apispec import (
    docs,
    headers_schema,
    json_schema,
    match_info_schema,
    querystring_schema,
    response_schema,
)

from events.commands import RequestUnload
from events.models import Model, ModelState
from runtime.errors import UnknownModel
from runtime.repository import Repository
from server.api.jobs import PREFER, IdempotencySchema, idempotency, submit
from server.api.parameters import requested_load
from server.api.schemas import (
    AtQuerySchema,
    JobSchema,
    LoadBodySchema,
    ModelListSchema,
    ModelPathSchema,
    ModelSchema,
    ModelsQuerySchema,
    UnloadBodySchema,
    UnloadQuerySchema,
)
from server.api.timetravel import past_model, past_models
from server.api.views import model_view
from server.appkeys import LOG, REPOSITORY
from server.auth.gate import PRINCIPAL
from server.errors import errors
from server.routes import Access, LimitClass, Route
from server.validation import NothingSchema, json_body, path_parameters, query_parameters

_ACCEPTED = "Accepted: follow the job at `Location`."
_ENDED = "Nothing to do, or the job ended within `Prefer: wait=N`, whatever its outcome."


@docs(tags=["models"], summary="Load a model, or another version of it", parameters=[PREFER])
@match_info_schema(ModelPathSchema())
@querystring_schema(NothingSchema())
@headers_schema(IdempotencySchema())
@json_schema(LoadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("unknown_model", "unknown_version", "invalid_defaults", "idempotency_mismatch", "queue_full")
@errors("log_unavailable", "shutting_down")
async def load_model(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless what is asked for is so or under way."""
    model_id, subject = path_parameters(request)["id"], request[PRINCIPAL].subject
    asked, key = json_body(request), idempotency(request)
    return await submit(request, await requested_load(request.app, model_id, asked, subject, key))


@docs(tags=["models"], summary="Unload the active model", parameters=[PREFER])
@querystring_schema(UnloadQuerySchema())
@headers_schema(IdempotencySchema())
@json_schema(UnloadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("nothing_loaded", "idempotency_mismatch", "log_unavailable", "shutting_down")
async def unload_active(request: web.Request) -> web.Response:
    """Append `UnloadRequested` for the model loaded last."""
    subject, force = request[PRINCIPAL].subject, query_parameters(request)["force"]
    return await submit(request, RequestUnload(None, subject, force, idempotency=idempotency(request)))


@docs(tags=["models"], summary="Unload a model", parameters=[PREFER])
@match_info_schema(ModelPathSchema())
@querystring_schema(UnloadQuerySchema())
@headers_schema(IdempotencySchema())
@json_schema(UnloadBodySchema())
@response_schema(JobSchema(), 202, description=_ACCEPTED)
@response_schema(JobSchema(), 200, description=_ENDED)
@errors("unknown_model", "not_loaded", "idempotency_mismatch", "log_unavailable", "shutting_down")
async def unload_model(request: web.Request) -> web.Response:
    """Append `UnloadRequested`, unless an unload is under way."""
    model_id = path_parameters(request)["id"]
    await _versions(request, model_id)
    subject, force = request[PRINCIPAL].subject, query_parameters(request)["force"]
    return await submit(request, RequestUnload(model_id, subject, force, idempotency=idempotency(request)))


@docs(tags=["models"], summary="List the models, in the repository or loaded")
@querystring_schema(ModelsQuerySchema())
@response_schema(ModelListSchema(), 200, description="One page, by id.")
@errors("beyond_head", "archived", "log_unavailable")
async def list_models(request: web.Request) -> web.Response:
    """Answer with a page of models, from the recorded state and the repository as it is now."""
    query, state = query_parameters(request), request.app[LOG].state
    if query["at"] is not None:
        return web.json_response(await past_models(request, query["at"], query["cursor"], query["limit"]))
    known = {model.id for model in state.models.values() if _is_live(model)}
    page = await asyncio.to_thread(
        _page_of_models,
        request.app[REPOSITORY],
        known,
        query["cursor"],
        query["limit"],
    )
    active = state.active()
    models = [model_view(model_id, state, versions, active) for model_id, versions in page[: query["limit"]]]
    more = len(page) > query["limit"]
    next_cursor = models[-1]["id"] if more else None
    return web.json_response({"models": models, "as_of": state.position, "next_cursor": next_cursor})


@docs(tags=["models"], summary="Show a model")
@match_info_schema(ModelPathSchema())
@querystring_schema(AtQuerySchema())
@response_schema(ModelSchema(), 200, description="The model.")
@errors("unknown_model", "beyond_head", "archived", "log_unavailable")
async def show_model(request: web.Request) -> web.Response:
    """Answer with one model."""
    model_id, at = path_parameters(request)["id"], query_parameters(request)["at"]
    if at is not None:
        return web.json_response(await past_model(request, at, model_id))
    versions = await _versions(request, model_id)
    state = request.app[LOG].state
    return web.json_response(model_view(model_id, state, versions, state.active()))


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
    ]


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
    page: list[tuple[str, list[int]]] = []
    ids = sorted(model_id for model_id in {*repository.folders(), *known} if model_id > cursor)
    for model_id in ids:  # only those of the page are looked into
        versions = _versions_or_none(repository, model_id)
        if versions or model_id in known:
            page.append((model_id, versions))
        if len(page) > limit:
            break
    return page
