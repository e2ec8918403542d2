"""Check of a version: what a load of it would pass, its signature first."""

from __future__ import annotations

from aiohttp import web
from marshmallow import Schema, validate

from answers.errors import ErrorInfo
from answers.signatures import FileDigest, LoadSignatureInfo, VerifiedVersionInfo
from runtime.repository import MAX_VERSION
from server.api.schemas import ModelPathSchema, about
from server.appkeys import CONSUMER
from server.auth.access import Access
from server.http.answers import respond, show, show_optional
from server.http.validation import ParameterInteger, path_parameters, query_parameters
from server.routing import Routes

routes = Routes(tag="models")


class VerifyQuerySchema(Schema):
    """Which version to verify."""

    version = ParameterInteger(
        load_default=None, validate=validate.Range(1, MAX_VERSION), **about("Default: the highest.")
    )


CHECK_ERRORS = (
    *("invalid_model", "unsafe_file", "model_changed"),
    *("repository_busy", "repository_unreadable", "disk_full", "store_full", "store_unavailable"),
)
"""Codes of `Consumer.check_version` for an existing version."""


@routes.get(
    "/api/v1/models/{id}/verify",
    access=Access.VERIFY,
    summary="Hash a version and check what a load of it would pass",
    description="As a load would do it now, here. Nothing is loaded, and nothing is recorded.",
    path=ModelPathSchema(),
    query=VerifyQuerySchema(),
    answers={200: (VerifiedVersionInfo, "The version's files, and what they pass.")},
    errors=("unknown_model", "unknown_version", *CHECK_ERRORS),
)
async def verify_version(request: web.Request) -> web.Response:
    model_id, version = path_parameters(request)["id"], query_parameters(request)["version"]
    checked = await request.app[CONSUMER].check_version(model_id, version)
    return respond(
        VerifiedVersionInfo(
            model_id=model_id,
            version=checked.version,
            digest=checked.digest,
            files=show(checked.files, list[FileDigest]),
            signature=show_optional(checked.evidence.signature or None, LoadSignatureInfo),
            problem=show_optional(checked.problem, ErrorInfo),
            added_by=None if checked.added_by is None else list(checked.added_by),
        )
    )
