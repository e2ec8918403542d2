"""Requests, answers, the interface of transports, and retries: back-off with jitter, and Retry-After.

No answer is taken as it is: it becomes a struct of `answers` or an exception with a printable message.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import msgspec

from loadledger.address import Address, query
from loadledger.errors import (
    ADVICE,
    CHOOSE_URL,
    BadAnswer,
    Busy,
    ClientProblem,
    NotAllowed,
    NotFound,
    ServerError,
    ServerUnreachable,
    printable,
)
from loadledger.uploads import FileBody

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
MAX_JOINED_BYTES = 2**15
"""Longest request that is copied into one piece: a further system call costs more than such a copy."""
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Bytes of JSON before the binary tensors of a body."""
MAX_LENGTH_DIGITS = 18
"""Digits of a length: no body is longer, and Python refuses to convert 4,300."""
ALIGNMENT_BYTES = 16
"""Alignment of binary tensors in memory: no datatype needs more."""
DETAIL_CHARACTERS = 4096
PROBLEM_BYTES = 2**16
"""A longer problem body is not parsed; the server's own are far smaller."""
LONGEST_RETRY_AFTER_S = 300.0
"""Upper limit of Retry-After: a wrong value must not stop a client for longer."""
RETRY_FOR_S = 10.0
"""Retries after a lost connection end after this; a restart of the server takes less."""
MAX_ATTEMPTS = 10
"""Attempts in a row to fetch a page that the server defers."""
FIRST_BACK_OFF_S = 0.2
LONGEST_BACK_OFF_S = 2.0
"""Back-off between attempts: short, because a refused connection costs nearly nothing."""
_SUCCESS, _REDIRECT = range(200, 300), range(300, 400)
_KINDS: Mapping[int, type[ServerError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    429: Busy,
    502: Busy,
    503: Busy,
    504: Busy,
}
_OF_PROXIES = frozenset({401, 403, 407, 413, 429})
"""Statuses below 500 with which a proxy before loadledger answers in its own words."""
_CODE = re.compile(r"[a-z0-9_]{1,64}")
MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        upload: a file as the body, read while it is sent.
        target: path and query below the server's URL, encoded.
        attachments: binary tensors, sent after the body without being copied.
        repeatable: sending it twice has no further effect.
        patience_s: extra time for an answer that the server was asked to hold back.
        timeout_s: instead of the client's.
        model: the path of the loaded model that it is about: the server that has it may be asked.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    upload: FileBody | None = None
    repeatable: bool = True
    patience_s: float = 0.0
    timeout_s: float | None = None
    attachments: tuple[Buffer, ...] = ()
    model: str | None = None

    @property
    def parts(self) -> tuple[Buffer, ...]:
        """The body and its attachments."""
        return (self.body or b"", *self.attachments)

    @property
    def length(self) -> int:
        """Bytes of all parts together."""
        return sum(map(len, self.parts))

    def limit_s(self, timeout_s: float) -> float:
        """Return the limit of its answer, given the client's timeout."""
        return self.patience_s + (self.timeout_s or timeout_s)


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: Buffer


def body_buffer(headers: Mapping[str, str], length: int) -> memoryview:
    """Return memory for a body; the binary tensors after an inference's JSON are aligned in it."""
    padding = -(parse_length(headers.get(HEADER_LENGTH.lower(), "")) or 0) % ALIGNMENT_BYTES
    return memoryview(bytearray(padding + length))[padding:]


def parse_length(text: str) -> int | None:
    """Return a length in decimal digits; None if the text is no number, or too large."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_LENGTH_DIGITS else None


class ResponseStream(Protocol):
    """A response whose body is read as it arrives.

    Attributes:
        answer: status and headers; with a status other than 200, the body too.
    """

    answer: Answer

    async def read(self) -> bytes:
        """Return the next bytes of the body; b"" is its end."""

    def close(self) -> None:
        """Close the connection."""


class Transport(Protocol):
    """Connections to one server; every failure is a `ClientProblem`."""

    async def send(self, request: Request) -> Answer:
        """Return the whole answer."""

    async def open(self, request: Request) -> ResponseStream:
        """Return the answer as a stream; an answer without success is read whole."""

    async def pause(self, seconds: float) -> None:
        """Sleep."""

    async def call(self, work: Callable[[], T]) -> T:
        """Return the result of a function that may read files for a long time."""


def decode_value(answer: Answer, kind: type[T], address: Address) -> T:
    """Decode the body of an answer.

    Raises:
        ServerError: the server refused.
        BadAnswer: the body has another shape.
    """
    if answer.status not in _SUCCESS:
        raise decode_refusal(answer, address)
    try:
        return _decode_json(answer.body, kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        is_json = isinstance(error, msgspec.ValidationError)
        raise foreign_answer(answer, address, str(error) if is_json else "") from None


def _decode_json(body: Buffer, kind: type[T]) -> T:
    """Decode JSON, which may have NaN, Infinity and -Infinity, as answers of inferences do."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(bytes(body)), kind)


def decode_refusal(answer: Answer, address: Address) -> ClientProblem:
    if answer.status in _REDIRECT:
        return _redirect_problem(answer, address)
    members = _members(answer.body)
    code, detail = members.get("code"), members.get("detail")
    if not isinstance(code, str) or not _CODE.fullmatch(code) or not isinstance(detail, str):
        if answer.status not in _OF_PROXIES and answer.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return foreign_answer(answer, address)
        code, who = f"http_{answer.status}", "a proxy or another program says so, not loadledger"
        detail = f"{who}: does a server run behind {address.url}, and {CHOOSE_URL}"
    instance = members.get("instance")
    kind = _KINDS.get(answer.status, ServerError)
    return kind(
        answer.status,
        code,
        printable(address.hide(detail), DETAIL_CHARACTERS),
        retry_after_s=parse_retry_after(answer.headers),
        instance=printable(address.hide(instance), 200) if isinstance(instance, str) else None,
        advice=ADVICE.get(code, ""),
    )


def problem_code(answer: Answer) -> str | None:
    """Return the code of an answer without success, or None."""
    code = _members(answer.body).get("code")
    return code if isinstance(code, str) else None


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "").strip()
    if not re.fullmatch(r"[0-9]{1,20}", text):
        return None
    return min(float(text), LONGEST_RETRY_AFTER_S)


def _redirect_problem(answer: Answer, address: Address) -> ClientProblem:
    where = printable(address.hide(answer.headers.get("location", "somewhere else")), 200)
    return ServerError(
        answer.status,
        "redirected",
        f"{address.url} redirects to {where}, which is not followed, since the token is for this URL",
        advice="use the server's own URL",
    )


def _members(body: Buffer) -> dict[str, Any]:
    if len(body) > PROBLEM_BYTES:
        return {}
    try:
        members = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return members if isinstance(members, dict) else {}


def foreign_answer(answer: Answer, address: Address, why: str = "") -> BadAnswer:
    """Return the exception for another program's answer, or with `why`, the difference, another release's."""
    what = "loadledger of this release" if why else "loadledger"
    kind = address.hide(answer.headers.get("content-type", "no media type"))
    found = f"status {answer.status}, {printable(kind, 100)}{': ' if why else ''}{printable(why, 200)}"
    return BadAnswer(f"what answers at {address.url} is not {what} ({found}): {CHOOSE_URL}")


@dataclass(frozen=True, slots=True)
class CallContext:
    """State shared by all operations of a client.

    Attributes:
        timeout_s: limit of an answer, unless the request asks the server to hold it back.
        now: a monotonic clock, in seconds.
        chance: random numbers from 0 to 1, for the jitter of back-off.
    """

    address: Address
    timeout_s: float
    transport: Transport
    now: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = lambda: os.urandom(1)[0] / 255


def get_request(path: str, pairs: list[tuple[str, str]] | None = None) -> Request:
    return Request("GET", path + query(pairs or []))


def post_request(
    path: str,
    pairs: list[tuple[str, str]] | None = None,
    *,
    body: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Request:
    """Return a POST request for a job; its idempotency key makes it safe to resend.

    Raises:
        ValueError: the key or the body cannot be sent.
    """
    headers = {"Idempotency-Key": quote_key(os.urandom(16).hex() if key is None else key)}
    request = json_request("POST", path + query(pairs or []), body)
    return replace(request, headers={**headers, **request.headers})


def json_request(method: str, path: str, body: Any, *, repeatable: bool = True) -> Request:
    """Return a request with a body of JSON, or without one if that is None.

    Raises:
        ValueError: the body cannot be sent.
    """
    if body is None:
        return Request(method, path, repeatable=repeatable)
    headers = {"Content-Type": "application/json"}
    return Request(method, path, headers, encode_json(body), repeatable=repeatable)


def quote_key(key: str) -> str:
    """Return a key as a string of a structured field (RFC 9651, section 3.3.3).

    Raises:
        ValueError: the key is empty, too long, or not printable ASCII.
    """
    if not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise ValueError(
            f"an idempotency key has 1 to {MAX_KEY_CHARACTERS} printable ASCII characters, not {key[:40]!r}"
        )
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def encode_json(body: Any) -> bytes:
    """Encode a body as JSON.

    Raises:
        ValueError: the body has a value that JSON cannot represent.
    """
    try:
        return msgspec.json.encode(body)
    except (TypeError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"a value cannot be written as JSON: {error}") from error


async def send_request(context: CallContext, request: Request) -> Answer:
    """Send a request and return its answer; after lost connections, resend a repeatable one for a while.

    The time limit excludes the time for which the server was asked to hold its answer, which may be lost.
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
    """Fetch a value; retry when the server asks for it or is back.

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
    """Whether a problem may be over soon, so that a retry may help.

    A server that never answered is more often a wrong URL than a starting server, so it is not retried. A
    rate limit always is.
    """
    if isinstance(problem, Busy):
        return reached or problem.code == "rate_limited"
    return reached and isinstance(problem, ServerUnreachable)


def back_off_s(problem: ClientProblem | None, failures: int, chance: float) -> float:
    """Return the back-off: exponential, with jitter so that many clients do not return at once.

    Args:
        problem: its Retry-After is the least back-off.
        failures: in a row, counted from 1.
        chance: the jitter, from 0 to 1.
    """
    wanted = min(FIRST_BACK_OFF_S * 2.0 ** min(failures - 1, 10), LONGEST_BACK_OFF_S) * (0.5 + chance / 2)
    if isinstance(problem, Busy) and problem.retry_after_s is not None:
        return max(wanted, problem.retry_after_s)
    return wanted
