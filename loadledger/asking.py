"""Requests and their answers, and when a request is sent again: what all calls of a client have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from loadledger import answers
from loadledger.address import Address, query
from loadledger.exchange import Answer, Request, Transport
from loadledger.problems import Busy, ClientProblem, ServerUnreachable

T = TypeVar("T")

RETRY_FOR_S = 10.0
"""How long a request is sent again whose connection was lost: a restart of the server takes less."""
TRIES = 10
"""In a row, of a page of a list that the server puts off."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 2.0
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
    return answers.value(await answered(setting, request), kind, setting.address)


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
    wanted = min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S) * (0.5 + chance / 2)
    if isinstance(problem, Busy) and problem.retry_after_s is not None:
        return max(wanted, problem.retry_after_s)
    return wanted
