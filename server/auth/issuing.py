"""How is a token issued? It is signed, then recorded in the ledger, and only then handed out.

Commands without a server use this module, too, so it imports no web framework.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from events.clock import Timestamp, format_timestamp, uuid7
from events.commands import Command, IssueToken, Receipt
from events.tokens import Token, TokenIssued, find_issued
from server.auth.keys import issue_token


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a token is to have, as `issue_token` takes it."""

    subject: str
    roles: tuple[str, ...]
    expires_s: int
    audience: str
    issuer: str | None = None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token; only its first caller gets `token`."""

    token: str = field(repr=False)
    jti: str
    subject: str
    roles: tuple[str, ...]
    expires_at: Timestamp

    def members(self) -> dict[str, object]:
        """Return the token as plain values."""
        return {**asdict(self), "roles": list(self.roles)}


async def issue_and_record(
    data: Path,
    submit: Callable[[Command], Awaitable[Receipt]],
    wanted: TokenRequest,
    *,
    actor: str,
    via: str,
    link_id: str | None = None,
    issued_with: str | None = None,
) -> IssuedToken:
    """Sign a token with the newest key of a data directory, and record it in the ledger there.

    Args:
        data: the directory.
        submit: appends to its ledger.
        wanted: what the token is to have.
        actor: who asked for it.
        via: how, as in `TokenIssued`.
        link_id: the sign-in link that is used for it.
        issued_with: the id of the token of who asked for it.

    Raises:
        KeyProblem: the subject, a role or the time is invalid, or there is no key.
        RequestRefused: `too_many_tokens`.
        LogUnavailable: `log_unavailable`.
    """
    jti, roles, now_s = uuid7(), tuple(sorted(set(wanted.roles))), int(time.time())
    sign = partial(
        issue_token,
        expires_s=wanted.expires_s,
        audience=wanted.audience,
        issuer=wanted.issuer,
        jti=jti,
        now_s=now_s,
    )
    token = await asyncio.to_thread(sign, data, wanted.subject, roles)
    expires_at = format_timestamp(datetime.fromtimestamp(now_s + wanted.expires_s, UTC))
    issued = TokenIssued(jti, wanted.subject, roles, expires_at, via, issued_with)
    await submit(IssueToken(issued, actor, link_id))
    return IssuedToken(token, jti, wanted.subject, roles, expires_at)


def timestamp_in(seconds: float) -> Timestamp:
    """Return the time so many seconds from now."""
    return format_timestamp(datetime.fromtimestamp(time.time() + seconds, UTC))


def token_view(token: Token) -> dict[str, object]:
    """Return a token as the API and the command show it."""
    return {
        "jti": token.id,
        "subject": token.subject,
        "roles": list(token.roles),
        "expires_at": token.expires_at,
        "issued_at": token.issued_at,
        "issued_by": token.issued_by,
        "via": token.via,
        "issued_with": token.issued_with,
        "revoked_at": token.revoked_at,
        "revoked_by": token.revoked_by,
    }


def revoked_view(tokens: Mapping[str, Token], jti: str) -> dict[str, object]:
    """Return a revoked token as the API and the command show it, and the unrevoked ids that it issued."""
    return {**token_view(tokens[jti]), "issued": find_issued(tokens, jti)}
