"""List and show models, and the last lines that their workers printed.

ONNX Runtime quotes inputs of clients in its messages, so only admins may read those lines.
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
from marshmallow import fields, validate

from events.history import ShownModel, describe_model
from events.models import RELOADS, Model, ModelState
from events.policy.rules import ModelRules, TrustMode
from events.sqlite.listing import EventFilter, EventQuery
from events.sqlite.timetravel import active_at, model_at, models_at
from events.types import LoadEvidence, VersionAdded, WorkerExited
from runtime.errors import RepositoryUnreadable, RuntimeProblem, UnknownModel
from runtime.onnxfile import ModelTensors
from runtime.repository import REQUEST_LIMIT_S, RepositoryBusy, refuse_unserved
from runtime.router import Here, Version
from runtime.store.versions import Versions
from server.api.approvals import (
    ApprovalSchema,
    LoadApprovalSchema,
    UnapprovedSchema,
    approvals_members,
    unapproved_members,
)
from server.api.schemas import (
    NO_NODE,
    AnswerSchema,
    DeclaredTensorSchema,
    FailureSchema,
    LoadSignatureSchema,
    ModelPathSchema,
    PageQuerySchema,
    about,
    node_member,
    one_of,
    signature_view,
)
from server.api.timetravel import PAST_ERRORS, AtQuerySchema, PastSchema, as_of, read_past
from server.appkeys import CONFIG, CONSUMER, LOG, POOL, READER, ROUTER, VERSIONS
from server.auth.access import Access
from server.cluster import CLUSTER
from server.http.validation import NothingSchema, path_parameters, query_parameters
from server.routing import Routes

routes = Routes(tag="models")

LIST_LIMIT_S = 2.0
"""How long a list of models waits for one look at all of them, and then for a look at each."""
_ALL_MODELS, _ALL_FOLDERS = "*", "/"
"""What looks at several models are known by; no model has such an id."""


class ModelsQuerySchema(AtQuerySchema, PageQuerySchema):
    """Page of the models."""

    cursor = fields.String(load_default="", **about("The `next_cursor` of the last page."))


class FileSchema(AnswerSchema):
    """A file of a loaded version, as it was read."""

    path = fields.String()
    bytes = fields.Integer()
    mtime_ns = fields.Integer()
    sha256 = fields.String()


class CopySchema(AnswerSchema):
    """A copy of a model: its load at one node."""

    node = fields.String(allow_none=True)
    version = fields.Integer(**about("During a swap, some copies have the version before."))
    position = fields.Integer(**about("Position of its `ModelLoaded`."))
    job_id = fields.String(**about("Job of its load."))
    loaded_at = fields.String()
    workers = fields.Integer(**about("Running workers; may be fewer than were loaded."))
    memory_bytes = fields.Integer(**about("What they took when it was loaded."))


class DeviceUseSchema(AnswerSchema):
    """The part of a loaded model that runs on one device."""

    provider = fields.String(**about("The execution provider; `cpu` is ONNX Runtime's own."))
    version = fields.String(**about("Of the provider."))
    device = fields.String()
    nodes = fields.Integer(**about("Nodes of the model's graph that run there."))
    memory_bytes = fields.Integer(
        allow_none=True, **about("Of the device's own memory when it was loaded; null if it has none.")
    )


class ModelPolicySchema(AnswerSchema):
    """The rules for a model: what its loads need."""

    digest = fields.String()
    trust = fields.String(
        allow_none=True,
        validate=validate.OneOf([TrustMode.ENFORCE.value, TrustMode.WARN.value]),
        **about("What follows without a trusted signature; null without rules for signatures."),
    )
    approvals = fields.Integer(**about("How many other persons must approve."))


class VersionSourceSchema(AnswerSchema):
    """Where a version comes from, as who added it said; the server has not looked."""

    version = fields.Integer()
    source = fields.String(**about("Its name, as it was given."))
    resolved = fields.String(**about("A name of what it meant then, which does not move."))
    added_by = fields.String()
    added_at = fields.String()
    position = fields.Integer(**about("Of its `VersionAdded`, which has the SHA-256 of each file."))


_TENSORS = (
    "In the answer of one model: those of the version that serves, else of the highest one, as its file"
)
_TENSORS += " declares them; null if the file cannot be read as ONNX."


class ChoiceSchema(AnswerSchema):
    """A load or an unload by a person."""

    version = fields.Integer(
        allow_none=True,
        **about("The version that an inference loads; null if it loads none: the person unloaded the model."),
    )
    parameters = fields.Dict(allow_none=True, **about("Of the load; null with `version`."))
    by = fields.String()
    at = fields.String()
    job_id = fields.String()


class ModelSchema(PastSchema):
    """A model of the repository, or one that is loaded."""

    id = fields.String()
    versions = fields.List(
        fields.Integer(),
        allow_none=True,
        **about("In the repository; null with `at`: its past is not recorded."),
    )
    state = fields.String(validate=one_of(ModelState))
    version = fields.Integer(allow_none=True)
    next_version = fields.Integer(allow_none=True)
    active = fields.Boolean()
    labels = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        **about("The version that each label names; missing without any.", is_optional=True),
    )
    loaded_at = fields.String(allow_none=True)
    loaded_by = fields.String(
        allow_none=True, **about("Who asked for it, also of a model that the system brought back since.")
    )
    brought_back = fields.String(
        allow_none=True,
        validate=validate.OneOf([cause.value for cause in RELOADS]),
        **about(
            "Why the system loaded it again, if it did: `restart` of the server, `recovery`, `swap`, `drain`,"
            " `copy`."
        ),
    )
    job_id = fields.String(allow_none=True)
    node = fields.String(**about(f"Name of the node where it is loaded; {NO_NODE}", is_optional=True))
    copies = fields.Integer(
        **about(
            "At how many nodes it is to be loaded; missing, as the next three, if at one.", is_optional=True
        )
    )
    copies_ready = fields.Integer(
        **about(
            "How many of them serve the version and files of the first, with all workers.", is_optional=True
        )
    )
    copies_at = fields.List(
        fields.Nested(CopySchema),
        **about("Its copies. The first is what the other members are of.", is_optional=True),
    )
    copies_waiting_for = fields.String(
        allow_none=True,
        **about("Why fewer are ready; null if all are, missing with `at`.", is_optional=True),
    )
    position = fields.Integer(allow_none=True, **about("Position of its `ModelLoaded`."))
    files = fields.List(fields.Nested(FileSchema))
    not_served = fields.String(
        allow_none=True,
        **about(
            "Why the highest version in the repository cannot be served, such as one that is not complete or"
            " cannot be read: a load without a number passes it over. Null if it can be, and with `at`."
        ),
    )
    repository_changed = fields.Boolean(
        allow_none=True,
        **about(
            "Whether the repository has newer files than those that are loaded; null if nothing is loaded,"
            " and with `at`."
        ),
    )
    memory_bytes = fields.Integer(
        allow_none=True,
        **about(
            "Memory of its workers here now, measured every few seconds, as in the resources; null with `at`,"
            " and if it is loaded at other nodes only."
        ),
    )
    memory_at_load_bytes = fields.Integer(
        allow_none=True, **about("What they took when the model was loaded.")
    )
    devices = fields.List(
        fields.Nested(DeviceUseSchema),
        **about(
            "First the device that it was loaded on, then `cpu` if nodes of its graph run there; missing if"
            " all is on the CPU.",
            is_optional=True,
        ),
    )
    signature = fields.Nested(
        LoadSignatureSchema, allow_none=True, **about("Of what it serves; null without rules for signatures.")
    )
    approval = fields.Nested(
        LoadApprovalSchema, allow_none=True, **about("Of what it serves; null without rules for approval.")
    )
    added_by = fields.List(
        fields.String(),
        allow_none=True,
        **about("All who added what it serves; null if the ledger has nobody, and if it serves nothing."),
    )
    approvals = fields.List(
        fields.Nested(ApprovalSchema),
        **about("The approvals of bytes that stand; missing without any.", is_optional=True),
    )
    unapproved = fields.List(
        fields.Nested(UnapprovedSchema),
        **about(
            "Versions whose load was refused, or that were added since the last approval, newest first; "
            "missing without any, and with `at`.",
            is_optional=True,
        ),
    )
    policy = fields.Nested(
        ModelPolicySchema,
        allow_none=True,
        **about(
            "The rules for it that are in force here; null without, missing with `at`.", is_optional=True
        ),
    )
    chosen = fields.Nested(
        ChoiceSchema,
        allow_none=True,
        **about(
            "The last load or unload by a person, which on-demand loads follow; null without one, missing"
            " with `at`.",
            is_optional=True,
        ),
    )
    error = fields.Nested(FailureSchema, allow_none=True)
    instances = fields.Integer(allow_none=True, **about("Running workers; may be fewer than were loaded."))
    threads = fields.Integer(allow_none=True, **about("Threads that each of its workers computes with."))
    inputs = fields.List(
        fields.Nested(DeclaredTensorSchema), allow_none=True, **about(_TENSORS, is_optional=True)
    )
    outputs = fields.List(
        fields.Nested(DeclaredTensorSchema), allow_none=True, **about(_TENSORS, is_optional=True)
    )
    parameters = fields.Dict(
        allow_none=True,
        **about("In the answer of one model: of the load that serves; null without one.", is_optional=True),
    )
    inputs_of_version = fields.Integer(
        allow_none=True, **about("The version that `inputs` and `outputs` are of.", is_optional=True)
    )
    sources = fields.List(
        fields.Nested(VersionSourceSchema),
        **about("In the answer of one model: its versions that have a name elsewhere.", is_optional=True),
    )


class ModelListSchema(PastSchema):
    """One page of the models, by id."""

    models = fields.List(fields.Nested(ModelSchema))
    as_of = fields.Integer(**about("The position that the answer reflects."))
    next_cursor = fields.String(allow_none=True)


_HAS_WORKERS = (ModelState.LOADED, ModelState.UNLOADING)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model's versions in the repository, and whether it has newer files than those that are loaded.

    `refusal` says why its highest version cannot be served, or cannot be known.
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
    answers={200: (ModelListSchema(), "One page, by id.")},
    errors=(*PAST_ERRORS, "repository_busy", "repository_unreadable"),
)
async def list_models(request: web.Request) -> web.Response:
    query = query_parameters(request)
    if query["at"] is not None:
        return web.json_response(await _list_past_models(request, **query))
    return web.json_response(await read_model_page(request.app, query["cursor"], query["limit"]))


async def read_model_page(app: web.Application, cursor: str, limit: int) -> dict[str, Any]:
    """Return a page of the models as they are now, by id.

    Args:
        app: the application.
        cursor: the id after which the page begins.
        limit: of the models.

    Raises:
        RuntimeProblem: `repository_busy`, `repository_unreadable`.
    """
    state = app[LOG].state
    known = {model.id for model in state.models.values() if _is_live(model)}
    page = await list_versions(app[VERSIONS], dict(state.models), known, cursor, limit)
    active = state.active()
    models = [
        _add_present(
            app,
            model_view(
                describe_model(state, seen.id),
                is_active=active is not None and active.id == seen.id,
                seen=seen,
                memory_bytes=_memory_now(app, seen.id),
            ),
        )
        for seen in page[:limit]
    ]
    next_cursor = models[-1]["id"] if len(page) > limit else None
    return {"models": models, "as_of": state.position, "next_cursor": next_cursor}


async def _list_past_models(request: web.Request, at: str, cursor: str, limit: int) -> dict[str, Any]:
    def read(connection: Any, position: int) -> tuple[list[ShownModel], str | None]:
        models = models_at(connection, position, cursor=cursor, limit=limit + 1)
        return models, active_at(connection, position)

    moment, (found, active) = await read_past(request, at, read)
    return {
        "models": [model_view(model, is_active=model.id == active) for model in found[:limit]],
        "next_cursor": found[limit - 1].id if len(found) > limit else None,
        **as_of(moment),
    }


@routes.get(
    "/api/v1/models/{id}",
    access=Access.ANY,
    summary="Show a model",
    path=ModelPathSchema(),
    query=AtQuerySchema(),
    answers={200: (ModelSchema(), "The model.")},
    errors=("unknown_model", *PAST_ERRORS, "repository_busy", "repository_unreadable"),
)
async def show_model(request: web.Request) -> web.Response:
    model_id, at = path_parameters(request)["id"], query_parameters(request)["at"]
    if at is not None:
        return web.json_response(await _show_past_model(request, at, model_id))
    seen = await look_at_model(request, model_id)
    state = request.app[LOG].state
    active = state.active()
    view = model_view(
        describe_model(state, model_id),
        is_active=active is not None and active.id == model_id,
        seen=seen,
        memory_bytes=_memory_now(request.app, model_id),
    )
    serving = state.models[model_id].serving if model_id in state.models else None
    parameters = msgspec.to_builtins(serving.parameters) if serving is not None else None
    tensors = await _describe_tensors(request.app, model_id)
    sources = await _list_sources(request.app, model_id, seen.versions)
    more = {"parameters": parameters, "sources": sources}
    return web.json_response({**_add_present(request.app, view), **tensors, **more})


async def _list_sources(
    app: web.Application, model_id: str, versions: Collection[int]
) -> list[dict[str, Any]]:
    return [
        {
            "version": event.version,
            "source": event.data.source.uri,
            "resolved": event.data.source.resolved,
            "added_by": event.actor,
            "added_at": event.recorded_at,
            "position": event.position,
        }
        for event in await app[READER].latest_changes(model_id)
        if isinstance(event.data, VersionAdded)
        and event.data.source is not msgspec.UNSET
        and event.version in versions
    ]


async def _show_past_model(request: web.Request, at: str, model_id: str) -> dict[str, Any]:
    def read(connection: Any, position: int) -> tuple[ShownModel | None, str | None]:
        return model_at(connection, position, model_id), active_at(connection, position)

    moment, (model, active) = await read_past(request, at, read)
    if model is None:
        raise UnknownModel(model_id)
    return {**model_view(model, is_active=model_id == active), **as_of(moment)}


def model_view(
    model: ShownModel,
    *,
    is_active: bool,
    seen: ListedModel | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Return a model as the API has it; None for what is unknown of the past, such as what was `seen`."""
    row, load = model.row, model.load
    evidence = (load and load.evidence) or LoadEvidence()
    return {
        "id": model.id,
        "versions": seen and seen.versions,
        "not_served": str(seen.refusal) if seen and seen.refusal else None,
        "state": row.state.value,
        "version": row.version,
        "next_version": row.next_version,
        "active": is_active,
        **({"labels": names} if (names := model.versions.versions_by_label) else {}),
        **approvals_members(model.versions),
        "loaded_at": load.loaded_at if load else None,
        "loaded_by": (row.asked_by or load.loaded_by) if load else None,
        "brought_back": row.brought_back,
        "job_id": load.load_job_id if load else None,
        **node_member(row.node),
        **_copies_members(model),
        "position": load.position if load else None,
        "files": msgspec.to_builtins(load.files) if load else [],
        "repository_changed": seen.has_changed if seen and load else None,
        "memory_bytes": memory_bytes,
        "memory_at_load_bytes": load.memory_bytes if load else None,
        **({"devices": msgspec.to_builtins(load.devices)} if load and load.devices else {}),
        "signature": signature_view(evidence.signature),
        "approval": msgspec.to_builtins(evidence.approval or None),
        "added_by": (load and model.versions.list_adders(load.digest)) or None,
        "error": msgspec.to_builtins(row.error),
        "instances": row.workers if row.state in _HAS_WORKERS else None,
        "threads": load.threads if load else None,
    }


def _copies_members(model: ShownModel) -> dict[str, Any]:
    """Return what the API has of copies; nothing of a model that has one load, and is to have one."""
    row, loads = model.row, (model.load, *model.copies) if model.row.state in _HAS_WORKERS else ()
    if row.copies_wanted == 1 and not row.copies:
        return {}
    copies = [
        {
            "node": place.node,
            "version": place.version,
            "position": place.load,
            "job_id": load.load_job_id,
            "loaded_at": load.loaded_at,
            "workers": place.workers,
            "memory_bytes": load.memory_bytes,
        }
        for place, load in zip(row.servings, loads, strict=False)
        if load is not None
    ]
    return {"copies": row.copies_wanted, "copies_ready": model.count_ready(), "copies_at": copies}


def _add_present(app: web.Application, view: dict[str, Any]) -> dict[str, Any]:
    """Return a view with what is not known of the past."""
    model, cluster = app[LOG].state.models.get(view["id"]), app.get(CLUSTER)
    chosen = None if model is None else msgspec.to_builtins(model.chosen or None)
    rules, versions = app[CONFIG].policy.of(view["id"]), app[LOG].state.registers.find_versions(view["id"])
    view |= {"policy": None if rules is None else _policy_view(rules), "chosen": chosen}
    view |= unapproved_members(model, versions, rules)
    if cluster is not None and model is not None and "copies" in view:
        view["copies_ready"], view["copies_waiting_for"] = cluster.count_copies(model)
    return view


def _policy_view(rules: ModelRules) -> dict[str, Any]:
    mode = TrustMode.ENFORCE if rules.enforced else TrustMode.WARN if rules.trust else None
    return {"digest": rules.digest, "trust": mode, "approvals": rules.persons}


def _memory_now(app: web.Application, model_id: str) -> int | None:
    """Return the measured memory of the load here that serves a model; None if it has no process."""
    model, loads = app[LOG].state.models.get(model_id), app[CONSUMER].loads
    servings = model.servings if model is not None else ()
    load = next((loads[each.load_job_id] for each in servings if each.load_job_id in loads), None)
    return load.memory_bytes if load is not None and load.alive_workers else None


async def find_tensors(
    app: web.Application, model_id: str, version: Version | None = None
) -> tuple[int, ModelTensors]:
    """Return a version, inputs and outputs: the serving one, else the highest and what its file declares.

    Args:
        app: the application.
        model_id: the model.
        version: only this one.

    Raises:
        RuntimeProblem: `unknown_model`, `unknown_version`, `invalid_model`, `unsafe_file`, `model_changed`,
            `repository_busy`, `repository_unreadable`, `unknown_label`.
    """
    target, number = app[ROUTER].resolve(model_id, version), app[ROUTER].find_version(model_id, version)
    if isinstance(target, Here):
        return target.version, ModelTensors(target.inputs, target.outputs)
    return await read_declared(app, model_id, number)


async def read_declared(app: web.Application, model_id: str, number: int | None) -> tuple[int, ModelTensors]:
    """Return a version, by default the highest, and what its file declares; raises as `find_tensors`."""
    versions = app[VERSIONS]
    look = partial(versions.read_tensors, model_id, number)
    return await versions.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)


async def _describe_tensors(app: web.Application, model_id: str) -> dict[str, Any]:
    with suppress(RuntimeProblem):  # the rest is known, and a load says why this is not
        version, tensors = await find_tensors(app, model_id)
        inputs, outputs = msgspec.to_builtins((tensors.inputs, tensors.outputs))
        return {"inputs": inputs, "outputs": outputs, "inputs_of_version": version}
    return {"inputs": None, "outputs": None, "inputs_of_version": None}


async def look_at_model(request: web.Request, model_id: str) -> ListedModel:
    """Look at a model in the repository; a loaded one has no versions if they are not there or hang.

    Raises:
        UnknownModel: `unknown_model`, there is no version, and the model is not loaded.
        RepositoryBusy: `repository_busy`, the folder hangs, and the model is not loaded.
        RepositoryUnreadable: `repository_unreadable`, likewise.
    """
    versions = request.app[VERSIONS]
    look = partial(_look_at, versions, request.app[LOG].state.models.get(model_id), model_id)
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
    return model is not None and _is_live(model)


def _is_live(model: Model) -> bool:
    """Whether there is something to show, and to unload, of a model that is not in the repository."""
    return bool(model.loads) or model.state not in (ModelState.UNLOADED, ModelState.FAILED)


def _look_at(versions: Versions, model: Model | None, model_id: str) -> ListedModel:
    try:
        present, refusal = versions.repository.find_versions(model_id)
    except RepositoryUnreadable as unreadable:
        present, refusal = [], unreadable
    serving = model.serving if model is not None else None
    changed = None if serving is None else versions.has_changed(model_id, serving.version, serving.files)
    return ListedModel(model_id, present, changed, refusal)


async def list_versions(
    versions: Versions,
    models: Mapping[str, Model],
    known: Collection[str],
    cursor: str = "",
    limit: int = sys.maxsize,
) -> list[ListedModel]:
    """List models with their versions: those of the repository that have any, and the known ones.

    Usually one look lists all. If it hangs, each model is looked at by itself; then the versions of a known
    model that hangs are missing, and another one that hangs is left out.

    Args:
        versions: has the repository.
        models: those of which newer files are looked for.
        known: models to list in any case.
        cursor: models after this one.
        limit: one more is listed, so that the end is known.

    Raises:
        RepositoryBusy: `repository_busy`, the repository's own folder hangs.
        RepositoryUnreadable: `repository_unreadable`, it cannot be read, and no model is known.
    """

    def look(model_id: str) -> ListedModel:
        return _look_at(versions, models.get(model_id), model_id)

    def list_folders() -> list[str]:
        try:
            return repository.folders()
        except RepositoryUnreadable:
            if not known:
                raise
            return []  # each of the known ones says so

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
    """Return models that have, or may have, a version, and known ones; none after them is looked at."""
    page: list[ListedModel] = []
    for model_id in ids:
        seen = look(model_id)
        if seen.versions or isinstance(seen.refusal, RepositoryUnreadable) or model_id in known:
            page.append(seen)
        if len(page) > limit:
            break
    return page


class PrintedSchema(AnswerSchema):
    """The last lines of one worker on its stderr."""

    worker_id = fields.String(allow_none=True)
    version = fields.Integer(allow_none=True)
    job_id = fields.String(allow_none=True, **about("The job of its load."))
    lines = fields.List(
        fields.String(),
        **about("Oldest first, at most 64 lines and 16 KiB; last, why the server killed the worker."),
    )


class ExitedSchema(PrintedSchema):
    """The last lines of a worker that ended unexpectedly, as the ledger has them."""

    exited_at = fields.String()
    position = fields.Integer(**about("Of its `WorkerExited`."))
    exit_code = fields.Integer(allow_none=True)
    signal = fields.Integer(allow_none=True)


class StderrSchema(AnswerSchema):
    """The last lines that a model's workers printed."""

    recorded = fields.Boolean(
        **about("False with `--ledger-stderr off`: the ledger keeps only why the server killed a worker.")
    )
    workers = fields.List(fields.Nested(PrintedSchema), **about("Those that run."))
    last_exited = fields.Nested(ExitedSchema, allow_none=True)


@routes.get(
    "/api/v1/models/{id}/stderr",
    access=Access.ADMIN,
    summary="Show the last lines that a model's workers printed",
    description="They may hold inputs of clients: ONNX Runtime quotes them in messages.",
    path=ModelPathSchema(),
    query=NothingSchema(),
    answers={200: (StderrSchema(), "Of the running workers, and of the last one that ended unexpectedly.")},
    errors=("unknown_model", "repository_busy", "repository_unreadable", "log_unavailable"),
)
async def show_stderr(request: web.Request) -> web.Response:
    model_id = path_parameters(request)["id"]
    running = [
        {
            "worker_id": worker.worker_id,
            "version": load.version,
            "job_id": load.job_id,
            "lines": worker.stderr_tail(),
        }
        for load in request.app[CONSUMER].loads.values()
        if load.model_id == model_id
        for worker in load.alive_workers
    ]
    exited = await _last_exited(request.app, model_id)
    if not running and exited is None:
        await look_at_model(request, model_id)
    answer = {"recorded": request.app[POOL].records_stderr, "workers": running, "last_exited": exited}
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _last_exited(app: web.Application, model_id: str) -> dict[str, Any] | None:
    wanted = EventFilter(types=(WorkerExited.TYPE,), models=(model_id,))
    page = await app[READER].event_page(EventQuery(wanted, newest_first=True, limit=1))
    for stored in page.items:
        event = msgspec.json.decode(stored.line)
        data = event["data"]
        return {
            **{name: event[name] for name in ("worker_id", "version", "job_id", "position")},
            "lines": data["stderr"],
            "exited_at": event["recorded_at"],
            "exit_code": data["exit_code"],
            "signal": data["signal"],
        }
    return None
