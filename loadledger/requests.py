"""Requests and their answers, and when a request is sent again: what all calls of a client have in common.

What an answer means: a value, or the exception that says what went wrong. Nothing in it is trusted.

A request, its answer, and the transport that carries them.

All that a client does is written once, as coroutines over a `Transport`. The one of `AsyncClient` waits in
its event loop. The one of `Client` blocks, so what is written over it never waits, and needs no event loop.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import msgspec

from loadledger.address import Address, query
from loadledger.problems import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    NotAllowed,
    NotFound,
    ServerError,
    ServerUnreachable,
    clean,
)


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked.

    Attributes:
        target: path and query below the server's URL, encoded.
        repeatable: whether to ask twice does no more than to ask once.
        patience_s: how long the server may take beyond what the client allows every answer.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    repeatable: bool = True
    patience_s: float = 0.0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What it said; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Stream(Protocol):
    """A response whose body is read as it comes.

    Attributes:
        answer: status and headers; the body as well, if the status is not 200 and there is no stream.
    """

    answer: Answer

    async def read(self) -> bytes:
        """Return the next bytes; none is the end."""

    def close(self) -> None:
        """Close the connection."""


class Transport(Protocol):
    """Connections to one server; what goes wrong with one is a `ClientProblem`."""

    async def send(self, request: Request) -> Answer:
        """Return the whole answer."""

    async def open(self, request: Request) -> Stream:
        """Return the answer as a stream."""

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""


T = TypeVar("T")

DETAIL_CHARACTERS = 4096
PROBLEM_BYTES = 2**16
"""Of the body of a refusal that are looked at; the server's own are far smaller."""
LONGEST_RETRY_AFTER_S = 300.0
"""Nobody is sent away for longer than this."""

_SUCCESS, _REDIRECT = range(200, 300), range(300, 400)
_KINDS: Mapping[int, type[ServerError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    410: Archived,
    429: Busy,
    502: Busy,
    503: Busy,
    504: Busy,
}
_ADVICE = {
    "no_credentials": "give a token: `loadledger token` makes one",
    "invalid_token": "get a new one: `loadledger token` makes one",
}
_CODE = re.compile(r"[a-z0-9_]{1,64}")


def value(answer: Answer, kind: type[T], address: Address) -> T:
    """Return what was answered.

    Raises:
        ServerError: it was refused.
        BadAnswer: it is something else.
    """
    if answer.status not in _SUCCESS:
        raise refusal(answer, address)
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadAnswer(_other(address, answer, clean(str(error), 200))) from None


def refusal(answer: Answer, address: Address) -> ClientProblem:
    """Return the exception that an answer other than success stands for."""
    if answer.status in _REDIRECT:
        return _redirected(answer, address)
    members = _members(answer.body)
    code, detail = members.get("code"), members.get("detail")
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        code = f"http_{answer.status}"
    if not isinstance(detail, str) or not detail:
        detail = answer.body[:200].decode(errors="replace") or "it did not say why"
    instance = members.get("instance")
    kind = _KINDS.get(answer.status, ServerError)
    if kind is Archived and not _is_position(members.get("oldest")):
        kind = ServerError
    error = kind(
        answer.status,
        code,
        clean(address.hide(detail), DETAIL_CHARACTERS),
        retry_after_s=retry_after_s(answer.headers),
        instance=clean(address.hide(instance), 200) if isinstance(instance, str) else None,
        advice=_ADVICE.get(code, ""),
    )
    return error.begin_at(members["oldest"]) if isinstance(error, Archived) else error


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return when to come back, if that is said in seconds."""
    text = headers.get("retry-after", "").strip()
    if not re.fullmatch(r"[0-9]{1,20}", text):
        return None
    return min(float(text), LONGEST_RETRY_AFTER_S)


def _redirected(answer: Answer, address: Address) -> ClientProblem:
    where = clean(address.hide(answer.headers.get("location", "somewhere else")), 200)
    return ServerError(
        answer.status,
        "redirected",
        f"{address.url} points to {where}, and a redirect is not followed, since the token is for this URL",
        advice="give the URL that the server really has",
    )


def _members(body: bytes) -> dict[str, Any]:
    if len(body) > PROBLEM_BYTES:
        return {}
    try:
        members = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return members if isinstance(members, dict) else {}


def _is_position(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _other(address: Address, answer: Answer, why: str) -> str:
    media_type = clean(address.hide(answer.headers.get("content-type", "no media type")), 100)
    return f"{address.url} answers something that is not loadledger's ({media_type}: {why}): is this its URL?"


RETRY_FOR_S = 10.0
"""How long a request is sent again whose connection was lost: a restart of the server takes less."""
TRIES = 10
"""In a row, of a page of a list that the server puts off."""
FIRST_PAUSE_S = 0.2
LONGEST_BACKOFF_S = 2.0
"""Between tries to reach a server: its return is noticed soon, and to be refused costs nearly nothing."""
MAX_KEY_CHARACTERS = 255


def _chance() -> float:
    return os.urandom(1)[0] / 255


@dataclass(frozen=True, slots=True)
class Setting:
    """What all calls of a client know.

    Attributes:
        timeout_s: for an answer that is not asked to wait.
        now: a clock that never goes back.
        chance: from 0 to 1.
    """

    address: Address
    timeout_s: float
    transport: Transport
    now: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = _chance


def get(path: str, pairs: list[tuple[str, str]] | None = None) -> Request:
    """Return the request for what is at a path."""
    return Request("GET", path + query(pairs or []))


def post(
    path: str,
    pairs: list[tuple[str, str]] | None = None,
    *,
    body: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Request:
    """Return the request for a job; a key of its own makes it safe to send again.

    Raises:
        ValueError: the key or the body cannot be sent.
    """
    headers = {"Idempotency-Key": quoted(os.urandom(16).hex() if key is None else key)}
    if body is None:
        return Request("POST", path + query(pairs or []), headers)
    headers["Content-Type"] = "application/json"
    return Request("POST", path + query(pairs or []), headers, encoded(body))


def quoted(key: str) -> str:
    """Return a key as the header field has it (RFC 9651, section 3.3.3).

    Raises:
        ValueError: it is none.
    """
    if not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise ValueError(
            f"an idempotency key has 1 to {MAX_KEY_CHARACTERS} printable ASCII characters, not {key[:40]!r}"
        )
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def encoded(body: Any) -> bytes:
    """Return JSON.

    Raises:
        ValueError: there is something in it that JSON has no way to write.
    """
    try:
        return msgspec.json.encode(body)
    except (TypeError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"this cannot be written as JSON: {error}") from error


async def answered(setting: Setting, request: Request) -> Answer:
    """Return the answer; a repeatable request whose connection was lost is sent again for a while.

    What the server was asked to hold it is no part of that: it may be lost at the end of that time, too.
    """
    limit_s = request.patience_s + min(RETRY_FOR_S, request.timeout_s or setting.timeout_s)
    until, failures, sent = setting.now() + limit_s, 0, False
    while True:
        try:
            return await setting.transport.send(request)
        except ServerUnreachable as problem:
            sent, failures = sent or problem.sent, failures + 1
            wait_s = pause_s(problem, failures, setting.chance())
            if not (request.repeatable and sent) or setting.now() + wait_s > until:
                raise
            await setting.transport.pause(wait_s)


async def asked(setting: Setting, request: Request, kind: type[T]) -> T:
    """Return the value that is answered, or raise what went wrong."""
    return value(await answered(setting, request), kind, setting.address)


async def patiently(setting: Setting, request: Request, kind: type[T], *, reached: bool) -> T:
    """Return the value that is answered, coming back when the server says so, or returns.

    One that takes all of the time for an answer, and never answered before, is not asked again.

    Args:
        setting: of the client.
        request: which may be sent twice.
        kind: of the value.
        reached: whether the server has answered before.
    """
    once, failures, has_answered = replace(request, repeatable=False), 0, reached
    until = setting.now() + (request.timeout_s or setting.timeout_s)
    while True:
        try:
            return await asked(setting, once, kind)
        except ClientProblem as problem:
            failures += 1
            reached = reached or getattr(problem, "sent", False)
            is_silent = not has_answered and setting.now() >= until
            if is_silent or failures >= TRIES or not passes(problem, reached=reached):
                raise
            wait_s = pause_s(problem, failures, setting.chance())
        await setting.transport.pause(wait_s)


def passes(problem: ClientProblem, *, reached: bool) -> bool:
    """Whether to try again may help, with a server that had answered before or not.

    A server that never answered is more often a wrong URL than one that starts, so that is told at once.
    What is refused only for coming too often is waited for in any case.
    """
    if isinstance(problem, Busy):
        return reached or problem.code == "rate_limited"
    return reached and isinstance(problem, ServerUnreachable)


def pause_s(problem: ClientProblem | None, failures: int, chance: float) -> float:
    """Return how long to wait: doubling, spread so that many clients do not come back at once.

    Args:
        problem: what went wrong, which may say when to come back.
        failures: in a row, counted from 1.
        chance: from 0 to 1.
    """
    wanted = min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_BACKOFF_S) * (0.5 + chance / 2)
    if isinstance(problem, Busy) and problem.retry_after_s is not None:
        return max(wanted, problem.retry_after_s)
    return wanted
