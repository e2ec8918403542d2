"""Approval of loads: answers of persons, and what a version would pass, which they may look at before.

Any server of a ledger takes an answer. The writer decides whether it counts (`events.approvals`), and the
load goes on by itself where its files were checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate

from events.approvals import AnswerApproval
from runtime.consumer.checks import ApprovalNeed
from runtime.repository import MAX_VERSION
from server.api.jobs import JOB_REQUESTS, JobPathSchema, JobSchema, find_job, present_job
from server.api.schemas import (
    IS_REASON,
    AnswerSchema,
    FailureSchema,
    LoadSignatureSchema,
    ModelPathSchema,
    about,
    one_of,
    signature_view,
)
from server.appkeys import CONSUMER
from server.auth.gate import PRINCIPAL, credential_of
from server.cluster import signer_of
from server.http.validation import (
    NothingSchema,
    ParameterInteger,
    json_body,
    path_parameters,
    query_parameters,
)
from server.routing import Access, Routes

routes = Routes(tag="jobs")


class FileHashSchema(AnswerSchema):
    """A file of a version."""

    path = fields.String()
    sha256 = fields.String()


class AnswerBodySchema(Schema):
    """An answer to a load that waits for approval."""

    digest = fields.String(
        required=True,
        validate=validate.Regexp(r"[0-9a-f]{64}\Z", error="Must be 64 digits, 0 to 9 and a to f."),
        **about("`digest` of the job's `approval`: of the files that you have looked at."),
    )
    reason = fields.String(required=True, validate=IS_REASON, **about("Why; the ledger records it."))


class VerifyQuerySchema(Schema):
    """Which version to verify."""

    version = ParameterInteger(
        load_default=None, validate=validate.Range(1, MAX_VERSION), **about("Default: the highest.")
    )


class VersionVerificationSchema(AnswerSchema):
    """The checks that a load of a version would pass now."""

    model_id = fields.String()
    version = fields.Integer()
    digest = fields.String(**about("Of all files: SHA-256 over a line `<sha256> <path>` for each, by path."))
    files = fields.List(fields.Nested(FileHashSchema))
    signature = fields.Nested(
        LoadSignatureSchema,
        allow_none=True,
        **about("Null without rules for signatures, and if a load would be refused."),
    )
    problem = fields.Nested(
        FailureSchema, allow_none=True, **about("Why a load would be refused; null if it would not.")
    )
    approval = fields.String(
        validate=one_of(ApprovalNeed), **about("Whether a load would wait for approval.")
    )


_AS_ANSWER: Mapping[str, Any] = {
    "access": Access.APPROVE,
    "path": JobPathSchema(),
    "query": NothingSchema(),
    "body": AnswerBodySchema(),
    "answers": {200: (JobSchema(), "The job; also if you have approved it before.")},
    "errors": (
        *("unknown_job", "not_waiting", "digest_differs", "same_person", "log_unavailable", "shutting_down"),
    ),
}


@routes.post(
    "/api/v1/jobs/{job_id}/approve",
    **_AS_ANSWER,
    summary="Approve a load that waits for approval",
    description="Who asked for the load cannot. With the last approval that is needed the load goes on.",
)
async def approve_load(request: web.Request) -> web.Response:
    return await _answer(request, approves=True)


@routes.post(
    "/api/v1/jobs/{job_id}/reject",
    **_AS_ANSWER,
    summary="Reject a load that waits for approval",
    description="The load fails with `rejected`. Who asked for it can cancel it instead.",
)
async def reject_load(request: web.Request) -> web.Response:
    return await _answer(request, approves=False)


CHECK_ERRORS = (
    *("invalid_model", "unsafe_file", "model_changed"),
    *("repository_busy", "repository_unreadable", "disk_full", "store_full", "store_unavailable"),
)
"""Codes of `Consumer.check_version` for a version that is there."""


@routes.get(
    "/api/v1/models/{id}/verify",
    access=Access.VERIFY,
    tag="models",
    summary="Hash a version and check its signature",
    description="As a load would do it now, here. Nothing is loaded, and nothing is recorded.",
    path=ModelPathSchema(),
    query=VerifyQuerySchema(),
    answers={200: (VersionVerificationSchema(), "The version's files, and what they pass.")},
    errors=("unknown_model", "unknown_version", *CHECK_ERRORS),
)
async def verify_version(request: web.Request) -> web.Response:
    model_id, version = path_parameters(request)["id"], query_parameters(request)["version"]
    checked = await request.app[CONSUMER].check_version(model_id, version)
    shown = {**msgspec.to_builtins(checked), "signature": signature_view(checked.signature)}
    return web.json_response({"model_id": model_id, **shown})


async def _answer(request: web.Request, *, approves: bool) -> web.Response:
    app, person, said = request.app, request[PRINCIPAL], json_body(request)
    job = await find_job(app, path_parameters(request)["job_id"])
    told = job.id, person.subject, said["digest"], said["reason"], credential_of(person)
    await app[JOB_REQUESTS].submit(AnswerApproval(*told, approves=approves, sign=signer_of(app)))
    return web.json_response(present_job(app, await find_job(app, job.id)))
