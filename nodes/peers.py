"""Trust among the nodes of a ledger: signed joins, and tokens that say for whom a request is forwarded.

The database's role may append a join, but whose join no key of `<data>/keys` has signed is untrusted: nothing
is placed at it, done by it or sent to it. The nodes share these keys, with an identity provider, too.

What a node forwards has a token of the node's own in place of the client's. It is signed with the node's
`ledger.key`, whose public key its join names, and is good for one node, one model and a minute.

The same key signs what persons say to a node, and its loads under rules. That is good for as long as the
ledger remembers the node, and its join is signed with one of the nodes' keys.
"""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
from aiohttp import hdrs
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from multidict import CIMultiDictProxy

from events.audit.signing import is_signed_by
from events.errors import LogUnavailable
from events.log import Log
from events.state import State
from features.nodes.facts import NodeSignature
from features.nodes.register import Node
from server.auth.access import ROLES
from server.auth.gate import POSITION, InvalidToken, Principal, Verifier, bearer_token
from server.auth.keys import (
    ALGORITHM,
    LEDGER_KEY,
    KeyProblem,
    KeyRing,
    VerificationKey,
    keys_folder,
    list_keys,
    load_private_key,
)

_log = logging.getLogger(__name__)

TOKEN_TYPE = "loadledger-forward+jwt"  # noqa: S105 - no secret
"""`typ` of a node's token: no token of a client has it, and none without it is a node's (RFC 8725, 3.11)."""

CLIENT_ISSUER = "client_iss"
"""The claim with the `iss` of the client's token; `iss` is the node. Missing if that has none."""

TOKEN_S = 60.0
"""Longest validity of a node's token: enough for reuse, useless for a reader of a log."""

MAX_TOKENS = 4096
"""Tokens of each kind in memory, some 4 MB; a forgotten one costs a signature, or its check (0.1 ms)."""

CATCH_UP_S = 1.0
"""For the events that another node knows already: replicas are milliseconds apart."""


_Keys = Mapping[str | None, VerificationKey]


class Peers:
    """The nodes of a ledger, as this one may trust them.

    Args:
        data: the data directory of this node.
        node_id: its name.
        log: of the ledger.
        verifier: knows which tokens of clients were revoked.
        clock: seconds since 1970 by the database's clock, which all nodes have.

    Raises:
        KeyProblem: there is no key to sign with.
    """

    def __init__(
        self, data: Path, node_id: str, log: Log, verifier: Verifier, clock: Callable[[], float]
    ) -> None:
        self._data = data
        self._node_id = node_id
        self._log = log
        self._verifier = verifier
        self._clock = clock
        self._key = load_private_key(data / LEDGER_KEY)
        self._ring = KeyRing(data)
        self._nodes: Mapping[str, Node] = {}
        self._found: _Keys = {}
        self._keys: _Keys = {}
        self._untrusted = frozenset[str]()
        self._warned = set[tuple[str, int]]()
        self._made: dict[tuple[object, ...], tuple[str, float]] = {}
        self._read: dict[str, Mapping[str, Any]] = {}

    def open_signer(self) -> Callable[[bytes], str]:
        """Return the signer of the statement of a join, with the newest of the nodes' keys.

        Raises:
            LogUnavailable: `log_unavailable`, there is none that can be read.
        """
        folder, known = keys_folder(self._data), list_keys(self._data)
        if not known:
            raise LogUnavailable(f"this node cannot join: {folder} has no key")
        try:
            key = load_private_key(folder / f"{known[-1].kid}.pem")
        except KeyProblem as problem:
            raise LogUnavailable(f"this node cannot join: {problem}") from None
        return lambda statement: base64.b64encode(key.sign(statement)).decode()

    def untrusted(self) -> frozenset[str]:
        """Return the present nodes whose joins are not signed with one of the nodes' keys.

        Keys without that of this node's own join are not used: the folder is being replaced, or this node has
        to be restarted. It does not end its workers for that.
        """
        nodes, found = self._log.state.registers.nodes, self._ring.list_keys(time.time())
        if nodes is not self._nodes or found != self._found:
            self._nodes, self._found = nodes, found
            own = nodes.get(self._node_id)
            if own is None or _is_signed(own, found) or not _is_signed(own, self._keys):
                self._keys = found
            present = (node for node in nodes.values() if node.is_present)
            unsigned = {(node.id, node.epoch): node for node in present if not _is_signed(node, self._keys)}
            for node in (unsigned[each] for each in sorted(unsigned.keys() - self._warned)):
                _log.warning(
                    "node %r at %r is not trusted: its join is signed with no key of %s, so it gets no loads"
                    " and no requests. If it is one of yours, copy another node's keys there, and restart it",
                    *(node.id, node.address, keys_folder(self._data)),
                )
            self._warned = set(unsigned)
            self._untrusted = frozenset(node_id for node_id, _ in unsigned)
        return self._untrusted

    def sign(self, statement: bytes) -> NodeSignature:
        """Sign a statement with this node's own key."""
        return NodeSignature(self._node_id, base64.b64encode(self._key.sign(statement)).decode())

    def is_signed(self, statement: bytes, signature: NodeSignature, state: State) -> bool:
        """Whether a node, which may have left since, has signed a statement; it may be called in a thread.

        The nodes' keys are those with which `untrusted` judged last: at each decision.
        """
        node = state.registers.nodes.get(signature.server)
        if node is None or not _is_signed(node, self._keys):
            return False
        return is_signed_by(statement, signature.signature, node.public_key or "")

    def make_token(self, receiver: Node, model_id: str, client: Principal) -> str:
        """Return the token with which this node forwards a client's request about a model to another one."""
        now_s, own = self._clock(), self._log.state.registers.nodes[self._node_id]
        token_of = client.jti, client.issuer, client.expires_at
        what = own.epoch, _name_epoch(receiver), model_id, client, *token_of
        token, until_s = self._made.get(what, ("", 0.0))
        if until_s - now_s > TOKEN_S / 2:
            return token
        until_s = now_s + min(TOKEN_S, client.expires_at - time.time())
        claims = {
            "iss": own.id,
            "epoch": own.epoch,
            "aud": _name_epoch(receiver),
            "model": model_id,
            "sub": client.subject,
            "roles": sorted(client.roles),
            "exp": until_s,
            **({} if client.jti is None else {"jti": client.jti}),
            **({} if client.issuer is None else {CLIENT_ISSUER: client.issuer}),
        }
        token = jwt.encode(claims, self._key, algorithm=ALGORITHM, headers={"typ": TOKEN_TYPE})
        _remember(self._made, what, (token, until_s))
        return token

    async def verify_forwarded(self, headers: CIMultiDictProxy[str], model_id: str | None) -> Principal:
        """Return for whom a request was forwarded, by a node that may have joined a moment ago."""
        token = bearer_token(headers.getall(hdrs.AUTHORIZATION, []))
        with suppress(jwt.PyJWTError, ValueError, RecursionError):
            if token not in self._read and self._find_sender(_peek(token)) is None:
                await self._log.wait_for(read_position(headers), CATCH_UP_S)
        return self.verify(token, model_id)

    def verify(self, token: str, model_id: str | None) -> Principal:
        """Return for whom a request about a model was forwarded to this node.

        Args:
            token: the token of the sending node.
            model_id: the model in the path; None if requests to this path are not forwarded.

        Raises:
            InvalidToken: `invalid_token`.
        """
        known = self._read.get(token)
        claims = self._check_signature(token) if known is None else known
        if (refusal := self._refusal(claims, model_id)) is not None:
            raise InvalidToken(refusal)
        _remember(self._read, token, claims)
        roles, issuer = ROLES.intersection(claims["roles"]), claims.get(CLIENT_ISSUER)
        return Principal(claims["sub"], roles, claims.get("jti"), issuer=issuer)

    def _check_signature(self, token: str) -> Mapping[str, Any]:
        options: jwt.types.Options = {"verify_aud": False, "verify_exp": False}
        try:
            sender = self._find_sender(_peek(token))
            if sender is None or jwt.get_unverified_header(token).get("typ") != TOKEN_TYPE:
                raise InvalidToken("a forwarded request has a token of the present node that sent it")
            return jwt.decode(token, sender.public_key or "", [ALGORITHM], options=options)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken(f"the token of the node that sent this is not valid: {error}") from None

    def _find_sender(self, claims: Mapping[str, Any]) -> Node | None:
        node = self._log.state.registers.nodes.get(str(claims.get("iss")))
        is_there = node is not None and node.is_present and node.id not in self.untrusted()
        return node if is_there and node is not None and node.epoch == claims.get("epoch") else None

    def _refusal(self, claims: Mapping[str, Any], model_id: str | None) -> str | None:
        own = self._log.state.registers.nodes.get(self._node_id)
        if self._find_sender(claims) is None:
            return "no present node has forwarded this request"
        if own is None or claims["aud"] != _name_epoch(own):
            return "the token of the node that sent this is for another node"
        if model_id is None or claims["model"] != model_id:
            return "the token of the node that sent this is for requests about another model"
        if claims["exp"] <= self._clock():
            return "the token of the node that sent this has expired"
        jti = claims.get("jti")
        return "the token was revoked" if jti is not None and self._verifier.is_revoked(jti) else None


def read_position(headers: Mapping[str, str]) -> int:
    """Return the position that a node names; 0 if it does not."""
    text = headers.get(POSITION, "")
    return int(text) if text.isdecimal() and len(text) < 19 else 0  # noqa: PLR2004 - a 64-bit integer


def _is_signed(node: Node, keys: _Keys) -> bool:
    """Whether one of our own keys has signed the join of a node."""
    with suppress(binascii.Error, ValueError):
        signature = base64.b64decode(node.signature or "", validate=True)
        for key in keys.values():
            with suppress(InvalidSignature):
                assert isinstance(key.public, Ed25519PublicKey)  # as all of ours
                key.public.verify(signature, node.statement)
                return True
    return False


def _peek(token: str) -> Mapping[str, Any]:
    """Return the claims of a token, without any verification."""
    return jwt.decode(token, options={"verify_signature": False})


def _name_epoch(node: Node) -> str:
    return f"{node.id}/{node.epoch}"


def _remember(tokens: dict[Any, Any], key: object, value: object) -> None:
    """Add to a dictionary that forgets its oldest entry when it is full."""
    tokens.pop(key, None)
    tokens[key] = value
    if len(tokens) > MAX_TOKENS:
        del tokens[next(iter(tokens))]
