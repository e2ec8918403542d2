"""List and show models, and the last lines that their workers printed.

ONNX Runtime quotes inputs of clients in its messages, so only admins may read those lines.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import fields

from answers.approvals import ApprovalInfo, LoadApprovalInfo
from answers.errors import ErrorInfo
from answers.events import EventInfo
from answers.jobs import JobInfo
from answers.models import (
    BatchRowsInfo,
    ExitedWorkerStderr,
    LoadedFileInfo,
    ModelChoice,
    ModelInfo,
    ModelList,
    ModelRulesInfo,
    ModelStderr,
    VersionOrigin,
    WorkerStderr,
)
from answers.signatures import LoadSignatureInfo
from answers.tensors import ModelTensor
from events.history import ShownModel, describe_model
from events.models import Model, ModelState
from events.serving import Serving
from events.sqlite.listing import EventFilter, EventQuery
from events.sqlite.timetravel import active_at, model_at, models_at
from events.state import State
from events.types import LoadedFile, VersionAdded, WorkerExited, contents_of, digest_of
from features.approvals.commands import list_unapproved
from features.facts import LoadEvidence
from features.rules import ModelRules
from features.server import OF_MODELS, collect, show_load
from features.signatures.rules import TrustMode
from runtime.errors import RepositoryUnreadable, RuntimeProblem, UnknownModel
from runtime.onnxfile import ModelTensors
from runtime.repository import REQUEST_LIMIT_S, RepositoryBusy, refuse_unserved
from runtime.router import Absent, Here, Version
from runtime.store.versions import Versions
from server.api.jobs import present_job
from server.api.schemas import ModelPathSchema, PageQuerySchema, about
from server.api.timetravel import PAST_ERRORS, AtQuerySchema, at_moment, read_past
from server.appkeys import CONFIG, CONSUMER, LOG, POOL, READER, ROUTER, VERSIONS
from server.auth.access import Access
from server.cluster import CLUSTER
from server.http.answers import respond, show, show_optional
from server.http.validation import NothingSchema, path_parameters, query_parameters
from server.routing import Routes

routes = Routes(tag="models")

LIST_LIMIT_S = 2.0
"""Time limit of reading all models at once, and then of reading each one."""
_ALL_MODELS, _ALL_FOLDERS = "*", "/"
"""Keys of reads of several models; no model has such an id."""


class ModelsQuerySchema(AtQuerySchema, PageQuerySchema):
    """Page of the models."""

    cursor = fields.String(load_default="", **about("The `next_cursor` of the last page."))


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model's versions in the repository, and whether it has newer files than those that were loaded.

    `refusal` says why its highest version cannot be served, or is not known.
    """

    id: str
    versions: list[int] = field(default_factory=list)
    has_changed: bool | None = None
    refusal: RuntimeProblem | None = None


@routes.get(
    "/api/v1/models",
    access=Access.ANY,
    summary="List the models of the repository and those loaded",
    query=ModelsQuerySchema(),
    answers={200: (ModelList, "One page, by id.")},
    errors=(*PAST_ERRORS, "repository_busy", "repository_unreadable"),
)
async def list_models(request: web.Request) -> web.Response:
    query = query_parameters(request)
    if query["at"] is not None:
        return respond(await _list_past_models(request, **query))
    return respond(await read_model_page(request.app, query["cursor"], query["limit"]))


async def read_model_page(app: web.Application, cursor: str, limit: int) -> ModelList:
    """Return a page of the models as they are now, by id.

    Args:
        app: the application.
        cursor: the id after which the page begins.
        limit: the largest number of models.

    Raises:
        RuntimeProblem: `repository_busy`, `repository_unreadable`.
    """
    state = app[LOG].state
    known = {model.id for model in state.models.values() if is_known(app, model)}
    find = partial(find_bytes, state, on_demand=app[CONFIG].loads_for_inferences)
    page = await list_versions(app[VERSIONS], find, known, cursor, limit)
    active = state.active()
    models = [_show_present(app, seen, active) for seen in page[:limit]]
    next_cursor = models[-1].id if len(page) > limit else None
    return ModelList(models=models, as_of=state.position, next_cursor=next_cursor)


async def _list_past_models(request: web.Request, at: str, cursor: str, limit: int) -> ModelList:
    def read(connection: Any, position: int) -> tuple[list[ShownModel], str | None]:
        models = models_at(connection, position, cursor=cursor, limit=limit + 1)
        return models, active_at(connection, position)

    moment, (found, active) = await read_past(request, at, read)
    page = ModelList(
        models=[make_model_info(model, is_active=model.id == active) for model in found[:limit]],
        as_of=moment.position,
        next_cursor=found[limit - 1].id if len(found) > limit else None,
    )
    return at_moment(page, moment)


@routes.get(
    "/api/v1/models/{id}",
    access=Access.ANY,
    summary="Show a model",
    path=ModelPathSchema(),
    query=AtQuerySchema(),
    answers={200: (ModelInfo, "The model.")},
    errors=("unknown_model", *PAST_ERRORS, "repository_busy", "repository_unreadable"),
)
async def show_model(request: web.Request) -> web.Response:
    model_id, at = path_parameters(request)["id"], query_parameters(request)["at"]
    if at is not None:
        return respond(await _show_past_model(request, at, model_id))
    seen = await look_at_model(request, model_id)
    state = request.app[LOG].state
    serving = state.models[model_id].serving if model_id in state.models else None
    shown = msgspec.structs.replace(
        _show_present(request.app, seen, state.active()),
        parameters=None if serving is None else msgspec.to_builtins(serving.parameters),
        sources=await _list_sources(request.app, model_id, seen.versions),
    )
    return respond(await _add_tensors(request.app, shown))


async def _list_sources(
    app: web.Application, model_id: str, versions: Collection[int]
) -> list[VersionOrigin]:
    return [
        VersionOrigin(
            version=event.version,
            source=event.data.source.uri,
            resolved=event.data.source.resolved,
            added_by=event.actor,
            added_at=event.recorded_at,
            position=event.position,
        )
        for event in await app[READER].latest_changes(model_id)
        if isinstance(event.data, VersionAdded)
        and event.data.source is not msgspec.UNSET
        and event.version is not None
        and event.version in versions
    ]


async def _show_past_model(request: web.Request, at: str, model_id: str) -> ModelInfo:
    def read(connection: Any, position: int) -> tuple[ShownModel | None, str | None]:
        return model_at(connection, position, model_id), active_at(connection, position)

    moment, (model, active) = await read_past(request, at, read)
    if model is None:
        raise UnknownModel(model_id)
    return at_moment(make_model_info(model, is_active=model_id == active), moment)


def make_model_info(
    model: ShownModel, *, is_active: bool, seen: ListedModel | None = None, memory_bytes: int | None = None
) -> ModelInfo:
    """Return a model as the API shows it; without `seen` and other present facts, as in the past."""
    row, load = model.row, model.load
    evidence = (load and load.evidence) or LoadEvidence()
    return ModelInfo(
        id=model.id,
        versions=seen.versions if seen else None,
        not_served=str(seen.refusal) if seen and seen.refusal else None,
        state=row.state,
        version=row.version,
        next_version=row.next_version,
        active=is_active,
        labels=model.versions.versions_by_name,
        approvals=show(model.versions.approvals, list[ApprovalInfo]),
        loaded_at=load.loaded_at if load else None,
        loaded_by=(row.asked_by or load.loaded_by) if load else None,
        brought_back=row.brought_back,
        job_id=load.load_job_id if load else None,
        position=load.position if load else None,
        files=show(load.files, list[LoadedFileInfo]) if load else [],
        repository_changed=seen.has_changed if seen else None,
        memory_bytes=memory_bytes,
        memory_at_load_bytes=load.memory_bytes if load else None,
        **show_load(load),
        rows=_show_rows(load) if load else None,
        signature=show_optional(evidence.signature, LoadSignatureInfo),
        approval=show_optional(evidence.approval, LoadApprovalInfo),
        added_by=list((load and model.versions.list_adders(load.digest)) or ()) or None,
        error=show_optional(row.error, ErrorInfo),
        instances=row.workers if row.has_workers else None,
        threads=load.threads if load else None,
        **collect(OF_MODELS, model),
    )


def _show_rows(load: Serving) -> BatchRowsInfo | None:
    if load.rows is msgspec.UNSET:
        return None
    return BatchRowsInfo(verdict=load.rows, reason=load.rows_depend or "", joined=load.joins_requests)


def _show_present(app: web.Application, seen: ListedModel, active: Model | None) -> ModelInfo:
    """Return a model with its present facts."""
    state, rules = app[LOG].state, app[CONFIG].policy.of(seen.id)
    model, versions = state.models.get(seen.id), state.registers.find_versions(seen.id)
    shown = make_model_info(
        describe_model(state, seen.id),
        is_active=active is not None and active.id == seen.id,
        seen=seen,
        memory_bytes=_memory_now(app, seen.id),
    )
    shown = msgspec.structs.replace(
        shown,
        policy=None if rules is None else _show_rules(rules),
        chosen=None if model is None else _show_choice(model),
        open_load=None if model is None else _show_open_load(app, model),
        unapproved=list_unapproved(model, versions, rules),
    )
    return shown if model is None else app[CLUSTER].complete_answer(shown, model)


def _show_open_load(app: web.Application, model: Model) -> JobInfo | None:
    """Return the load of a model that runs, or else the one that runs next."""
    load = model.started_load or next(iter(model.loads), None)
    job = None if load is None else app[LOG].state.jobs.get(load.job_id)
    return None if job is None else present_job(app, job)


def _show_choice(model: Model) -> ModelChoice | None:
    if not model.chosen:
        return None
    chosen = model.chosen
    return ModelChoice(
        version=chosen.version,
        parameters=None if chosen.parameters is None else msgspec.to_builtins(chosen.parameters),
        digest=digest_of(contents_of(chosen.files)) if chosen.files else None,
        by=chosen.by,
        at=chosen.at,
        job_id=chosen.job_id,
    )


def _show_rules(rules: ModelRules) -> ModelRulesInfo:
    mode = TrustMode.ENFORCE if rules.enforced else TrustMode.WARN if rules.trust else None
    return ModelRulesInfo(digest=rules.digest, trust=mode, approvals=rules.persons)


def _memory_now(app: web.Application, model_id: str) -> int | None:
    """Return the measured memory of the load here that serves a model, or None without a process."""
    model, loads = app[LOG].state.models.get(model_id), app[CONSUMER].loads
    servings = model.servings if model is not None else ()
    load = next((loads[each.load_job_id] for each in servings if each.load_job_id in loads), None)
    return load.memory_bytes if load is not None and load.alive_workers else None


async def find_tensors(
    app: web.Application, model_id: str, version: Version | None = None
) -> tuple[int, ModelTensors]:
    """Return the serving version, or else the highest one, with its inputs and outputs.

    Args:
        app: the application.
        model_id: the model.
        version: the wanted version; None accepts any.

    Raises:
        RuntimeProblem: `unknown_model`, `unknown_version`, `invalid_model`, `unsafe_file`, `model_changed`,
            `repository_busy`, `repository_unreadable`, `unknown_label`; `model_not_loaded` or `bytes_gone`:
            the model is listed, and the repository does not have it.
    """
    target, number = app[ROUTER].resolve(model_id, version), app[ROUTER].find_version(model_id, version)
    if isinstance(target, Here):
        return target.version, ModelTensors(target.inputs, target.outputs)
    try:
        return await read_declared(app, model_id, number)
    except UnknownModel:
        model = app[LOG].state.models.get(model_id)
        if isinstance(target, Absent) and model is not None and is_known(app, model):
            raise target.problem from None
        raise


async def read_declared(app: web.Application, model_id: str, number: int | None) -> tuple[int, ModelTensors]:
    """Return a version, by default the highest, with its file's declarations; raises as `find_tensors`."""
    versions = app[VERSIONS]
    look = partial(versions.read_tensors, model_id, number)
    return await versions.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)


async def _add_tensors(app: web.Application, shown: ModelInfo) -> ModelInfo:
    with suppress(RuntimeProblem):  # the other facts are known, and a load reports this problem
        version, found = await find_tensors(app, shown.id)
        inputs, outputs = show(found.inputs, list[ModelTensor]), show(found.outputs, list[ModelTensor])
        return msgspec.structs.replace(shown, inputs=inputs, outputs=outputs, inputs_of_version=version)
    return shown


async def look_at_model(request: web.Request, model_id: str) -> ListedModel:
    """Read a model in the repository; a loaded model has no versions if they are missing or hang.

    Raises:
        UnknownModel: `unknown_model`, the model has no version, and is not loaded.
        RepositoryBusy: `repository_busy`, the folder hangs, and the model is not loaded.
        RepositoryUnreadable: `repository_unreadable`, and the model is not loaded.
    """
    versions = request.app[VERSIONS]
    app = request.app
    find = partial(find_bytes, app[LOG].state, on_demand=app[CONFIG].loads_for_inferences)
    look = partial(_look_at, versions, find, model_id)
    try:
        seen: ListedModel = await versions.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
    except RepositoryBusy:
        if not is_listed(request, model_id):
            raise
        return ListedModel(model_id)
    if not seen.versions and not is_listed(request, model_id):
        raise refuse_unserved(model_id, seen.refusal)
    return seen


def is_listed(request: web.Request, model_id: str) -> bool:
    model = request.app[LOG].state.models.get(model_id)
    return model is not None and is_known(request.app, model)


def is_known(app: web.Application, model: Model) -> bool:
    """Whether a model is listed though the repository may not have it.

    The first that applies:
    1. It has a load, or one to end: yes.
    2. The version that a person chose was removed: no.
    3. It should serve and cannot: yes, or nobody would know.
    4. Inferences load what a person chose: yes, from the store.
    """
    if model.loads or model.state not in (ModelState.UNLOADED, ModelState.FAILED):
        return True
    chosen = None if not model.chosen else model.chosen.version
    if chosen is not None and app[LOG].state.is_removed(model.id, chosen):
        return False
    return model.is_missed or (app[CONFIG].loads_for_inferences and chosen is not None)


FindBytes = Callable[[str, Sequence[int]], tuple[int, Sequence[LoadedFile]] | None]
"""Returns the version of a model that serves or would be loaded, and its files, by the present versions."""


def find_bytes(
    state: State, model_id: str, present: Sequence[int], *, on_demand: bool
) -> tuple[int, Sequence[LoadedFile]] | None:
    """Return the bytes of a model that stay, whatever the repository has, with their version; or None.

    They are what it serves from, or without a load what an inference would load, if these load models.
    """
    model = state.models.get(model_id)
    if model is None:
        return None
    if model.serving is not None:
        return model.serving.version, model.serving.files
    version = model.chosen.version if model.chosen else max(present, default=None)
    if version is None or not on_demand:
        return None
    added = state.registers.find_versions(model_id).find_added(version)
    kept = model.find_kept_files(version, 0 if added is None else added.position)
    return None if kept is None else (version, kept)


def _look_at(versions: Versions, find_bytes: FindBytes, model_id: str) -> ListedModel:
    try:
        present, refusal = versions.repository.find_versions(model_id)
    except RepositoryUnreadable as unreadable:
        present, refusal = [], unreadable
    known = find_bytes(model_id, present)
    return ListedModel(model_id, present, known and versions.has_changed(model_id, *known), refusal)


async def list_versions(
    versions: Versions,
    find_bytes: FindBytes,
    known: Collection[str],
    cursor: str = "",
    limit: int = sys.maxsize,
) -> list[ListedModel]:
    """List models with their versions: the repository's models with a version, and the known ones.

    Usually one read lists all. If it hangs, each model is read by itself; then a known model that hangs has
    no versions, and another model that hangs is left out.

    Args:
        versions: reads the repository.
        find_bytes: finds what the present files are compared with.
        known: models to list in any case.
        cursor: only models after this id.
        limit: the page's limit; one more is listed, to tell whether there is another page.

    Raises:
        RepositoryBusy: `repository_busy`, the repository's own folder hangs.
        RepositoryUnreadable: `repository_unreadable`, the folder cannot be read, and no model is known.
    """

    def look(model_id: str) -> ListedModel:
        return _look_at(versions, find_bytes, model_id)

    def list_folders() -> list[str]:
        try:
            return repository.folders()
        except RepositoryUnreadable:
            if not known:
                raise
            return []  # each known model reports this itself

    def list_all() -> list[ListedModel]:
        return _first_models(_ids_after(cursor, list_folders(), known), known, look, limit)

    repository = versions.repository
    file_system = repository.file_system
    try:
        return await file_system.run(_ALL_MODELS, list_all, LIST_LIMIT_S)
    except RepositoryBusy:
        folders = await file_system.run(_ALL_FOLDERS, list_folders, REQUEST_LIMIT_S)
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
    """Return the first models that have, or may have, a version, and known ones; later ones are not read."""
    page: list[ListedModel] = []
    for model_id in ids:
        seen = look(model_id)
        if seen.versions or isinstance(seen.refusal, RepositoryUnreadable) or model_id in known:
            page.append(seen)
        if len(page) > limit:
            break
    return page


@routes.get(
    "/api/v1/models/{id}/stderr",
    access=Access.ADMIN,
    summary="Show the last lines that a model's workers printed",
    description="They may hold inputs of clients: ONNX Runtime quotes them in messages.",
    path=ModelPathSchema(),
    query=NothingSchema(),
    answers={200: (ModelStderr, "Of the running workers, and of the last one that ended unexpectedly.")},
    errors=("unknown_model", "repository_busy", "repository_unreadable", "log_unavailable"),
)
async def show_stderr(request: web.Request) -> web.Response:
    model_id = path_parameters(request)["id"]
    running = [
        WorkerStderr(
            worker_id=worker.worker_id, version=load.version, job_id=load.job_id, lines=worker.stderr_tail()
        )
        for load in request.app[CONSUMER].loads.values()
        if load.model_id == model_id
        for worker in load.alive_workers
    ]
    exited = await _last_exited(request.app, model_id)
    if not running and exited is None:
        await look_at_model(request, model_id)
    recorded = request.app[POOL].records_stderr
    return respond(ModelStderr(recorded=recorded, workers=running, last_exited=exited))


async def _last_exited(app: web.Application, model_id: str) -> ExitedWorkerStderr | None:
    wanted = EventFilter(types=(WorkerExited.TYPE,), models=(model_id,))
    page = await app[READER].event_page(EventQuery(wanted, newest_first=True, limit=1))
    for stored in page.items:
        event = EventInfo.read(stored.line)
        return ExitedWorkerStderr(
            worker_id=event.worker_id,
            version=event.version,
            job_id=event.job_id,
            position=event.position,
            lines=event.data["stderr"],
            exited_at=event.recorded_at,
            exit_code=event.data["exit_code"],
            signal=event.data["signal"],
        )
    return None
