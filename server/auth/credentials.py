"""What a request shows to say who it is from, and how it is told what is wrong with that (RFC 6750)."""

import re
from dataclasses import dataclass

from aiohttp import hdrs, web

from server.errors import ServerProblem
from server.routes import Access

REALM = "loadledger"

# RFC 6750 section 2.1, with as many spaces as RFC 9110 section 11.4 allows.
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*)")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a verified token speaks for.

    Attributes:
        subject: 1 to 128 printable characters, never `system`; the actor of the events it causes.
        roles: Those of the token that exist here.
    """

    subject: str
    roles: frozenset[str]


PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
"""Who asks, on every request but those to public routes."""


class Challenge(ServerProblem):
    """The request is told how to show who it is from, in WWW-Authenticate."""

    error: str | None = None

    def __init__(self, detail: str = "", *, extra: str = "") -> None:
        challenge = f'Bearer realm="{REALM}"'
        if self.error is not None:
            challenge += f', error="{self.error}"{extra}'
        super().__init__(detail, http_headers={hdrs.WWW_AUTHENTICATE: challenge})


class NoCredentials(Challenge):
    """This route needs a token: send it as Authorization: Bearer <token>."""

    code = "no_credentials"


class InvalidToken(Challenge):
    """The token is not valid."""

    code = "invalid_token"
    error = "invalid_token"


class MalformedAuthorization(Challenge):
    """There must be one Authorization field, of the form Bearer <token>."""

    code = "invalid_request"
    error = "invalid_request"


class Forbidden(Challenge):
    """The token's roles do not allow this."""

    code = "forbidden"
    error = "insufficient_scope"

    def __init__(self, principal: Principal, access: Access) -> None:
        needed = sorted(access.value)
        has = ", ".join(sorted(principal.roles)) or "none"
        super().__init__(
            f"this needs one of the roles {', '.join(needed)}; the token has {has}",
            extra=f', scope="{" ".join(needed)}"',
        )


def bearer_token(fields: list[str]) -> str:
    """Return the token out of a request's Authorization fields.

    Raises:
        NoCredentials: there is no bearer token (`no_credentials`).
        MalformedAuthorization: there are several fields, or the one is malformed (`invalid_request`).
    """
    if len(fields) > 1:
        raise MalformedAuthorization
    scheme = fields[0].partition(" ")[0].lower() if fields else ""
    if not fields or (scheme and scheme != "bearer"):
        raise NoCredentials
    match = _BEARER.fullmatch(fields[0].strip())
    if match is None:
        raise MalformedAuthorization
    return match[1]
