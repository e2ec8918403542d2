"""The management API: the signed head, which an auditor keeps where the operator cannot reach it."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp_apispec import docs, querystring_schema, response_schema
from marshmallow import fields

from events.basestate import read_base
from events.log import Log
from events.schema import connect_read_only
from events.signing import Base, HeadSigner, SignedHead, Statement
from server.api.schemas import AnswerSchema
from server.appkeys import LOG
from server.ledger.key import open_signer
from server.routes import Access, LimitClass, Route
from server.validation import NothingSchema


class BaseSchema(AnswerSchema):
    """Where the log begins: after this event, which was the last one to be archived."""

    position = fields.Integer(required=True, metadata={"description": "0 as long as nothing was archived."})
    hash = fields.String(required=True, metadata={"description": "In hexadecimal."})


class HeadSchema(AnswerSchema):
    """The last event, signed with the ledger's key; docs/verify-it-yourself.md says what is signed."""

    position = fields.Integer(required=True)
    hash = fields.String(required=True, metadata={"description": "In hexadecimal."})
    recorded_at = fields.String(required=True, allow_none=True)
    base = fields.Nested(BaseSchema, required=True)
    algorithm = fields.String(required=True, metadata={"description": "Ed25519."})
    key_id = fields.String(
        required=True, metadata={"description": "32 digits of the public key's SHA-256, in hexadecimal."}
    )
    public_key = fields.String(required=True, metadata={"description": "DER (RFC 8410), in base64."})
    signature = fields.String(required=True, metadata={"description": "64 bytes, in base64."})


@dataclass(frozen=True, slots=True)
class Prover:
    """What signs heads of this ledger. Its base stays where it is as long as a server runs."""

    signer: HeadSigner
    base: Base

    def head(self, log: Log) -> SignedHead:
        """Sign the head as the writer has it: it moves only when what it stands for is on the disk."""
        head = log.head
        return self.signer(Statement(head.position, head.hash, head.recorded_at, self.base))


PROVER = web.AppKey("prover", Prover)


async def open_prover(data: Path, ledger: Path) -> Prover:
    """Return what signs heads.

    Raises:
        KeyProblem: the ledger's key cannot be used.
    """

    def read() -> Prover:
        with closing(connect_read_only(ledger)) as connection:
            return Prover(open_signer(data), read_base(connection))

    return await asyncio.to_thread(read)


@docs(tags=["ledger"], summary="Show the head of the ledger, signed")
@querystring_schema(NothingSchema())
@response_schema(HeadSchema(), 200, description="As it is now.")
async def show_head(request: web.Request) -> web.Response:
    """Answer with position and hash of the last event: whoever keeps them can prove later what was there."""
    app = request.app
    return web.json_response(app[PROVER].head(app[LOG]).members())


def proof_routes() -> list[Route]:
    """Return the routes of this module."""
    return [Route("GET", "/api/v1/events/head", show_head, Access.AUDIT, LimitClass.READS)]
