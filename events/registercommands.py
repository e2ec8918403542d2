"""Commands about tokens, which concern no model, and the decisions on them."""

from __future__ import annotations

from dataclasses import dataclass

from events.clock import Timestamp
from events.commands import Accepted, Command, Decision, DecisionInput, Existing, Refused
from events.tokens import MAX_TOKENS, count_valid, find_issued, is_refused
from events.types import Draft, SignInLinkUsed, TokenIssued, TokenRevoked


@dataclass(frozen=True, slots=True)
class IssueToken(Command):
    """Record a new token, which its caller has signed.

    Attributes:
        issued: what to record.
        link_id: the sign-in link that it is for, whose use is recorded before.
    """

    issued: TokenIssued
    actor: str
    link_id: str | None = None

    def decide(self, at: DecisionInput) -> Decision:
        tokens = at.state.registers.tokens
        if len(tokens) >= MAX_TOKENS and count_valid(tokens, at.now) >= MAX_TOKENS:
            return Refused(
                "too_many_tokens",
                f"{MAX_TOKENS} tokens have not expired yet; let tokens expire sooner, or issue fewer",
            )
        if is_refused(tokens, self.issued.issued_with):
            return Refused("invalid_token", "the token that was to issue another one was revoked meanwhile")
        drafts = [Draft(at.new_id(), self.issued, self.actor)]
        if self.link_id is not None:
            drafts.insert(0, Draft(at.new_id(), SignInLinkUsed(self.link_id), self.actor))
        return Accepted(tuple(drafts))


@dataclass(frozen=True, slots=True)
class RevokeToken(Command):
    """Refuse a token from now on.

    `expires_at` is when it expires at the latest: without it only tokens that the ledger issued are revoked.
    `with_issued` revokes those that it issued, too, and that these issued in turn.
    """

    jti: str
    actor: str
    expires_at: Timestamp | None = None
    with_issued: bool = False

    def decide(self, at: DecisionInput) -> Decision:
        token = at.state.registers.tokens.get(self.jti)
        if token is None and self.expires_at is None:
            return Refused(
                "unknown_token",
                f"the ledger knows no token {self.jti[:64]!r} that may still be valid; for a token of an "
                "identity provider, say how long it is valid at most (`expires_s`, `--expires`)",
            )
        is_revoked = token is not None and token.is_revoked
        expires_at = self.expires_at if token is None else None
        revoked = [] if is_revoked else [TokenRevoked(self.jti, expires_at)]
        if self.with_issued:
            revoked += [TokenRevoked(jti) for jti in find_issued(at.state.registers.tokens, self.jti)]
        if not revoked:
            return Existing(None)
        return Accepted(tuple([Draft(at.new_id(), data, self.actor) for data in revoked]))
