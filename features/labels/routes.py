"""Labels: routes that set and remove names for versions of a model. A load can set one, too (`loads`)."""

from __future__ import annotations

from functools import partial

from aiohttp import web
from marshmallow import Schema, fields, validate

from features.labels.commands import RemoveLabel, SetLabel
from runtime.repository import MAX_VERSION
from server.api.jobs import JOB_REQUESTS
from server.api.loads import look_in_repository
from server.api.schemas import IS_LABEL, ModelPathSchema, about
from server.appkeys import VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.http.validation import NothingSchema, StrictInteger, json_body, path_parameters
from server.routing import Routes

routes = Routes(tag="models")

_LABEL = "/api/v1/models/{id}/labels/{label}"


class ModelLabelPathSchema(ModelPathSchema):
    """The model and the label named by the path."""

    label = fields.String(
        required=True, validate=IS_LABEL, **about("A name for a version.", example="champion")
    )


class LabelBodySchema(Schema):
    """The version that a label names from now on."""

    version = StrictInteger(required=True, validate=validate.Range(1, MAX_VERSION))


@routes.put(
    _LABEL,
    access=Access.ADMIN,
    summary="Let a label name a version",
    description="Records `LabelSet`, unless the label names the version already. The version is in the "
    "repository; it need not be loaded.",
    path=ModelLabelPathSchema(),
    query=NothingSchema(),
    body=LabelBodySchema(),
    answers={204: {"description": "The label names the version."}},
    errors=(
        *("unknown_model", "unknown_version", "too_many_labels", "repository_busy", "repository_unreadable"),
        *("log_unavailable", "shutting_down"),
    ),
)
async def set_label(request: web.Request) -> web.Response:
    app, path, version = request.app, path_parameters(request), json_body(request)["version"]
    look = partial(app[VERSIONS].repository.find_version, path["id"], version)
    await look_in_repository(app, path["id"], version, look)
    command = SetLabel(path["id"], path["label"], version, request[PRINCIPAL].subject)
    await app[JOB_REQUESTS].submit(command)
    return web.Response(status=204)


@routes.delete(
    _LABEL,
    access=Access.ADMIN,
    summary="Remove a label",
    description="Records `LabelRemoved`. The version stays, and so does what is loaded.",
    path=ModelLabelPathSchema(),
    query=NothingSchema(),
    answers={204: {"description": "Removed."}},
    errors=("unknown_label", "log_unavailable", "shutting_down"),
)
async def remove_label(request: web.Request) -> web.Response:
    path = path_parameters(request)
    command = RemoveLabel(path["id"], path["label"], request[PRINCIPAL].subject)
    await request.app[JOB_REQUESTS].submit(command)
    return web.Response(status=204)
