"""Tokens and sign-in links over HTTP: list, issue and revoke; use a link.

The socket in the data directory (`server.auth.control`) has the same routes, but for the use of a link.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate

from answers.tokens import IssuedTokenInfo, RevokedTokenInfo, SignInLinkInfo, TokenInfo, TokenList
from events.tokens import Token, find_issued
from server.api.schemas import PageQuerySchema, about
from server.appkeys import GATE, LOG
from server.auth.access import ROLES, Access
from server.auth.gate import PRINCIPAL
from server.auth.keys import MAX_EXPIRES_S
from server.auth.subjects import subject_refusal
from server.auth.tokens import TOKENS, is_local
from server.http.answers import respond, show
from server.http.validation import (
    InvalidBody,
    NothingSchema,
    ParameterInteger,
    StrictBoolean,
    StrictInteger,
    json_body,
    path_parameters,
    query_parameters,
)
from server.routing import Routes

routes = Routes(tag="tokens")

MAX_ID_CHARACTERS = 255
"""Length of a token's id; an identity provider may have others than UUIDs."""

MAX_CODE_CHARACTERS = 128
"""Longer than the server's own codes of 43."""

MAX_TOKEN_S = 366 * 86_400
"""A year: tokens issued with a stolen token end some day, even if nobody finds them."""


def _valid_subject(subject: str) -> None:
    refusal = subject_refusal(subject)
    if refusal is not None:
        raise ValidationError(refusal)


class TokensQuerySchema(PageQuerySchema):
    """Page of the tokens."""

    cursor = ParameterInteger(
        load_default=None, validate=validate.Range(min=1), **about("The `next_cursor` of the last page.")
    )


class TokenBodySchema(Schema):
    """A token to issue."""

    subject = fields.String(
        required=True,
        validate=_valid_subject,
        **about("Name of the user or program; the ledger records it.", example="alice"),
    )
    roles = fields.List(
        fields.String(validate=validate.OneOf(sorted(ROLES))), required=True, validate=validate.Length(min=1)
    )
    expires_s = StrictInteger(
        load_default=12 * 3_600, validate=validate.Range(1, MAX_EXPIRES_S), **about("Lifetime in seconds.")
    )


class TokenPathSchema(Schema):
    """The token named by the path."""

    jti = fields.String(
        required=True, validate=validate.Length(1, MAX_ID_CHARACTERS), **about("The token's id (`jti`).")
    )


class RevocationBodySchema(Schema):
    """A revocation."""

    expires_s = StrictInteger(
        validate=validate.Range(1, MAX_EXPIRES_S),
        **about(
            "For a token that this server did not issue: in how many seconds it expires at the latest. The "
            "revocation is kept until then."
        ),
    )
    issued = StrictBoolean(
        load_default=False,
        **about("Whether to revoke the tokens that it issued, too, and those that these issued."),
    )


class CodeBodySchema(Schema):
    """The code of a sign-in link."""

    code = fields.String(required=True, validate=validate.Length(1, MAX_CODE_CHARACTERS))


@routes.get(
    "/api/v1/tokens",
    access=Access.ADMIN,
    summary="List the tokens that have not expired, newest first",
    description="Tokens of identity providers are not known to the ledger. An expired one stays while "
    "one that came from it has not expired.",
    query=TokensQuerySchema(),
    answers={200: (TokenList, "One page.")},
)
async def list_tokens(request: web.Request) -> web.Response:
    """Answer with a page of tokens; revoked ones stay until a day after they would have expired."""
    query, state = query_parameters(request), request.app[LOG].state
    before, limit = query["cursor"], query["limit"]
    found = [token for token in state.registers.tokens.values() if before is None or token.position < before]
    found.sort(key=lambda token: token.position, reverse=True)
    page = found[:limit]
    next_cursor = page[-1].position if len(found) > limit else None
    listed = [TokenInfo(**_members_of(token)) for token in page]
    return respond(TokenList(tokens=listed, as_of=state.position, next_cursor=next_cursor))


def _members_of(token: Token) -> dict[str, Any]:
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


@routes.post(
    "/api/v1/tokens",
    access=Access.ADMIN,
    summary="Issue a token",
    body=TokenBodySchema(),
    answers={201: (IssuedTokenInfo, "The token, which is recorded without itself.")},
    errors=("not_supported", "too_many_tokens", "log_unavailable"),
)
async def issue(request: web.Request) -> web.Response:
    body, principal, app = json_body(request), request[PRINCIPAL], request.app
    via = "socket" if is_local(principal) else "api"
    if via == "api" and body["expires_s"] > MAX_TOKEN_S:
        raise InvalidBody(
            f"body: expires_s: over the API, a token is issued for at most {MAX_TOKEN_S} s; on the server's"
            " machine, `loadledger token issue` has no such limit"
        )
    issued = await app[TOKENS].issue(**body, actor=principal.subject, via=via, issued_with=principal.jti)
    return respond(show(issued, IssuedTokenInfo), status=201)


@routes.post(
    "/api/v1/tokens/{jti}/revoke",
    access=Access.ADMIN,
    summary="Revoke a token",
    description="It is refused from then on, on this server and after each restart. Repeat it at will.",
    path=TokenPathSchema(),
    body=RevocationBodySchema(),
    answers={200: (RevokedTokenInfo, "The revoked token.")},
    errors=("unknown_token", "log_unavailable"),
)
async def revoke_token(request: web.Request) -> web.Response:
    """Revoke a token, even if it is revoked already."""
    jti, app = path_parameters(request)["jti"], request.app
    await app[TOKENS].revoke(jti, actor=request[PRINCIPAL].subject, **json_body(request))
    known = app[LOG].state.registers.tokens
    return respond(RevokedTokenInfo(**_members_of(known[jti]), issued=find_issued(known, jti)))


@routes.post(
    "/api/v1/sign-in-links",
    access=Access.ADMIN,
    summary="Make a link that signs a browser in",
    description="It works once, within a minute, and signs in with your subject and roles for 12 hours.",
    body=NothingSchema(),
    answers={201: (SignInLinkInfo, "The link.")},
    errors=("not_supported", "log_unavailable"),
)
async def issue_sign_in_link(request: web.Request) -> web.Response:
    issuer = request.app[TOKENS]
    link = await issuer.issue_link(request[PRINCIPAL])
    shown = SignInLinkInfo(
        link_id=link.link_id, path=link.path, server_url=issuer.server_url, expires_at=link.expires_at
    )
    return respond(shown, status=201)


@routes.post(
    "/api/v1/sign-in-links/use",
    access=Access.PUBLIC,
    summary="Use a sign-in link",
    description="The console does this. Wrong codes count as failed authentications of the address.",
    body=CodeBodySchema(),
    answers={201: (IssuedTokenInfo, "A token for the console.")},
    errors=("invalid_token", "too_many_failures", "not_supported", "too_many_tokens", "log_unavailable"),
)
async def use_sign_in_link(request: web.Request) -> web.Response:
    app, code = request.app, json_body(request)["code"]
    link = app[GATE].try_credentials(request, lambda: app[TOKENS].take_link(code))
    issued = await app[TOKENS].use_link(link)
    return respond(show(issued, IssuedTokenInfo), status=201)
