"""Responses with answers in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import LooseHeaders

from answers.answer import AnswerBody

T = TypeVar("T")


def respond(
    answer: AnswerBody | Sequence[AnswerBody], *, status: int = 200, headers: LooseHeaders | None = None
) -> web.Response:
    """Return a response with an answer."""
    return respond_encoded(msgspec.json.encode(answer), status=status, headers=headers)


def respond_encoded(body: bytes, *, status: int = 200, headers: LooseHeaders | None = None) -> web.Response:
    """Return a response with an answer that is encoded already."""
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")


def show_optional(kept: Any, answer: type[T]) -> T | None:
    """Return what `show` does; None if there is nothing (None or UNSET)."""
    return None if kept is None or kept is msgspec.UNSET else show(kept, answer)


def show(kept: Any, answer: type[T]) -> T:
    """Return what an answer shows of an object of the ledger or the runtime, by the names of its members.

    Raises:
        msgspec.ValidationError: the object lacks a member, or has one of another type.
    """
    return msgspec.convert(kept, answer, from_attributes=True)
