"""Authentication and authorisation: bearer tokens (RFC 6750, 7519, 8725), roles, limits, denials.

`Gate.admit` checks a request, for the middleware and for the fast path of inferences. Denials of verified
subjects go into the ledger, one event per subject, action and minute, up to a limit: requests without a valid
token must not fill the ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jwt
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDictProxy, istr

from events.clock import uuid7
from events.commands import Command, Record
from events.types import SYSTEM, AccessDenied, Draft
from events.values import Credential
from server.auth.access import ROLES, Access
from server.auth.keys import KeyRing, VerificationKey
from server.auth.proxies import Proxies
from server.auth.ratelimit import QUOTA, RateLimits
from server.auth.subjects import subject_refusal
from server.config import Config
from server.errors import ServerProblem
from server.routing import AT, matched_route

_log = logging.getLogger(__name__)

T = TypeVar("T")

REALM = "loadledger"

FORWARDED = istr("Loadledger-Forwarded")
"""Names the server that has forwarded a request, whose token the request has."""
POSITION = istr("Loadledger-Position")
"""How far the server knows the ledger that forwards a request, or refuses a forwarded one."""

MINUTE_S = 60.0

MAX_EVENTS = 60
"""`AccessDenied` events of a minute, so that no client can fill the ledger."""

OTHER = "other"
"""The action of the event, by `system`, that counts all denials beyond `MAX_EVENTS`."""

NO_ROUTE = "no route"
"""The action of a subject without any role that requested a path or method that no route has."""

CLOCK_SKEW_S = 60.0
"""How far an issuer's clock may be ahead, for `nbf` and `iat`. `exp` has no tolerance."""

MAX_TIME_S = 2**53
"""Up to here a float is exact to the second; excludes infinity, and integers that no float can hold."""

MAX_REMEMBERED = 4096
"""Verified tokens in memory, some 2 MB; a token that was forgotten costs one signature check (0.1 ms)."""

_SCHEME = "bearer "
"""The field's beginning, in any case (RFC 9110 section 11.1); a remembered token is not parsed further."""

# RFC 6750 section 2.1, with as many spaces as RFC 9110 section 11.4 allows.
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*)")


@dataclass(frozen=True, slots=True)
class Principal:
    """The subject and roles of a verified token: the actor of its events, and the token's known roles.

    `jti` is the token's id, and `issuer` its `iss`; None if missing. `expires_at` is in seconds since 1970.
    """

    subject: str
    roles: frozenset[str]
    jti: str | None = field(default=None, compare=False)
    expires_at: float = field(default=math.inf, compare=False)
    issuer: str | None = field(default=None, compare=False)


PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
"""Set on every request except those to public routes."""


def credential_of(principal: Principal) -> Credential:
    """Return a principal's token as the ledger records it; the writer adds the issuers."""
    return Credential(principal.issuer, principal.jti)


class Challenge(ServerProblem):
    """A refusal whose WWW-Authenticate header says which credentials to send."""

    error: str | None = None

    def __init__(self, detail: str = "", *, extra: str = "") -> None:
        challenge = f'Bearer realm="{REALM}"'
        if self.error is not None:
            challenge += f', error="{self.error}"{extra}'
        super().__init__(detail, http_headers={hdrs.WWW_AUTHENTICATE: challenge})


class NoCredentials(Challenge):
    """This needs a token: send it as Authorization: Bearer <token>."""

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
    """Return the token in a request's Authorization fields.

    Raises:
        NoCredentials: there is no bearer token (`no_credentials`).
        MalformedAuthorization: there are several fields, or the field is malformed (`invalid_request`).
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


class Denials:
    """Counts denied requests by subject and action; `run` appends the counts each minute."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._some = asyncio.Event()
        self._closing = asyncio.Event()

    def count(self, subject: str, action: str, count: int = 1) -> None:
        key = (subject, action)
        if key not in self._counts and len(self._counts) >= MAX_EVENTS - 1:
            key = (SYSTEM, OTHER)
        self._counts[key] = self._counts.get(key, 0) + count
        self._some.set()

    async def run(self, submit: Callable[[Command], Awaitable[object]], minute_s: float = MINUTE_S) -> None:
        """Append the counts a minute after the first denial, repeatedly, until `close`."""
        while not self._closing.is_set():
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(minute_s):
                    await self._closing.wait()
            await self._flush(submit)
        await self._flush(submit)  # counts from before this task began, and from the last minute

    def close(self) -> None:
        self._closing.set()
        self._some.set()

    async def _flush(self, submit: Callable[[Command], Awaitable[object]]) -> None:
        counts, self._counts = self._counts, {}
        self._some.clear()
        if not counts:
            return
        drafts = [
            Draft(uuid7(), AccessDenied(action, count), subject)
            for (subject, action), count in counts.items()
        ]
        try:
            await submit(Record(tuple(drafts)))
        except Exception as error:  # noqa: BLE001 - counting goes on whatever the error is
            _log.warning("denied requests could not be recorded yet: %s", error)
            later, self._counts = self._counts, counts  # in this order: the limit holds for both together
            self._some.set()
            for key, count in later.items():
                self.count(*key, count)


@dataclass(frozen=True, slots=True)
class _Remembered:
    principal: Principal
    kid: str | None
    key: VerificationKey


@dataclass(eq=False)
class Verifier:
    """Verifies tokens; remembers valid ones by their SHA-256 until they or their key expire or are revoked.

    `is_revoked` says whether the ledger has a revocation of a token's id; it is called for each request.
    Without a ledger no token is revoked.
    """

    keys: KeyRing
    audience: str
    issuer: str | None = None
    roles_claim: str = "roles"
    capacity: int = MAX_REMEMBERED
    is_revoked: Callable[[str], bool] = lambda _: False
    _remembered: OrderedDict[bytes, _Remembered] = field(default_factory=OrderedDict, init=False)

    def verify(self, token: str, now: float) -> Principal:
        """Return the subject and roles of a token that was sent at `now`, in seconds since 1970.

        Raises:
            InvalidToken: the token is not valid (`invalid_token`).
        """
        if (known := self.recall(token, now)) is not None:
            return known
        verified, digest = self._verify_afresh(token, now), _digest(token)
        self._remembered[digest] = verified
        if len(self._remembered) > self.capacity:
            self._remembered.popitem(last=False)
        return verified.principal

    def recall(self, token: str, now: float) -> Principal | None:
        """Return the subject and roles of a token that was verified before and is still valid."""
        digest = _digest(token)
        known = self._remembered.get(digest)
        if known is None:
            return None
        is_valid = known.principal.expires_at > now and self.keys.find(known.kid, now) is known.key
        if is_valid and not self._refuses(known.principal):
            self._remembered.move_to_end(digest)
            return known.principal
        del self._remembered[digest]
        return None

    def _verify_afresh(self, token: str, now: float) -> _Remembered:
        kid = _kid_of(token)
        key = self.keys.find(kid, now)
        if key is None:
            raise InvalidToken("the token is signed with a key that is not known here")
        claims = self._claims(token, key)
        principal = replace(self._principal(claims), expires_at=_check_times(claims, now))
        if self._refuses(principal):
            raise InvalidToken("the token was revoked")
        return _Remembered(principal, kid, key)

    def _refuses(self, principal: Principal) -> bool:
        return principal.jti is not None and self.is_revoked(principal.jti)

    def _claims(self, token: str, key: VerificationKey) -> Mapping[str, Any]:
        options: jwt.types.Options = {
            "require": ["sub", "exp", "aud"],
            "verify_exp": False,  # _check_times compares the times with the caller's
            "verify_nbf": False,
            "verify_iat": False,
            "verify_iss": self.issuer is not None,
        }
        try:
            return jwt.decode(
                token,
                key.public,
                [key.algorithm],
                options=options,
                audience=self.audience,
                issuer=self.issuer,
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken(f"the token is not valid: {error}") from None

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        subject = claims["sub"]
        if not isinstance(subject, str):
            raise InvalidToken("the subject must be text")
        refusal = subject_refusal(subject, is_own=self.keys.provider is None)
        if refusal is not None:
            raise InvalidToken(refusal)
        roles = _find_claim(claims, self.roles_claim)
        if not isinstance(roles, list):
            raise InvalidToken(f"the claim {self.roles_claim} must be a list of roles")
        jti, issuer = (_find_text(claims, name) for name in ("jti", "iss"))
        known = ROLES.intersection(role for role in roles if isinstance(role, str))
        return Principal(subject, known, jti, issuer=issuer)


def create_verifier(config: Config) -> Verifier:
    keys = KeyRing(config.data, config.jwt_keys)
    return Verifier(keys, config.jwt_audience, config.jwt_issuer, config.jwt_roles_claim)


ForwardedVerifier = Callable[[CIMultiDictProxy[str], str | None], Awaitable[Principal]]
"""Returns for whom another server has forwarded a request, by its header fields and the model in its path.

It raises `InvalidToken` if the token is not good for that; None is a path to which nothing is forwarded.
"""


@dataclass(eq=False)
class Gate:
    """Admits requests; refuses them in the order 429 (address), 401, 429 (subject), 403.

    A remembered token passes the limit of its address, so other clients there cannot lock it out. Beyond that
    limit no other token is checked, which limits guesses, and checks of signatures.

    Attributes:
        verify_forwarded: verifies the tokens of forwarded requests; None if nobody forwards any.
    """

    verifier: Verifier
    limits: RateLimits
    clock: Callable[[], float] = time.time
    proxies: Proxies = field(default_factory=Proxies)
    denials: Denials = field(default_factory=Denials, init=False)
    verify_forwarded: ForwardedVerifier | None = field(default=None, init=False)

    async def admit(
        self, request: web.BaseRequest, access: Access, action: str, model_id: str | None = None
    ) -> Principal:
        """Authenticate a request, count it against its subject's limit, and check the subject's roles.

        From then on the request has `PRINCIPAL`, and `QUOTA` if the limit is set. Only its header fields are
        read; the ledger names a denial by `action`. `model_id` is the model that the path names, if requests
        to it are forwarded.

        Raises:
            TooManyFailures: `too_many_failures`.
            NoCredentials: `no_credentials`.
            InvalidToken: `invalid_token`.
            MalformedAuthorization: `invalid_request`.
            RateLimited: `rate_limited`.
            Forbidden: `forbidden`; the denial is counted.
        """
        if self.verify_forwarded is not None and FORWARDED in request.headers:
            principal = await self._authenticate_forwarded(request, self.verify_forwarded, model_id)
        else:
            principal = self._authenticate(request)
        request[PRINCIPAL] = principal
        quota = self.limits.count(access, principal.subject)
        if quota is not None:
            request[QUOTA] = quota
        self.check_role(principal, access, action)
        return principal

    def check_role(self, principal: Principal, access: Access, action: str) -> None:
        """Refuse a subject that has none of the roles that a route, or one of its parameters, needs.

        Raises:
            Forbidden: `forbidden`; the denial is counted.
        """
        if not principal.roles & access.value:
            self.denials.count(principal.subject, action)
            raise Forbidden(principal, access)

    def try_credentials(self, request: web.BaseRequest, check: Callable[[], T]) -> T:
        """Check credentials: a token, or the code of a sign-in link.

        Requests without credentials do not count as failures: they guess nothing, and counting them would
        lock out all clients behind the same address.

        Raises:
            TooManyFailures: `too_many_failures`.
            InvalidToken: `invalid_token`, or MalformedAuthorization, as `check` raises it; it counts.
        """
        peer = self.proxies.peer(request)
        self.limits.check_peer(peer)
        try:
            return check()
        except (InvalidToken, MalformedAuthorization):
            self.limits.count_failure(peer)
            raise

    def _authenticate(self, request: web.BaseRequest) -> Principal:
        fields, now = request.headers.getall(hdrs.AUTHORIZATION, []), self.clock()
        if len(fields) == 1 and fields[0][: len(_SCHEME)].lower() == _SCHEME:
            known = self.verifier.recall(fields[0][len(_SCHEME) :].strip(" "), now)
            if known is not None:
                return known
        return self.try_credentials(request, lambda: self.verifier.verify(bearer_token(fields), now))

    async def _authenticate_forwarded(
        self, request: web.BaseRequest, verify: ForwardedVerifier, model_id: str | None
    ) -> Principal:
        """Authenticate a request of another server, whatever clients at its address have tried."""
        try:
            return await verify(request.headers, model_id)
        except (InvalidToken, MalformedAuthorization):
            peer = self.proxies.peer(request)
            self.limits.check_peer(peer)
            self.limits.count_failure(peer)
            raise


def auth_middleware(gate: Gate) -> Middleware:
    """Return the middleware that admits requests.

    Unknown paths and wrong methods need a token of any role, so that they cannot be explored without one.
    """

    @web.middleware
    async def authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = matched_route(request)
        if route is None:
            await gate.admit(request, Access.ANY, NO_ROUTE)
            return await handler(request)
        if route.access is Access.PUBLIC:
            return await handler(request)
        model_id = request.match_info["id"] if route.is_forwarded else None
        principal = await gate.admit(request, route.access, route.name, model_id)
        if route.shows_past and AT in request.query:
            gate.check_role(principal, Access.AUDIT, f"{route.name}?")
        return await handler(request)

    return authorise


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _kid_of(token: str) -> str | None:
    try:
        kid = jwt.get_unverified_header(token).get("kid")
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise InvalidToken(f"the token is not a JWT: {error}") from None
    return kid if isinstance(kid, str) else None


def _check_times(claims: Mapping[str, Any], now: float) -> float:
    """Check `exp`, `nbf` and `iat` (RFC 7519 section 4.1) and return `exp`."""
    times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
    for name, value in times.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_TIME_S:
            raise InvalidToken(f"the token's {name} must be a number of seconds since 1970")
    if times["exp"] <= now:
        raise InvalidToken("the token has expired")
    if max(times.get("nbf", now), times.get("iat", now)) > now + CLOCK_SKEW_S:
        raise InvalidToken("the token is not valid yet")
    return float(times["exp"])


def _find_text(claims: Mapping[str, Any], name: str) -> str | None:
    claim = claims.get(name)
    return claim if isinstance(claim, str) else None


def _find_claim(claims: Mapping[str, Any], path: str) -> object:
    """Return the claim of this name, or at the end of this dotted path, or an empty list."""
    if path in claims:
        return claims[path]
    found: object = claims
    for step in path.split("."):
        if not isinstance(found, Mapping) or step not in found:
            return []
        found = found[step]
    return found
