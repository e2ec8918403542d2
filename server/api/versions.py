"""Versions: add them to the repository, show and remove them.

A version of one file is the body of one request. Several files are sent one by one into an upload, which a
last request commits, with an optional source. A file may have any length: the disk gets it as it arrives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Any, NamedTuple

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from marshmallow import Schema, ValidationError, fields, validate, validates_schema
from msgspec import UNSET

from answers.approvals import ApprovalInfo
from answers.versions import AddedFileInfo, AddedVersionInfo, UploadInfo, VersionFileInfo, VersionInfo
from events.clock import format_timestamp
from events.commands import MAX_QUEUE
from events.errors import RequestRefused
from events.models import ModelState
from events.types import AddedFile, Contents, Provenance, VersionAdded, contents_of, digest_of
from events.versioncommands import find_end_of_use
from runtime.errors import UnknownModel, UnknownVersion
from runtime.repository import SizedFile
from runtime.uploads.receive import Digests, parse_digests
from runtime.uploads.recovery import UNUSED_LIMIT_S
from runtime.uploads.staging import UploadEntry
from runtime.uploads.uploads import UploadBody
from server.api.jobs import IS_KEY, hash_idempotency_key, run_job
from server.api.loads import look_in_repository
from server.api.schemas import ModelVersionPathSchema, about
from server.appkeys import LOG, READER, STOPPING, UPLOADS, VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.cluster import CLUSTER
from server.errors import ServerProblem
from server.http.answers import respond, show
from server.http.bodies import iterate_body
from server.http.validation import (
    InvalidParameter,
    NothingSchema,
    ParameterBoolean,
    UnsupportedMediaType,
    header_fields,
    is_json,
    path_parameters,
    query_parameters,
    read_json,
)
from server.routing import Routes

routes = Routes(tag="models")

MEDIA_TYPES = ("application/octet-stream", "application/x-onnx")
"""Media types of one file; a request without one, as `curl -T` sends it, is accepted as one, too."""
DIGESTS = ("Repr-Digest", "Content-Digest")
"""RFC 9530. Without a content coding or a range, both cover the same bytes."""
MAX_UPLOAD_ID_CHARACTERS = 320
"""A UUID, and the name of a server."""
_FILE_BODY: Mapping[str, Any] = {
    "required": True,
    "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES},
}
_NAME = r"[a-z][a-z0-9+.-]*://(?![^/]*@)[!\"$->@-~]+"
"""Printable ASCII, but for `?` and `#`, and no `@` before the first slash."""
_NO_NAME = (
    "Must be a name such as hf://org/repo@main, of ASCII characters, without user, password and query: the"
    " ledger keeps it, and would keep a secret in it."
)
_MAX_NAME = 2048
_FILE_ERRORS = ("digest_mismatch", "body_timeout", "body_too_large", "unsupported_media_type")
_MODEL_ERRORS = ("not_onnx", "unsafe_file", "invalid_model")
_CHANGE_ERRORS = (
    "repository_read_only",
    "repository_not_shared",
    "version_exists",
    "repository_busy",
    "repository_unreadable",
    "insufficient_storage",
    "log_unavailable",
    "shutting_down",
)
_OF_UPLOAD: Mapping[str, Any] = {"access": Access.ADMIN, "is_forwarded": True, "query": NothingSchema()}
_UPLOAD_ERRORS = ("unknown_upload", "node_unreachable", *_CHANGE_ERRORS)


class DigestHeadersSchema(Schema):
    """Header fields of a file."""

    repr_digest = fields.String(
        data_key="Repr-Digest",
        **about(
            "Digests of the body (RFC 9530): `sha-256` and `sha-512` are checked, others ignored.",
            example="sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
        ),
    )
    content_digest = fields.String(data_key="Content-Digest", **about("As `Repr-Digest`."))


class VersionHeadersSchema(DigestHeadersSchema):
    """Header fields of a version of one file."""

    if_none_match = fields.String(
        data_key="If-None-Match",
        validate=validate.Equal("*", error="Must be *."),
        **about("`*` answers 412 instead of 409 if the version exists. Neither overwrites it.", example="*"),
    )


class RemovalQuerySchema(Schema):
    """Query of a removal."""

    force = ParameterBoolean(
        load_default=False,
        **about("End loads of the version, as an unload with `force`, and remove it then."),
    )


class CommitBodySchema(Schema):
    """Where the files come from, as their sender says: the server has not looked."""

    source = fields.String(
        validate=[validate.Length(max=_MAX_NAME), validate.Regexp(rf"{_NAME}\Z", error=_NO_NAME)],
        **about("A name with a scheme, of ASCII characters.", example="hf://org/repo@main"),
    )
    resolved = fields.String(
        validate=[validate.Length(max=_MAX_NAME), validate.Regexp(rf"{_NAME}(#[!-~]*)?\Z", error=_NO_NAME)],
        **about("What it meant: it may have a fragment. Default: `source`.", example="hf://org/repo@0123456"),
    )

    @validates_schema
    def _has_source(self, given: Mapping[str, str], **_: Any) -> None:
        if "resolved" in given and "source" not in given:
            raise ValidationError("Must be given with resolved.", "source")


class UploadHeadersSchema(Schema):
    """Header fields of a new upload."""

    idempotency_key = fields.String(
        data_key="Idempotency-Key",
        validate=IS_KEY,
        **about(
            "Any string in double quotes. The same subject's upload of this version that began with the same "
            "key is answered with 200, with the files that it has.",
            example='"8e03978e-40d5-43dd-bc93-6894a57f9324"',
        ),
    )


class UploadPathSchema(ModelVersionPathSchema):
    """An upload of the version that the path names."""

    upload = fields.String(required=True, validate=validate.Length(1, MAX_UPLOAD_ID_CHARACTERS))


class UploadedFilePathSchema(UploadPathSchema):
    """A file of an upload."""

    path = fields.String(
        required=True, **about("Relative to the version's folder; it may have slashes.", example="model.onnx")
    )


def at_its_node(handler: Handler) -> Handler:
    """Return a handler about an upload that lets the server answer that the upload's id names."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        cluster, (_, _, name) = request.app[CLUSTER], path_parameters(request)["upload"].partition(".")
        there = cluster.find_other(request, name)
        if there is None:
            return await handler(request)
        if request.method == hdrs.METH_PUT:
            body: AsyncIterator[bytes] | None = _read_file(request).pieces
        else:
            body = _read_pieces(request) if request.can_read_body else None
        return await cluster.pass_on(request, there, path_parameters(request)["id"], body)

    return answer


@routes.put(
    "/api/v1/models/{id}/versions/{version}",
    access=Access.ADMIN,
    summary="Add a version of one file",
    description="Puts a version into the repository, and records `VersionAdded`. The body is one ONNX file, "
    "which becomes the version's `model.onnx`; versions of several files need an upload. The version is "
    "visible once all of it is on disk and its event is recorded; until then, and if the request ends early, "
    "there is nothing. A version is never overwritten. The server fetches nothing: what has a name "
    "elsewhere, `loadledger add MODEL SOURCE` downloads where it runs, and sends it in an upload.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    headers=VersionHeadersSchema(),
    request_body=_FILE_BODY,
    answers={201: (AddedVersionInfo, "Added; the model is at `Location`.")},
    errors=("precondition_failed", *_FILE_ERRORS, *_MODEL_ERRORS, *_CHANGE_ERRORS),
)
async def add_version(request: web.Request) -> web.Response:
    if is_json(request.headers.get(hdrs.CONTENT_TYPE, "")):
        raise UnsupportedMediaType(
            "the server fetches no version by its name: `loadledger add MODEL SOURCE` downloads it where it"
            " runs, and sends the files"
        )
    given, body = path_parameters(request), _read_file(request)
    files = await request.app[UPLOADS].add(
        *(given["id"], given["version"], request[PRINCIPAL].subject, body),
        only_new="if_none_match" in header_fields(request),
    )
    return _answer_with_version(given, files)


@routes.get(
    "/api/v1/models/{id}/versions/{version}",
    access=Access.ANY,
    summary="Show a version",
    description="Its files, and who added it. Nothing is hashed for it.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    answers={200: (VersionInfo, "The version.")},
    errors=(
        *("unknown_model", "unknown_version", "unsafe_file", "model_changed"),
        *("repository_busy", "repository_unreadable", "log_unavailable"),
    ),
)
async def show_version(request: web.Request) -> web.Response:
    app, path = request.app, path_parameters(request)
    model_id, version = path["id"], path["version"]
    seen = await _look_at(app, model_id, version)
    return respond(await _describe_version(app, model_id, version, seen))


class _SeenVersion(NamedTuple):
    """The files of a version, their contents if these are known, and whether the repository has them."""

    files: Sequence[SizedFile]
    contents: Contents | None
    in_repository: bool


async def _look_at(app: web.Application, model_id: str, version: int) -> _SeenVersion:
    """Look at a version in the repository; what is loaded or chosen is known without.

    Raises:
        RuntimeProblem: as `look_in_repository`.
    """
    try:
        look = partial(app[VERSIONS].look_at, model_id, version)
        return _SeenVersion(*await look_in_repository(app, model_id, version, look), in_repository=True)
    except (UnknownModel, UnknownVersion):
        model = app[LOG].state.models.get(model_id)
        candidates = () if model is None else (model.serving, model.chosen or None)
        kept = next((each for each in candidates if each is not None and each.version == version), None)
        if kept is None:
            raise
        return _SeenVersion(kept.files, contents_of(kept.files), in_repository=False)


async def _describe_version(
    app: web.Application, model_id: str, version: int, seen: _SeenVersion
) -> VersionInfo:
    """Return a version with what the ledger has of it."""
    state = app[LOG].state
    model, versions = state.models.get(model_id), state.registers.find_versions(model_id)
    sha256s = dict(seen.contents or ())
    digest = None if seen.contents is None else digest_of(seen.contents)
    added = next(
        (
            event
            for event in await app[READER].latest_changes(model_id)
            if event.version == version and isinstance(event.data, VersionAdded)
        ),
        None,
    )
    source = added.data.source if added is not None and isinstance(added.data, VersionAdded) else UNSET
    return VersionInfo(
        model_id=model_id,
        version=version,
        digest=digest,
        files=[
            VersionFileInfo(path=each.path, bytes=each.bytes, sha256=sha256s.get(each.path))
            for each in seen.files
        ],
        in_repository=seen.in_repository,
        loaded=model is not None
        and model.phase is ModelState.LOADED
        and version in {each.version for each in model.servings},
        labels=sorted(versions.list_names_of(version)),
        approvals=show([each for each in versions.approvals if each.digest == digest], list[ApprovalInfo]),
        added_by=added.actor if added else None,
        added_at=added.recorded_at if added else None,
        position=added.position if added else None,
        source=source.uri if source else None,
        resolved=source.resolved if source else None,
    )


@routes.delete(
    "/api/v1/models/{id}/versions/{version}",
    access=Access.ADMIN,
    summary="Remove a version",
    description="Records `VersionRemoved`, then deletes the version's files from the repository. A version "
    "that is loaded, or will be, is refused, unless `force` ends that; one that a label names is refused.",
    path=ModelVersionPathSchema(),
    query=RemovalQuerySchema(),
    answers={204: {"description": "Removed."}},
    errors=("unknown_version", "version_in_use", *_CHANGE_ERRORS),
)
async def remove_version(request: web.Request) -> web.Response:
    given, app = path_parameters(request), request.app
    version = given["id"], given["version"], request[PRINCIPAL].subject
    end_uses = partial(_end_uses, app, *version) if query_parameters(request)["force"] else None
    await app[UPLOADS].remove(*version, end_uses)
    return web.Response(status=204)


async def _end_uses(app: web.Application, model_id: str, version: int, subject: str) -> None:
    """End the loads of a version: the serving one, and unended ones, one after the other."""
    for _ in range(MAX_QUEUE):  # afterwards others load it all the time, and the removal is refused
        command = find_end_of_use(app[LOG].state, model_id, version, subject)
        if command is None:
            return
        with suppress(RequestRefused):  # the job has just ended
            await run_job(app, command)


@routes.post(
    "/api/v1/models/{id}/versions/{version}/uploads",
    access=Access.ADMIN,
    summary="Begin an upload of a version",
    description="An upload takes the files of a version one by one, until it is committed. Only its creator "
    "may use it. It ends 24 hours after its last file, or with the node that has it; a restart of a server "
    "alone leaves it. The files of all uploads of a subject may have as many bytes as a version.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    headers=UploadHeadersSchema(),
    body=NothingSchema(),
    answers={
        201: (UploadInfo, "It is at `Location`."),
        200: (UploadInfo, "It began before, with the same `Idempotency-Key`."),
    },
    errors=_CHANGE_ERRORS,
)
async def begin_upload(request: web.Request) -> web.Response:
    given, key = path_parameters(request), hash_idempotency_key(request)
    upload, is_new = await request.app[UPLOADS].begin_upload(
        given["id"], given["version"], request[PRINCIPAL].subject, None if key is None else key.key_hash
    )
    location = f"/api/v1/models/{upload.model_id}/versions/{upload.version}/uploads/{upload.id}"
    return respond(_show_upload(upload), status=201 if is_new else 200, headers={hdrs.LOCATION: location})


@routes.get(
    "/api/v1/models/{id}/versions/{version}/uploads/{upload}",
    **_OF_UPLOAD,
    summary="Show an upload",
    description="Its files that are complete: they need not be sent again.",
    path=UploadPathSchema(),
    answers={200: (UploadInfo, "The upload.")},
    errors=_UPLOAD_ERRORS,
)
@at_its_node
async def get_upload(request: web.Request) -> web.Response:
    return respond(_show_upload(await _find_upload(request)))


@routes.delete(
    "/api/v1/models/{id}/versions/{version}/uploads/{upload}",
    **_OF_UPLOAD,
    summary="Discard an upload",
    description="Its files are deleted.",
    path=UploadPathSchema(),
    answers={204: {"description": "Discarded."}},
    errors=_UPLOAD_ERRORS,
)
@at_its_node
async def discard_upload(request: web.Request) -> web.Response:
    await request.app[UPLOADS].discard_upload(await _find_upload(request))
    return web.Response(status=204)


@routes.put(
    "/api/v1/models/{id}/versions/{version}/uploads/{upload}/files/{path}",
    **_OF_UPLOAD,
    summary="Add a file to an upload",
    description="The body is the file. One with the same path is replaced. A path that is absolute, leads "
    "upwards, or is no printable UTF-8 is refused.",
    path=UploadedFilePathSchema(),
    headers=DigestHeadersSchema(),
    request_body=_FILE_BODY,
    answers={201: (AddedFileInfo, "Added."), 200: (AddedFileInfo, "Added in place of another one.")},
    errors=(*_FILE_ERRORS, *_UPLOAD_ERRORS),
)
@at_its_node
async def add_uploaded_file(request: web.Request) -> web.Response:
    path, body = path_parameters(request)["path"], _read_file(request)
    file, is_new = await request.app[UPLOADS].add_file(await _find_upload(request), path, body)
    return respond(show(file, AddedFileInfo), status=201 if is_new else 200)


@routes.post(
    "/api/v1/models/{id}/versions/{version}/uploads/{upload}/commit",
    **_OF_UPLOAD,
    summary="Add the version of an upload",
    description="Records `VersionAdded`, and makes the version visible, as a `PUT` of the version does. If "
    "it is refused, the upload stays. The event has what the body says of where the files come from, beside "
    "the digests that the server computed.",
    path=UploadPathSchema(),
    request_body={"required": False, "content": {"application/json": {"schema": CommitBodySchema()}}},
    answers={201: (AddedVersionInfo, "Added; the model is at `Location`.")},
    errors=("invalid_body", "unsupported_media_type", "body_timeout", *_MODEL_ERRORS, *_UPLOAD_ERRORS),
)
@at_its_node
async def commit_upload(request: web.Request) -> web.Response:
    said = await read_json(request, CommitBodySchema())
    source = Provenance(said["source"], said.get("resolved", said["source"])) if said else UNSET
    files = await request.app[UPLOADS].commit(await _find_upload(request), source)
    return _answer_with_version(path_parameters(request), files)


async def _find_upload(request: web.Request) -> UploadEntry:
    given, subject = path_parameters(request), request[PRINCIPAL].subject
    return await request.app[UPLOADS].find_upload(given["upload"], given["id"], given["version"], subject)


def _answer_with_version(given: Any, files: Iterable[AddedFile]) -> web.Response:
    shown = AddedVersionInfo(**_members_of(given["id"], given["version"], files))
    return respond(shown, status=201, headers={hdrs.LOCATION: f"/api/v1/models/{given['id']}"})


def _members_of(model_id: str, version: int, files: Iterable[AddedFile]) -> dict[str, Any]:
    shown = show(list(files), list[AddedFileInfo])
    total = sum(file.bytes for file in shown)
    return {"model_id": model_id, "version": version, "bytes": total, "files": shown}


def _show_upload(upload: UploadEntry) -> UploadInfo:
    ends = datetime.fromtimestamp(upload.used_at + UNUSED_LIMIT_S, UTC)
    members = _members_of(upload.model_id, upload.version, upload.files.values())
    return UploadInfo(id=upload.id, expires_at=format_timestamp(ends), **members)


def _read_file(request: web.Request) -> UploadBody:
    """Return the body of a request, which is one file.

    Raises:
        UnsupportedMediaType: `unsupported_media_type`.
        InvalidParameter: `invalid_parameter`.
    """
    if hdrs.CONTENT_RANGE in request.headers:  # RFC 9110, section 14.5
        raise InvalidParameter("headers: Content-Range: a file is sent as a whole")
    media_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip(" \t").lower()
    if media_type not in ("", *MEDIA_TYPES):
        raise UnsupportedMediaType(
            f"the body must be one file, as {' or '.join(MEDIA_TYPES)}: the files of a version of several are"
            " sent one by one into an upload"
        )
    return UploadBody(_read_pieces(request), request.content_length, _read_digests(request))


def _read_pieces(request: web.Request) -> AsyncIterator[bytes]:
    """Return a body that must not be compressed, as it arrives.

    Raises:
        UnsupportedMediaType: `unsupported_media_type`.
    """
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed: leave Content-Encoding out")
    return _read_until_stop(request)


def _read_digests(request: web.Request) -> Digests:
    named = header_fields(request)
    try:
        return parse_digests([named[name] for name in ("repr_digest", "content_digest") if name in named])
    except ValueError as error:
        raise InvalidParameter(f"headers: {' or '.join(DIGESTS)}: {error}") from None


async def _read_until_stop(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives, unless the server stops.

    Raises:
        BodyTimeout: `body_timeout`.
        ServerProblem: `shutting_down`.
    """
    stopping = request.app[STOPPING]
    async for piece in iterate_body(request.content):
        if stopping.is_set():
            raise ServerProblem(
                "the server stops; nothing of this body is kept: send it again then", code="shutting_down"
            )
        yield piece
