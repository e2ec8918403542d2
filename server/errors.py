"""The table of error codes, and the middleware that turns every error into an RFC 9457 body.

A domain error is any exception with an attribute `code` that is in the table; its text is the `detail`. It
may also have `retry_after_s` (a number), `http_headers` and `problem_members` (mappings without lone
surrogates).
"""

import errno
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from uuid import uuid4

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from answers.errors import Problem

log = logging.getLogger(__name__)

CODE: web.ResponseKey[str] = web.ResponseKey("code", str)
"""The error code of an answer."""

ANSWER_FIELDS: web.RequestKey[Mapping[str, str]] = web.RequestKey("answer_fields", Mapping)
"""Header fields that the answer to a request gets, be it an error."""

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
# Long enough for any message of ours; a hostile field name must not be echoed by the megabyte.
DETAIL_CHARACTERS = 4096
RETRY_LATER = (429, 503)
"""Statuses with Retry-After (RFC 9110 sections 10.2.3 and 15.6.4, RFC 6585)."""
RETRY_AFTER_S = 1
"""Default: about as long as a restart of a worker or of the fork server takes."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """HTTP status, stable title and registered problem type of a code."""

    status: int
    title: str
    registered_type: str | None = None


ERRORS: Mapping[str, ErrorKind] = {
    "invalid_request": ErrorKind(400, "The request is malformed"),
    "invalid_body": ErrorKind(400, "The request body is invalid"),
    "invalid_parameter": ErrorKind(400, "A parameter is invalid"),
    "not_supported": ErrorKind(400, "This is not supported"),
    "beyond_head": ErrorKind(400, "The position is beyond the head of the log"),
    "before_first_event": ErrorKind(400, "The time is before the first event of the log"),
    "invalid_defaults": ErrorKind(400, "The model's loadledger.toml is invalid"),
    "inference_failed": ErrorKind(400, "The model could not compute an answer"),
    "inference_cancelled": ErrorKind(400, "The inference was stopped"),
    "invalid_input": ErrorKind(400, "The input does not fit the model"),
    "invalid_model": ErrorKind(400, "The model cannot be loaded"),
    "warm_up_failed": ErrorKind(400, "The model loads, but its first inference fails"),
    "model_changed": ErrorKind(400, "The model's files changed while they were copied"),
    "rows_depend": ErrorKind(400, "With batching, the answers of the model would depend on each other"),
    "unsafe_file": ErrorKind(400, "The model has an unsafe file"),
    "signature_invalid": ErrorKind(400, "The version's signature cannot be used"),
    "signature_missing": ErrorKind(400, "The version is not signed"),
    "signature_untrusted": ErrorKind(400, "The version is signed by nobody who may"),
    "signature_mismatch": ErrorKind(400, "The signature is of other files"),
    "signature_unsupported": ErrorKind(400, "The form of the signature is not supported"),
    "policy_differs": ErrorKind(400, "The rules for the model changed"),
    "not_approved": ErrorKind(400, "Other persons have to approve the version"),
    "not_encodable": ErrorKind(400, "The ledger cannot hold what was loaded"),
    "crash_loop": ErrorKind(400, "The model's workers died too often"),
    "job_failed": ErrorKind(400, "The job failed"),
    "cancelled": ErrorKind(400, "The job was cancelled"),
    "not_onnx": ErrorKind(400, "The version has no ONNX model"),
    "digest_mismatch": ErrorKind(400, "The file arrived changed"),
    "no_credentials": ErrorKind(401, "A bearer token is needed"),
    "invalid_token": ErrorKind(401, "The bearer token is not valid"),
    "forbidden": ErrorKind(403, "The token's roles do not allow this"),
    "same_person": ErrorKind(403, "Another person has to approve"),
    "emergency_forbidden": ErrorKind(403, "The rules of the model allow no emergency"),
    "not_found": ErrorKind(404, "No such route or file"),
    "unknown_model": ErrorKind(404, "No such model"),
    "unknown_version": ErrorKind(404, "No such version of the model"),
    "unknown_label": ErrorKind(404, "No such label of the model"),
    "unknown_job": ErrorKind(404, "No such job"),
    "unknown_upload": ErrorKind(404, "No such upload of a version"),
    "unknown_approval": ErrorKind(404, "The version is not approved"),
    "unknown_token": ErrorKind(404, "No such token"),
    "unknown_node": ErrorKind(404, "No such node"),
    "unknown_record_file": ErrorKind(404, "No such file of records"),
    "not_ready": ErrorKind(400, "The model is not ready"),
    "not_representable": ErrorKind(400, "JSON cannot represent the answer"),
    "method_not_allowed": ErrorKind(405, "This route does not take the method"),
    "body_timeout": ErrorKind(408, "The request body did not arrive in time"),
    "head_timeout": ErrorKind(408, "The request's head did not arrive in time"),
    "nothing_loaded": ErrorKind(409, "No model is loaded"),
    "already_finished": ErrorKind(409, "The job has ended"),
    "already_started": ErrorKind(409, "The job cannot be cancelled any more"),
    "not_loaded": ErrorKind(409, "The model is not loaded"),
    "digest_differs": ErrorKind(409, "The version has other files"),
    "record_file_open": ErrorKind(409, "The file of records is being written"),
    "version_exists": ErrorKind(409, "The version exists"),
    "version_in_use": ErrorKind(409, "A load or a label uses the version"),
    "too_many_labels": ErrorKind(409, "The model has too many labels"),
    "device_unavailable": ErrorKind(409, "No server has the device"),
    "fallback_refused": ErrorKind(400, "The device does not support the whole model"),
    "node_ended": ErrorKind(409, "The node has left, or was lost"),
    "repository_not_shared": ErrorKind(409, "The nodes may not share a repository"),
    "no_nodes": ErrorKind(409, "The server has no nodes"),
    "repository_read_only": ErrorKind(409, "The server does not change its repository"),
    "precondition_failed": ErrorKind(412, "The version exists, and the request is for a new one"),
    "body_too_large": ErrorKind(413, "The request body is too large"),
    "target_too_long": ErrorKind(414, "The request line is too long"),
    "unsupported_media_type": ErrorKind(415, "The media type or coding of the request body is not supported"),
    "idempotency_mismatch": ErrorKind(422, "The Idempotency-Key was used for another request"),
    "rate_limited": ErrorKind(429, "Too many requests", QUOTA_EXCEEDED),
    "too_many_failures": ErrorKind(429, "Too many failed authentications", QUOTA_EXCEEDED),
    "queue_full": ErrorKind(429, "Too many jobs are waiting"),
    "too_many_tokens": ErrorKind(429, "Too many tokens are valid"),
    "too_many_streams": ErrorKind(429, "Too many streams are open"),
    "head_too_large": ErrorKind(431, "The request's header fields are too large"),
    "internal": ErrorKind(500, "The server failed"),
    "unknown_transfer_coding": ErrorKind(501, "The transfer coding is not supported"),
    "inference_queue_full": ErrorKind(503, "Too many inferences of the model are waiting"),
    "bodies_full": ErrorKind(503, "Too many large bodies are in memory"),
    "too_many_connections": ErrorKind(503, "Too many connections are open"),
    "too_many_files": ErrorKind(503, "The server may open no more files"),
    "model_not_loaded": ErrorKind(503, "The model is not loaded"),
    "load_failed": ErrorKind(503, "The model could not be loaded on demand"),
    "out_of_service": ErrorKind(503, "A person has taken the model out of service"),
    "bytes_gone": ErrorKind(503, "The bytes that served are gone"),
    "model_unloading": ErrorKind(503, "The model is being unloaded"),
    "model_unloaded": ErrorKind(503, "A person unloaded the model during the inference"),
    "model_replaced": ErrorKind(503, "Another version replaced the model during the inference"),
    "model_evicted": ErrorKind(503, "The server unloaded the model during the inference, to free memory"),
    "model_moved": ErrorKind(503, "The model is being moved to another node"),
    "node_unreachable": ErrorKind(503, "The node that has to answer cannot be reached"),
    "worker_died": ErrorKind(503, "The model's worker ended"),
    "out_of_memory": ErrorKind(503, "There is not enough memory for the model"),
    "insufficient_memory": ErrorKind(503, "The model does not fit into the memory budget"),
    "too_many_loaded": ErrorKind(503, "The limit on loaded models is reached"),
    "disk_full": ErrorKind(503, "The disk has no room for the model"),
    "store_full": ErrorKind(503, "The store of models is full"),
    "store_unavailable": ErrorKind(503, "The store of models cannot be used"),
    "timeout": ErrorKind(503, "The load took too long"),
    "no_progress": ErrorKind(503, "The load made no progress"),
    "fork_server_died": ErrorKind(503, "The fork server ended"),
    "fork_server_unavailable": ErrorKind(503, "The fork server does not answer"),
    "repository_unreadable": ErrorKind(503, "The repository cannot be read"),
    "repository_busy": ErrorKind(503, "The repository does not answer"),
    "log_unavailable": ErrorKind(503, "The event log cannot be written"),
    "unhealthy": ErrorKind(503, "The server is unhealthy"),
    "shutting_down": ErrorKind(503, "The server is stopping"),
    "inference_timeout": ErrorKind(504, "The inference took too long"),
    "insufficient_storage": ErrorKind(507, "The repository's disk has no room"),
    "unknown_http_version": ErrorKind(505, "The HTTP version is not supported"),
}
"""Every error code of the API; the advice for each is in `tools.errors`."""

# aiohttp's own exceptions, by status; any other 4xx is reported under its status as `invalid_request`.
_FRAMEWORK_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class ServerProblem(Exception):
    """The request could not be served."""

    code: str = "internal"

    def __init__(
        self, detail: str = "", *, code: str | None = None, http_headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip())
        self.code = code or type(self).code
        self.http_headers: Mapping[str, str] = http_headers or {}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The members of an error answer's body, a `Problem`, and of its header, before they are serialised."""

    code: str
    status: int
    detail: str
    instance: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, object] = field(default_factory=dict)


def problem_of(error: Exception) -> ErrorAnswer:
    """Return the problem for an exception; one that is not in the table is logged and answered 500.

    An `OSError` for lack of file descriptors is `too_many_files`.
    """
    if isinstance(error, web.HTTPException):
        return _framework_problem(error)
    if isinstance(error, web.RequestPayloadError):
        return ErrorAnswer("invalid_request", 400, f"the request body could not be read: {error}")
    code, detail = code_of(error), str(error)
    if isinstance(error, OSError) and code == "too_many_files":
        detail = "no file descriptor is left: the limit of open files is reached"
    if code == "internal":
        return _unexpected_problem(error)
    members = getattr(error, "problem_members", {})
    headers = dict(_headers_of(error, code))
    return ErrorAnswer(code, ERRORS[code].status, detail, headers=headers, members=members)


def code_of(error: Exception) -> str:
    """Return the code of an exception; `internal` for one that is not in the table."""
    if isinstance(error, web.RequestPayloadError):
        return "invalid_request"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too_many_files"
    code = getattr(error, "code", None)
    return code if isinstance(code, str) and code in ERRORS else "internal"


def problem_response(problem: ErrorAnswer, path: str) -> web.Response:
    """Return a problem as an RFC 9457 body, in the media type that clients of `path` read."""
    kind = ERRORS[problem.code]
    detail = _clean_detail(problem.detail)
    body = Problem(
        type=kind.registered_type or f"urn:loadledger:error:{problem.code}",
        title=kind.title,
        status=problem.status,
        detail=detail,
        instance=problem.instance,
        code=problem.code,
        error=detail,
    )
    return web.Response(
        status=problem.status,
        body=msgspec.json.encode({**msgspec.to_builtins(body), **problem.members}),
        content_type=media_type_of(path),
        headers=dict(problem.headers),
    )


def media_type_of(path: str) -> str:
    is_inference = path == "/v2" or path.startswith("/v2/")
    return "application/json" if is_inference else "application/problem+json"


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into one form of answer; must be the outermost middleware but for the log's."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 -- redirects and the like are answers, not errors
            raise
        return error_response(request, error)
    except Exception as error:  # noqa: BLE001 -- the last place where one can be turned into an answer
        return error_response(request, error)


def error_response(request: web.BaseRequest, error: Exception) -> web.Response:
    """Return the answer to an error; raises it again if the answer has already begun."""
    problem = problem_of(error)
    if request.writer.output_size > 0:
        # A second status line in the middle of a stream would be read as data: break the connection instead.
        raise error
    response = problem_response(problem, request.path)
    response[CODE] = problem.code
    response.headers.update(request.get(ANSWER_FIELDS, {}))
    if isinstance(error, web.RequestPayloadError):
        response.force_close()  # the framework ends such a connection
    return response


def _framework_problem(error: web.HTTPException) -> ErrorAnswer:
    if error.status >= 500:  # noqa: PLR2004 -- not a client's mistake
        return _unexpected_problem(error)
    code = _FRAMEWORK_CODES.get(error.status, "invalid_request")
    headers = {name: error.headers[name] for name in ("Allow", "Retry-After") if name in error.headers}
    detail = _FRAMEWORK_DETAILS.get(code) or error.text or error.reason
    if isinstance(error, web.HTTPMethodNotAllowed):
        detail = f"{error.method} is not a method of this route: {headers.get('Allow', '')}"
    return ErrorAnswer(code, error.status, detail, headers=headers)


_FRAMEWORK_DETAILS = {
    "not_found": "no route has this path; see /openapi.yaml for all routes",
    "body_too_large": "the request body is larger than this route allows",
}


def _unexpected_problem(error: Exception) -> ErrorAnswer:
    reference = uuid4()
    log.error("request failed, reference %s", reference, exc_info=error)
    detail = f"the server failed; its log has the reason under {reference}"
    return ErrorAnswer("internal", 500, detail, instance=f"urn:uuid:{reference}")


def _headers_of(error: Exception, code: str) -> Iterator[tuple[str, str]]:
    yield from getattr(error, "http_headers", {}).items()
    default = RETRY_AFTER_S if ERRORS[code].status in RETRY_LATER else None
    retry_after_s = getattr(error, "retry_after_s", default)
    if retry_after_s is not None:
        # Whole seconds, rounded up: coming back early would be refused again.
        yield "Retry-After", str(max(1, math.ceil(retry_after_s)))


def _clean_detail(detail: str) -> str:
    clean = detail.encode("utf-8", "replace").decode()
    return clean if len(clean) <= DETAIL_CHARACTERS else clean[: DETAIL_CHARACTERS - 1] + "…"
