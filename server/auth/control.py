"""The control socket, over which the server's user and root manage tokens, and servers, without one.

Who may read the keys may sign any token, so whoever proves that is an administrator: `control.key`, which is
new at each start, is as readable as the keys are. To be the server's user is no proof: confined processes of
ours are, and Landlock keeps none from connecting to a socket's path. It speaks HTTP, with the routes of
tokens and of servers, and the limits of any connection:

    curl --unix-socket control.sock -H "Authorization: Bearer $(cat control.key)" http://local/api/v1/tokens
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from events.files import write_file
from server.api import tokens
from server.appkeys import CONFIG, LOG
from server.auth.access import Access
from server.auth.gate import PRINCIPAL, InvalidToken, Principal
from server.auth.proxies import Proxies
from server.auth.subjects import local_actor
from server.auth.tokens import TOKENS
from server.cluster import CLUSTER
from server.errors import errors_middleware
from server.http.connection import ConnectionLimits, bound_socket, listening_on, peer_of, protect
from server.http.responses import response_completer
from server.http.validation import validation_middleware
from server.routing import Route, add_routes

_log = logging.getLogger(__name__)

SOCKET = "control.sock"
"""The socket's file in the data directory."""

KEY = "control.key"
"""The file beside it, of mode 0600, with the bearer token of its requests."""

KEY_BYTES = 32
"""Bytes of randomness in the key."""

MAX_CONNECTIONS = 16
"""Commands at once; each sends one request."""

MAX_BODY_BYTES = 64 * 2**10
"""Longest body of a request: a name, some roles and a number."""


async def open_control(app: web.Application, others: Mapping[str, Sequence[Route]]) -> AsyncIterator[None]:
    """Serve the socket; a resource of the application, under the lock of its data directory.

    It has the routes of tokens, and `others` by their subjects.

    Where no socket can be, as on some network file systems, the server runs without it.
    """
    key = secrets.token_urlsafe(KEY_BYTES)
    runner = web.AppRunner(_create_control(app, others, key), access_log=None, handler_cancellation=True)
    limits = replace(ConnectionLimits.of(app[CONFIG]), most=MAX_CONNECTIONS, reserve=0, open=set())
    async with AsyncExitStack() as stack:
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        try:
            stack.enter_context(_key_file(app[CONFIG].data / KEY, key))
            bound = stack.enter_context(bound_socket(app[CONFIG].data, SOCKET))
        except OSError as error:
            managed = " and ".join(["tokens", *others])
            _log.warning("without %s, %s are managed over HTTP only: %s", SOCKET, managed, error)
        else:
            assert runner.server is not None, "the runner is not set up"
            protect(runner.server)
            await stack.enter_async_context(listening_on(runner.server, bound, limits))
        yield


def _create_control(app: web.Application, others: Mapping[str, Sequence[Route]], key: str) -> web.Application:
    control = web.Application(
        middlewares=[errors_middleware, _local_middleware(key), validation_middleware],
        client_max_size=MAX_BODY_BYTES,
    )
    control.on_response_prepare.append(response_completer(Proxies()))
    offered = chain(tokens.routes, *others.values())
    add_routes(control, [route for route in offered if route.access is not Access.PUBLIC])
    control[CONFIG], control[LOG], control[TOKENS] = app[CONFIG], app[LOG], app[TOKENS]
    control[CLUSTER] = app[CLUSTER]
    return control


@contextmanager
def _key_file(path: Path, key: str) -> Iterator[None]:
    """Write the file, even over the one of a killed server, and remove it on exit."""
    with write_file(path, replace=True) as file:
        file.write(key.encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _local_middleware(key: str) -> Middleware:
    """Return a middleware that treats the user at the other end, if it sends the key, as an administrator."""
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        user = None if request.transport is None else peer_of(request.transport).user
        given = request.headers.get("Authorization", "")
        if user is None or user not in {os.geteuid(), 0}:
            raise InvalidToken("only the server's user and root may use this socket")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected):
            raise InvalidToken(f"this socket takes the content of {KEY}, beside it, as the bearer token")
        request[PRINCIPAL] = Principal(local_actor(user), frozenset({"admin"}))
        return await handler(request)

    return check
