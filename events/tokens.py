"""The fold of issued and revoked tokens: which tokens are refused.

Tokens of an identity provider are not recorded: their signature suffices. A token leaves the fold some time
after its expiry, unless a token that it issued is still there: so memory grows with the valid tokens and
their issuers, and revoking a token reaches all tokens that came from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds
from events.types import Event, TokenData, TokenIssued, TokenRevoked
from events.values import Credential

MAX_TOKENS = 10_000
"""Limit of valid tokens, beyond which none is issued: some 5 MB, searched in 2 ms."""

KEPT_AFTER_EXPIRY_S = 24 * 3_600
"""How long a token stays after its expiry: a clock set back by less revives no revoked token."""

SWEEP_EVERY = 128
"""Expired tokens are removed when this divides the number of tokens: so few events walk through all."""


class Token(Struct, frozen=True, gc=False):
    """A token, as recorded.

    Attributes:
        id: its `jti`.
        subject: None for a token that the ledger did not issue.
        expires_at: the time from which it is refused in any case.
        position: the position of the first event about it.
        issued_at: None for a token that the ledger did not issue.
        issued_by: the actor of `TokenIssued`.
        via, issued_with: as in `TokenIssued`.
        revoked_at: None for a valid token.
        revoked_by: the actor of `TokenRevoked`.
    """

    id: str
    subject: str | None
    roles: tuple[str, ...]
    expires_at: Timestamp
    position: int
    issued_at: Timestamp | None = None
    issued_by: str | None = None
    via: str | None = None
    revoked_at: Timestamp | None = None
    revoked_by: str | None = None
    issued_with: str | None = None

    @property
    def is_revoked(self) -> bool:
        return self.revoked_at is not None


def evolve_tokens(tokens: dict[str, Token], event: Event, data: TokenData) -> Mapping[str, Token | None]:
    """Fold an event into `tokens`; returns the changed tokens by id, None for removed ones."""
    before = tokens.get(data.jti)
    after = _evolve_token(before, event, data)
    if after is None or after is before:
        return {}
    tokens[data.jti] = after
    changed: dict[str, Token | None] = {data.jti: after}
    if len(tokens) % SWEEP_EVERY == 0:
        for key in _find_forgotten(tokens, event.recorded_at):
            del tokens[key]
            changed[key] = None
    return changed


def _evolve_token(token: Token | None, event: Event, data: TokenData) -> Token | None:
    """Return a token after an event about it. A revocation stays, whatever follows."""
    match data:
        case TokenIssued(jti, subject, roles, expires_at, via, issued_with):
            if token is not None:
                return token
            issued = event.recorded_at, event.actor, via
            return Token(jti, subject, roles, expires_at, event.position, *issued, issued_with=issued_with)
        case TokenRevoked(jti, expires_at):
            if token is None and expires_at is not None:
                token = Token(jti, None, (), expires_at, event.position)
            if token is None or token.is_revoked:
                return token
            return replace(token, revoked_at=event.recorded_at, revoked_by=event.actor)


def count_valid(tokens: Mapping[str, Token], now: Timestamp) -> int:
    """Return the number of tokens that have not expired, including revoked ones, which are kept as well."""
    return sum(token.expires_at > now for token in tokens.values())


def find_issued(tokens: Mapping[str, Token], jti: str) -> list[str]:
    """Return the ids of the unrevoked tokens that a token issued, directly or through others."""
    by_issuer: dict[str | None, list[str]] = {}
    for token in tokens.values():
        by_issuer.setdefault(token.issued_with, []).append(token.id)
    found = {jti: None}
    queue = [jti]
    while queue:
        new = [each for each in by_issuer.get(queue.pop(), ()) if each not in found]
        found.update(dict.fromkeys(new))
        queue += new
    return [each for each in found if each != jti and not tokens[each].is_revoked]


def list_issuers(tokens: Mapping[str, Token], jti: str | None) -> tuple[str, ...]:
    """Return the issuer of a token, the issuer of that token, and so on, as far as the ledger knows."""
    issuers = (token.issued_by for token in _ancestry(tokens, jti))
    return tuple(dict.fromkeys(each for each in issuers if each is not None))


def add_issuers(credential: Credential, tokens: Mapping[str, Token]) -> Credential:
    """Return a credential with the issuers of its token."""
    return replace(credential, issued_by=list_issuers(tokens, credential.jti))


def is_refused(tokens: Mapping[str, Token], jti: str | None) -> bool:
    """Whether a token was revoked; a browser's session ends with the token that made it, too.

    Called for each request, so it walks up by itself: `_ancestry` takes 1 us more (measured).
    """
    passed = set[str]()  # a session may have made another session; forged ids may form a ring
    while jti is not None and jti not in passed and (token := tokens.get(jti)) is not None:
        if token.is_revoked:
            return True
        if token.via != "link":
            return False
        passed.add(jti)
        jti = token.issued_with
    return False


def _ancestry(tokens: Mapping[str, Token], jti: str | None) -> Iterator[Token]:
    """Yield a token, its issuer, and so on; forged ids may form a ring."""
    passed = set[str]()
    while jti is not None and jti not in passed and (token := tokens.get(jti)) is not None:
        yield token
        passed.add(jti)
        jti = token.issued_with


def _find_forgotten(tokens: Mapping[str, Token], now: Timestamp) -> list[str]:
    """Return the ids of the tokens that expired some time ago, like all tokens that came from them."""
    until, kept = add_seconds(now, -KEPT_AFTER_EXPIRY_S), set[str]()
    for jti, token in tokens.items():
        if token.expires_at > until:
            new = takewhile(lambda each: each.id not in kept, _ancestry(tokens, jti))
            kept.update([each.id for each in new])
    return [key for key in tokens if key not in kept]
