"""`Idempotency-Key`: who is not sure that a request arrived sends it again, and is answered with its job.

Whether a key was used is decided where the request is accepted; here it is read, and hashed together with
what was asked. Under /v2 the field is ignored: that protocol does not have it.
"""

from __future__ import annotations

import hashlib
import json
import re

from aiohttp import web
from marshmallow import Schema, fields, validate

from events.types import Idempotency
from server.appkeys import PRINCIPAL
from server.routes import matched_route
from server.validation import header_fields, json_body, query_parameters

MAX_KEY_CHARACTERS = 255
"""More than any UUID, ULID or hash has."""

_TIMES = f"{{1,{MAX_KEY_CHARACTERS}}}"
_QUOTED = rf'"(?:[ !#-\[\]-~]|\\["\\]){_TIMES}"'  # RFC 9651, section 3.3.3
# Without quotes nothing that could be a second field, or a parameter, joined to the first on its way.
_BARE = rf"[!#-+\--:<-\[\]-~]{_TIMES}"
_RULE = (
    f"Must be given once: 1 to {MAX_KEY_CHARACTERS} printable ASCII characters in double quotes, where "
    '" and \\ are preceded by \\.'
)


class IdempotencySchema(Schema):
    """The header field of a request that may be sent twice."""

    idempotency_key = fields.String(
        data_key="Idempotency-Key",
        validate=validate.Regexp(rf"(?:{_QUOTED}|{_BARE})\Z", error=_RULE),
        metadata={
            "description": "Any string in double quotes, new for each request and the same when it is sent "
            "again; a UUID, say. For 24 hours the same request of the same subject with the same key is "
            "answered with the job of the first, ended or not, whatever has changed since (only a model, "
            "version or job that is not there any more is 404 all the same); another request with it is "
            "422 `idempotency_mismatch`. A request that is refused, or that changes nothing, does not use "
            "its key up. The ledger keeps a hash of the key, never the key.",
            "example": '"8e03978e-40d5-43dd-bc93-6894a57f9324"',
        },
    )


def idempotency(request: web.Request) -> Idempotency | None:
    """Return the key of a validated request, which is its subject's alone, and what was asked; or None."""
    field = header_fields(request).get("idempotency_key")
    if field is None:
        return None
    return Idempotency(_hash([request[PRINCIPAL].subject, key_in(field)]), _fingerprint(request))


def key_in(field: str) -> str:
    """Return the key that a field of the right form carries; it is the same with and without quotes."""
    return re.sub(r"\\(.)", r"\1", field[1:-1]) if field.startswith('"') else field


def _fingerprint(request: web.Request) -> str:
    """Hash what was asked as it was understood: the order of members and white space do not matter."""
    route = matched_route(request)
    assert route is not None
    path = dict(request.match_info)
    return _hash([route.method, route.path, path, query_parameters(request), json_body(request)])


def _hash(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
