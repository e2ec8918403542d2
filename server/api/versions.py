"""Versions: add them to the repository, and remove them.

The body of an addition is a file or an archive of any length: it goes to the disk as it arrives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import hdrs, web
from marshmallow import Schema, fields, validate

from runtime.uploads.receiving import ExpectedDigests, UploadForm, parse_digests
from runtime.uploads.uploads import UploadOrder
from server.api.jobs import ShuttingDown
from server.api.schemas import ModelVersionPathSchema, about
from server.appkeys import STOPPING, UPLOADS
from server.auth.gate import PRINCIPAL
from server.http.bodies import iterate_body
from server.http.validation import (
    InvalidParameter,
    NothingSchema,
    UnsupportedMediaType,
    header_fields,
    path_parameters,
)
from server.routing import Access, Routes

routes = Routes(tag="models")

FORMS = {
    "": UploadForm.FILE,  # as `curl -T` sends it
    "application/octet-stream": UploadForm.FILE,
    "application/x-onnx": UploadForm.FILE,
    "application/x-tar": UploadForm.TAR,
    "application/gzip": UploadForm.TAR,
}
"""What the body is, by its media type; a tar may be compressed under either name."""
DIGESTS = ("Repr-Digest", "Content-Digest")
"""RFC 9530. Without a content coding or a range, both are of the same bytes."""
_BINARY = {"schema": {"type": "string", "format": "binary"}}
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


class UploadHeadersSchema(Schema):
    """Header fields of an upload."""

    if_none_match = fields.String(
        data_key="If-None-Match",
        validate=validate.Equal("*", error="Must be *."),
        **about("`*` answers 412 instead of 409 if the version exists. Neither overwrites it.", example="*"),
    )
    repr_digest = fields.String(
        data_key="Repr-Digest",
        **about(
            "Digests of the body (RFC 9530): `sha-256` and `sha-512` are checked, others ignored.",
            example="sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
        ),
    )
    content_digest = fields.String(data_key="Content-Digest", **about("As `Repr-Digest`."))


class AddedFileSchema(Schema):
    """One file of an added version."""

    path = fields.String(required=True, **about("Relative to the version's folder."))
    bytes = fields.Integer(required=True)
    sha256 = fields.String(required=True, **about("Of its contents, in 64 hexadecimal digits."))


class AddedVersionSchema(Schema):
    """A version that was added."""

    model_id = fields.String(required=True)
    version = fields.Integer(required=True)
    bytes = fields.Integer(required=True, **about("Of all files together."))
    files = fields.List(fields.Nested(AddedFileSchema), required=True)


@routes.put(
    "/api/v1/models/{id}/versions/{version}",
    access=Access.ADMIN,
    summary="Add a version",
    description="Puts a version into the repository, and records `VersionAdded`. The body is one ONNX file, "
    "which becomes the version's `model.onnx`, or a tar of the version's folder, compressed with gzip or "
    "not. The version is visible once all of it is on disk and its event is recorded; until then, and if the "
    "upload ends early, there is nothing. A version is never overwritten.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    headers=UploadHeadersSchema(),
    request_body={
        "required": True,
        "content": {media_type: _BINARY for media_type in FORMS if media_type},
    },
    answers={201: (AddedVersionSchema(), "Added; the model is at `Location`.")},
    errors=(
        "bad_archive",
        "not_onnx",
        "digest_mismatch",
        "unsafe_file",
        "invalid_model",
        "body_timeout",
        "precondition_failed",
        "body_too_large",
        "unsupported_media_type",
        *_CHANGE_ERRORS,
    ),
)
async def add_version(request: web.Request) -> web.Response:
    """Write the body into the repository, then record `VersionAdded`, then make the version visible."""
    order = _read_order(request)
    files = await request.app[UPLOADS].add(order, _read_until_stop(request))
    body = {
        "model_id": order.model_id,
        "version": order.version,
        "bytes": sum(file.bytes for file in files),
        "files": [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files],
    }
    return web.json_response(body, status=201, headers={hdrs.LOCATION: f"/api/v1/models/{order.model_id}"})


@routes.delete(
    "/api/v1/models/{id}/versions/{version}",
    access=Access.ADMIN,
    summary="Remove a version",
    description="Records `VersionRemoved`, then deletes the version's files from the repository. A version "
    "that is loaded, or will be, is refused.",
    path=ModelVersionPathSchema(),
    query=NothingSchema(),
    answers={204: {"description": "Removed."}},
    errors=("unknown_version", "version_in_use", *_CHANGE_ERRORS),
)
async def remove_version(request: web.Request) -> web.Response:
    """Record `VersionRemoved`, then delete the files."""
    given = path_parameters(request)
    await request.app[UPLOADS].remove(given["id"], given["version"], request[PRINCIPAL].subject)
    return web.Response(status=204)


def _read_order(request: web.Request) -> UploadOrder:
    """Return what a request orders.

    Raises:
        UnsupportedMediaType: `unsupported_media_type`.
        InvalidParameter: `invalid_parameter`.
    """
    given, named = path_parameters(request), header_fields(request)
    if hdrs.CONTENT_RANGE in request.headers:  # RFC 9110, section 14.5
        raise InvalidParameter("headers: Content-Range: a version is sent as a whole")
    return UploadOrder(
        given["id"],
        given["version"],
        request[PRINCIPAL].subject,
        form=_read_form(request),
        expected=_read_digests(named),
        length=request.content_length,
        only_new="if_none_match" in named,
    )


def _read_form(request: web.Request) -> UploadForm:
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed as a whole: leave Content-Encoding out")
    media_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip(" \t").lower()
    if media_type not in FORMS:
        known = ", ".join(filter(None, FORMS))
        raise UnsupportedMediaType(
            "the body must be one ONNX file (Content-Type: application/octet-stream) or a tar of the"
            f" version's folder (Content-Type: application/x-tar); known are {known}"
        )
    return FORMS[media_type]


def _read_digests(named: dict[str, Any]) -> ExpectedDigests:
    given = [named[name] for name in ("repr_digest", "content_digest") if name in named]
    try:
        return parse_digests(given)
    except ValueError as error:
        raise InvalidParameter(f"headers: {' or '.join(DIGESTS)}: {error}") from None


async def _read_until_stop(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives, unless the server stops.

    Raises:
        BodyTimeout: `body_timeout`.
        ShuttingDown: `shutting_down`.
    """
    stopping = request.app[STOPPING]
    async for piece in iterate_body(request.content):
        if stopping.is_set():
            raise ShuttingDown("the server stops; nothing of the upload is kept: send it again then")
        yield piece
