"""Responses to malformed HTTP, and on connections that may make no request: in the one error body."""

from __future__ import annotations

from aiohttp import hdrs, http_exceptions, web

from server.connections.direct import SERVER
from server.errors import ServerProblem, problem_of, problem_response

MAX_LINE_BYTES = 8190
"""Of a request line, or a header field: a token with many roles has some thousand."""

MAX_FIELDS = 100
MAX_HEAD_BYTES = 64 * 2**10
"""Of a head that has not ended: what a connection can have us keep before it is authenticated."""


class HeadTooLarge(ServerProblem):
    """The request's header fields are too many or too long."""

    code = "head_too_large"


class TargetTooLong(ServerProblem):
    """The request line is too long."""

    code = "target_too_long"


class MalformedRequest(ServerProblem):
    """The request is no HTTP."""

    code = "invalid_request"


class HeadTimeout(ServerProblem):
    """The request's head did not arrive in time."""

    code = "head_timeout"


class TooManyConnections(ServerProblem):
    """The server has as many connections open as it may; try again."""

    code = "too_many_connections"


def problem_of_parser(defect: BaseException | None) -> ServerProblem:
    """Return the error for what aiohttp's parser refused."""
    if isinstance(defect, http_exceptions.LineTooLong):
        if MAX_LINE_BYTES in defect.args:
            return TargetTooLong(f"the request line must not have more than {MAX_LINE_BYTES} bytes")
        return HeadTooLarge(f"a header field must not have more than {MAX_LINE_BYTES} bytes")
    if "Too many headers" in str(defect):
        return HeadTooLarge(f"a request must not have more than {MAX_FIELDS} header fields")
    told = defect.message if isinstance(defect, http_exceptions.HttpProcessingError) else str(defect)
    first = told.strip().partition("\n")[0].rstrip(":")  # then come the bytes that were sent
    return MalformedRequest(f"the request is no HTTP: {first or 'malformed'}")


def refusal(request: web.BaseRequest, problem: ServerProblem) -> web.Response:
    """Return the response to a request after which the connection is closed."""
    response = problem_response(problem_of(problem), request.path)
    response.headers[hdrs.SERVER] = SERVER
    response.force_close()
    return response


def raw_refusal(error: ServerProblem) -> bytes:
    """Return a whole response, as it goes over the wire where there is no request."""
    problem = problem_of(error)
    response = problem_response(problem, "/")
    assert isinstance(response.body, bytes)
    retry = "".join(f"{name}: {value}\r\n" for name, value in problem.headers.items())
    return (
        f"HTTP/1.1 {problem.status} {response.reason}\r\nContent-Type: application/problem+json\r\n"
        f"Content-Length: {len(response.body)}\r\nServer: {SERVER}\r\nConnection: close\r\n{retry}\r\n"
    ).encode() + response.body
