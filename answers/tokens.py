"""Tokens and sign-in links."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AS_OF, AnswerBody, about

ROLES = ("admin", "infer", "audit", "approve", "emergency")
"""The roles of tokens."""


class TokenInfo(AnswerBody, frozen=True, kw_only=True):
    """A token, as the ledger knows it; never the token itself."""

    jti: str
    subject: Annotated[str | None, about("Null if an identity provider issued the token.")]
    roles: list[str]
    expires_at: str
    issued_at: str | None
    issued_by: str | None
    via: Annotated[str | None, about("How it was issued: api, socket, link or serve.")]
    issued_with: Annotated[str | None, about("The token that issued it; null on the server's machine.")]
    revoked_at: str | None
    revoked_by: str | None


class RevokedTokenInfo(TokenInfo, frozen=True, kw_only=True):
    """A revoked token."""

    issued: Annotated[
        list[str], about("The tokens that it issued, and that these issued, which are not revoked.")
    ]


class TokenList(AnswerBody, frozen=True, kw_only=True):
    """One page of the tokens, newest first."""

    tokens: list[TokenInfo]
    as_of: Annotated[int, AS_OF]
    next_cursor: int | None


class IssuedTokenInfo(AnswerBody, frozen=True, kw_only=True):
    """A new token."""

    token: Annotated[str, about("The token itself: only this answer has it.")]
    jti: str
    subject: str
    roles: list[str]
    expires_at: str


class SignInLinkInfo(AnswerBody, frozen=True, kw_only=True):
    """A new sign-in link."""

    link_id: str
    path: Annotated[
        str, about("Path and fragment of the console, to add to the server's URL; a fragment is never sent.")
    ]
    server_url: Annotated[str, about("Where the server listens, for browsers on its machine; may be empty.")]
    expires_at: str
