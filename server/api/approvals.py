"""Approval of versions: give and withdraw it, and look before at what a version would pass.

Any server of a ledger takes an approval that has hashed the files, or whose ledger has who added them. The
writer decides whether it counts (`events.approvals`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web
from marshmallow import Schema, fields, validate

from events.approvals import ApproveVersion, WithdrawApproval, list_unapproved, list_valid_approvals
from events.models import Model
from events.policy.rules import ModelRules
from events.types import SYSTEM, ApprovalResult, Contents, VersionAdded, contents_of, digest_of
from events.versions import Approval, ModelVersions
from runtime.errors import LoadRefused, RepositoryUnreadable, UnknownModel, UnknownVersion
from runtime.repository import MAX_VERSION, REQUEST_LIMIT_S
from server.api.jobs import JOB_REQUESTS
from server.api.schemas import (
    IS_DIGEST,
    IS_REASON,
    AnswerSchema,
    FailureSchema,
    LoadSignatureSchema,
    ModelPathSchema,
    about,
    one_of,
    signature_view,
)
from server.appkeys import CONFIG, CONSUMER, LOG, READER, VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL, credential_of
from server.cluster import signer_of
from server.errors import ServerProblem
from server.http.validation import (
    NothingSchema,
    ParameterInteger,
    json_body,
    path_parameters,
    query_parameters,
)
from server.routing import Routes

routes = Routes(tag="models")

_APPROVAL = "/api/v1/models/{id}/versions/{version}/approval"


class ApprovalPathSchema(ModelPathSchema):
    """The model and the version named by the path."""

    version = ParameterInteger(required=True, validate=validate.Range(1, MAX_VERSION))


class FileHashSchema(AnswerSchema):
    """A file of a version."""

    path = fields.String()
    sha256 = fields.String()


class ApprovalBodySchema(Schema):
    """An approval of bytes."""

    digest = fields.String(
        required=True,
        validate=IS_DIGEST,
        **about("Of the files that you have looked at, as `GET .../verify` shows it."),
    )
    reason = fields.String(required=True, validate=IS_REASON, **about("Why; the ledger records it."))


class WithdrawalQuerySchema(Schema):
    """Why an approval is withdrawn."""

    reason = fields.String(required=True, validate=IS_REASON, **about("Why; the ledger records it."))


class ApprovalSchema(AnswerSchema):
    """One person's approval of the bytes with a digest."""

    digest = fields.String()
    version = fields.Integer(**about("How they were named."))
    by = fields.String()
    reason = fields.String()
    at = fields.String()
    position = fields.Integer(**about("Of its `VersionApproved`, which has the SHA-256 of each file."))


class UnapprovedSchema(AnswerSchema):
    """A version that waits for a person to approve it."""

    version = fields.Integer()
    digest = fields.String(allow_none=True, **about("Of the files that were added as it; null if none were."))
    is_refused = fields.Boolean(
        **about("Whether the last load was of it, and was refused with `not_approved`.")
    )
    added_by = fields.String(allow_none=True, **about("Null if the ledger has nobody."))
    position = fields.Integer(allow_none=True, **about("Of its `VersionAdded`."))


class LoadApprovalSchema(AnswerSchema):
    """Why a load could go on whose model's rules ask for approval."""

    rule = fields.String(**about("Digest of the model's rules of approval then."))
    result = fields.String(validate=one_of(ApprovalResult))
    by = fields.List(fields.String(), **about("Who approved its bytes, or loaded them without."))
    positions = fields.List(
        fields.Integer(), **about("Of the `VersionApproved` that it rests on; empty without any.")
    )


class VersionApprovalsSchema(AnswerSchema):
    """The approvals of a version's bytes."""

    model_id = fields.String()
    version = fields.Integer()
    approvals = fields.List(
        fields.Nested(ApprovalSchema), **about("Those of its bytes that stand, the oldest first.")
    )
    missing = fields.Integer(
        **about("How many other persons the rules for the model still ask for, beside who asks for the load.")
    )


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
        FailureSchema,
        allow_none=True,
        **about("Why a load would be refused, whoever asks for it; null if it would not."),
    )
    added_by = fields.List(
        fields.String(), allow_none=True, **about("All who added these files; null if the ledger has nobody.")
    )


def approvals_members(versions: ModelVersions) -> dict[str, Any]:
    """Return the member of a model with its approvals; without any there is none."""
    return {"approvals": [_approval_view(each) for each in versions.approvals]} if versions.approvals else {}


def unapproved_members(
    model: Model | None, versions: ModelVersions, rules: ModelRules | None
) -> dict[str, Any]:
    """Return the member of a model with the versions that wait for approval; without any there is none."""
    found = list_unapproved(model, versions, rules)
    return {"unapproved": msgspec.to_builtins(found)} if found else {}


def _approval_view(approval: Approval) -> dict[str, Any]:
    return {name: getattr(approval, name) for name in ("digest", "version", "by", "reason", "at", "position")}


@routes.put(
    _APPROVAL,
    access=Access.APPROVE,
    summary="Approve the bytes of a version",
    description="For all loads of the model, under any rules, until it is withdrawn. Nothing is hashed: the "
    "server has to have hashed the files (`GET .../verify` does), or the ledger has them as they were added. "
    "Who added these bytes cannot approve them.",
    path=ApprovalPathSchema(),
    query=NothingSchema(),
    body=ApprovalBodySchema(),
    answers={200: (VersionApprovalsSchema(), "The approvals; also if you have approved it before.")},
    errors=(
        *("unknown_model", "unknown_version", "digest_differs", "same_person", "repository_busy"),
        *("repository_unreadable", "log_unavailable", "shutting_down"),
    ),
)
async def approve_version(request: web.Request) -> web.Response:
    app, person, said = request.app, request[PRINCIPAL], json_body(request)
    model_id, version = (path_parameters(request)[name] for name in ("id", "version"))
    contents = await _find_contents(app, model_id, version, said["digest"])
    about_person = person.subject, said["reason"], credential_of(person), signer_of(app)
    command = ApproveVersion(model_id, version, said["digest"], contents, *about_person)
    await app[JOB_REQUESTS].submit(command)
    return _respond(app, model_id, version, said["digest"])


@routes.delete(
    _APPROVAL,
    access=Access.APPROVE,
    summary="Withdraw the approval of a version",
    description="Of all persons, for the bytes that were approved as this version. What is loaded serves on, "
    "and comes back after a restart; the next load by a person or an inference is refused.",
    path=ApprovalPathSchema(),
    query=WithdrawalQuerySchema(),
    answers={200: (VersionApprovalsSchema(), "What is left: no approval.")},
    errors=("unknown_approval", "log_unavailable", "shutting_down"),
)
async def withdraw_approval(request: web.Request) -> web.Response:
    app, person, reason = request.app, request[PRINCIPAL], query_parameters(request)["reason"]
    model_id, version = (path_parameters(request)[name] for name in ("id", "version"))
    command = WithdrawApproval(model_id, version, person.subject, reason, credential_of(person))
    await app[JOB_REQUESTS].submit(command)
    return _respond(app, model_id, version)


def _respond(app: web.Application, model_id: str, version: int, digest: str | None = None) -> web.Response:
    """Return the approvals of bytes; None has none."""
    versions = app[LOG].state.registers.find_versions(model_id)
    persons = app[CONFIG].policy.count_persons(model_id)
    given = [_approval_view(each) for each in versions.approvals if each.digest == digest]
    missing = max(0, persons - len(list_valid_approvals(versions, digest or "", SYSTEM)))
    return web.json_response(
        {"model_id": model_id, "version": version, "approvals": given, "missing": missing}
    )


async def _find_contents(app: web.Application, model_id: str, version: int, digest: str) -> Contents:
    """Return the hashes of a version's files, as the server or the ledger has them.

    Raises:
        RuntimeProblem: `unknown_model`, `unknown_version`, `repository_busy`, `repository_unreadable`.
        ServerProblem: `digest_differs`, they have another digest, or neither has them.
    """
    versions = app[VERSIONS]

    def look() -> Contents | None:
        versions.repository.find_version(model_id, version)
        with suppress(LoadRefused, RepositoryUnreadable):  # a load then says what is wrong
            return versions.known_contents(model_id, version)
        return None

    found, unknown = None, None
    try:
        found = await versions.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
    except (UnknownModel, UnknownVersion) as problem:
        unknown = problem  # another node may have it
    for event in await app[READER].latest_changes(model_id) if found is None else ():
        if event.version == version and isinstance(event.data, VersionAdded):
            found = contents_of(event.data.files)
    if found is None and unknown is not None:
        raise unknown
    name = f"version {version} of {model_id!r}"
    advice = f"GET /api/v1/models/{model_id}/verify?version={version}"
    if found is None:
        what = f"this server has not hashed {name}, and the ledger does not have who added it"
        raise ServerProblem(f"{what}: {advice} hashes it", code="digest_differs")
    if digest_of(found) != digest:
        what = f"{name} has the digest {digest_of(found)}, not {digest}"
        raise ServerProblem(f"{what}: {advice} shows its files", code="digest_differs")
    return found


CHECK_ERRORS = (
    *("invalid_model", "unsafe_file", "model_changed"),
    *("repository_busy", "repository_unreadable", "disk_full", "store_full", "store_unavailable"),
)
"""Codes of `Consumer.check_version` for a version that is there."""


@routes.get(
    "/api/v1/models/{id}/verify",
    access=Access.VERIFY,
    summary="Hash a version and check what a load of it would pass",
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
