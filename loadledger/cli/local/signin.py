"""The profile with a token that `serve` writes for its own user, if that has none."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import jwt

from events.errors import LedgerProblem
from events.tokens import Token
from loadledger.profiles import (
    DEFAULT_PROFILE,
    ProfileProblem,
    ServerTarget,
    profile_path,
    read_profile,
    write_profile,
)
from server.appkeys import CONFIG
from server.auth.keys import KeyProblem
from server.auth.subjects import subject_refusal
from server.auth.tokens import TOKENS, issue_recorded_token, timestamp_in
from server.serve import RunningServer

_log = logging.getLogger(__name__)

OWN_PROFILE = "local"
"""The profile for the server of this machine, if the default one is of another server."""

PROFILE_LIFE_S = 30 * 86400
"""Of the token in it: a month, and each start of the server issues a new one."""

KEPT_S = 86400
"""A token in the profile that is valid for longer is kept."""


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A profile that has a token for the server."""

    name: str
    path: Path
    token: str = field(repr=False)

    @property
    def option(self) -> str:
        """What a command needs to use it, with a space before it."""
        return "" if self.name == DEFAULT_PROFILE else f" --profile {self.name}"

    @property
    def hint(self) -> str:
        """What a user has to know, as the end of a sentence."""
        return f"; commands use it with{self.option}" if self.option else ""


async def sign_in_user(server: RunningServer) -> SignedIn | None:
    """Write a profile with an admin's token for the user of the terminal; None if that cannot be.

    A default profile of another server is left as it is, and so is a token that still works.
    """
    if server.app[CONFIG].jwt_keys is not None:
        return None  # an identity provider issues the tokens
    try:
        name = DEFAULT_PROFILE if _is_ours(server, _read_if_there(DEFAULT_PROFILE)) else OWN_PROFILE
        path, kept = profile_path(name, os.environ), _read_if_there(name)
        if kept is not None and kept.token and kept.url == server.url and _works(server, kept.token):
            return SignedIn(name, path, kept.token)
        issued = await issue_recorded_token(server.app, local_subject(), ["admin"], PROFILE_LIFE_S)
        await asyncio.to_thread(write_profile, path, ServerTarget(server.url, issued.token))
    except (ProfileProblem, OSError, LedgerProblem, KeyProblem) as problem:
        _log.warning("no profile with a token was written for commands: %s", problem)
        return None
    return SignedIn(name, path, issued.token)


def local_subject() -> str:
    """Return the subject of this process's user."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = ""
    return name if subject_refusal(name) is None else f"user-{os.getuid()}"


def _read_if_there(name: str) -> ServerTarget | None:
    with suppress(FileNotFoundError):
        return read_profile(profile_path(name, os.environ))
    return None


def _is_ours(server: RunningServer, kept: ServerTarget | None) -> bool:
    """Whether a profile is for this server, or has a token that an earlier start of it wrote."""
    if kept is None or kept.url.rstrip("/") == server.url:
        return True
    known = _find_known(server, kept.token)
    return known is not None and known.via == "serve"


def _works(server: RunningServer, token: str) -> bool:
    """Whether a token is one of this ledger, for at least a day."""
    known = _find_known(server, token)
    return known is not None and not known.is_revoked and known.expires_at > timestamp_in(KEPT_S)


def _find_known(server: RunningServer, token: str | None) -> Token | None:
    """Return what the ledger knows of a token; its signature is not verified here."""
    try:
        claims = jwt.decode(token or "", options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return None
    return server.app[TOKENS].tokens.get(str(claims.get("jti")))
