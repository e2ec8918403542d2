"""Responses that are written past the framework: fast ones in one piece, refusals of malformed HTTP.

Every response has `STANDARD_FIELDS`, whichever way it is written.

aiohttp takes 25 µs to write a response, most of the server's time for an inference (measured: 16,000 constant
responses a second with it, 27,000 without). `DirectResponse` does the little work that a response of known
length needs. Connections, parsing, timeouts and shutdown are those of all responses. Refusals have the one
error body.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache

from aiohttp import HttpVersion11, hdrs, http_exceptions, web
from aiohttp.abc import AbstractStreamWriter

from runtime.wire import Buffer, join_short
from server.auth.proxies import Proxies
from server.auth.ratelimit import QUOTA
from server.errors import ServerProblem, problem_of, problem_response
from server.http.bodies import BodyMemory
from server.observability.output import CONTEXT, REQUEST_ID, valid_request_id

STANDARD_FIELDS: Mapping[str, str] = {
    hdrs.SERVER: "loadledger",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
}
"""Header fields of every response: no version that an attacker could look up, nothing left in a cache, and no
browser that takes an answer for a page. Static files have a Cache-Control of their own."""
_STANDARD_LINES = "".join(f"{name}: {value}\r\n" for name, value in STANDARD_FIELDS.items())
JOINED_BYTES = 64 * 2**10
"""Copying this much takes about as long as passing one more buffer to the kernel."""


def add_standard_fields(response: web.StreamResponse) -> None:
    """Add `STANDARD_FIELDS` to a response, except a field for caches that its handler has set."""
    caching = response.headers.get(hdrs.CACHE_CONTROL)
    response.headers.update(STANDARD_FIELDS)
    if caching is not None:
        response.headers[hdrs.CACHE_CONTROL] = caching


def response_completer(proxies: Proxies) -> Callable[[web.BaseRequest, web.StreamResponse], Awaitable[None]]:
    """Return the handler of `app.on_response_prepare` that completes a response's header fields.

    It adds the rest of the subject's limit, the request's id and `STANDARD_FIELDS`, and adapts `Location` to
    the prefix of a proxy.
    """

    async def complete(request: web.BaseRequest, response: web.StreamResponse) -> None:
        quota, context = request.get(QUOTA), CONTEXT.get()
        if quota is not None:
            response.headers.update(quota.headers())
        if context is not None:
            response.headers[REQUEST_ID] = context.request_id
        add_standard_fields(response)
        proxies.relocate(request, response)

    return complete


class DirectResponse(web.StreamResponse):
    """A response with status 200, these final header fields, which have no line breaks, and this body.

    `memory`, of request and response, is given back when the client has received the response.
    `on_written` is called once: when the whole response was handed to the connection, or cannot be.
    """

    def __init__(
        self,
        fields: Mapping[str, object],
        body: Sequence[Buffer],
        memory: BodyMemory,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._fields = fields
        self._buffers = body
        self._memory = memory
        self._on_written = on_written
        self._is_kept = False

    @property
    def keep_alive(self) -> bool | None:
        return self._is_kept

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole response.

        Raises:
            ConnectionResetError: the client has left, or was disconnected because it did not read.
        """
        try:
            try:
                transport = self._write(request)
            finally:
                self._on_written()
            if transport.get_write_buffer_size() > JOINED_BYTES:
                await request.writer.drain()
        finally:
            self._memory.give_back()
        return None

    def _write(self, request: web.BaseRequest) -> asyncio.WriteTransport:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        request.writer.output_size += 1  # so that aiohttp writes nothing else before the answer ends
        self._is_kept = request.keep_alive and super().keep_alive is None  # no `force_close`
        length = sum(map(len, self._buffers))
        more = _connection(request, is_kept=self._is_kept)
        request_id = request.headers.get(REQUEST_ID)  # only a client's: creating one would take too long
        if request_id is not None and REQUEST_ID not in self._fields:
            is_valid = valid_request_id((request_id,)) is not None
            more += f"{REQUEST_ID}: {request_id}\r\n" if is_valid else ""
        head = _head(self._fields, length, more)
        if length < JOINED_BYTES:
            transport.write(b"".join((head, *self._buffers)))
        else:
            self._memory.replace(length)
            for part in join_short((head, *self._buffers)):  # a short write would wake the client early
                transport.write(part)
        self._buffers = ()
        return transport

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` has written the whole response."""


def _head(fields: Mapping[str, object], length: int, connection: str) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return (
        f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {length}\r\n"
        f"Date: {_date(int(time.time()))}\r\n{_STANDARD_LINES}{connection}\r\n"
    ).encode("latin-1")


def _connection(request: web.BaseRequest, *, is_kept: bool) -> str:
    """Return the Connection field, unless the protocol's version implies it."""
    if request.version == HttpVersion11:
        return "" if is_kept else "Connection: close\r\n"
    return "Connection: keep-alive\r\n" if is_kept else ""


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


MAX_LINE_BYTES = 8190
"""Length of a request line or a header field: a token with many roles has some thousand."""

MAX_FIELDS = 100
MAX_HEAD_BYTES = 64 * 2**10
"""Length of an unfinished head: memory that a connection can take before it is authenticated."""


class UnknownTransferCoding(ServerProblem):
    """Transfer-Encoding must be chunked, once and alone; compress the content with Content-Encoding."""

    code = "unknown_transfer_coding"


class UnknownHttpVersion(ServerProblem):
    """Requests must be HTTP/1.1 or HTTP/1.0; a proxy in front can take others."""

    code = "unknown_http_version"


class TooManyConnections(ServerProblem):
    """The server has as many connections open as it may; try again."""

    code = "too_many_connections"


def problem_of_parser(defect: BaseException | None) -> ServerProblem:
    """Return the error for a refusal of aiohttp's parser."""
    if isinstance(defect, http_exceptions.LineTooLong):
        if MAX_LINE_BYTES in defect.args:
            text = f"the request line must not have more than {MAX_LINE_BYTES} bytes"
            return ServerProblem(text, code="target_too_long")
        text = f"a header field must not have more than {MAX_LINE_BYTES} bytes"
        return ServerProblem(text, code="head_too_large")
    if "Too many headers" in str(defect):
        text = f"a request must not have more than {MAX_FIELDS} header fields"
        return ServerProblem(text, code="head_too_large")
    text = defect.message if isinstance(defect, http_exceptions.HttpProcessingError) else str(defect)
    first = text.strip().partition("\n")[0].rstrip(":")  # the client's bytes follow
    if "Transfer-Encoding" in first and "Content-Length" not in first:  # with both, no coding is at fault
        return UnknownTransferCoding()
    if "://" in first:  # it is the whole target, and may have a user and a password
        first = "its target is no URL"
    return ServerProblem(f"the request is no HTTP: {first or 'malformed'}", code="invalid_request")


def check_framing(request: web.BaseRequest) -> None:
    """Refuse a request whose body another server on its way may have delimited differently.

    The parser accepts more than RFC 9112: codings before `chunked`, and HTTP/1.0 with a coding, whose
    framing is faulty (section 6.1).

    Raises:
        ServerProblem: `unknown_transfer_coding`, `invalid_request`.
    """
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, ())
    if not codings:
        return
    if len(codings) > 1 or codings[0].strip(" \t").lower() != "chunked":
        raise UnknownTransferCoding
    if request.version < HttpVersion11:
        reason = "the request is no HTTP: Transfer-Encoding is not part of HTTP/1.0"
        raise ServerProblem(reason, code="invalid_request")


def refusal(request: web.BaseRequest, problem: ServerProblem) -> web.Response:
    response = problem_response(problem_of(problem), request.path)
    add_standard_fields(response)
    response.force_close()
    return response


def raw_refusal(error: ServerProblem) -> bytes:
    """Return the bytes of a refusal outside of a request."""
    problem = problem_of(error)
    response = problem_response(problem, "/")
    assert isinstance(response.body, bytes)
    retry = "".join(f"{name}: {value}\r\n" for name, value in problem.headers.items())
    return (
        f"HTTP/1.1 {problem.status} {response.reason}\r\nContent-Type: application/problem+json\r\n"
        f"Content-Length: {len(response.body)}\r\n{_STANDARD_LINES}Connection: close\r\n{retry}\r\n"
    ).encode() + response.body
