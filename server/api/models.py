"""Models: list, show, load and unload them.

The parameters of a load come from the request, then, for the loaded version, from its load (`events.accept`),
else from the model's loadledger.toml, then from the server's settings.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET

from events.accept import NO_BATCHING
from events.commands import RequestLoad, RequestUnload
from events.models import Model, ModelState
from events.types import Idempotency, LoadParameters
from runtime.contents import Contents, ModelContents
from runtime.errors import LoadRefused, RuntimeProblem, UnknownModel
from runtime.filesystem import REQUEST_LIMIT_S, RepositoryBusy
from runtime.modeldefaults import InvalidDefaults, defaults_name, read_defaults
from runtime.onnxfile import ModelSignature
from runtime.repository import Repository
from runtime.store.problems import RepositoryUnreadable
from server.api.jobs import AS_JOB, JOB_ERRORS, answer_with_job, hash_idempotency_key
from server.api.schemas import (
    AtQuerySchema,
    LoadBodySchema,
    ModelListSchema,
    ModelPathSchema,
    ModelSchema,
    ModelsQuerySchema,
    UnloadBodySchema,
    UnloadQuerySchema,
    model_view,
)
from server.api.timetravel import past_model, past_models
from server.appkeys import CONFIG, CONSUMER, CONTENTS, LOG, ROUTER
from server.auth.gate import PRINCIPAL
from server.config import Config
from server.http.validation import (
    NothingSchema,
    json_body,
    load_with,
    path_parameters,
    query_parameters,
)
from server.routing import Access, Routes

routes = Routes(tag="models")

_PARAMETERS = LoadParameters.__struct_fields__
_AS_DEFAULTS = LoadBodySchema(only=_PARAMETERS)
LIST_LIMIT_S = 2.0
"""How long a list of models waits for one look at all of them, and then for a look at each."""
_ALL_MODELS, _ALL_FOLDERS = "*", "/"
"""What looks at several models are known by; no model has such an id."""
NEVER = -1
"""The `keep_alive_s` of a model without an idle timeout."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model's versions in the repository, and whether it has newer files than those that are loaded."""

    id: str
    versions: list[int] = field(default_factory=list)
    has_changed: bool | None = None


async def make_load_command(
    app: web.Application,
    model_id: str,
    asked: Mapping[str, Any],
    subject: str,
    idempotency: Idempotency | None = None,
) -> RequestLoad:
    """Return the command of a request whose body, as `LoadBodySchema` loads it, is `asked`.

    Raises:
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is invalid.
        RuntimeProblem: `invalid_model_id`, `unknown_model`, `unknown_version`, `repository_busy`.
    """
    wanted = {name: value for name, value in asked.items() if name != "version"}
    version = asked.get("version")
    contents = app[CONTENTS]
    look = partial(_look_up, contents, model_id, version)
    chosen, known, written = await contents.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
    defaults = load_with(_AS_DEFAULTS, written, defaults_name(model_id), InvalidDefaults)
    parameters = _merge_parameters(wanted, defaults, defaults_name(model_id), app[CONFIG])
    return RequestLoad(
        model_id,
        chosen,
        known,
        subject,
        parameters,
        asked=frozenset(wanted),
        idempotency=idempotency,
    )


def default_parameters(repository: Repository, model_id: str, config: Config) -> LoadParameters:
    """Return the parameters of a load whose request names none.

    Raises:
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is invalid.
    """
    file = defaults_name(model_id)
    defaults = load_with(_AS_DEFAULTS, read_defaults(repository, model_id), file, InvalidDefaults)
    return _merge_parameters({}, defaults, file, config)


def _look_up(
    contents: ModelContents, model_id: str, version: int | None
) -> tuple[int, Contents | None, dict[str, Any]]:
    chosen = contents.repository.find_version(model_id, version)
    known = None
    with suppress(LoadRefused, RepositoryUnreadable):  # the load then says what is wrong
        known = contents.known_contents(model_id, chosen)
    return chosen, known, read_defaults(contents.repository, model_id)


def _merge_parameters(
    wanted: Mapping[str, Any], defaults: Mapping[str, Any], file: str, config: Config
) -> LoadParameters:
    """Merge the sources; a request that switches batching off also drops its delay."""
    own = {name: getattr(config, name) for name in ("timeout_s", "progress_timeout_s")}
    merged = {**own, **defaults, **wanted}
    if merged.get("keep_alive_s") is None:  # null means the server's setting in each source
        merged["keep_alive_s"] = None if config.keep_alive_s == NEVER else config.keep_alive_s
    asks_delay = bool(wanted.get("max_queue_delay_us"))  # the loaded model may have batches: `events.accept`
    if merged.get("max_queue_delay_us") and not merged.get("max_batch_size") and not asks_delay:
        if not defaults.get("max_batch_size"):
            raise InvalidDefaults(f"{file}: {NO_BATCHING}")
        merged["max_queue_delay_us"] = 0
    merged["node_labels"] = tuple(sorted(set(merged.get("node_labels") or ()))) or UNSET
    return LoadParameters(**merged)


@routes.get(
    "/api/v1/models",
    access=Access.ANY,
    summary="List the models of the repository and those loaded",
    query=ModelsQuerySchema(),
    answers={200: (ModelListSchema(), "One page, by id.")},
    errors=("beyond_head", "archived", "log_unavailable", "repository_busy"),
)
async def list_models(request: web.Request) -> web.Response:
    """Answer with a page of models, from the recorded state and the repository."""
    query, state = query_parameters(request), request.app[LOG].state
    if query["at"] is not None:
        return web.json_response(await past_models(request, query["at"], query["cursor"], query["limit"]))
    known = {model.id for model in state.models.values() if _is_live(model)}
    limit, active = query["limit"], state.active()
    page = await list_versions(request.app[CONTENTS], dict(state.models), known, query["cursor"], limit)
    models = [
        model_view(
            seen.id,
            state,
            seen.versions,
            active,
            repository_changed=seen.has_changed,
            memory_bytes=_memory_now(request.app, seen.id),
        )
        for seen in page[:limit]
    ]
    next_cursor = models[-1]["id"] if len(page) > limit else None
    return web.json_response({"models": models, "as_of": state.position, "next_cursor": next_cursor})


@routes.get(
    "/api/v1/models/{id}",
    access=Access.ANY,
    summary="Show a model",
    path=ModelPathSchema(),
    query=AtQuerySchema(),
    answers={200: (ModelSchema(), "The model.")},
    errors=("unknown_model", "beyond_head", "archived", "log_unavailable", "repository_busy"),
)
async def show_model(request: web.Request) -> web.Response:
    """Answer with one model."""
    model_id, at = path_parameters(request)["id"], query_parameters(request)["at"]
    if at is not None:
        return web.json_response(await past_model(request, at, model_id))
    seen = await look_at_model(request, model_id)
    state = request.app[LOG].state
    view = model_view(
        model_id,
        state,
        seen.versions,
        state.active(),
        repository_changed=seen.has_changed,
        memory_bytes=_memory_now(request.app, model_id),
    )
    serving = state.models[model_id].serving if model_id in state.models else None
    parameters = msgspec.to_builtins(serving.parameters) if serving is not None else None
    signature = await _describe_signature(request.app, model_id)
    return web.json_response({**view, "parameters": parameters, **signature})


def _memory_now(app: web.Application, model_id: str) -> int | None:
    """Return the measured memory of the load that serves a model; None if it has no process."""
    model = app[LOG].state.models.get(model_id)
    serving = model.serving if model is not None else None
    load = app[CONSUMER].loads.get(serving.load_job_id) if serving is not None else None
    return load.run.memory_bytes if load is not None and load.alive_workers else None


async def find_signature(
    app: web.Application, model_id: str, version: int | None = None
) -> tuple[int, ModelSignature]:
    """Return a version, inputs and outputs: the serving one, else the highest and what its file declares.

    Args:
        app: the application.
        model_id: the model.
        version: only this one.

    Raises:
        RuntimeProblem: `unknown_model`, `unknown_version`, `invalid_model`, `unsafe_file`, `model_changed`,
            `repository_busy`, `repository_unreadable`.
    """
    router, contents = app[ROUTER], app[CONTENTS]
    if router.is_ready(model_id, version):
        route = router.route(model_id, version)
        return route.version, ModelSignature(route.inputs, route.outputs)
    look = partial(contents.read_signature, model_id, version)
    return await contents.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)


async def _describe_signature(app: web.Application, model_id: str) -> dict[str, Any]:
    with suppress(RuntimeProblem):  # the rest is known, and a load says why this is not
        version, signature = await find_signature(app, model_id)
        inputs, outputs = msgspec.to_builtins((signature.inputs, signature.outputs))
        return {"inputs": inputs, "outputs": outputs, "signature_version": version}
    return {"inputs": None, "outputs": None, "signature_version": None}


@routes.post(
    "/api/v1/models/unload",
    **AS_JOB,
    summary="Unload the active model",
    query=UnloadQuerySchema(),
    body=UnloadBodySchema(),
    errors=("nothing_loaded", *JOB_ERRORS),
)
async def unload_active(request: web.Request) -> web.Response:
    """Append `UnloadRequested` for the active model."""
    return await _unload(request, None)


@routes.post(
    "/api/v1/models/{id}/load",
    **AS_JOB,
    summary="Load a model, or replace its version",
    path=ModelPathSchema(),
    query=NothingSchema(),
    body=LoadBodySchema(),
    errors=(
        "unknown_model",
        "unknown_version",
        "invalid_defaults",
        "queue_full",
        "repository_busy",
        *JOB_ERRORS,
    ),
)
async def load_model(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless the model is loaded as requested or an equal load is under way."""
    model_id, subject = path_parameters(request)["id"], request[PRINCIPAL].subject
    asked, key = json_body(request), hash_idempotency_key(request)
    return await answer_with_job(request, await make_load_command(request.app, model_id, asked, subject, key))


@routes.post(
    "/api/v1/models/{id}/unload",
    **AS_JOB,
    summary="Unload a model",
    path=ModelPathSchema(),
    query=UnloadQuerySchema(),
    body=UnloadBodySchema(),
    errors=("unknown_model", "not_loaded", "repository_busy", *JOB_ERRORS),
)
async def unload_model(request: web.Request) -> web.Response:
    """Append `UnloadRequested`, unless an unload is in progress."""
    model_id = path_parameters(request)["id"]
    if not _is_listed(request, model_id):
        await look_at_model(request, model_id)
    return await _unload(request, model_id)


async def _unload(request: web.Request, model_id: str | None) -> web.Response:
    subject, force = request[PRINCIPAL].subject, query_parameters(request)["force"]
    key = hash_idempotency_key(request)
    return await answer_with_job(request, RequestUnload(model_id, subject, force, idempotency=key))


async def look_at_model(request: web.Request, model_id: str) -> ListedModel:
    """Look at a model in the repository; a loaded one has no versions if they are not there or hang.

    Raises:
        UnknownModel: `unknown_model`, there is no version, and the model is not loaded.
        RepositoryBusy: `repository_busy`, the folder hangs, and the model is not loaded.
    """
    contents = request.app[CONTENTS]
    look = partial(_look_at, contents, request.app[LOG].state.models.get(model_id), model_id)
    try:
        seen: ListedModel = await contents.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
    except RepositoryBusy:
        if not _is_listed(request, model_id):
            raise
        return ListedModel(model_id)
    if not seen.versions and not _is_listed(request, model_id):
        raise UnknownModel(model_id)
    return seen


def _is_listed(request: web.Request, model_id: str) -> bool:
    model = request.app[LOG].state.models.get(model_id)
    return model is not None and _is_live(model)


def _is_live(model: Model) -> bool:
    """Whether there is something to show, and to unload, of a model that is not in the repository."""
    return bool(model.loads) or model.state not in (ModelState.UNLOADED, ModelState.FAILED)


def _look_at(contents: ModelContents, model: Model | None, model_id: str) -> ListedModel:
    try:
        versions = contents.repository.versions(model_id)
    except UnknownModel:
        versions = []
    serving = model.serving if model is not None else None
    if serving is None:
        return ListedModel(model_id, versions)
    return ListedModel(model_id, versions, contents.has_changed(model_id, serving.version, serving.files))


async def list_versions(
    contents: ModelContents,
    models: Mapping[str, Model],
    known: Collection[str],
    cursor: str = "",
    limit: int = sys.maxsize,
) -> list[ListedModel]:
    """List models with their versions: those of the repository that have one, and the known ones.

    Usually one look lists all. If it hangs, each model is looked at by itself; then the versions of a known
    model that hangs are missing, and another one that hangs is left out.

    Args:
        contents: has the repository.
        models: those of which newer files are looked for.
        known: models to list in any case.
        cursor: models after this one.
        limit: one more is listed, so that the end is known.

    Raises:
        RepositoryBusy: `repository_busy`, the repository's own folder hangs.
    """

    def look(model_id: str) -> ListedModel:
        return _look_at(contents, models.get(model_id), model_id)

    def list_all() -> list[ListedModel]:
        return _first_models(_ids_after(cursor, repository.folders(), known), known, look, limit)

    repository = contents.repository
    file_system = repository.file_system
    try:
        return await file_system.run(_ALL_MODELS, list_all, LIST_LIMIT_S)
    except RepositoryBusy:
        folders = await file_system.run(_ALL_FOLDERS, repository.folders, REQUEST_LIMIT_S)
    ids = _ids_after(cursor, folders, known)
    runs = (file_system.run(model_id, partial(look, model_id), LIST_LIMIT_S) for model_id in ids)
    answers = await asyncio.gather(*runs, return_exceptions=True)
    listed = {answer.id: answer for answer in answers if isinstance(answer, ListedModel)}
    return _first_models(ids, known, lambda model_id: listed.get(model_id, ListedModel(model_id)), limit)


def _ids_after(cursor: str, folders: Iterable[str], known: Iterable[str]) -> list[str]:
    return sorted(model_id for model_id in {*folders, *known} if model_id > cursor)


def _first_models(
    ids: Iterable[str], known: Collection[str], look: Callable[[str], ListedModel], limit: int
) -> list[ListedModel]:
    """Return models with a version and known ones; only those that are returned are looked at."""
    page: list[ListedModel] = []
    for model_id in ids:
        seen = look(model_id)
        if seen.versions or model_id in known:
            page.append(seen)
        if len(page) > limit:
            break
    return page
