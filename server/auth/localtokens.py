"""The tokens of a data directory: through the socket of its running server, or without one in its ledger.

The user of the data directory needs no token, since who may read its keys can sign one.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import pwd
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from events.commands import RevokeToken
from events.errors import DataInUse
from events.log import Log
from events.sqlite.datalock import LEDGER, lock_data, lock_ledger, refuse_replica
from server.auth.issuing import TokenRequest, issue_and_record, revoked_view, timestamp_in, token_view
from server.auth.keys import KeyProblem, ensure_data_dir
from server.auth.subjects import LOCAL, subject_refusal

T = TypeVar("T")

SOCKET = "control.sock"
"""The socket's file in the data directory (`server.auth.control`)."""

ANSWER_S = 10.0
"""For an answer of the socket: each is a few events."""

STARTING_S = 10.0
"""A server holds the lock before it listens; so long a command waits for it."""

PAUSE_S = 0.1
"""Between two attempts to find the server or the lock."""

MAX_ANSWER_BYTES = 16 * 2**20
"""All tokens that a ledger can have are fewer."""

OK = range(200, 300)


class LocalRefusal(KeyProblem):
    """The server, or its data directory, refused; the text says why."""


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over the socket of a data directory."""

    def __init__(self, data: Path) -> None:
        super().__init__("local", timeout=ANSWER_S)
        self._data = data

    def connect(self) -> None:
        """Connect through the directory's descriptor, since an address has 108 bytes at most."""
        folder = os.open(self._data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self.sock.settimeout(ANSWER_S)
            self.sock.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        finally:
            os.close(folder)


def ask_server(
    data: Path, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the answer of the server that runs on a data directory; None if none listens.

    Raises:
        LocalRefusal: the server refused, or did not answer.
        OSError: the directory cannot be opened.
    """
    connection = _LocalConnection(data)
    sent = None if body is None else json.dumps(body).encode()
    try:
        try:
            connection.connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if not data.is_dir():
                raise error from None
            return None
        except PermissionError:
            raise LocalRefusal(f"{data / SOCKET} is for the server's user: run this as that user") from None
        connection.request(method, path, sent, {"Content-Type": "application/json"} if sent else {})
        answer = connection.getresponse()
        members = json.loads(answer.read(MAX_ANSWER_BYTES))
    except (http.client.HTTPException, ValueError, TimeoutError, ConnectionError) as error:
        raise LocalRefusal(f"the server on {data} did not answer: {error!r}") from None
    finally:
        connection.close()
    if answer.status not in OK:
        raise LocalRefusal(f"{members.get('detail')} ({members.get('code')})")
    return dict(members)


def issue_local(data: Path, wanted: TokenRequest) -> str:
    """Return a new token of a data directory, recorded in its ledger.

    A running server signs with its own audience and issuer.

    Raises:
        KeyProblem: the request is invalid, or the server refused it.
        LedgerProblem: the ledger cannot be written.
        OSError: a file cannot be read or written.
    """
    refusal = subject_refusal(wanted.subject)
    if refusal is not None:
        raise KeyProblem(refusal)

    async def append(log: Log) -> str:
        made = await issue_and_record(data, log.submit, wanted, actor=_actor(), via="command")
        return made.token

    body = {"subject": wanted.subject, "roles": sorted(set(wanted.roles)), "expires_s": wanted.expires_s}
    answer = _ask_or_open(data, ("POST", "/api/v1/tokens", body), append)
    return answer if isinstance(answer, str) else str(answer["token"])


def list_local(data: Path) -> list[dict[str, Any]]:
    """Return the tokens that the ledger of a data directory knows, newest first. Raises as `issue_local`."""

    async def read(log: Log) -> dict[str, Any]:
        known = sorted(log.state.tokens.values(), key=lambda token: token.position, reverse=True)
        return {"tokens": [token_view(token) for token in known], "next_cursor": None}

    found: list[dict[str, Any]] = []
    cursor: int | None = None
    while True:
        at = "" if cursor is None else f"&cursor={cursor}"
        page = _ask_or_open(data, ("GET", f"/api/v1/tokens?limit=1000{at}", None), read)
        found += page["tokens"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def revoke_local(
    data: Path, jti: str, expires_s: int | None = None, *, issued: bool = False
) -> dict[str, Any]:
    """Revoke a token of a data directory, and return it. Raises as `issue_local`."""

    async def append(log: Log) -> dict[str, Any]:
        expires_at = None if expires_s is None else timestamp_in(expires_s)
        await log.submit(RevokeToken(jti, _actor(), expires_at, issued))
        return revoked_view(log.state.tokens, jti)

    body = {"issued": issued} if expires_s is None else {"issued": issued, "expires_s": expires_s}
    path = f"/api/v1/tokens/{quote_segment(jti)}/revoke"
    return _ask_or_open(data, ("POST", path, body), append)


def sign_in_link_local(data: Path) -> str:
    """Return a link that signs a browser in to the server on a data directory.

    Raises:
        KeyProblem: no server runs there, or it refused.
    """
    link = ask_server(data, "POST", "/api/v1/sign-in-links", {})
    if link is None or not link["server_url"]:
        raise LocalRefusal(f"no server runs on {data}: start it with `loadledger serve`")
    return f"{link['server_url']}{link['path']}"


def quote_segment(text: str) -> str:
    """Return a text as a part of a path."""
    from urllib.parse import quote  # noqa: PLC0415 - only for tokens that are revoked

    return quote(text, safe="")


def local_actor(user: int) -> str:
    """Return the actor of a user of this machine: by name, or by number if no actor can have the name."""
    try:
        named = f"{LOCAL}{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"{LOCAL}{user}"
    return named if subject_refusal(named, is_own=True) is None else f"{LOCAL}{user}"


def _actor() -> str:
    return local_actor(os.getuid())


def _ask_or_open(
    data: Path,
    question: tuple[str, str, Mapping[str, Any] | None],
    work: Callable[[Log], Awaitable[T]],
) -> T | Any:
    """Ask the running server; without one, work on the ledger under the lock of the data directory.

    A server that starts or stops meanwhile has the lock and does not listen: then both are tried again.
    """
    until_s = time.monotonic() + STARTING_S
    while True:
        answer = ask_server(data, *question)
        if answer is not None:
            return answer
        try:
            return _open_and_work(data, work)
        except DataInUse as error:
            if time.monotonic() > until_s:
                raise LocalRefusal(f"{error}; it does not answer on {data / SOCKET}") from None
        time.sleep(PAUSE_S)


def _open_and_work(data: Path, work: Callable[[Log], Awaitable[T]]) -> T:
    async def run() -> T:
        log = Log(data / LEDGER)
        await log.open()
        try:
            return await work(log)
        finally:
            await log.close()

    _become_owner(data)
    with lock_data(data):
        refuse_replica(data)
        if not (data / LEDGER).exists():  # a node would refuse a ledger that was made for a token
            raise LocalRefusal(f"no server has run on {data} yet: start one, which this then asks")
        ensure_data_dir(data)
        with lock_ledger(data / LEDGER):
            return asyncio.run(run())


def _become_owner(data: Path) -> None:
    """Go on as the owner of the data directory if root runs this: its server must read what is written."""
    owner = data.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        with suppress(PermissionError):  # root in a container that may not change users
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)
