"""Retries of requests: back-off with jitter, and Retry-After."""

from __future__ import annotations

from dataclasses import replace

from loadledger.errors import Busy, ClientProblem, ServerUnreachable
from loadledger.requests import Answer, CallContext, Request, T, decode_value

RETRY_FOR_S = 10.0
"""Retries after a lost connection end after this; a restart of the server takes less."""
MAX_ATTEMPTS = 10
"""Attempts in a row to fetch a page that the server defers."""
FIRST_BACK_OFF_S = 0.2
LONGEST_BACK_OFF_S = 2.0
"""Back-off between attempts: a return is noticed soon, and a refused connection costs nearly nothing."""


async def send_request(context: CallContext, request: Request) -> Answer:
    """Send a request and return its answer; resend a repeatable one for a while after lost connections.

    The time for which the server was asked to hold its answer does not count: it may be lost at its end.
    """
    limit_s = request.patience_s + min(RETRY_FOR_S, request.timeout_s or context.timeout_s)
    until, failures, sent = context.now() + limit_s, 0, False
    while True:
        try:
            return await context.transport.send(request)
        except ServerUnreachable as problem:
            sent, failures = sent or problem.sent, failures + 1
            wait_s = back_off_s(problem, failures, context.chance())
            if not (request.repeatable and sent) or context.now() + wait_s > until:
                raise
            await context.transport.pause(wait_s)


async def fetch(context: CallContext, request: Request, kind: type[T]) -> T:
    return decode_value(await send_request(context, request), kind, context.address)


async def fetch_with_retries(context: CallContext, request: Request, kind: type[T], *, reached: bool) -> T:
    """Fetch a value; retry when the server says so or is back.

    A server that never answered before and lets the whole time limit pass is not asked again.

    `reached` says whether the server has answered before.
    """
    once, failures, has_answered = replace(request, repeatable=False), 0, reached
    until = context.now() + (request.timeout_s or context.timeout_s)
    while True:
        try:
            return await fetch(context, once, kind)
        except ClientProblem as problem:
            failures += 1
            reached = reached or getattr(problem, "sent", False)
            is_silent = not has_answered and context.now() >= until
            if is_silent or failures >= MAX_ATTEMPTS or not is_transient(problem, reached=reached):
                raise
            wait_s = back_off_s(problem, failures, context.chance())
        await context.transport.pause(wait_s)


def is_transient(problem: ClientProblem, *, reached: bool) -> bool:
    """Whether a problem is transient, so that a retry may help.

    A server that never answered is more often a wrong URL than one that starts, so that is no reason to
    retry. A rate limit always is.
    """
    if isinstance(problem, Busy):
        return reached or problem.code == "rate_limited"
    return reached and isinstance(problem, ServerUnreachable)


def back_off_s(problem: ClientProblem | None, failures: int, chance: float) -> float:
    """Return the back-off: exponential, with jitter so that many clients do not return at once.

    Args:
        problem: its Retry-After is the least.
        failures: in a row, counted from 1.
        chance: the jitter, from 0 to 1.
    """
    wanted = min(FIRST_BACK_OFF_S * 2.0 ** min(failures - 1, 10), LONGEST_BACK_OFF_S) * (0.5 + chance / 2)
    if isinstance(problem, Busy) and problem.retry_after_s is not None:
        return max(wanted, problem.retry_after_s)
    return wanted
