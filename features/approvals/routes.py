"""Approval of versions: give and withdraw it.

Any server of a ledger accepts an approval if it has hashed the files, or the ledger knows who added them. The
writer decides whether the approval is valid (`features.approvals.commands`).
"""

from __future__ import annotations

from contextlib import suppress

from aiohttp import web
from marshmallow import Schema, fields

from answers.approvals import ApprovalInfo, VersionApprovals
from events.types import SYSTEM, Contents, VersionAdded, contents_of, digest_of
from features.approvals.commands import ApproveVersion, WithdrawApproval, list_valid_approvals
from runtime.errors import LoadRefused, RepositoryUnreadable, UnknownModel, UnknownVersion
from runtime.repository import REQUEST_LIMIT_S
from server.api.jobs import JOB_REQUESTS
from server.api.schemas import IS_DIGEST, IS_REASON, ModelVersionPathSchema, about
from server.appkeys import CONFIG, LOG, READER, VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL, credential_of
from server.cluster import CLUSTER
from server.errors import ServerProblem
from server.http.answers import respond, show
from server.http.validation import NothingSchema, json_body, path_parameters, query_parameters
from server.routing import Routes

routes = Routes(tag="models")

_APPROVAL = "/api/v1/models/{id}/versions/{version}/approval"


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


@routes.put(
    _APPROVAL,
    access=Access.APPROVE,
    summary="Approve the bytes of a version",
    description="For all loads of the model, under any rules, until it is withdrawn. Nothing is hashed: the "
    "server has to have hashed the files (`GET .../verify` does), or the ledger has them as they were added. "
    "Who added these bytes cannot approve them.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    body=ApprovalBodySchema(),
    answers={200: (VersionApprovals, "The approvals; also if you have approved it before.")},
    errors=(
        *("unknown_model", "unknown_version", "digest_differs", "same_person", "repository_busy"),
        *("repository_unreadable", "log_unavailable", "shutting_down"),
    ),
)
async def approve_version(request: web.Request) -> web.Response:
    app, person, said = request.app, request[PRINCIPAL], json_body(request)
    model_id, version = (path_parameters(request)[name] for name in ("id", "version"))
    contents = await _find_contents(app, model_id, version, said["digest"])
    about_person = person.subject, said["reason"], credential_of(person), app[CLUSTER].sign
    command = ApproveVersion(model_id, version, said["digest"], contents, *about_person)
    await app[JOB_REQUESTS].submit(command)
    return _respond(app, model_id, version, said["digest"])


@routes.delete(
    _APPROVAL,
    access=Access.APPROVE,
    summary="Withdraw the approval of a version",
    description="Of all persons, for the bytes that were approved as this version. What is loaded serves on, "
    "and comes back after a restart; the next load by a person or an inference is refused.",
    path=ModelVersionPathSchema(),
    query=WithdrawalQuerySchema(),
    answers={200: (VersionApprovals, "What is left: no approval.")},
    errors=("unknown_approval", "log_unavailable", "shutting_down"),
)
async def withdraw_approval(request: web.Request) -> web.Response:
    app, person, reason = request.app, request[PRINCIPAL], query_parameters(request)["reason"]
    model_id, version = (path_parameters(request)[name] for name in ("id", "version"))
    command = WithdrawApproval(model_id, version, person.subject, reason, credential_of(person))
    await app[JOB_REQUESTS].submit(command)
    return _respond(app, model_id, version)


def _respond(app: web.Application, model_id: str, version: int, digest: str | None = None) -> web.Response:
    """Return the approvals of bytes; `digest` is None for bytes without approvals."""
    versions = app[LOG].state.registers.find_versions(model_id)
    persons = app[CONFIG].policy.count_persons(model_id)
    given = [each for each in versions.approvals if each.digest == digest]
    missing = max(0, persons - len(list_valid_approvals(versions, digest or "", SYSTEM)))
    approvals = show(given, list[ApprovalInfo])
    return respond(VersionApprovals(model_id=model_id, version=version, approvals=approvals, missing=missing))


async def _find_contents(app: web.Application, model_id: str, version: int, digest: str) -> Contents:
    """Return the hashes of a version's files, known to the server or the ledger.

    Raises:
        RuntimeProblem: `unknown_model`, `unknown_version`, `repository_busy`, `repository_unreadable`.
        ServerProblem: `digest_differs`, the files have another digest, or are unknown.
    """
    versions = app[VERSIONS]

    def look() -> Contents | None:
        versions.repository.find_version(model_id, version)
        with suppress(LoadRefused, RepositoryUnreadable):  # a load then reports the problem
            return versions.known_contents(model_id, version)
        return None

    found, unknown = None, None
    try:
        found = await versions.repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
    except (UnknownModel, UnknownVersion) as problem:
        unknown = problem  # another server may have it
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
