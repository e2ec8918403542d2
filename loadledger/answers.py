"""What an answer means: a value, or the exception that says what went wrong. Nothing in it is trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from loadledger.address import Address
from loadledger.exchange import Answer
from loadledger.problems import (
    Archived,
    BadAnswer,
    Busy,
    ClientProblem,
    NotAllowed,
    NotFound,
    ServerError,
    clean,
)

T = TypeVar("T")

DETAIL_CHARACTERS = 4096
PROBLEM_BYTES = 2**16
"""Of the body of a refusal that are looked at; the server's own are far smaller."""
LONGEST_PAUSE_S = 300.0
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
    return min(float(text), LONGEST_PAUSE_S)


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
