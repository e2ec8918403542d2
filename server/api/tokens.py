"""Tokens and sign-in links over HTTP: list, issue and revoke; use a link.

The socket in the data directory (`server.auth.control`) has the same routes, but for the use of a link.
"""

from __future__ import annotations

from dataclasses import asdict

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate

from events.tokens import Token, find_issued
from server.api.schemas import AnswerSchema, PageQuerySchema, about
from server.appkeys import GATE, LOG
from server.auth.access import ROLES, Access
from server.auth.gate import PRINCIPAL
from server.auth.keys import MAX_EXPIRES_S
from server.auth.subjects import subject_refusal
from server.auth.tokens import TOKENS, is_local
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
"""Of a token's id; an identity provider may have others than UUIDs."""

MAX_CODE_CHARACTERS = 128
"""A code of ours has 43."""

MAX_TOKEN_S = 366 * 86_400
"""A year: what a stolen token issued ends some day, even if nobody finds it."""


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


class TokenSchema(AnswerSchema):
    """A token, as the ledger knows it; never the token itself."""

    jti = fields.String()
    subject = fields.String(allow_none=True, **about("Null if an identity provider issued the token."))
    roles = fields.List(fields.String())
    expires_at = fields.String()
    issued_at = fields.String(allow_none=True)
    issued_by = fields.String(allow_none=True)
    via = fields.String(allow_none=True, **about("How it was issued: api, socket, link or serve."))
    issued_with = fields.String(
        allow_none=True, **about("The token that issued it; null on the server's machine.")
    )
    revoked_at = fields.String(allow_none=True)
    revoked_by = fields.String(allow_none=True)


class RevokedTokenSchema(TokenSchema):
    """A revoked token."""

    issued = fields.List(
        fields.String(), **about("The tokens that it issued, and that these issued, which are not revoked.")
    )


class TokenListSchema(AnswerSchema):
    """One page of the tokens, newest first."""

    tokens = fields.List(fields.Nested(TokenSchema))
    as_of = fields.Integer(**about("The position that the answer reflects."))
    next_cursor = fields.Integer(allow_none=True)


class IssuedTokenSchema(AnswerSchema):
    """A new token."""

    token = fields.String(**about("The token itself: only this answer has it."))
    jti = fields.String()
    subject = fields.String()
    roles = fields.List(fields.String())
    expires_at = fields.String()


class SignInLinkSchema(AnswerSchema):
    """A new sign-in link."""

    link_id = fields.String()
    path = fields.String(
        **about("Path and fragment of the console, to add to the server's URL; a fragment is never sent.")
    )
    server_url = fields.String(
        **about("Where the server listens, for browsers on its machine; may be empty.")
    )
    expires_at = fields.String()


@routes.get(
    "/api/v1/tokens",
    access=Access.ADMIN,
    summary="List the tokens that have not expired, newest first",
    description="Tokens of identity providers are not known to the ledger. An expired one stays while "
    "one that came from it has not expired.",
    query=TokensQuerySchema(),
    answers={200: (TokenListSchema(), "One page.")},
)
async def list_tokens(request: web.Request) -> web.Response:
    """Answer with a page of tokens; revoked ones stay until a day after they would have expired."""
    query, state = query_parameters(request), request.app[LOG].state
    before, limit = query["cursor"], query["limit"]
    found = [token for token in state.registers.tokens.values() if before is None or token.position < before]
    found.sort(key=lambda token: token.position, reverse=True)
    page = found[:limit]
    next_cursor = page[-1].position if len(found) > limit else None
    listed = [_token_view(token) for token in page]
    return web.json_response({"tokens": listed, "as_of": state.position, "next_cursor": next_cursor})


def _token_view(token: Token) -> dict[str, object]:
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
    answers={201: (IssuedTokenSchema(), "The token, which is recorded without itself.")},
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
    return web.json_response(asdict(issued), status=201)


@routes.post(
    "/api/v1/tokens/{jti}/revoke",
    access=Access.ADMIN,
    summary="Revoke a token",
    description="It is refused from then on, on this server and after each restart. Repeat it at will.",
    path=TokenPathSchema(),
    body=RevocationBodySchema(),
    answers={200: (RevokedTokenSchema(), "The revoked token.")},
    errors=("unknown_token", "log_unavailable"),
)
async def revoke_token(request: web.Request) -> web.Response:
    """Revoke a token, also one that is revoked already."""
    jti, app = path_parameters(request)["jti"], request.app
    await app[TOKENS].revoke(jti, actor=request[PRINCIPAL].subject, **json_body(request))
    known = app[LOG].state.registers.tokens
    return web.json_response({**_token_view(known[jti]), "issued": find_issued(known, jti)})


@routes.post(
    "/api/v1/sign-in-links",
    access=Access.ADMIN,
    summary="Make a link that signs a browser in",
    description="It works once, within a minute, and signs in with your subject and roles for 12 hours.",
    body=NothingSchema(),
    answers={201: (SignInLinkSchema(), "The link.")},
    errors=("not_supported", "log_unavailable"),
)
async def issue_sign_in_link(request: web.Request) -> web.Response:
    issuer = request.app[TOKENS]
    link = await issuer.issue_link(request[PRINCIPAL])
    return web.json_response({**asdict(link), "server_url": issuer.server_url}, status=201)


@routes.post(
    "/api/v1/sign-in-links/use",
    access=Access.PUBLIC,
    summary="Use a sign-in link",
    description="The console does this. Wrong codes count as failed authentications of the address.",
    body=CodeBodySchema(),
    answers={201: (IssuedTokenSchema(), "A token for the console.")},
    errors=("invalid_token", "too_many_failures", "not_supported", "too_many_tokens", "log_unavailable"),
)
async def use_sign_in_link(request: web.Request) -> web.Response:
    app, code = request.app, json_body(request)["code"]
    link = app[GATE].try_credentials(request, lambda: app[TOKENS].take_link(code))
    issued = await app[TOKENS].use_link(link)
    return web.json_response(asdict(issued), status=201)
