"""Issuing and revoking tokens, and the links that sign a browser in.

A token is signed, then recorded (`TokenIssued`), and only then handed out. Revocations are in the ledger, so
that a restart forgets none. The code of a sign-in link is in memory only, as its hash, and works once.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web

from events.clock import Timestamp, format_timestamp, uuid7
from events.commands import Receipt, Record
from events.log import Log
from events.registercommands import IssueToken, RevokeToken
from events.tokens import is_refused
from events.types import Draft, SignInLinkIssued, TokenIssued
from server.auth.gate import InvalidToken, Principal
from server.auth.keys import sign_token
from server.auth.subjects import LOCAL
from server.config import Config
from server.errors import ServerProblem

LINK_S = 60
"""How long a sign-in link works; people open it at once."""

MAX_LINKS = 64
"""Links at once; a further one ends the oldest. Each is for one person and one minute."""

CODE_BYTES = 32
"""Length of a link's code, too long to be guessed in a minute."""

SESSION_S = 12 * 3_600
"""How long the token of a sign-in link is valid: a working day, as `loadledger token` has it by default."""


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token; only its first caller gets `token`."""

    token: str = field(repr=False)
    jti: str
    subject: str
    roles: tuple[str, ...]
    expires_at: Timestamp


@dataclass(frozen=True, slots=True)
class SignInLink:
    """A new sign-in link: `path` leads to the console, and its fragment has the code."""

    link_id: str
    path: str = field(repr=False)
    expires_at: Timestamp


@dataclass(frozen=True, slots=True)
class _OpenLink:
    link_id: str
    principal: Principal
    until_s: float


class SignInLinks:
    """The unused links, by the hashes of their codes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[bytes, _OpenLink] = {}

    def add(self, link_id: str, principal: Principal) -> str:
        code = secrets.token_urlsafe(CODE_BYTES)
        now_s = self._clock()
        kept = {key: link for key, link in self._open.items() if link.until_s > now_s}
        kept[_hash(code)] = _OpenLink(link_id, principal, now_s + LINK_S)
        self._open = dict(list(kept.items())[-MAX_LINKS:])
        return code

    def take(self, code: str) -> _OpenLink:
        """Return the link with this code, and end the link.

        Raises:
            InvalidToken: `invalid_token`, there is no such link any more.
        """
        link = self._open.pop(_hash(code), None)
        if link is None or link.until_s <= self._clock():
            raise InvalidToken(
                f"this sign-in link is not valid any more: it works once, within {LINK_S} s; "
                "`loadledger console` makes another"
            )
        return link


class TokenIssuer:
    """Issues and revokes tokens, and sign-in links; all of these are recorded.

    Attributes:
        links: the unused sign-in links.
        server_url: the server's address for people on its machine; empty before it listens.
    """

    def __init__(self, config: Config, log: Log) -> None:
        self._config = config
        self._log = log
        self.links = SignInLinks()
        self.server_url = ""

    def is_revoked(self, jti: str) -> bool:
        return is_refused(self._log.state.registers.tokens, jti)

    async def issue(
        self,
        subject: str,
        roles: Collection[str],
        *,
        expires_s: int,
        actor: str,
        via: str,
        link_id: str | None = None,
        issued_with: str | None = None,
    ) -> IssuedToken:
        """Issue a token and record it.

        Args:
            subject: the actor of the bearer's requests.
            roles: the token's roles.
            expires_s: its lifetime.
            actor: the requesting person.
            via: the way of issue, as in `TokenIssued`.
            link_id: the sign-in link that is used for it.
            issued_with: the id of the requesting person's token.

        Raises:
            ServerProblem: `not_supported`, an identity provider issues the tokens.
            KeyProblem: the subject, a role or the time is invalid, or there is no key.
            RequestRefused: `too_many_tokens`; `invalid_token`, the person's token was revoked meanwhile.
            LogUnavailable: `log_unavailable`.
        """
        self._refuse_with_provider()
        config, jti, now_s = self._config, uuid7(), int(time.time())
        sorted_roles = tuple(sorted(set(roles)))
        token = await asyncio.to_thread(
            sign_token,
            config.data,
            subject,
            sorted_roles,
            expires_s=expires_s,
            audience=config.jwt_audience,
            issuer=config.jwt_issuer,
            jti=jti,
            now_s=now_s,
        )
        expires_at = format_timestamp(datetime.fromtimestamp(now_s + expires_s, UTC))
        issued = TokenIssued(jti, subject, sorted_roles, expires_at, via, issued_with)
        await self._log.submit(IssueToken(issued, actor, link_id))
        return IssuedToken(token, jti, subject, sorted_roles, expires_at)

    async def revoke(
        self, jti: str, *, actor: str, expires_s: int | None = None, issued: bool = False
    ) -> Receipt:
        """Revoke a token; `expires_s` is the possible rest of an identity provider's token's lifetime.

        With `issued`, the tokens that it issued are revoked, too.

        Raises:
            RequestRefused: `unknown_token`.
            LogUnavailable: `log_unavailable`.
        """
        expires_at = None if expires_s is None else timestamp_in(expires_s)
        return await self._log.submit(RevokeToken(jti, actor, expires_at, issued))

    async def issue_link(self, principal: Principal) -> SignInLink:
        """Return a link that signs a browser in as this person.

        Raises:
            ServerProblem: `not_supported`, an identity provider issues the tokens.
            LogUnavailable: `log_unavailable`.
        """
        self._refuse_with_provider()
        link_id = uuid7()
        await self._log.submit(Record((Draft(uuid7(), SignInLinkIssued(link_id), principal.subject),)))
        code = self.links.add(link_id, principal)
        return SignInLink(link_id, f"/#sign-in={code}", timestamp_in(LINK_S))

    def take_link(self, code: str) -> _OpenLink:
        """Return the link with this code, and end the link, unless its issuer's token was revoked meanwhile.

        Raises:
            InvalidToken: `invalid_token`.
        """
        link = self.links.take(code)
        jti = link.principal.jti
        if jti is not None and self.is_revoked(jti):
            raise InvalidToken("the token of who asked for this sign-in link was revoked")
        return link

    async def use_link(self, link: _OpenLink) -> IssuedToken:
        """Return a token for the link's issuer, and end the link, even if the token cannot be recorded.

        The token expires no later than the issuer's.

        Raises:
            InvalidToken: `invalid_token`, the issuer's token has expired.
        """
        principal = link.principal
        left_s = math.floor(min(SESSION_S, principal.expires_at - time.time()))
        if left_s < 1:
            raise InvalidToken("the token of who asked for this sign-in link has expired")
        return await self.issue(
            principal.subject,
            sorted(principal.roles),
            expires_s=left_s,
            actor=principal.subject,
            via="link",
            link_id=link.link_id,
            issued_with=principal.jti,
        )

    def _refuse_with_provider(self) -> None:
        if self._config.jwt_keys is not None:
            raise ServerProblem(
                "This server issues no tokens: they come from the identity provider, whose keys it has"
                " (--jwt-keys).",
                code="not_supported",
            )


TOKENS = web.AppKey("tokens", TokenIssuer)


def timestamp_in(seconds: float) -> Timestamp:
    return format_timestamp(datetime.fromtimestamp(time.time() + seconds, UTC))


def is_local(principal: Principal) -> bool:
    """Whether a person is a user of this machine, who needs no token (`server.auth.control`)."""
    return principal.jti is None and principal.subject.startswith(LOCAL)


def _hash(code: str) -> bytes:
    return hashlib.sha256(code.encode("utf-8", "surrogateescape")).digest()
